"""Schedules against diffusers, 50-digit arithmetic and autograd; T(t; low, high) against its closed-form quantiles."""

from statistics import NormalDist

import mpmath
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch._subclasses import FakeTensorMode

from megatron_pdmd.diffusion import (
    FlowMatchingSchedule,
    NoiseSchedule,
    VariancePreservingSchedule,
    sample_timesteps,
    timestep_cdf,
)

SCHEDULES = [FlowMatchingSchedule(), VariancePreservingSchedule()]
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)


def exact_alpha_sigma(schedule: NoiseSchedule, t: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
    if isinstance(schedule, FlowMatchingSchedule):
        return 1 - t, t
    return mpmath.cos(mpmath.pi * t / 2), mpmath.sin(mpmath.pi * t / 2)


@by_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transition_keeps_its_precision_next_to_s(schedule, dtype):
    """Eq. 2 in 50 digits, down to neighbouring floats, where the difference of squares as written loses all digits."""
    eps = torch.finfo(dtype).eps
    s = torch.tensor([0.01, 0.1, 0.5, 0.75, 0.9375], dtype=dtype)
    for distance in (0.05, 1e-3, 1e-5, 0.0):
        t = torch.maximum(s + distance, torch.nextafter(s, torch.ones_like(s)))
        alpha_ts, sigma_ts = schedule.transition(s, t)
        assert alpha_ts.dtype == sigma_ts.dtype == dtype
        with mpmath.workdps(50):
            for i in range(len(s)):
                alpha_s, sigma_s = exact_alpha_sigma(schedule, mpmath.mpf(s[i].item()))
                alpha_t, sigma_t = exact_alpha_sigma(schedule, mpmath.mpf(t[i].item()))
                exact = mpmath.sqrt(sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2)
                assert abs(sigma_ts[i].item() / exact - 1) < 8 * eps
                assert abs(alpha_ts[i].item() / (alpha_t / alpha_s) - 1) < 8 * eps


@by_schedule
def test_transitions_compose(schedule):
    r, s, t = (torch.tensor([time], dtype=torch.float64) for time in (0.2, 0.5, 0.9))
    (alpha_sr, sigma_sr), (alpha_ts, sigma_ts) = schedule.transition(r, s), schedule.transition(s, t)
    alpha_tr, sigma_tr = schedule.transition(r, t)
    torch.testing.assert_close(alpha_ts * alpha_sr, alpha_tr)
    torch.testing.assert_close((alpha_ts * sigma_sr).square() + sigma_ts.square(), sigma_tr.square())


@by_schedule
def test_transition_from_data_is_alpha_and_sigma_and_to_itself_nothing(schedule):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    alpha, sigma = schedule.transition(torch.zeros_like(t), t)
    torch.testing.assert_close((alpha, sigma), (schedule.alpha(t), schedule.sigma(t)))
    alpha, sigma = schedule.transition(t[:-1], t[:-1])
    assert torch.equal(alpha, torch.ones(10, dtype=torch.float64))
    assert torch.equal(sigma, torch.zeros(10, dtype=torch.float64))


@by_schedule
def test_derivatives_are_autograds(schedule):
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    for function, derivative in (
        (schedule.alpha, schedule.alpha_derivative),
        (schedule.sigma, schedule.sigma_derivative),
    ):
        (expected,) = torch.autograd.grad(function(t).sum(), t)
        torch.testing.assert_close(derivative(t), expected)


@by_schedule
def test_snr_falls_from_infinity_to_exactly_zero(schedule):
    snr = schedule.snr(torch.linspace(0, 1, 101))
    assert snr[0] == torch.inf
    assert snr[-1] == 0
    assert (snr.diff() < 0).all()


def test_shifted_times_are_those_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    times = FlowMatchingSchedule(shift=5.0).shifted(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    torch.testing.assert_close(times, scheduler.sigmas)


@pytest.mark.parametrize("kind", [FlowMatchingSchedule, VariancePreservingSchedule])
def test_shift_multiplies_the_noise_to_signal_ratio_and_is_undone(kind):
    schedule, u = kind(shift=3.0), torch.linspace(0, 1, 21, dtype=torch.float64)
    t = schedule.shifted(u)
    torch.testing.assert_close(schedule.unshifted(t), u)
    inside = slice(1, -1)
    torch.testing.assert_close(schedule.snr(t)[inside].rsqrt(), 3 * schedule.snr(u)[inside].rsqrt())


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match="--timestep-shift"):
        FlowMatchingSchedule(shift=shift)


@by_schedule
def test_diffuse_is_the_transition_applied(schedule):
    x_s, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s, t = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.5, 0.9, 1.0]).double()
    alpha, sigma = schedule.transition(s, t)
    expected = torch.stack([alpha[i] * x_s[i] + sigma[i] * eps[i] for i in range(3)])
    torch.testing.assert_close(schedule.diffuse(x_s, eps, s, t), expected)


def truncated_cdf(time: float, low: float, high: float, distribution: str, mean: float, std: float) -> float:
    """The distribution function of T truncated to (low, high), by the standard library."""
    if distribution == "uniform":
        return (time - low) / (high - low)

    def cdf(x: float) -> float:
        return NormalDist(mean, std).cdf(float(mpmath.log(x / (1 - x)))) if 0 < x < 1 else float(x >= 1)

    return (cdf(time) - cdf(low)) / (cdf(high) - cdf(low))


@pytest.mark.parametrize("kind", [FlowMatchingSchedule, VariancePreservingSchedule])
@pytest.mark.parametrize(("distribution", "mean", "std"), [("uniform", 0.0, 1.0), ("logit_normal", -0.4, 1.3)])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.9375, 1.0), (0.3, 0.6)])
def test_timesteps_have_the_quantiles_of_the_truncated_distribution(kind, distribution, mean, std, low, high):
    schedule, margin = kind(shift=5.0), 0.01
    u = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    options = {"distribution": distribution, "margin": margin, "mean": mean, "std": std}
    t = sample_timesteps(u, low, high, schedule, **options)
    assert (t.diff() > 0).all()
    ends = schedule.unshifted(torch.tensor([low, high], dtype=torch.float64)).tolist()
    ends = (ends[0] + margin, ends[1] - margin)
    quantiles = [truncated_cdf(x, *ends, distribution, mean, std) for x in schedule.unshifted(t).tolist()]
    torch.testing.assert_close(torch.tensor(quantiles, dtype=torch.float64), u)
    drawn_below = [timestep_cdf(x, low, high, schedule, **options) for x in t.tolist()]
    torch.testing.assert_close(torch.tensor(drawn_below, dtype=torch.float64), u)
    assert timestep_cdf(low, low, high, schedule, **options) == 0
    assert timestep_cdf(high, low, high, schedule, **options) == 1


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_timesteps_never_leave_the_interval(distribution):
    """Rounding must not carry t below s: sigma_{t|s} would be NaN."""
    u = torch.cat([torch.zeros(1), torch.rand(5000, generator=torch.Generator().manual_seed(0)), torch.ones(1)])
    for shift in (1.0, 3.0, 5.0, 7.3):
        schedule = FlowMatchingSchedule(shift)
        for low in schedule.shifted(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist():
            t = sample_timesteps(u, low, 1.0, schedule, distribution=distribution)
            assert t.dtype == torch.float32
            assert not schedule.transition(torch.full_like(t, low), t)[1].isnan().any()
            assert t.max() <= 1


def test_timesteps_take_an_interval_per_sample():
    schedule, u = FlowMatchingSchedule(shift=3.0), torch.tensor([0.2, 0.8])
    low, high = torch.tensor([0.0, 0.5]), torch.tensor([0.5, 1.0])
    each = [sample_timesteps(u[i : i + 1], low[i].item(), high[i].item(), schedule, margin=0.02) for i in range(2)]
    torch.testing.assert_close(sample_timesteps(u, low, high, schedule, margin=0.02), torch.cat(each))


def test_an_interval_of_one_point_fixes_t():
    schedule = FlowMatchingSchedule(shift=5.0)
    t = sample_timesteps(torch.tensor([0.0, 0.5, 0.9]), 0.882, 0.882, schedule, margin=0.02)
    assert torch.equal(t, torch.full((3,), 0.882))
    assert [timestep_cdf(time, 0.882, 0.882, schedule) for time in (0.5, 0.9)] == [0.0, 1.0]


def test_intervals_need_no_value_of_a_tensor():
    with FakeTensorMode():
        t = sample_timesteps(torch.rand(4), 0.7, 1.0, FlowMatchingSchedule(5.0), margin=0.02)
    assert t.shape == (4,)


@pytest.mark.parametrize(
    ("low", "high", "margin", "message"),
    [
        (0.9, 1.0, 0.2, "--timestep-margin 0.2"),
        (0.0, 1.0, -0.1, "--timestep-margin -0.1"),
        (0.6, 0.5, 0.0, "noise interval"),
        (0.5, 1.1, 0.0, "noise interval"),
    ],
)
def test_impossible_intervals_are_refused(low, high, margin, message):
    with pytest.raises(ValueError, match=message):
        sample_timesteps(torch.tensor([0.5]), low, high, FlowMatchingSchedule(5.0), margin=margin)


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="logit_normal"):
        sample_timesteps(torch.tensor([0.5]), 0.0, 1.0, FlowMatchingSchedule(), distribution="beta")
