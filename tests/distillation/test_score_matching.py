"""Eq. 12, 13 and 15: the conditional mean of the target is the exact prediction, and the loss is finite at t = s."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from megatron_pdmd.diffusion import FlowMatchingSchedule, NoiseSchedule, VariancePreservingSchedule
from megatron_pdmd.distillation import score_matching_loss, subinterval_target

SCHEDULES = [FlowMatchingSchedule(), VariancePreservingSchedule()]
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
by_prediction = pytest.mark.parametrize("prediction", ["flow", "x0"])
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-1.5, 0.2, 1.0], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.3, 0.1, 0.5], dtype=torch.float64)


def mixture_at(schedule: NoiseSchedule, t: Tensor) -> MixtureSameFamily:
    """p(x_t) for the Gaussian mixture p(x0); t is a scalar tensor."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    components = Normal(alpha * MEANS, ((alpha * DEVIATIONS) ** 2 + sigma**2).sqrt())
    return MixtureSameFamily(Categorical(WEIGHTS), components)


def exact_prediction(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: str) -> Tensor:
    """The minimiser of Eq. 5 or 14, written with the autograd score of p(x_t)."""
    x_t = x_t.clone().requires_grad_()
    (score,) = torch.autograd.grad(mixture_at(schedule, t).log_prob(x_t).sum(), x_t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0 = x_t / alpha + sigma**2 / alpha * score
    flow = -x_t / alpha - (sigma + sigma**2 / alpha) * score
    return (flow if prediction == "flow" else x0).detach()


def conditional_means(schedule: NoiseSchedule, s: float, t: float, prediction: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, E[target | x_t], E[eps - x_s | x_t]) by the trapezoidal rule over x_s, spectrally accurate here."""
    x_s = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    s_each, t_each = torch.full_like(x_s, s), torch.full_like(x_s, t)
    alpha_ts, sigma_ts = schedule.transition(s_each[:1], t_each[:1])
    density = mixture_at(schedule, s_each[0]).log_prob(x_s)
    points, means, biased = torch.linspace(-2, 2, 9, dtype=torch.float64), [], []
    for x_t in points:
        eps = (x_t - alpha_ts * x_s) / sigma_ts
        made, target, _ = subinterval_target(x_s, eps, s_each, t_each, schedule, prediction)
        torch.testing.assert_close(made, x_t.expand_as(made))
        posterior = (density - eps.square() / 2).softmax(0)
        means.append((posterior * target).sum())
        biased.append((posterior * (eps - x_s)).sum())
    return points, torch.stack(means), torch.stack(biased)


@by_schedule
@by_prediction
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.0, 0.95), (0.3, 0.35), (0.3, 0.9), (0.75, 0.8), (0.75, 0.98)])
def test_the_mean_of_the_target_given_x_t_is_the_exact_prediction(schedule, prediction, s, t):
    x_t, means, biased = conditional_means(schedule, s, t, prediction)
    exact = exact_prediction(schedule, x_t, torch.tensor(t, dtype=torch.float64), prediction)
    torch.testing.assert_close(means, exact)
    if prediction == "flow" and s > 0:
        assert (biased - exact).abs().max() > 0.01, "this data does not tell the biased target from the right one"


def batch(dtype: torch.dtype = torch.float64, times: int = 33, s: float = 0.5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    output, x_s, eps = torch.randn(3, times, 2, 3, dtype=torch.float64, generator=generator).to(dtype)
    t = torch.linspace(s, 1, times, dtype=torch.float64).to(dtype)
    return output, x_s, eps, torch.full_like(t, s), t


@by_schedule
def test_at_s_0_the_target_is_eq_4s(schedule):
    _, x0, eps, s, t = batch(s=0.0)
    x_t, flow, weight = subinterval_target(x0, eps, s, t, schedule)
    torch.testing.assert_close(flow, eps - x0)
    torch.testing.assert_close(subinterval_target(x0, eps, s, t, schedule, "x0")[1], x0)
    alpha, sigma = schedule.alpha(t).view(-1, 1, 1), schedule.sigma(t).view(-1, 1, 1)
    torch.testing.assert_close(x_t, alpha * x0 + sigma * eps)
    assert torch.equal(weight, torch.ones_like(t))


@by_schedule
def test_at_s_0_the_loss_is_the_plain_mean_squared_error_also_at_t_0(schedule):
    output, x0, eps, s, t = batch(s=0.0)
    for clamp_max in (1.0, 10.0):
        loss = score_matching_loss(output, x0, eps, s, t, schedule, clamp_max=clamp_max)
        torch.testing.assert_close(loss, torch.nn.functional.mse_loss(output, eps - x0))


@by_schedule
@by_prediction
@pytest.mark.parametrize("clamp_max", [1.0, 10.0, 100.0])
def test_the_scaled_loss_is_the_weighted_unscaled_one(schedule, prediction, clamp_max):
    """Away from t = s both forms of Eq. 13 can be computed. Also for an s that differs from sample to sample."""
    output, x_s, eps, _, t = batch(s=0.6)
    s = torch.linspace(0, 0.55, len(t), dtype=torch.float64)
    _, target, weight = subinterval_target(x_s, eps, s, t, schedule, prediction, clamp_max)
    expected = (weight.view(-1, 1, 1) * (output - target).square()).mean()
    loss = score_matching_loss(output, x_s, eps, s, t, schedule, prediction, clamp_max)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        score_matching_loss(output, x_s, eps, s, t, schedule, clamp_max=clamp_max, objective=prediction), expected
    )


def test_the_printed_eq_13_for_flow_matching():
    """Alpha = 1 - t, s = 0.5, t = 0.75 by hand: alpha_{t|s} = 1/2, sigma_{t|s}^2 = 1/2, c = 1, c_x = -sqrt 2."""
    x_s, eps, output = (torch.tensor([[value]], dtype=torch.float64) for value in (0.3, -1.1, 0.4))
    s, t = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.75], dtype=torch.float64)
    loss = score_matching_loss(output, x_s, eps, s, t, FlowMatchingSchedule())
    expected = 2 * (0.5**0.5 * 0.4 - (-1.1 - 2**0.5 * 0.3)) ** 2
    assert loss.item() == pytest.approx(expected)
    weight = subinterval_target(x_s, eps, s, t, FlowMatchingSchedule(), clamp_max=1.5)[2]
    assert weight.item() == pytest.approx(0.75)


@by_schedule
@by_prediction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s", [0.0, 0.5, 0.9375])
def test_loss_and_gradient_are_finite_for_every_t_from_s_to_1(schedule, prediction, dtype, s):
    """The loss of 16-bit outputs is as right as fp32 is, for they are read exactly."""
    output, x_s, eps, s, t = batch(torch.float32, times=257, s=s)
    t[1] = torch.nextafter(t[0], t[-1])
    output = output.to(dtype).requires_grad_()
    loss = score_matching_loss(output, x_s, eps, s, t, schedule, prediction)
    loss.backward()
    exact_output = output.detach().double().requires_grad_()
    wide = (tensor.double() for tensor in (x_s, eps, s, t))
    exact = score_matching_loss(exact_output, *wide, schedule, prediction)
    exact.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, check_dtype=False)
    torch.testing.assert_close(output.grad, exact_output.grad, check_dtype=False)
    assert output.grad.isfinite().all()


@by_schedule
def test_the_biased_objective_takes_x_s_for_x0(schedule):
    output, x_s, eps, s, t = batch()
    mse = torch.nn.functional.mse_loss
    loss = score_matching_loss(output, x_s, eps, s, t, schedule, objective="biased")
    torch.testing.assert_close(loss, mse(output, eps - x_s))
    loss = score_matching_loss(output, x_s, eps, s, t, schedule, "x0", objective="biased")
    torch.testing.assert_close(loss, mse(output, x_s))


def test_mistakes_name_the_flag():
    output, x_s, eps, s, t = batch()
    with pytest.raises(ValueError, match="--clamp-max"):
        score_matching_loss(output, x_s, eps, s, t, FlowMatchingSchedule(), clamp_max=0.0)
    with pytest.raises(ValueError, match="--objective"):
        score_matching_loss(output, x_s, eps, s, t, FlowMatchingSchedule(), objective="eps")
