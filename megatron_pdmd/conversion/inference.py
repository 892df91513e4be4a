"""Samples from a Hugging Face pipeline folder, teacher or student, with our own models and sampler."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_pdmd.config import MethodConfig
from megatron_pdmd.conversion.few_step_sampling import MOST_STEPS, SAMPLING_FILE, FewStepSampling, read_sampling
from megatron_pdmd.conversion.lora_files import read_lora
from megatron_pdmd.conversion.lora_folder import LoraFolder
from megatron_pdmd.conversion.pipeline_folder import HIGH_NOISE, PipelineFolder
from megatron_pdmd.diffusion.noise_schedule import FlowMatchingSchedule
from megatron_pdmd.diffusion.phases import PhasePlan
from megatron_pdmd.diffusion.sampler import sample_along
from megatron_pdmd.distillation.distribution_matching import guided_flow
from megatron_pdmd.models import from_hf
from megatron_pdmd.models.lora import merge_low_rank
from megatron_pdmd.models.wan.config import WanConfig
from megatron_pdmd.models.wan.weights import tensor_shapes

TEACHER_STEPS = 40
Model = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """The steps that one expert makes, one after the other.

    Attributes:
        expert: its name.
        times: noise levels of the steps, falling, and where the last one ends.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    expert: str
    times: tuple[float, ...]
    guidance: float


@dataclass(frozen=True)
class SamplingPlan:
    """The steps from noise to a sample.

    Attributes:
        times: N + 1 noise levels, from 1 to 0.
        experts: the expert of each step; one after the other, none comes twice.
        guidance: scale of classifier-free guidance for low-noise (or single) and high-noise expert; 1 is none.
    """

    times: tuple[float, ...]
    experts: tuple[str, ...]
    guidance: tuple[float, float]

    def guidance_of(self, expert: str) -> float:
        """The guidance scale of an expert's steps."""
        return self.guidance[expert.endswith(HIGH_NOISE)]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The steps by expert."""
        stages, first = [], 0
        for expert, steps in itertools.groupby(self.experts):
            last = first + len(list(steps))
            stages.append(Stage(expert, self.times[first : last + 1], self.guidance_of(expert)))
            first = last
        return tuple(stages)

    @property
    def is_guided(self) -> bool:
        """Whether a step needs the negative prompt."""
        return any(stage.guidance != 1 for stage in self.stages)


def plan_sampling(
    folder: PipelineFolder,
    *,
    lora: LoraFolder | None = None,
    num_steps: int | None = None,
    phase_steps: Sequence[int] | None = None,
    timestep_shift: float | None = None,
    guidance_scale: Sequence[float] | None = None,
) -> SamplingPlan:
    """What the caller asks for; the rest is the export's own description, or for a teacher 40 guided steps.

    Args:
        folder: the pipeline.
        lora: LoRA files on top of it; their description takes the place of the folder's.
        num_steps: evenly spaced before the shift.
        phase_steps: how many of them each expert makes; where not given, the boundary decides.
        timestep_shift: where not given, the scheduler's.
        guidance_scale: one number, or low-noise and high-noise expert.

    Raises:
        ValueError: options that do not fit each other or the folder, or an export whose parts do not.
    """
    exported = description(folder, lora)
    names = tuple(lora.files if lora else folder.experts)
    guidance = tuple(guidance_scale or ((exported.guidance_scale,) if exported else MethodConfig().guidance_scale))
    if len(guidance) > 2 or not all(map(math.isfinite, guidance)):
        raise ValueError("--guidance-scale: give one finite number, or two as low-noise,high-noise")
    guidance = (guidance[0], guidance[-1])
    if exported and not (num_steps or phase_steps or timestep_shift):
        counts = [len(levels) for levels in exported.steps]
        times = (*itertools.chain.from_iterable(exported.steps), 0.0)
        return SamplingPlan(times, _each(names, counts), guidance)
    shift = timestep_shift or (exported.timestep_shift if exported else folder.shift)
    if shift is None:
        raise ValueError(f"--timestep-shift: {folder.path} does not fix it; give the number the model was trained with")
    own_steps = sum(map(len, exported.steps)) if exported else TEACHER_STEPS
    steps = num_steps or sum(phase_steps or ()) or own_steps
    if steps > MOST_STEPS:
        raise ValueError(f"--num-steps {steps}: a model knows {MOST_STEPS} times; give fewer")
    times = PhasePlan.build(steps, tuple(phase_steps or (steps,)), FlowMatchingSchedule(shift)).times
    counts = phase_steps or _steps_of_each(names, times, exported.boundary_ratio if lora else folder.boundary_ratio)
    if len(counts) != len(names):
        raise ValueError(
            f"--phase-steps names {len(counts)} phases but there are {len(names)} experts of {folder.path}"
        )
    return SamplingPlan(times, _each(names, counts), guidance)


def description(folder: PipelineFolder, lora: LoraFolder | None = None) -> FewStepSampling | None:
    """How an export or LoRA files say that they are to be sampled; None for a teacher.

    Raises:
        ValueError: it is damaged, or does not fit the transformers that are there and the boundary between them.
    """
    if lora:
        return lora.sampling
    exported = read_sampling(folder.path)
    if exported:
        path = folder.path / SAMPLING_FILE
        if len(exported.steps) != len(folder.experts):
            raise ValueError(
                f"{path}: steps of {len(exported.steps)} experts, but {folder.path} has {len(folder.experts)}; "
                "export the run again"
            )
        owners = [name for name, levels in zip(folder.experts, exported.steps, strict=True) for _ in levels]
        if owners != [folder.expert_at(t) for levels in exported.steps for t in levels]:
            raise ValueError(
                f"{path}: its steps lie on other sides of boundary_ratio {folder.boundary_ratio}, which "
                "model_index.json gives, than their experts; export the run again"
            )
    return exported


def _steps_of_each(names: Sequence[str], times: Sequence[float], boundary: float | None) -> list[int]:
    """How many steps the boundary gives to each expert."""
    if len(names) == 1:
        return [len(times) - 1]
    if boundary is None:
        raise ValueError(f"--phase-steps: give the steps of each of the {len(names)} experts")
    above = sum(t >= boundary for t in times[:-1])
    return [above, len(times) - 1 - above]


def _each(names: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    return tuple(name for name, count in zip(names, counts, strict=True) for _ in range(count))


def load_expert(
    folder: PipelineFolder,
    name: str,
    *,
    lora: LoraFolder | None = None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Model:
    """A network of the folder, or with `lora` the one that a LoRA file makes of it.

    Raises:
        ValueError: weights or LoRA file are damaged or do not fit.
    """
    if lora is None:
        return from_hf(folder.path, subfolder=folder.experts[name], dtype=dtype, device=device).eval()
    matrices = read_lora_of(folder, name, lora)
    model = from_hf(folder.path, subfolder=expert_subfolder(folder, name, lora), dtype=dtype, device=device).eval()
    merge_low_rank(model, matrices)
    return model


def read_lora_of(folder: PipelineFolder, name: str, lora: LoraFolder) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """An expert's LoRA matrices; see `lora_files.read_lora`.

    Raises:
        ValueError: the file is damaged, or does not fit the transformer that it belongs to.
    """
    config = WanConfig.read(folder.path / expert_subfolder(folder, name, lora) / "config.json")
    return read_lora(lora.path / lora.files[name], tensor_shapes(config))


def expert_subfolder(folder: PipelineFolder, name: str, lora: LoraFolder | None = None) -> str:
    """The folder's part that holds an expert's weights, or those that its LoRA file belongs to.

    Raises:
        ValueError: a LoRA file belongs to a transformer that the folder does not have.
    """
    if lora is None:
        return folder.experts[name]
    base = dict(zip(lora.files, lora.bases, strict=True))[name]
    if base not in folder.experts.values():
        raise ValueError(f"--hf {folder.path}: has no {base}, which {lora.files[name]} belongs to; name its teacher")
    return base


@torch.no_grad()
def sample_stage(
    model: Model, stage: Stage, x: torch.Tensor, text: torch.Tensor, negative: torch.Tensor | None = None
) -> torch.Tensor:
    """Takes latents through one expert's steps.

    Args:
        model: the expert.
        stage: its steps.
        x: fp32 [B, C, F, H, W], where they begin.
        text: what the samples are conditioned on, embeddings [B, L, D].
        negative: what guidance leads away from; needed where the scale is not 1.
    """
    schedule = FlowMatchingSchedule()  # the plan's times are already shifted
    flow = _guided(model, stage.guidance, text, negative)
    for t, t_next in itertools.pairwise(stage.times):
        x = sample_along(flow, x, (t, t_next), schedule)
    return x


def _guided(
    model: Model, scale: float, text: Any, negative: Any
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditional = model(x, t, text).float()
        if scale == 1:
            return conditional
        assert negative is not None, "guidance needs the negative prompt"
        return guided_flow(conditional, model(x, t, negative).float(), scale)

    return flow


def batches(count: int, size: int) -> Iterator[range]:
    """0 to `count` - 1, `size` at a time."""
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
