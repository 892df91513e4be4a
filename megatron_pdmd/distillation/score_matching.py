"""Score matching within (s, 1) from samples at s alone: the fake score's loss (Eq. 4, 12, 13 and 15).

Given x_t = alpha_{t|s} x_s + sigma_{t|s} eps, the score of p(x_t | x_s) is -eps / sigma_{t|s}. Its mean given x_t is
the score of p(x_t) (denoising score matching), so the prediction that it implies has the exact prediction at t as its
mean, though no x0 is known. At s = 0 it is the usual target.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_pdmd.diffusion import NoiseSchedule
from pdmd_kernels import diffuse, subinterval_loss

ModelPrediction = Literal["flow", "x0"]
Objective = Literal["flow", "x0", "biased"]


def subinterval_target(
    x_s: Tensor,
    eps: Tensor,
    s: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    prediction: ModelPrediction = "flow",
    clamp_max: float = 10.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The noisy sample, the target that Eq. 12 (flow) or Eq. 15 (x0) sets for it, and Eq. 13's weight of the two.

    Args:
        x_s: samples at noise level s [B, ...].
        eps: standard normal noise of the shape of x_s.
        s: [B], below 1.
        t: [B], at least s. The target grows without bound as t nears an s > 0; `score_matching_loss` does not.
        schedule: alpha and sigma.
        prediction: what the model predicts.
        clamp_max: the most that Eq. 13's 1 / sigma_{t|s}^2 may be.

    Returns:
        x_t and target [B, ...] in the dtype of x_s, and weight [B] = min(1, clamp_max sigma_{t|s}^2), or 1 where s = 0,
        such that weight |output - target|^2 is Eq. 13's integrand.
    """
    c_out, c_eps, c_x, _ = _unbiased_residual(s, t, schedule, prediction, clamp_max)
    target = diffuse(x_s, eps, c_x / c_out, c_eps / c_out)
    _, sigma_ts = schedule.transition(s, t)
    weight = torch.where(s == 0, 1.0, (clamp_max * sigma_ts.square()).clamp(max=1.0))
    return schedule.diffuse(x_s, eps, s, t), target, weight


def score_matching_loss(
    model_output: Tensor,
    x_s: Tensor,
    eps: Tensor,
    s: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    prediction: ModelPrediction = "flow",
    clamp_max: float = 10.0,
    objective: Objective | None = None,
) -> Tensor:
    """Eq. 13, or its counterpart for Eq. 15: clamp(1 / sigma_{t|s}^2) |sigma_{t|s} output - sigma_{t|s} target|^2.

    sigma_{t|s} target is finite at t = s, where the loss asks nothing of the output. The printed Eq. 13 has a
    parenthesis out of place; the signs here are those of Eq. 12.

    Args:
        model_output: the fake score's prediction at (x_t, t) [B, ...].
        x_s: samples at noise level s [B, ...].
        eps: the noise that made x_t of x_s, or the int64 seeds [B] it is drawn from again.
        s: [B], below 1.
        t: [B], at least s.
        schedule: alpha and sigma.
        prediction: what the model predicts, unless the objective says so.
        clamp_max: the most that 1 / sigma_{t|s}^2 may be; no clamp where s = 0, for Eq. 4 is not singular.
        objective: "flow" is Eq. 13, "x0" its counterpart for Eq. 15, by default that of the prediction. "biased" takes
            x_s for x0 (Fig. 2c): an ablation that learns a wrong score.

    Returns:
        The mean over all elements, a scalar in fp32 (fp64 if a tensor is fp64).
    """
    if objective == "biased":
        residual = _biased_residual(t, prediction)
    else:
        residual = _unbiased_residual(s, t, schedule, objective or prediction, clamp_max)
    return subinterval_loss(model_output, x_s, eps, *residual).mean()


class _Residual(NamedTuple):
    """weight |c_out output - c_eps eps - c_x x_s|^2, each field [B]."""

    c_out: Tensor
    c_eps: Tensor
    c_x: Tensor
    weight: Tensor


def _unbiased_residual(
    s: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: ModelPrediction, clamp_max: float
) -> _Residual:
    """Eq. 13 and its counterpart for x0; where s = 0 unscaled, with the target eps - x0 or x0 and weight 1."""
    if clamp_max <= 0:
        raise ValueError(f"--clamp-max is {clamp_max}; it must be positive, for it is the weight near t = s")
    _, sigma_ts = schedule.transition(s, t)
    alpha_s = schedule.alpha(s)
    renoised = schedule.alpha(t) * (schedule.sigma(s) / alpha_s).square()
    at_data = s == 0
    c_out = torch.where(at_data, 1.0, sigma_ts)
    weight = torch.where(at_data, 1.0, sigma_ts.square().reciprocal().clamp(max=clamp_max))
    if prediction == "flow":
        return _Residual(c_out, torch.where(at_data, 1.0, schedule.sigma(t) + renoised), -c_out / alpha_s, weight)
    if prediction == "x0":
        return _Residual(c_out, -renoised, c_out / alpha_s, weight)
    raise ValueError(f"--objective {prediction} does not exist; choose flow, x0 or biased")


def _biased_residual(t: Tensor, prediction: ModelPrediction) -> _Residual:
    """The targets eps - x_s and x_s, unweighted."""
    one = torch.ones_like(t)
    if prediction == "flow":
        return _Residual(one, one, -one, one)
    return _Residual(one, torch.zeros_like(t), one, one)
