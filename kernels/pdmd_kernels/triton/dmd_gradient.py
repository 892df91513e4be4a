"""gradient = weight (guided - fake), optionally over max(mean |x_s - (c_x x_t - weight guided)|, floor).

guided = unconditional + guidance (teacher - unconditional). With the normaliser the first pass sums the error, the
second divides by its mean; each program of the second is given the mean, so the sum's order never changes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdmd_kernels.triton.launching import launch

BLOCK = 1024


@triton.jit
def _guided(teacher, unconditional, guidance, base, lane, mask, CFG: tl.constexpr, FROM_TEACHER: tl.constexpr):
    """The guided prediction, counted from the nearer of its two ends as torch.lerp does."""
    guided = tl.load(teacher + base + lane, mask=mask).to(tl.float32)
    if CFG:
        plain = tl.load(unconditional + base + lane, mask=mask).to(tl.float32)
        end = guided if FROM_TEACHER else plain
        guided = end + (guided - plain) * guidance
    return guided


@triton.jit
def posterior_error_kernel(
    teacher,
    unconditional,
    weight,
    x_s,
    x_t,
    c_x,
    sums,
    numel,
    guidance,
    CFG: tl.constexpr,
    FROM_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block's part of sum |x_s - (c_x x_t - weight guided)|."""
    blocks = tl.cdiv(numel, BLOCK)
    sample = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < numel - start
    base = sample.to(tl.int64) * numel + start
    guided = _guided(teacher, unconditional, guidance, base, lane, mask, CFG, FROM_TEACHER)
    diffused = tl.load(x_t + base + lane, mask=mask).to(tl.float32)
    clean = tl.load(x_s + base + lane, mask=mask).to(tl.float32)
    mean = tl.load(c_x + sample).to(tl.float32) * diffused - tl.load(weight + sample).to(tl.float32) * guided
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(mask, tl.abs(clean - mean), 0.0)))


@triton.jit
def dmd_gradient_kernel(
    teacher,
    unconditional,
    fake,
    weight,
    scale,
    gradient,
    counts,
    numel,
    guidance,
    CFG: tl.constexpr,
    FROM_TEACHER: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of the gradient, and how many of its elements are not finite."""
    blocks = tl.cdiv(numel, BLOCK)
    sample = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < numel - start
    base = sample.to(tl.int64) * numel + start
    guided = _guided(teacher, unconditional, guidance, base, lane, mask, CFG, FROM_TEACHER)
    value = tl.load(weight + sample).to(tl.float32) * (guided - tl.load(fake + base + lane, mask=mask).to(tl.float32))
    if NORMALISE:
        value = tl.div_rn(value, tl.load(scale + sample))
    tl.store(gradient + base + lane, value, mask=mask)
    nonfinite = (tl.abs(value) < float("inf")) == 0
    tl.store(counts + tl.program_id(0), tl.sum((nonfinite & mask).to(tl.int32)))


def dmd_gradient(
    teacher: Tensor,
    unconditional: Tensor | None,
    guidance: float,
    fake: Tensor,
    weight: Tensor,
    x_s: Tensor | None,
    x_t: Tensor | None,
    c_x: Tensor | None,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """The generator's gradient in one pass, in two with the normaliser.

    Args:
        teacher: conditional prediction [B, ...].
        unconditional: of the shape of teacher, or none: no guidance.
        guidance: factor of teacher - unconditional.
        fake: of the shape of teacher.
        weight: [B].
        x_s: the samples [B, ...]; without them there is no normaliser.
        x_t: the diffused samples [B, ...].
        c_x: factor of x_t [B].
        floor: the least denominator.

    Returns:
        The gradient in fp32, and int64 [B]: how many of its elements are not finite.
    """
    numel = teacher.shape[1:].numel()
    shape = (teacher.shape[0], triton.cdiv(numel, BLOCK))
    near_teacher = guidance >= 0.5
    common = {
        "teacher": teacher,
        "unconditional": unconditional,
        "weight": weight,
        "numel": numel,
        "guidance": guidance - 1.0 if near_teacher else float(guidance),
        "CFG": unconditional is not None,
        "FROM_TEACHER": near_teacher,
        "BLOCK": BLOCK,
    }
    grid = (shape[0] * shape[1],)
    scale = None
    if x_s is not None:
        sums = torch.empty(shape, dtype=torch.float32, device=teacher.device)
        launch(posterior_error_kernel, grid, num_warps=4, x_s=x_s, x_t=x_t, c_x=c_x, sums=sums, **common)
        scale = (sums.sum(1) / max(numel, 1)).clamp(min=floor)
    gradient = torch.empty_like(teacher, dtype=torch.float32)
    counts = torch.empty(shape, dtype=torch.int32, device=teacher.device)
    launch(
        dmd_gradient_kernel,
        grid,
        num_warps=4,
        fake=fake,
        scale=scale,
        gradient=gradient,
        counts=counts,
        NORMALISE=x_s is not None,
        **common,
    )
    return gradient, counts.sum(1)
