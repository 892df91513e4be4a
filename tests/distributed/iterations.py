"""Whole iterations to compare: a run on a small random teacher, and the plain baseline of the same run.

The baseline is tools/plain_iteration.py: diffusers, peft and torch.optim, in fp64 or as plain torch in any dtype.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from megatron_pdmd import pretrain
from megatron_pdmd.arguments import parse_arguments
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.models import WanConfig, WanModel, adapter_state_dict, add_adapter, to_hf_state_dict

# Heads that 2, 4 and 8 ranks divide.
MODEL = WanConfig(num_attention_heads=8, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=10, freq_dim=14,
                  ffn_dim=80, num_layers=1, rope_max_seq_len=32)  # fmt: skip
PROMPTS, PROMPT_LENGTH, BOUNDARY, ITERATIONS = 6, 7, 0.8, 3
EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
LAST_EXPERT = "low_noise"
NUMBERS = ("fake_loss", "fake_grad_norm", "dmd_gradient", "score_gap", "generator_grad_norm")
GENERATORS = {  # an adapter whose B starts at zero has the smaller gradients
    "lora": ["--generator=lora", "--lr=2"],
    "full": ["--generator=full", "--lr=0.1"],
}


@dataclass(frozen=True)
class PlainRun:
    """What the baseline finds.

    Attributes:
        numbers: losses and gradient norms of every iteration, [iterations, 5].
        changes: what training added to the weights of the last phase's generator; of an adapter B, which was zero.
    """

    numbers: torch.Tensor
    changes: dict[str, torch.Tensor]


class Scene:
    """A teacher of two experts, prompts, and a run of both phases on them.

    Args:
        folder: an empty one.
        plain: the module tools/plain_iteration.py.
        fp64_mode: computes in fp64 where a library would not.
        layers: of the teacher's networks.
        latents: channels, frames, rows and columns of a sample.
        samples: of the global batch.
    """

    def __init__(
        self,
        folder: Path,
        plain: ModuleType,
        fp64_mode: Any,
        *,
        layers: int,
        latents: tuple[int, int, int, int],
        samples: int,
    ):
        self.model = replace(MODEL, num_layers=layers)
        self._latents = latents
        self._plain, self._fp64_mode = plain, fp64_mode
        for seed, name in enumerate(EXPERTS.values()):
            self._new_teacher(seed).save_pretrained(folder / name)
        components = {name: ["diffusers", "WanTransformer3DModel"] for name in EXPERTS.values()}
        index = {"_class_name": "WanPipeline", "boundary_ratio": BOUNDARY, **components}
        (folder / "model_index.json").write_text(json.dumps(index))
        generator = torch.Generator().manual_seed(5)
        text = torch.randn(PROMPTS, PROMPT_LENGTH, MODEL.text_dim, generator=generator)
        negative = torch.randn(PROMPT_LENGTH, MODEL.text_dim, generator=generator)
        PromptEmbeddings(tuple("abcdef"), (text,), negative).save(folder / "prompts")
        options = {
            "teacher": folder,
            "prompts": folder / "prompts",
            "prompt-length": PROMPT_LENGTH,
            "frames": latents[1],
            "height": latents[2],
            "width": latents[3],
            "timestep-shift": 3,
            "guidance-scale": "2,3",
            "fake-updates": 2,
            "lora-rank": 4,
            "lora-alpha": 8,
            "fake-lr": 0.002,
            # With Adam's usual eps its steps would be signs of rounding errors.
            "adam-eps": 0.01,
            "clip-grad": 0.5,
            "train-iters": ITERATIONS,
            "global-batch-size": samples,
            "save-interval": 0,
            "log-interval": 1,
            "sample-prompts": 0,
        }
        self.flags = [f"--{name}={value}" for name, value in options.items()] + ["--no-export", "--no-tensorboard"]
        self.run_plainly = functools.cache(self._run_plainly)

    def _run_plainly(self, generator: str, dtype: torch.dtype, exact: bool = False, *more: str) -> PlainRun:
        """The baseline in a dtype, or in fp64 from weights of that dtype."""
        config, _ = parse_arguments([*self.flags, *GENERATORS[generator], *more])
        data = PromptEmbeddings.load(config.data.prompts)

        def load_teacher(expert: str) -> WanTransformer3DModel:
            path = config.model.teacher / EXPERTS[expert]
            model = WanTransformer3DModel.from_pretrained(path, torch_dtype=dtype)
            if not exact:
                return model
            with self._fp64_mode:
                twin = WanTransformer3DModel.from_config(model.config).double()
            twin.load_state_dict(model.state_dict())
            return twin

        adapted = WanModel(self.model)
        add_adapter(adapted, "new", rank=config.method.lora_rank, alpha=1.0, seed=config.training.seed)
        adapter = {
            name.removesuffix(".lora_A.weight"): tensor
            for name, tensor in adapter_state_dict(adapted, "new").items()
            if "lora_A" in name
        }
        prompts = (data.embeddings, data.negative)
        if exact:
            prompts = tuple(part.to(dtype).double() for part in prompts)
        distillation = self._plain.PlainDistillation(
            config, load_teacher, BOUNDARY, prompts, self._latents, adapter, self._fp64_mode if exact else None
        )
        rows = []
        for phase in (1, 2):
            distillation.start_phase(phase)
            rows += [distillation.run_iteration(index) for index in range(ITERATIONS)]
        end = dict(distillation.generators[2].named_parameters())
        if generator == "lora":
            own = ".lora_B.phase_2."
            changes = {name.replace(own, ".lora_B."): p.detach() for name, p in end.items() if own in name}
        else:
            start = dict(load_teacher(LAST_EXPERT).named_parameters())
            changes = {name: (end[name] - p).detach() for name, p in start.items()}
        return PlainRun(numbers(rows), changes)

    def _new_teacher(self, seed: int) -> WanTransformer3DModel:
        torch.manual_seed(seed)
        model = WanTransformer3DModel(**{k: v for k, v in self.model.to_hf().items() if not k.startswith("_")})
        with torch.no_grad():  # norms' weights are ones by default, which would hide mistakes
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model


def numbers(rows: list[dict[str, float]]) -> torch.Tensor:
    """The losses and gradient norms of every iteration, [iterations, 5]."""
    return torch.tensor([[row[name] for name in NUMBERS] for row in rows], dtype=torch.float64)


def logged(run: Path, iterations: int = ITERATIONS) -> list[dict[str, float]]:
    """The entries of a run's log, of so many iterations of both phases, none of whose updates was skipped."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == [1] * iterations + [2] * iterations
    assert rows[-1]["skipped_updates"] == 0
    return rows


def train(arguments: list[str]) -> dict[str, torch.Tensor]:
    """One rank of a run; returns what it added to the last phase's generator, as `PlainRun.changes`."""
    changes = {}

    def keep_weights(plan, topology, networks, trainer):
        delivered = networks.delivered(2)
        if delivered.adapter:
            state = adapter_state_dict(delivered.model, delivered.adapter)
            changes.update({name: tensor for name, tensor in state.items() if "lora_B" in name})
        else:
            start, end = (to_hf_state_dict(model) for model in (networks.teacher[LAST_EXPERT], delivered.model))
            changes.update({name: end[name] - tensor for name, tensor in start.items()})

    pretrain.finish = keep_weights
    assert pretrain.main(arguments) == 0
    return changes
