"""The sampler against exact flows, the exact probability-flow ODE, and diffusers' own Euler and DDIM steps."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from megatron_pdmd.diffusion import (
    FlowMatchingSchedule,
    PhasePlan,
    VariancePreservingSchedule,
    euler_path,
    euler_step,
    moves_of,
    sample,
    sample_along,
    to_flow,
)

SCHEDULES = [FlowMatchingSchedule(3.0), VariancePreservingSchedule(3.0)]
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
MEAN, DEVIATION = 0.7, 0.4


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def gaussian_flow(schedule, x, t):
    """The exact flow for x0 ~ N(MEAN, DEVIATION^2), by conditioning jointly Gaussian x0 and x_t."""
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    x0 = MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN)
    return to_flow(x0, x, t, schedule, "x0")


@by_schedule
@pytest.mark.parametrize("phase_steps", [(1,), (4,), (2, 2), (1, 2, 1)])
def test_a_point_mass_is_reached_exactly_and_on_the_way_by_any_steps(schedule, phase_steps):
    point, eps = noise(2, 3, 4), noise(2, 3, 4).flip(0)
    plan = PhasePlan.build(sum(phase_steps), phase_steps, schedule)
    for end, phase in enumerate(plan.phases, start=1):
        x = sample(lambda x, t, phase: eps - point, eps, plan.phases[:end], schedule)
        t = torch.full((2,), phase.end, dtype=torch.float64)
        alpha, sigma = schedule.alpha(t).view(-1, 1, 1), schedule.sigma(t).view(-1, 1, 1)
        torch.testing.assert_close(x, alpha * point + sigma * eps)


@by_schedule
def test_gaussian_paths_converge_to_the_probability_flow_at_first_order(schedule):
    """The ODE carries a Gaussian by quantiles: (x_t - mean_t) / deviation_t is constant along a path."""
    x, end = noise(64, 1), torch.tensor(0.25, dtype=torch.float64)
    deviation = ((schedule.alpha(end) * DEVIATION) ** 2 + schedule.sigma(end) ** 2).sqrt()
    exact = schedule.alpha(end) * MEAN + deviation * x
    errors = []
    for steps in (32, 64, 128):
        times = torch.linspace(1, end, steps + 1, dtype=torch.float64).tolist()
        path = sample_along(lambda x, t: gaussian_flow(schedule, x, t), x, times, schedule)
        errors.append((path - exact).norm().item())
    ratios = [errors[0] / errors[1], errors[1] / errors[2]]
    assert abs(ratios[1] - 2) < abs(ratios[0] - 2) < 0.2


def test_steps_are_those_of_diffusers_euler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    schedule = FlowMatchingSchedule(5.0)
    plan = PhasePlan.build(4, (2, 2), schedule)
    x, expected = noise(2, 3, 4, dtype=torch.float32), noise(2, 3, 4, dtype=torch.float32)
    x = sample(lambda x, t, phase: torch.tanh(x) * t.view(-1, 1, 1), x, plan.phases, schedule)
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        expected = scheduler.step(torch.tanh(expected) * sigma, timestep, expected).prev_sample
    torch.testing.assert_close(x, expected)


def test_a_variance_preserving_step_is_diffusers_ddim():
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # its roots in fp32 would be off by 1e-7
    scheduler.set_timesteps(10)
    steps, stride = scheduler.timesteps[:-1], scheduler.timesteps[0] - scheduler.timesteps[1]
    schedule = VariancePreservingSchedule()
    x, eps = noise(1, 6), noise(1, 6).flip(1)
    for step in steps:
        alphas = scheduler.alphas_cumprod[torch.stack([step, step - stride])]
        t, t_next = torch.acos(alphas.sqrt())[:, None] * (2 / torch.pi)
        flow = to_flow(eps, x, t, schedule, "eps")
        expected = scheduler.step(eps, step, x).prev_sample
        torch.testing.assert_close(euler_step(x, flow, t, t_next, schedule), expected, check_dtype=False)


def test_latents_keep_their_dtype_whatever_the_flow():
    x, t = noise(2, 3, dtype=torch.float32), torch.tensor([1.0, 0.5])
    flow = noise(2, 3).to(torch.bfloat16)
    stepped = euler_step(x, flow, t, t / 2, FlowMatchingSchedule())
    torch.testing.assert_close(stepped, x - (t / 2)[:, None] * flow.float())
    with pytest.raises(AssertionError, match="16 bits"):
        euler_step(x.bfloat16(), flow, t, t / 2, FlowMatchingSchedule())


def test_truncation_jumps_to_the_end_of_the_phase():
    plan = PhasePlan.build(5, (2, 3), FlowMatchingSchedule(5.0))
    first, second = plan.phases
    whole = moves_of(plan.phases)
    assert [(move.t, move.t_next) for move in whole] == list(zip(plan.times[:-1], plan.times[1:], strict=True))
    assert moves_of(plan.phases, truncate_at=3) == whole
    assert [(move.t, move.t_next) for move in moves_of([first], truncate_at=1)] == [(1.0, first.end)]
    truncated = moves_of(plan.phases, truncate_at=2)
    assert truncated[:3] == whole[:3]
    assert (truncated[3].t, truncated[3].t_next, len(truncated)) == (second.steps[1], 0.0, 4)


class Recorder(nn.Module):
    """A flow whose every evaluation has its own parameter, so that gradients tell which evaluations were recorded."""

    def __init__(self, evaluations: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((evaluations,), 0.3, dtype=torch.float64))
        self.calls: list[tuple[int, float]] = []

    def forward(self, x, t, phase):
        self.calls.append((phase.index, t[0].item()))
        return self.weights[len(self.calls) - 1] * x


@pytest.mark.parametrize(
    ("truncate_at", "recorded"), [(1, [0, 0, 1, 0]), (2, [0, 0, 0, 1]), (None, [0, 0, 1, 1])], ids=str
)
def test_gradients_reach_the_evaluations_they_should(truncate_at, recorded):
    plan, flow = PhasePlan.build(4, (2, 2), FlowMatchingSchedule(3.0)), Recorder(4)
    sample(flow, noise(2, 3), plan.phases, FlowMatchingSchedule(3.0), truncate_at=truncate_at).sum().backward()
    assert (flow.weights.grad != 0).tolist() == [bool(flag) for flag in recorded]
    evaluations = 4 if truncate_at is None else 2 + truncate_at
    assert flow.calls == list(zip((1, 1, 2, 2), plan.times, strict=False))[:evaluations]


def test_sampling_without_gradients_records_nothing():
    plan, flow = PhasePlan.build(2, (2,), FlowMatchingSchedule()), Recorder(2)
    with torch.no_grad():
        assert not sample(flow, noise(2, 3), plan.phases, FlowMatchingSchedule()).requires_grad


def test_a_path_passes_through_every_time_and_ends_in_its_sample():
    schedule, x, times = FlowMatchingSchedule(), noise(2, 3), [1.0, 0.6, 0.1]
    path = list(euler_path(lambda x, t: torch.sin(x), x, times, schedule))
    assert len(path) == 2
    torch.testing.assert_close(path[0], x - 0.4 * torch.sin(x))
    assert torch.equal(path[-1], sample_along(lambda x, t: torch.sin(x), x, times, schedule))
