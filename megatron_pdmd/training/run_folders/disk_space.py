"""The disk that a run needs at the least, known before it begins."""

import math

import torch

from megatron_pdmd.config import Config
from megatron_pdmd.conversion.pipeline_folder import PipelineFolder
from megatron_pdmd.diffusion.noise_schedule import NoiseSchedule
from megatron_pdmd.diffusion.phases import PhasePlan
from megatron_pdmd.distillation.step import Iteration
from megatron_pdmd.files.safetensors_files import DIFFUSERS_STEM, read_model_header

_FP32 = 4  # bytes; masters and moments


def least_bytes(config: Config, source: PipelineFolder, plan: PhasePlan, schedule: NoiseSchedule) -> int:
    """Bytes of the largest phase's checkpoint without adapters, and of the export.

    Args:
        config: of the run.
        source: the teacher.
        plan: the phases.
        schedule: alpha_t and sigma_t.
    """
    numbers = {
        expert: sum(math.prod(t.shape) for t in read_model_header(source.path / name, DIFFUSERS_STEM).values())
        for expert, name in source.experts.items()
    }
    method, dtype_bytes = config.method, 2 if config.training.bf16 else _FP32
    trained = _FP32 * (2 if config.optimizer.adam_beta1 == 0 else 3)  # a weight and its moments
    checkpoints, delivered = [], 0
    for phase in plan.phases:
        iteration = Iteration(method, plan, phase, schedule, (), torch.device("cpu"))
        own = numbers[phase.expert]
        fakes = [own] if method.fake_experts == "single" else [numbers[expert] for expert in iteration.experts()]
        size = trained * sum(fakes) + delivered
        if method.generator == "full":
            size += trained * own
            delivered += dtype_bytes * own
        checkpoints.append(size)
    export = sum(dtype_bytes * numbers[phase.expert] for phase in plan.phases) if config.checkpoint.export else 0
    return max(checkpoints) + export
