"""Phases: boundaries, experts, noise intervals and the deployment boundary, against hand-computed schedules."""

import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from megatron_pdmd.diffusion import (
    FlowMatchingSchedule,
    Phase,
    PhasePlan,
    VariancePreservingSchedule,
    deployment_boundary,
    expert_at,
    noise_interval,
)

SHIFT_5 = FlowMatchingSchedule(shift=5.0)  # 1, 15/16, 5/6, 5/8, 0


def test_four_steps_in_two_phases():
    plan = PhasePlan.build(4, (2, 2), SHIFT_5, boundary=0.875)
    first, second = plan.phases
    assert first.steps == pytest.approx((1, 15 / 16))
    assert second.steps == pytest.approx((5 / 6, 5 / 8))
    assert (first.index, first.start, first.end, first.expert) == (1, 1.0, second.start, "high_noise")
    assert (second.index, second.end, second.expert) == (2, 0.0, "low_noise")


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0])
def test_times_are_those_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)])
    times = PhasePlan.build(6, (1, 2, 3), FlowMatchingSchedule(shift)).times
    torch.testing.assert_close(torch.tensor(times, dtype=torch.float32), scheduler.sigmas)


@pytest.mark.parametrize("phase_steps", [(1,), (4,), (1, 3), (2, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("schedule", [SHIFT_5, VariancePreservingSchedule(2.0)])
def test_phases_cover_the_times_without_gap(phase_steps, schedule):
    plan = PhasePlan.build(sum(phase_steps), phase_steps, schedule)
    assert [phase.index for phase in plan.phases] == list(range(1, len(phase_steps) + 1))
    assert all(earlier.end == later.start for earlier, later in itertools.pairwise(plan.phases))
    assert (plan.times[0], plan.times[-1], len(plan.times)) == (1.0, 0.0, sum(phase_steps) + 1)
    assert all(later < earlier for earlier, later in itertools.pairwise(plan.times))
    assert {phase.expert for phase in plan.phases} == {"single"}


def test_the_middle_of_a_phase_decides_its_expert():
    """Shift 1, two phases: (0.5, 1) has its middle at 0.75."""
    for boundary, expert in ((0.7, "high_noise"), (0.75, "high_noise"), (0.8, "low_noise")):
        assert PhasePlan.build(2, (1, 1), FlowMatchingSchedule(), boundary).phases[0].expert == expert


def test_an_expert_owns_its_boundary():
    assert [expert_at(t, 0.875) for t in (0.874, 0.875, 1.0)] == ["low_noise", "high_noise", "high_noise"]
    assert expert_at(0.3, None) == "single"


def test_noise_intervals():
    first, second = PhasePlan.build(4, (2, 2), SHIFT_5, boundary=0.875).phases
    assert noise_interval(first, "nested", 0.875) == (0.875, 1.0)
    assert noise_interval(second, "nested", 0.875) == (0.0, 1.0)
    assert noise_interval(first, "disjoint", 0.875) == (pytest.approx(5 / 6), 1.0)
    assert noise_interval(second, "disjoint", 0.875) == (0.0, pytest.approx(5 / 6))
    assert noise_interval(first, "fixed", 0.875, fixed_t=0.882) == (0.882, 0.882)


def test_a_phase_that_ends_above_the_boundary_keeps_its_own_end():
    first = PhasePlan.build(4, (1, 3), SHIFT_5, boundary=0.5).phases[0]
    assert noise_interval(first, "nested", 0.5) == (pytest.approx(15 / 16), 1.0)


def test_a_single_network_draws_from_the_whole_nested_interval():
    first = PhasePlan.build(4, (2, 2), SHIFT_5).phases[0]
    assert noise_interval(first) == (pytest.approx(5 / 6), 1.0)


@pytest.mark.parametrize(
    ("num_steps", "phase_steps", "schedule", "boundary", "flag"),
    [
        (4, (2, 1), SHIFT_5, None, "--phase-steps 2,1 sums to 3 but --num-steps is 4"),
        (4, (4, 0), SHIFT_5, None, "--phase-steps 4,0"),
        (4, (), SHIFT_5, None, "--phase-steps"),
        (0, (1,), SHIFT_5, None, "--num-steps is 0"),
        (4, (2, 2), FlowMatchingSchedule(1e20), None, "--timestep-shift"),
        (4, (2, 2), SHIFT_5, 1.0, "boundary is 1.0"),
    ],
)
def test_impossible_plans_name_the_flag(num_steps, phase_steps, schedule, boundary, flag):
    with pytest.raises(ValueError, match=flag):
        PhasePlan.build(num_steps, phase_steps, schedule, boundary)


@pytest.mark.parametrize(("mode", "fixed_t"), [("fixed", None), ("fixed", 0.5), ("fixed", 1.0), ("reversed", None)])
def test_impossible_intervals_name_the_flag(mode, fixed_t):
    with pytest.raises(ValueError, match="--noise-interval"):
        noise_interval(Phase(1, (1.0,), 0.625, "single"), mode, fixed_t=fixed_t)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0, 9.0])
def test_deployment_boundary_gives_each_step_to_its_phase(shift):
    """By diffusers' rule, also after its timesteps were truncated to thousandths."""
    plan = PhasePlan.build(4, (2, 2), FlowMatchingSchedule(shift), boundary=0.875)
    boundary = deployment_boundary(plan)
    for phase, expert in zip(plan.phases, ("high_noise", "low_noise"), strict=True):
        for t in phase.steps:
            assert expert_at(t, boundary) == expert_at(int(1000 * t) / 1000, boundary) == expert


def test_deployment_boundary_of_one_and_of_three_phases():
    assert deployment_boundary(PhasePlan.build(4, (4,), SHIFT_5)) is None
    with pytest.raises(ValueError, match="--phase-steps"):
        deployment_boundary(PhasePlan.build(3, (1, 1, 1), SHIFT_5))
