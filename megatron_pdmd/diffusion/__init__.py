"""Section 2 of the paper: noise schedules, predictions, phases and the sampler, for models given as callables."""

from megatron_pdmd.diffusion.noise_schedule import (
    FlowMatchingSchedule,
    NoiseSchedule,
    TimestepDistribution,
    VariancePreservingSchedule,
    sample_timesteps,
    timestep_cdf,
)
from megatron_pdmd.diffusion.phases import (
    Expert,
    NoiseInterval,
    Phase,
    PhasePlan,
    deployment_boundary,
    expert_at,
    noise_interval,
)
from megatron_pdmd.diffusion.prediction import Prediction, from_flow, to_flow
from megatron_pdmd.diffusion.sampler import (
    FlowOfStep,
    FlowOfTime,
    Move,
    euler_path,
    euler_step,
    make_move,
    moves_of,
    sample,
    sample_along,
)

__all__ = [
    "Expert",
    "FlowMatchingSchedule",
    "FlowOfStep",
    "FlowOfTime",
    "Move",
    "NoiseInterval",
    "NoiseSchedule",
    "Phase",
    "PhasePlan",
    "Prediction",
    "TimestepDistribution",
    "VariancePreservingSchedule",
    "deployment_boundary",
    "euler_path",
    "euler_step",
    "expert_at",
    "from_flow",
    "make_move",
    "moves_of",
    "noise_interval",
    "sample",
    "sample_along",
    "sample_timesteps",
    "timestep_cdf",
    "to_flow",
]
