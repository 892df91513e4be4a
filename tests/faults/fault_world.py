"""A small world of inputs that are right: a teacher, prompts, recipes, a finished run and its samples."""

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fault_programs import run_program
from safetensors.torch import save_file
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel
from transformers.utils import logging

from megatron_pdmd import pretrain
from megatron_pdmd.conversion.weight_files import write_model
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.models import WanConfig, WanModel, to_hf_state_dict
from megatron_pdmd.parallel import without_cuda

SHAPE = WanConfig(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=1,
    out_channels=1,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=16,
)
PROMPTS = ("a seven moves left", "a one moves up", "a three moves down", "an eight moves right")
PROMPT_LENGTH = 8

OPTIONS = {
    "--prompt-length": PROMPT_LENGTH,
    "--frames": 2,
    "--height": 4,
    "--width": 4,
    "--timestep-shift": 3,
    "--guidance-scale": 2,
    "--fake-updates": 1,
    "--lora-rank": 2,
    "--lora-alpha": 2,
    "--train-iters": "1,1",
    "--micro-batch-size": 2,
    "--global-batch-size": 2,
    "--log-interval": 1,
    "--sample-prompts": 1,
    "--teacher-steps": 2,
}


@dataclass(frozen=True)
class World:
    """A folder with everything that a program may be given. All of it is right.

    Attributes:
        folder: holds `teacher/`, `sharded/` (its weights in several files), `encoded/`, `prompts.txt`, `recipe.yaml`,
            `run/` with its export in `hf/`, and `samples/`.
    """

    folder: Path

    @contextmanager
    def copy(self) -> Iterator["World"]:
        """Another of the same content, to be spoilt."""
        with tempfile.TemporaryDirectory() as parent:
            shutil.copytree(self.folder, Path(parent) / "world")
            yield World(Path(parent) / "world")

    def flags(
        self,
        teacher: str = "teacher",
        prompts: str = "encoded",
        save: str = "new",
        more: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Of a run of two iterations, or with `more` options; relative paths, for programs run in the folder."""
        options = {"--teacher": teacher, "--prompts": prompts, "--save": save} | OPTIONS | (more or {})
        return [str(part) for pair in options.items() for part in pair] + ["--no-tensorboard"]

    def content(self) -> dict[str, bytes | None]:
        """Every file's bytes and every folder, by its path."""
        paths = sorted(self.folder.rglob("*"))
        return {str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None for path in paths}


@functools.cache
def built_world() -> World:
    """The world, made once in this process and removed at its end."""
    folder = Path(_holder().name) / "world"
    folder.mkdir()
    world = World(folder)
    _write_teacher(folder / "teacher", max_shard_size=5_000_000_000)
    _write_teacher(folder / "sharded", max_shard_size=2_000)
    embeddings = torch.randn(len(PROMPTS), PROMPT_LENGTH, SHAPE.text_dim, generator=torch.Generator().manual_seed(0))
    PromptEmbeddings(PROMPTS, (embeddings,), torch.zeros(PROMPT_LENGTH, SHAPE.text_dim)).save(folder / "encoded")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    outcome = run_program(pretrain, world.flags(save="run", more={"--eval-interval": 1, "--eval-samples": 1}), folder)
    assert outcome.code == 0, outcome
    shutil.copyfile(folder / "run" / "config.yaml", folder / "recipe.yaml")
    (folder / "samples").mkdir()
    save_file({"latents": torch.zeros(len(PROMPTS), 1, 2, 4, 4)}, folder / "samples" / "samples.safetensors")
    (folder / "samples" / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return world


@functools.cache
def _holder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def _write_teacher(folder: Path, max_shard_size: int) -> None:
    for seed, name in enumerate(("transformer", "transformer_2"), start=1):
        torch.manual_seed(seed)
        with without_cuda():
            model = WanModel(SHAPE)
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(SHAPE.to_hf()))
        write_model(folder / name, to_hf_state_dict(model).items(), max_shard_size=max_shard_size)
    torch.manual_seed(0)
    text = UMT5Config(vocab_size=384, d_model=SHAPE.text_dim, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    logging.disable_progress_bar()
    UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer(model_max_length=PROMPT_LENGTH).save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.75,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
