"""y = x + gate h; dh = grad gate, dgate = sum(grad h) over the tokens that share a gate.

The sum is taken in two stages, in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdmd_kernels.triton.launching import launch
from pdmd_kernels.triton.tiling import column_tile, rows_per_program, token_stride


@triton.jit
def gated_residual_kernel(
    x,
    h,
    gate,
    y,
    tokens,
    width,
    gate_sample,
    gate_token,
    rows,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK)
    programs = tl.cdiv(tokens, rows)
    part = tl.program_id(0) // columns
    sample = (part // programs).to(tl.int64)
    first = (part % programs).to(tl.int64) * rows
    column = (tl.program_id(0) % columns) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    local = tl.arange(0, ROWS)
    gate += sample * gate_sample
    if not PER_TOKEN:
        factor = tl.load(gate + column, mask=inside)[None, :]
    for start in range(first, tl.minimum(first + rows, tokens), ROWS):
        valid = local < tl.minimum(first + rows, tokens) - start
        base = (sample * tokens + start) * width
        offset = local[:, None] * width + column[None, :]
        mask = valid[:, None] & inside[None, :]
        residual = tl.load(x + base + offset, mask=mask).to(tl.float32)
        update = tl.load(h + base + offset, mask=mask).to(tl.float32)
        if PER_TOKEN:
            own = gate + start * gate_token + local[:, None] * gate_token + column[None, :]
            factor = tl.load(own, mask=mask)
        tl.store(y + base + offset, (residual + update * factor).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gated_residual_backward_kernel(
    grad,
    h,
    gate,
    dh,
    dgate,
    tokens,
    width,
    gate_sample,
    gate_token,
    rows,
    DH: tl.constexpr,
    DGATE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK)
    programs = tl.cdiv(tokens, rows)
    part = tl.program_id(0) // columns
    sample = (part // programs).to(tl.int64)
    first = (part % programs).to(tl.int64) * rows
    column = (tl.program_id(0) % columns) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    local = tl.arange(0, ROWS)
    gate += sample * gate_sample
    if DH and not PER_TOKEN:
        factor = tl.load(gate + column, mask=inside)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + rows, tokens), ROWS):
        valid = local < tl.minimum(first + rows, tokens) - start
        base = (sample * tokens + start) * width
        offset = local[:, None] * width + column[None, :]
        mask = valid[:, None] & inside[None, :]
        upstream = tl.load(grad + base + offset, mask=mask, other=0.0).to(tl.float32)
        if DH:
            if PER_TOKEN:
                own = gate + start * gate_token + local[:, None] * gate_token + column[None, :]
                factor = tl.load(own, mask=mask)
            tl.store(dh + base + offset, (upstream * factor).to(dh.dtype.element_ty), mask=mask)
        if DGATE:
            product = upstream * tl.load(h + base + offset, mask=mask, other=0.0).to(tl.float32)
            if PER_TOKEN:
                tl.store(dgate + base + offset, product, mask=mask)
            else:
                total += product
    if DGATE and not PER_TOKEN:
        tl.store(dgate + part.to(tl.int64) * width + column, tl.sum(total, axis=0), mask=inside)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate h in the dtype of x.

    Args:
        x: [B, S, d].
        h: as x.
        gate: fp32 [B, 1 or S, d], the last dim contiguous.
    """
    y = torch.empty_like(x)
    grid, cut = _cut(x, gate)
    num_warps = 8 if cut["PER_TOKEN"] else 4  # with 4, ptxas spills on sm_100
    launch(gated_residual_kernel, grid, num_warps=num_warps, x=x, h=h, gate=gate, y=y, **cut)
    return y


def gated_residual_backward(grad: Tensor, h: Tensor, gate: Tensor, mask: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The gradients, in one pass.

    Args:
        grad: d loss / d y [B, S, d].
        h: [B, S, d].
        gate: fp32 [B, 1 or S, d], the last dim contiguous.
        mask: whether dh, and whether dgate is wanted.

    Returns:
        dh in the dtype of h, dgate in fp32 and the shape of gate; what is not wanted is empty.
    """
    samples, tokens, width = h.shape
    grid, cut = _cut(h, gate)
    dh = torch.empty_like(h) if mask[0] else h.new_empty(0)
    parts = tokens if cut["PER_TOKEN"] else triton.cdiv(tokens, cut["rows"])
    dgate = gate.new_empty((samples, parts, width) if mask[1] else (0,))
    if any(mask):
        wanted = {"DH": mask[0], "DGATE": mask[1]}
        launch(
            gated_residual_backward_kernel,
            grid,
            num_warps=4,
            grad=grad,
            h=h,
            gate=gate,
            dh=dh,
            dgate=dgate,
            **wanted,
            **cut,
        )
    if mask[1] and not cut["PER_TOKEN"]:
        dgate = dgate.sum(1, keepdim=True)
    return dh, dgate


def _cut(x: Tensor, gate: Tensor) -> tuple[tuple[int], dict[str, int | bool]]:
    """The grid, and the arguments that say how x [B, S, d] is cut into programs."""
    samples, tokens, width = x.shape
    tile_rows, tile_columns = column_tile(width)
    rows = rows_per_program(samples, tokens, tile=tile_rows)
    grid = (samples * triton.cdiv(tokens, rows) * triton.cdiv(width, tile_columns),)
    return grid, {
        "tokens": tokens,
        "width": width,
        "gate_sample": gate.stride(0),
        "gate_token": token_stride(gate),
        "rows": rows,
        "PER_TOKEN": gate.shape[1] == tokens,
        "ROWS": tile_rows,
        "BLOCK": tile_columns,
    }
