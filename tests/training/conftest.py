"""A random two-expert Wan pipeline with its text encoder, prompts, and launches of the whole program."""

import functools
import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from megatron_pdmd import pretrain
from megatron_pdmd.conversion.weight_files import write_model
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.models import WanConfig, WanModel, to_hf_state_dict
from megatron_pdmd.parallel import destroy_topology, without_cuda

TINY = WanConfig(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=1,
    out_channels=1,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=1,
    rope_max_seq_len=16,
)
PROMPTS = ("a seven moves left", "a one moves up", "a three moves down", "eight moves right", "a two", "a five")
PROMPT_LENGTH = 8

Launch = Callable[..., int]


def new_model(seed: int) -> WanModel:
    """A tiny network with random weights, on one rank."""
    torch.manual_seed(seed)
    with without_cuda():
        return WanModel(TINY)


@pytest.fixture
def teachers() -> dict[str, WanModel]:
    """The networks of two experts."""
    return {"high_noise": new_model(1), "low_noise": new_model(2)}


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of two experts with boundary 0.75."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny_wan"
    for seed, name in enumerate(("transformer", "transformer_2"), start=1):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(TINY.to_hf()))
        write_model(folder / name, to_hf_state_dict(new_model(seed)).items())
    torch.manual_seed(0)
    text = UMT5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer(model_max_length=PROMPT_LENGTH).save_pretrained(folder / "tokenizer")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (folder / "scheduler").mkdir()
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
    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="session")
def encoded_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of encoded prompts, which a launch reads faster than it could encode them."""
    folder = tmp_path_factory.mktemp("encoded") / "prompts"
    embeddings = torch.randn(len(PROMPTS), PROMPT_LENGTH, 16, generator=torch.Generator().manual_seed(0))
    PromptEmbeddings(PROMPTS, (embeddings,), torch.zeros(PROMPT_LENGTH, 16)).save(folder)
    return folder


@pytest.fixture(scope="session")
def flags(pipeline: Path, encoded_prompts: Path) -> list[str]:
    """A run of six iterations in two phases; later flags win."""
    options = {
        "--teacher": pipeline,
        "--prompts": encoded_prompts,
        "--prompt-length": PROMPT_LENGTH,
        "--frames": 2,
        "--height": 4,
        "--width": 4,
        "--timestep-shift": 3,
        "--guidance-scale": 2,
        "--fake-updates": 2,
        "--lora-rank": 4,
        "--lora-alpha": 4,
        "--lr": 0.01,
        "--fake-lr": 0.01,
        "--train-iters": "3,3",
        "--micro-batch-size": 2,
        "--global-batch-size": 4,
        "--save-interval": 2,
        "--log-interval": 1,
        "--sample-prompts": 2,
        "--teacher-steps": 2,
    }
    return [str(part) for pair in options.items() for part in pair] + ["--no-export", "--no-tensorboard"]


@pytest.fixture(scope="session")
def launch(flags: list[str]) -> Launch:
    """The function ``launch(save, *more_flags, sheets=False)``: the program's exit code; sheets only where asked."""

    def run(save: Path, *more: str, sheets: bool = False) -> int:
        try:
            return pretrain.main([*flags, "--save", str(save), *([] if sheets else ["--sample-prompts", "0"]), *more])
        finally:
            destroy_topology()

    return run


@pytest.fixture(scope="session")
def finished(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of an uninterrupted run with these flags, made once."""

    @functools.cache
    def run(*more: str) -> Path:
        folder = tmp_path_factory.mktemp("finished") / "run"
        assert launch(folder, *more) == 0
        return folder

    return run


@pytest.fixture(scope="session")
def in_child() -> Callable[[Callable[[], None]], int]:
    """The function ``in_child(function)``: calls it in a fork and returns the exit code, or minus the signal."""

    def run(function: Callable[[], None]) -> int:
        gc.collect()  # a dropped process group that the child collected would wait there for the parent's threads
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            try:
                function()
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run
