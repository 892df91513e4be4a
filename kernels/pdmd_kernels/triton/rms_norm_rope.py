"""y = rope(x rstd weight) with rstd = (mean(x^2) + eps)^(-1/2), where one rank holds all heads: one pass each way.

With g = unrope(grad) and n = x rstd: dx = rstd (g weight - n mean(g weight n)), dweight = sum(g n) over the tokens.
Each program keeps its rows in registers. dweight is summed in two stages, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdmd_kernels.triton.launching import launch, padded
from pdmd_kernels.triton.rms_rope import rms_rope, rms_rope_backward_dots, rms_rope_backward_dx, rotate, sum_of_squares
from pdmd_kernels.triton.tiling import LONGEST_ROW_IN_COMPANY, row_warps, rows_per_program


@triton.jit
def _rotations(rope, token, lane, mask, head_dim, BLOCK: tl.constexpr):
    """cos and sin of a token's pairs, head after head: fp32 [BLOCK / 2] each."""
    table = tl.load(rope + token * head_dim + lane % head_dim, mask=mask, other=0.0)
    return tl.split(tl.reshape(table, [BLOCK // 2, 2]))


@triton.jit
def rms_norm_rope_kernel(
    x,
    weight,
    rope,
    y,
    rstd,
    tokens,
    width,
    head_dim,
    inverse_width,
    eps,
    rows,
    ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    programs = tl.cdiv(tokens, rows)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * rows
    lane = tl.arange(0, BLOCK)
    mask = lane < width
    factor = tl.load(weight + lane, mask=mask, other=0.0).to(tl.float32)
    for token in range(first, tl.minimum(first + rows, tokens)):
        row = sample * tokens + token
        value = tl.load(x + row * width + lane, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value) * inverse_width + eps))
        value = value * inverse * factor
        if ROPE:
            cos, sin = _rotations(rope, token, lane, mask, head_dim, BLOCK)
            value = rotate(value, cos, sin, [BLOCK], [BLOCK // 2, 2])
        tl.store(y + row * width + lane, value.to(y.dtype.element_ty), mask=mask)
        tl.store(rstd + row, inverse)


@triton.jit
def rms_norm_rope_backward_kernel(
    grad,
    x,
    weight,
    rstd,
    rope,
    dx,
    dweight,
    tokens,
    width,
    head_dim,
    inverse_width,
    rows,
    ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    programs = tl.cdiv(tokens, rows)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * rows
    lane = tl.arange(0, BLOCK)
    mask = lane < width
    factor = tl.load(weight + lane, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for token in range(first, tl.minimum(first + rows, tokens)):
        row = sample * tokens + token
        upstream = tl.load(grad + row * width + lane, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + row * width + lane, mask=mask, other=0.0).to(tl.float32)
        if ROPE:
            cos, sin = _rotations(rope, token, lane, mask, head_dim, BLOCK)
            upstream = rotate(upstream, cos, -sin, [BLOCK], [BLOCK // 2, 2])
        inverse = tl.load(rstd + row)
        normed = value * inverse
        along = tl.sum(upstream * factor * normed) * inverse_width
        value = inverse * (upstream * factor - normed * along)
        tl.store(dx + row * width + lane, value.to(dx.dtype.element_ty), mask=mask)
        total += upstream * normed
    tl.store(dweight + tl.program_id(0).to(tl.int64) * width + lane, total, mask=mask)


def rms_norm_rope(x: Tensor, weight: Tensor, rope: Tensor | None, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """The norm and the rotation in one pass (in two where rows are too long to keep the weight beside them).

    Args:
        x: [B, S, n], n = heads * head_dim.
        weight: [n].
        rope: (cos, sin) of the pairs (2i, 2i + 1), fp32 [S, head_dim / 2, 2]; none: no rotation.
        heads: of the model.
        eps: added to the mean square.

    Returns:
        y in the dtype of x, and rstd fp32 [B, S].
    """
    samples, tokens, width = x.shape
    block = padded(width)
    if block > LONGEST_ROW_IN_COMPANY:
        rstd = 1 / (sum_of_squares(x) / width + eps).sqrt()
        return rms_rope(x, weight, rstd, rope, heads), rstd
    y = torch.empty_like(x)
    rstd = torch.empty(samples, tokens, dtype=torch.float32, device=x.device)
    rows = rows_per_program(samples, tokens)
    launch(
        rms_norm_rope_kernel,
        (samples * triton.cdiv(tokens, rows),),
        num_warps=row_warps(block),
        x=x,
        weight=weight,
        rope=rope,
        y=y,
        rstd=rstd,
        tokens=tokens,
        width=width,
        head_dim=width // heads,
        inverse_width=1 / width,
        eps=eps,
        rows=rows,
        ROPE=rope is not None,
        BLOCK=block,
    )
    return y, rstd


def rms_norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, rope: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """The gradients in one pass (in two where rows are too long to keep sums beside them).

    Args:
        grad: d loss / d y [B, S, n].
        x: [B, S, n].
        weight: [n].
        rstd: fp32 [B, S].
        rope: as in `rms_norm_rope`.
        heads: of the model.

    Returns:
        dx in the dtype of x, and dweight fp32 [n].
    """
    samples, tokens, width = x.shape
    block = padded(width)
    if block > LONGEST_ROW_IN_COMPANY:
        dots, dweight = rms_rope_backward_dots(grad, x, weight, rstd, rope, heads)
        return rms_rope_backward_dx(grad, x, weight, rstd, dots / width, rope, heads), dweight
    dx = torch.empty_like(x)
    rows = rows_per_program(samples, tokens)
    dweight = rstd.new_empty(samples * triton.cdiv(tokens, rows), width)
    launch(
        rms_norm_rope_backward_kernel,
        dweight.shape[:1],
        num_warps=row_warps(block),
        grad=grad,
        x=x,
        weight=weight,
        rstd=rstd,
        rope=rope,
        dx=dx,
        dweight=dweight,
        tokens=tokens,
        width=width,
        head_dim=width // heads,
        inverse_width=1 / width,
        rows=rows,
        ROPE=rope is not None,
        BLOCK=block,
    )
    return dx, dweight.sum(0)
