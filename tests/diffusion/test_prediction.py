"""Conversions against the x0 and eps that made x_t, and against the gradient of the log density."""

import pytest
import torch
from torch.distributions import Normal

from megatron_pdmd.diffusion import FlowMatchingSchedule, VariancePreservingSchedule, from_flow, to_flow


@pytest.fixture
def made():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator)
    return x0, eps, torch.tensor([0.05, 0.4, 0.8, 0.99], dtype=torch.float64)


@pytest.mark.parametrize("schedule", [FlowMatchingSchedule(), VariancePreservingSchedule()])
@pytest.mark.parametrize("prediction", ["flow", "x0", "eps", "score"])
def test_predictions_are_what_made_the_sample(made, schedule, prediction):
    x0, eps, t = made
    alpha, sigma = (coefficient.view(-1, 1, 1) for coefficient in (schedule.alpha(t), schedule.sigma(t)))
    x_t = (alpha * x0 + sigma * eps).requires_grad_()
    log_density = Normal(alpha * x0, sigma.expand_as(x0)).log_prob(x_t).sum()
    truth = {"flow": eps - x0, "x0": x0, "eps": eps, "score": torch.autograd.grad(log_density, x_t)[0]}
    x_t = x_t.detach()
    torch.testing.assert_close(from_flow(eps - x0, x_t, t, schedule, prediction), truth[prediction])
    torch.testing.assert_close(to_flow(truth[prediction], x_t, t, schedule, prediction), eps - x0)


@pytest.mark.parametrize("convert", [from_flow, to_flow])
def test_an_unknown_prediction_is_refused(made, convert):
    x0, _, t = made
    with pytest.raises(ValueError, match="x0, eps or score"):
        convert(x0, x0, t, FlowMatchingSchedule(), "velocity")
