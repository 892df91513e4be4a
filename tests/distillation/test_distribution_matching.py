"""Eq. 9 to 11 against the closed-form gradient of the KL divergence of Gaussians, and DMD's weighting at s = 0."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from megatron_pdmd.diffusion import FlowMatchingSchedule, VariancePreservingSchedule, from_flow, to_flow
from megatron_pdmd.distillation import dmd_gradient, guided_flow

SCHEDULES = [FlowMatchingSchedule(), VariancePreservingSchedule()]
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
REAL, FAKE = (0.4, 0.7), (-0.3, 0.5)  # mean and deviation of x0


def at(schedule, data, time: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of x_t for Gaussian data."""
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    return alpha * data[0], ((alpha * data[1]) ** 2 + sigma**2).sqrt()


def exact_flow(schedule, data, x_t: Tensor, t: Tensor) -> Tensor:
    mean, deviation = at(schedule, data, t)
    return to_flow((mean - x_t) / deviation**2, x_t, t, schedule, "score")


def gaussian_quadrature() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes of two independent standard normal variables and their joint weights, each [n^2]."""
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(8))
    weights = weights / weights.sum()
    first, second = torch.meshgrid(nodes, nodes, indexing="ij")
    return first.flatten(), second.flatten(), torch.outer(weights, weights).flatten()


@by_schedule
@pytest.mark.parametrize("s", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("t", [0.8, 0.95])
def test_the_expected_gradient_is_that_of_the_kl_divergence_at_t(schedule, s, t):
    """The generator is x_s = mean + deviation z; the integrand is a polynomial, so the quadrature is exact."""
    s_scalar, t_scalar = torch.tensor(s, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
    parameters = [value.clone().requires_grad_() for value in at(schedule, FAKE, s_scalar)]
    alpha_ts, sigma_ts = schedule.transition(s_scalar, t_scalar)
    fake_t = Normal(alpha_ts * parameters[0], ((alpha_ts * parameters[1]) ** 2 + sigma_ts**2).sqrt())
    divergence = kl_divergence(fake_t, Normal(*at(schedule, REAL, t_scalar)))
    expected = torch.autograd.grad(divergence, parameters)

    z, eps, weights = gaussian_quadrature()
    x_s = parameters[0] + parameters[1] * z
    s_each, t_each = s_scalar.expand_as(z), t_scalar.expand_as(z)
    x_t = schedule.diffuse(x_s.detach(), eps, s_each, t_each)
    teacher, fake = (exact_flow(schedule, data, x_t, t_each) for data in (REAL, FAKE))
    gradient = dmd_gradient(teacher, fake, s_each, t_each, schedule)
    torch.testing.assert_close(torch.autograd.grad((weights * gradient * x_s).sum(), parameters), expected)
    assert not torch.isclose(expected[0], torch.zeros_like(expected[0])), "nothing was tested"


def random_flows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    teacher, fake, x_s, eps = torch.randn(4, 5, 2, 3, dtype=torch.float64, generator=generator).to(dtype)
    return teacher, fake, x_s, eps


@by_schedule
@pytest.mark.parametrize("weighting", ["score", "mean_abs"])
def test_the_gradient_vanishes_where_fake_and_teacher_agree(schedule, weighting):
    teacher, _, x_s, eps = random_flows()
    s, t = torch.full((5,), 0.5, dtype=torch.float64), torch.linspace(0.5, 1, 5, dtype=torch.float64)
    x_t = schedule.diffuse(x_s, eps, s, t)
    gradient = dmd_gradient(teacher, teacher.clone(), s, t, schedule, weighting, x_s=x_s, x_t=x_t)
    assert torch.equal(gradient, torch.zeros_like(teacher))


@by_schedule
def test_mean_abs_at_s_0_is_dmds(schedule):
    """(x0(fake) - x0(teacher)) / mean|x0 - x0(teacher)| (Yin et al. 2024, Eq. 7 and 8)."""
    teacher, fake, x0, eps = random_flows()
    s, t = torch.zeros(5, dtype=torch.float64), torch.linspace(0.1, 1, 5, dtype=torch.float64)
    x_t = schedule.diffuse(x0, eps, s, t)
    real_x0, fake_x0 = (from_flow(flow, x_t, t, schedule, "x0") for flow in (teacher, fake))
    expected = (fake_x0 - real_x0) / (x0 - real_x0).abs().mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(dmd_gradient(teacher, fake, s, t, schedule, "mean_abs", x_s=x0, x_t=x_t), expected)


@by_schedule
@pytest.mark.parametrize("s", [0.0, 0.3, 0.75])
def test_mean_abs_compares_posterior_means_of_x_s(schedule, s):
    """For Gaussian data E[x_s | x_t] follows from their joint covariance, without x0 or a flow."""
    _, _, z, eps = random_flows()
    s = torch.full((5,), s, dtype=torch.float64)
    t = torch.linspace(0.8, 1, 6, dtype=torch.float64)[:-1]
    x_s = z * 0.6 + 0.1
    x_t = schedule.diffuse(x_s, eps, s, t)
    column = [tensor.view(-1, 1, 1) for tensor in (s, t)]
    alpha_ts, _ = schedule.transition(*column)
    means, flows = [], []
    for data in (REAL, FAKE):
        (mean_s, deviation_s), (mean_t, deviation_t) = (at(schedule, data, time) for time in column)
        means.append(mean_s + alpha_ts * deviation_s**2 / deviation_t**2 * (x_t - mean_t))
        score = (mean_t - x_t) / deviation_t**2
        flows.append(to_flow(score, x_t, t, schedule, "score"))
    expected = (means[1] - means[0]) / (x_s - means[0]).abs().mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(dmd_gradient(*flows, s, t, schedule, "mean_abs", x_s=x_s, x_t=x_t), expected)


@by_schedule
@pytest.mark.parametrize("weighting", ["score", "mean_abs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_finite_in_fp32_from_s_to_1_and_has_no_graph(schedule, weighting, dtype):
    teacher, fake, x_s, eps = random_flows(torch.float32)
    s = torch.full((5,), 0.5)
    t = torch.linspace(0.5, 1, 5)
    t[1] = torch.nextafter(t[0], t[-1])
    x_s.requires_grad_()
    x_t = schedule.diffuse(x_s, eps, s, t)
    gradient = dmd_gradient(teacher.to(dtype), fake.to(dtype), s, t, schedule, weighting, x_s=x_s, x_t=x_t)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    assert not gradient.requires_grad


def test_mistakes_are_refused():
    teacher, fake, x_s, _ = random_flows()
    s, t = torch.zeros(5), torch.full((5,), 0.5)
    with pytest.raises(ValueError, match="needs x_s and x_t"):
        dmd_gradient(teacher, fake, s, t, FlowMatchingSchedule(), "mean_abs", x_s=x_s)
    with pytest.raises(ValueError, match="--dmd-weighting"):
        dmd_gradient(teacher, fake, s, t, FlowMatchingSchedule(), "uniform")


def test_guidance_extrapolates_from_unconditional_through_conditional():
    conditional, unconditional = (flow.bfloat16() for flow in random_flows()[:2])
    assert torch.equal(guided_flow(conditional, unconditional, 1.0), conditional.float())
    assert torch.equal(guided_flow(conditional, unconditional, 0.0), unconditional.float())
    exact = unconditional.double() + 4 * (conditional.double() - unconditional.double())
    guided = guided_flow(conditional, unconditional, 4.0)
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided, exact, check_dtype=False)
