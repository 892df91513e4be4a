"""Samples from a Hugging Face pipeline folder, teacher or student, with our own models and sampler."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from megatron_pdmd.config import MethodConfig
from megatron_pdmd.conversion.export import read_sampling
from megatron_pdmd.conversion.pipeline_folder import HIGH_NOISE, PipelineFolder
from megatron_pdmd.diffusion.noise_schedule import FlowMatchingSchedule
from megatron_pdmd.diffusion.phases import Expert, PhasePlan, deployment_boundary, expert_at
from megatron_pdmd.diffusion.sampler import sample_along
from megatron_pdmd.distillation.distribution_matching import guided_flow
from megatron_pdmd.models import from_hf

TEACHER_STEPS = 40
Model = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class SamplingPlan:
    """The steps from noise to a sample.

    Attributes:
        times: N + 1 noise levels, from 1 to 0.
        boundary: noise level at and above which the high-noise expert works; None for a single one.
        guidance: scale of classifier-free guidance for low-noise (or single) and high-noise expert; 1 is none.
    """

    times: tuple[float, ...]
    boundary: float | None
    guidance: tuple[float, float]

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The expert of each step."""
        return tuple(expert_at(t, self.boundary) for t in self.times[:-1])

    def guidance_of(self, expert: Expert) -> float:
        """The guidance scale of an expert's steps."""
        return self.guidance[expert == HIGH_NOISE]


def plan_sampling(
    folder: PipelineFolder,
    *,
    num_steps: int | None = None,
    phase_steps: Sequence[int] | None = None,
    timestep_shift: float | None = None,
    guidance_scale: Sequence[float] | None = None,
) -> SamplingPlan:
    """What the caller asks for; the rest is the export's own description, or for a teacher 40 guided steps.

    Args:
        folder: the pipeline.
        num_steps: evenly spaced before the shift.
        phase_steps: how many of them each of two transformers makes; where not given, the folder's boundary decides.
        timestep_shift: where not given, the scheduler's.
        guidance_scale: one number, or low-noise and high-noise expert.

    Raises:
        ValueError: options that do not fit each other or the folder.
    """
    exported = read_sampling(folder.path) or {}
    shift = timestep_shift or exported.get("timestep_shift") or folder.shift
    if shift is None:
        raise ValueError(f"--timestep-shift: {folder.path} does not fix it; give the number the model was trained with")
    steps = num_steps or sum(phase_steps or ()) or sum(map(len, exported.get("steps", ()))) or TEACHER_STEPS
    plan = PhasePlan.build(steps, tuple(phase_steps or (steps,)), FlowMatchingSchedule(shift))
    boundary = folder.boundary_ratio
    if phase_steps:
        if len(phase_steps) != len(folder.experts):
            raise ValueError(
                f"--phase-steps names {len(phase_steps)} phases but {folder.path} has {len(folder.experts)} experts"
            )
        boundary = deployment_boundary(plan)
    own_guidance = (exported["guidance_scale"],) if exported else MethodConfig().guidance_scale
    guidance = tuple(guidance_scale or own_guidance)
    if len(guidance) > 2:
        raise ValueError("--guidance-scale: give one number, or two as low-noise,high-noise")
    return SamplingPlan(plan.times, boundary, (guidance[0], guidance[-1]))


def load_experts(
    folder: PipelineFolder, plan: SamplingPlan, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[Expert, Model]:
    """The networks that the plan uses."""
    needed = dict.fromkeys(plan.experts)
    models = {name: from_hf(folder.path, subfolder=folder.experts[name], dtype=dtype, device=device) for name in needed}
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


@torch.no_grad()
def sample_latents(
    models: Mapping[Expert, Model], plan: SamplingPlan, noise: torch.Tensor, text: Any, negative: Any = None
) -> torch.Tensor:
    """Samples [B, C, F, H, W] in fp32.

    Args:
        models: the network of each expert in the plan.
        plan: the steps.
        noise: standard normal, fp32 [B, C, F, H, W].
        text: what the samples are conditioned on, for example embeddings [B, L, D].
        negative: what guidance leads away from; needed where a scale is not 1.
    """
    schedule = FlowMatchingSchedule()  # the plan's times are already shifted
    x = noise
    for (t, t_next), expert in zip(pairwise(plan.times), plan.experts, strict=True):
        flow = _guided(models[expert], plan.guidance_of(expert), text, negative)
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
