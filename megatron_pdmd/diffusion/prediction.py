"""flow <-> x0 <-> eps <-> score at x_t = alpha_t x0 + sigma_t eps, for any alpha and sigma.

The flow is eps - x0 whatever the schedule; it equals dx_t/dt only where alpha = 1 - t and sigma = t. Every conversion
is linear in x_t and the prediction, so it also holds for conditional means.
"""

from typing import Literal

from torch import Tensor

from megatron_pdmd.diffusion.noise_schedule import NoiseSchedule
from pdmd_kernels import diffuse

Prediction = Literal["flow", "x0", "eps", "score"]


def from_flow(flow: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """What a flow says of x0, eps or the score of p(x_t) (the last by Eq. 5).

    Args:
        flow: [B, ...].
        x_t: the noisy samples, of the shape of flow.
        t: [B].
        schedule: alpha and sigma.
        prediction: what is wanted. The score is infinite at t = 0.

    Returns:
        [B, ...] in the dtype of x_t.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    total = alpha + sigma
    if prediction == "flow":
        return flow
    if prediction == "x0":
        return diffuse(x_t, flow, 1 / total, -sigma / total)
    if prediction == "eps":
        return diffuse(x_t, flow, 1 / total, alpha / total)
    if prediction == "score":
        return diffuse(x_t, flow, -1 / (sigma * total), -alpha / (sigma * total))
    raise ValueError(f"unknown prediction {prediction!r}; choose flow, x0, eps or score")


def to_flow(value: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """The flow that a prediction of x0, eps or the score amounts to; the inverse of `from_flow`.

    Args:
        value: [B, ...].
        x_t: the noisy samples, of the shape of value.
        t: [B].
        schedule: alpha and sigma.
        prediction: what value predicts. x0 says nothing of the flow at t = 0, eps and the score nothing at t = 1.

    Returns:
        [B, ...] in the dtype of x_t.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    total = alpha + sigma
    if prediction == "flow":
        return value
    if prediction == "x0":
        return diffuse(x_t, value, 1 / sigma, -total / sigma)
    if prediction == "eps":
        return diffuse(x_t, value, -1 / alpha, total / alpha)
    if prediction == "score":
        return diffuse(x_t, value, -1 / alpha, -sigma * total / alpha)
    raise ValueError(f"unknown prediction {prediction!r}; choose flow, x0, eps or score")
