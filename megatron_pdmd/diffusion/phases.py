"""N sampling steps in K phases: times t_0 > ... > t_K, and the expert and noise interval of each phase (section 2.3).

Everything here is a Python number, known before any tensor exists.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_pdmd.diffusion.noise_schedule import NoiseSchedule

Expert = Literal["single", "high_noise", "low_noise"]
NoiseInterval = Literal["nested", "disjoint", "fixed"]


@dataclass(frozen=True)
class Phase:
    """The training of one expert G_k, which takes p(x_{t_{k-1}}) to p(x_{t_k}).

    Attributes:
        index: k, from 1.
        steps: the times at which the expert is evaluated, falling from t_{k-1}.
        end: s = t_k, where the phase's samples are; 0 in the last phase.
        expert: the expert of the teacher that the phase starts from; "single" if the teacher is one network.
    """

    index: int
    steps: tuple[float, ...]
    end: float
    expert: Expert

    @property
    def start(self) -> float:
        """t_{k-1}, the noise level of the phase's input."""
        return self.steps[0]


@dataclass(frozen=True)
class PhasePlan:
    """All phases of a run, in order.

    Attributes:
        phases: phases 1 to K; each starts where the one before ends.
        boundary: the time at and above which a two-expert teacher uses its high-noise expert; None for one network.
    """

    phases: tuple[Phase, ...]
    boundary: float | None

    @classmethod
    def build(
        cls, num_steps: int, phase_steps: Sequence[int], schedule: NoiseSchedule, boundary: float | None = None
    ) -> "PhasePlan":
        """Splits N steps, evenly spaced before the shift, into phases.

        Args:
            num_steps: N.
            phase_steps: steps of each phase; they sum to N.
            schedule: gives the shift.
            boundary: of a two-expert teacher. A phase belongs to the expert that owns the middle of its (t_k, t_{k-1}).

        Raises:
            ValueError: the steps do not sum to N, the times do not fall, or the boundary is outside (0, 1).
        """
        if num_steps < 1:
            raise ValueError(f"--num-steps is {num_steps}; sampling needs at least 1 step")
        if not phase_steps or min(phase_steps) < 1:
            raise ValueError(f"--phase-steps {_listed(phase_steps)}: give every phase at least 1 step")
        if sum(phase_steps) != num_steps:
            raise ValueError(
                f"--phase-steps {_listed(phase_steps)} sums to {sum(phase_steps)} but --num-steps is {num_steps}; "
                "make them agree"
            )
        if boundary is not None and not 0 < boundary < 1:
            raise ValueError(f"the teacher's boundary is {boundary}; it must lie strictly between 0 and 1")
        evenly = (torch.tensor(left / num_steps, dtype=torch.float64) for left in range(num_steps, -1, -1))
        times = [schedule.shifted(u).item() for u in evenly]
        if any(not later < earlier for earlier, later in itertools.pairwise(times)):
            raise ValueError(
                f"--timestep-shift {schedule.shift} with --num-steps {num_steps} gives times that do not fall: "
                f"{times}; lower one of them"
            )
        ends = list(itertools.accumulate(phase_steps))
        phases = tuple(
            Phase(index, tuple(times[end - count : end]), times[end], expert_at(_middle(times, end, count), boundary))
            for index, (count, end) in enumerate(zip(phase_steps, ends, strict=True), start=1)
        )
        return cls(phases, boundary)

    @property
    def times(self) -> tuple[float, ...]:
        """The N + 1 noise levels of the whole pipeline, from 1 to 0."""
        return (*(t for phase in self.phases for t in phase.steps), self.phases[-1].end)


def expert_at(t: float, boundary: float | None) -> Expert:
    """The teacher's expert that owns noise level t (diffusers' rule: the high-noise one from the boundary upwards)."""
    if boundary is None:
        return "single"
    return "high_noise" if t >= boundary else "low_noise"


def noise_interval(
    phase: Phase, mode: NoiseInterval = "nested", boundary: float | None = None, *, fixed_t: float | None = None
) -> tuple[float, float]:
    """The interval from which a phase draws the diffused time t.

    Args:
        phase: gives s = t_k and t_{k-1}.
        mode: "nested" is the paper's (s, 1); a phase of the high-noise expert leaves out what lies below the boundary,
            so that it needs no other expert of the teacher. "disjoint" is (t_k, t_{k-1}), the ablation of appendix E.2.
            "fixed" is one t.
        boundary: of a two-expert teacher.
        fixed_t: the t of "fixed".

    Returns:
        (low, high) with s <= low <= high <= 1.

    Raises:
        ValueError: "fixed" without a t within (s, 1), or a mode that does not exist.
    """
    if mode == "nested":
        needs_one_expert = phase.expert == "high_noise" and boundary is not None
        return (max(phase.end, boundary) if needs_one_expert else phase.end), 1.0
    if mode == "disjoint":
        return phase.end, phase.start
    if mode == "fixed":
        if fixed_t is None or not phase.end < fixed_t < 1:
            raise ValueError(
                f"--fixed-timestep is {fixed_t}; with --noise-interval fixed, phase {phase.index} needs it strictly "
                f"between {phase.end:.4g} and 1"
            )
        return fixed_t, fixed_t
    raise ValueError(f"--noise-interval {mode} does not exist; choose nested, disjoint or fixed")


def deployment_boundary(plan: PhasePlan) -> float | None:
    """The boundary with which a two-expert pipeline gives every step to the expert that was trained for it.

    diffusers' Wan pipeline uses the first expert where t >= boundary and rounds its timesteps, so the number stays as
    far as it can from the steps on both sides.

    Returns:
        The middle between phase 1's last step and phase 2's first; None if one phase makes all steps.

    Raises:
        ValueError: there are more than two phases, hence more experts than such a pipeline holds.
    """
    if len(plan.phases) == 1:
        return None
    if len(plan.phases) > 2:
        raise ValueError(
            f"{len(plan.phases)} phases make {len(plan.phases)} experts, but a diffusers pipeline holds two; "
            "give --phase-steps one or two numbers to export there"
        )
    above, below = plan.phases[0].steps[-1], plan.phases[1].start
    middle = (above + below) / 2
    assert below < middle < above
    return middle


def _middle(times: Sequence[float], end: int, count: int) -> float:
    return math.fsum((times[end - count], times[end])) / 2


def _listed(phase_steps: Sequence[int]) -> str:
    return ",".join(map(str, phase_steps)) or "(nothing)"
