"""The generator's gradient: distribution matching at an intermediate noise level (Eq. 9 to 11), and guidance."""

from typing import Literal

import torch
from torch import Tensor

import pdmd_kernels
from megatron_pdmd.diffusion import NoiseSchedule

Weighting = Literal["score", "mean_abs"]


@torch.no_grad()
def dmd_gradient(
    teacher_flow: Tensor,
    fake_flow: Tensor,
    s: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    weighting: Weighting = "score",
    x_s: Tensor | None = None,
    x_t: Tensor | None = None,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """The gradient with respect to x_s whose descent lowers KL(p_fake(x_t) || p_real(x_t)).

    "score" is the paper's w_{t|s} (T - F), w_{t|s} = alpha_t alpha_{t|s} / (sigma_t (alpha_t + sigma_t)): exactly the
    gradient of the KL. "mean_abs" is (m(F) - m(T)) / mean|x_s - m(T)|, with m(v) the posterior mean of x_s given x_t
    that a flow v implies and the mean taken per sample. At s = 0 that is DMD's weighting, and it is finite at t = s.

    Args:
        teacher_flow: the teacher's flow T at (x_t, t) [B, ...], after guidance unless `unconditional` is given.
        fake_flow: the fake score's, of the same shape.
        s: [B], below 1.
        t: [B], above 0 and at least s.
        schedule: alpha and sigma.
        weighting: "score" or "mean_abs".
        x_s: the generator's samples, for "mean_abs".
        x_t: the diffused samples, for "mean_abs".
        unconditional: the teacher's flow without the prompt, for `guided_flow` in the same pass over memory.
        guidance: its scale.

    Returns:
        [B, ...], fp32 or fp64, without a graph.

    Raises:
        ValueError: "mean_abs" without x_s and x_t, or an unknown weighting.
    """
    alpha_s, alpha, sigma = schedule.alpha(s), schedule.alpha(t), schedule.sigma(t)
    alpha_ts, sigma_ts = schedule.transition(s, t)
    guided = {"unconditional": unconditional, "guidance": guidance}
    if weighting == "score":
        weight = alpha * alpha_ts / (sigma * (alpha + sigma))
        return pdmd_kernels.dmd_gradient(teacher_flow, fake_flow, weight, **guided)
    if weighting != "mean_abs":
        raise ValueError(f"--dmd-weighting {weighting} does not exist; choose score or mean_abs")
    if x_s is None or x_t is None:
        raise ValueError("the weighting mean_abs needs x_s and x_t")
    # m(v) = c_x x_t - weight v: x0(v) = (x_t - sigma v) / (alpha + sigma) put into the mean of p(x_s | x_t, x0).
    of_x0 = alpha_s * (sigma_ts / sigma).square()
    of_x_t = alpha_ts * (schedule.sigma(s) / sigma).square()
    weight = of_x0 * sigma / (alpha + sigma)
    c_x = of_x_t + of_x0 / (alpha + sigma)
    return pdmd_kernels.dmd_gradient(teacher_flow, fake_flow, weight, x_s, x_t, c_x, **guided)


def guided_flow(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional), exact at scales 0 and 1.

    Args:
        conditional: [B, ...].
        unconditional: of the same shape.
        scale: 1 is no guidance.

    Returns:
        [B, ...], at least fp32, for the difference of two 16-bit flows is scaled up.
    """
    dtype = torch.promote_types(conditional.dtype, torch.float32)
    return torch.lerp(unconditional.to(dtype), conditional.to(dtype), scale)
