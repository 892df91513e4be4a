"""y = rope(x rstd weight), sum(x^2), and the backward pass in two halves, between which ranks may sum their dots.

With g = unrope(grad): dots = sum(g weight x rstd) over a token's units, dweight = sum(g x rstd) over the tokens,
dx = rstd (g weight - x rstd mean_dots). A program takes a tile of tokens by the channels of one head and walks over the
heads, so that it reads the rotations once. dweight is summed in two stages, in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdmd_kernels.triton.launching import launch, padded
from pdmd_kernels.triton.tiling import row_warps

_TILE = 4096
_CHUNK = 128


@triton.jit
def rotate(value, cos, sin, SHAPE: tl.constexpr, PAIRS: tl.constexpr):
    """Turns the pairs (2i, 2i + 1) of value [SHAPE]; cos and sin have the shape of PAIRS less its last dim."""
    even, odd = tl.split(tl.reshape(value, PAIRS))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), SHAPE)


@triton.jit
def sum_of_squares_kernel(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + lane, mask=lane < width, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(value * value))


@triton.jit
def rms_rope_kernel(
    x,
    weight,
    rstd,
    rope,
    y,
    tokens,
    width,
    heads,
    head_dim,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * ROWS
    local = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    valid = local < tokens - first
    inside = channel < head_dim
    base = sample * tokens + first
    inverse = tl.load(rstd + base + local, mask=valid, other=0.0)
    if ROPE:
        table = rope + first.to(tl.int64) * head_dim + local[:, None] * head_dim + channel[None, :]
        table = tl.load(table, mask=valid[:, None] & inside[None, :], other=0.0)
        cos, sin = tl.split(tl.reshape(table, [ROWS, BLOCK // 2, 2]))
    for head in range(heads):
        column = head * head_dim + channel
        within = inside & (column < width)
        mask = valid[:, None] & within[None, :]
        offset = base * width + local[:, None] * width + column[None, :]
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
        value = value * inverse[:, None] * factor[None, :]
        if ROPE:
            value = rotate(value, cos, sin, [ROWS, BLOCK], [ROWS, BLOCK // 2, 2])
        tl.store(y + offset, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def rms_rope_backward_dots_kernel(
    grad,
    x,
    weight,
    rstd,
    rope,
    dots,
    dweight,
    tokens,
    width,
    heads,
    head_dim,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * ROWS
    local = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    valid = local < tokens - first
    inside = channel < head_dim
    base = sample * tokens + first
    inverse = tl.load(rstd + base + local, mask=valid, other=0.0)
    if ROPE:
        table = rope + first.to(tl.int64) * head_dim + local[:, None] * head_dim + channel[None, :]
        table = tl.load(table, mask=valid[:, None] & inside[None, :], other=0.0)
        cos, sin = tl.split(tl.reshape(table, [ROWS, BLOCK // 2, 2]))
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for head in range(heads):
        column = head * head_dim + channel
        within = inside & (column < width)
        mask = valid[:, None] & within[None, :]
        offset = base * width + local[:, None] * width + column[None, :]
        upstream = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        if ROPE:
            upstream = rotate(upstream, cos, -sin, [ROWS, BLOCK], [ROWS, BLOCK // 2, 2])
        product = upstream * (value * inverse[:, None])
        factor = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
        total += product * factor[None, :]
        tl.store(dweight + tl.program_id(0).to(tl.int64) * width + column, tl.sum(product, axis=0), mask=within)
    tl.store(dots + base + local, tl.sum(total, axis=1), mask=valid)


@triton.jit
def rms_rope_backward_dx_kernel(
    grad,
    x,
    weight,
    rstd,
    mean_dots,
    rope,
    dx,
    tokens,
    width,
    heads,
    head_dim,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * ROWS
    local = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    valid = local < tokens - first
    inside = channel < head_dim
    base = sample * tokens + first
    inverse = tl.load(rstd + base + local, mask=valid, other=0.0)
    along = tl.load(mean_dots + base + local, mask=valid, other=0.0)
    if ROPE:
        table = rope + first.to(tl.int64) * head_dim + local[:, None] * head_dim + channel[None, :]
        table = tl.load(table, mask=valid[:, None] & inside[None, :], other=0.0)
        cos, sin = tl.split(tl.reshape(table, [ROWS, BLOCK // 2, 2]))
    for head in range(heads):
        column = head * head_dim + channel
        within = inside & (column < width)
        mask = valid[:, None] & within[None, :]
        offset = base * width + local[:, None] * width + column[None, :]
        upstream = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
        if ROPE:
            upstream = rotate(upstream, cos, -sin, [ROWS, BLOCK], [ROWS, BLOCK // 2, 2])
        value = upstream * factor[None, :] - value * inverse[:, None] * along[:, None]
        tl.store(dx + offset, (inverse[:, None] * value).to(dx.dtype.element_ty), mask=mask)


def sum_of_squares(x: Tensor) -> Tensor:
    """sum(x^2) over the last dim of [..., n], in fp32 [...]."""
    out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block = padded(x.shape[-1])
    launch(
        sum_of_squares_kernel, (out.numel(),), num_warps=row_warps(block), x=x, out=out, width=x.shape[-1], BLOCK=block
    )
    return out


def rms_rope(x: Tensor, weight: Tensor, rstd: Tensor, rope: Tensor | None, heads: int) -> Tensor:
    """rope(x rstd weight) in the dtype of x.

    Args:
        x: [B, S, n], n = heads * head_dim.
        weight: [n].
        rstd: fp32 [B, S].
        rope: (cos, sin) of the pairs (2i, 2i + 1), fp32 [S, head_dim / 2, 2]; none: no rotation.
        heads: of this rank.
    """
    y = torch.empty_like(x)
    grid, cut = _cut(x, rope, heads)
    launch(rms_rope_kernel, grid, num_warps=4, x=x, weight=weight, rstd=rstd, rope=rope, y=y, **cut)
    return y


def rms_rope_backward_dots(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, rope: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """The first half of the backward pass.

    Args:
        grad: d loss / d y [B, S, n].
        x: [B, S, n].
        weight: [n].
        rstd: fp32 [B, S].
        rope: as in `rms_rope`.
        heads: of this rank.

    Returns:
        dots fp32 [B, S], this rank's part of sum(g weight x rstd), and dweight fp32 [n].
    """
    grid, cut = _cut(x, rope, heads)
    dots, dweight = torch.empty_like(rstd), rstd.new_empty(grid[0], x.shape[-1])
    outputs = {"dots": dots, "dweight": dweight}
    launch(
        rms_rope_backward_dots_kernel,
        grid,
        num_warps=4,
        grad=grad,
        x=x,
        weight=weight,
        rstd=rstd,
        rope=rope,
        **outputs,
        **cut,
    )
    return dots, dweight.sum(0)


def rms_rope_backward_dx(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, mean_dots: Tensor, rope: Tensor | None, heads: int
) -> Tensor:
    """The second half: dx in the dtype of x.

    Args:
        grad: d loss / d y [B, S, n].
        x: [B, S, n].
        weight: [n].
        rstd: fp32 [B, S].
        mean_dots: the dots' mean over the units of all ranks, fp32 [B, S].
        rope: as in `rms_rope`.
        heads: of this rank.
    """
    dx = torch.empty_like(x)
    grid, cut = _cut(x, rope, heads)
    launch(
        rms_rope_backward_dx_kernel,
        grid,
        num_warps=4,
        grad=grad,
        x=x,
        weight=weight,
        rstd=rstd,
        mean_dots=mean_dots,
        rope=rope,
        dx=dx,
        **cut,
    )
    return dx


def _cut(x: Tensor, rope: Tensor | None, heads: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the arguments that say how x [B, S, n] is cut; a head may be any chunk without rotations."""
    samples, tokens, width = x.shape
    head_dim = _CHUNK if rope is None else width // heads
    block = padded(head_dim)
    rows = max(_TILE // block, 1)
    return (samples * triton.cdiv(tokens, rows),), {
        "tokens": tokens,
        "width": width,
        "heads": triton.cdiv(width, head_dim),
        "head_dim": head_dim,
        "ROPE": rope is not None,
        "ROWS": rows,
        "BLOCK": block,
    }
