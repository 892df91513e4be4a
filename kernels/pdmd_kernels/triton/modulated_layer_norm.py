"""y = LN(x) (1 + scale) + shift; with g = grad (1 + scale), n = (x - mean) rstd: dx = rstd (g - mean(g) - n mean(g n)).

dshift = sum(grad) and dscale = sum(grad n), over the tokens that share a shift. Each program keeps its rows in
registers: x is read once, the variance is that of the deviations from the mean. Sums over tokens are taken in two
stages, in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdmd_kernels.triton.launching import launch, padded
from pdmd_kernels.triton.tiling import LONGEST_ROW_IN_COMPANY, column_tile, row_warps, rows_per_program, token_stride


@triton.jit
def modulated_layer_norm_kernel(
    x,
    shift,
    scale,
    y,
    mean,
    rstd,
    tokens,
    width,
    shift_sample,
    shift_token,
    scale_sample,
    scale_token,
    inverse_width,
    eps,
    rows,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some rows; shift and scale stay in registers where they are HELD, else they are loaded for each row."""
    programs = tl.cdiv(tokens, rows)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * rows
    lane = tl.arange(0, BLOCK)
    mask = lane < width
    shift += sample * shift_sample
    scale += sample * scale_sample
    if HELD:
        offset = tl.load(shift + lane, mask=mask)
        factor = 1.0 + tl.load(scale + lane, mask=mask)
    for token in range(first, tl.minimum(first + rows, tokens)):
        row = sample * tokens + token
        value = tl.load(x + row * width + lane, mask=mask, other=0.0).to(tl.float32)
        center = tl.sum(value) * inverse_width
        deviation = tl.where(mask, value - center, 0.0)
        spread = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(deviation * deviation) * inverse_width + eps))
        if not HELD:
            offset = tl.load(shift + token * shift_token + lane, mask=mask)
            factor = 1.0 + tl.load(scale + token * scale_token + lane, mask=mask)
        value = deviation * spread * factor + offset
        tl.store(y + row * width + lane, value.to(y.dtype.element_ty), mask=mask)
        tl.store(mean + row, center)
        tl.store(rstd + row, spread)


@triton.jit
def modulated_layer_norm_backward_kernel(
    grad,
    x,
    scale,
    mean,
    rstd,
    dx,
    dshift,
    dscale,
    tokens,
    width,
    scale_sample,
    scale_token,
    inverse_width,
    rows,
    PER_TOKEN: tl.constexpr,
    HELD: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of some rows, and their dshift and dscale: each row's own where PER_TOKEN, else the program's sums."""
    programs = tl.cdiv(tokens, rows)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * rows
    lane = tl.arange(0, BLOCK)
    mask = lane < width
    scale += sample * scale_sample
    if HELD:
        factor = 1.0 + tl.load(scale + lane, mask=mask, other=0.0)
    if SUMS and not PER_TOKEN:
        shift_sum = tl.zeros([BLOCK], tl.float32)
        scale_sum = tl.zeros([BLOCK], tl.float32)
    for token in range(first, tl.minimum(first + rows, tokens)):
        row = sample * tokens + token
        upstream = tl.load(grad + row * width + lane, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + row * width + lane, mask=mask, other=0.0).to(tl.float32)
        spread = tl.load(rstd + row)
        normed = tl.where(mask, (value - tl.load(mean + row)) * spread, 0.0)
        if not HELD:
            factor = 1.0 + tl.load(scale + token * scale_token + lane, mask=mask, other=0.0)
        inner = upstream * factor
        along = tl.sum(inner * normed) * inverse_width
        value = spread * (inner - tl.sum(inner) * inverse_width - normed * along)
        tl.store(dx + row * width + lane, value.to(dx.dtype.element_ty), mask=mask)
        if SUMS:
            if PER_TOKEN:
                tl.store(dshift + row * width + lane, upstream, mask=mask)
                tl.store(dscale + row * width + lane, upstream * normed, mask=mask)
            else:
                shift_sum += upstream
                scale_sum += upstream * normed
    if SUMS and not PER_TOKEN:
        part = tl.program_id(0).to(tl.int64) * width
        tl.store(dshift + part + lane, shift_sum, mask=mask)
        tl.store(dscale + part + lane, scale_sum, mask=mask)


@triton.jit
def modulation_sums_kernel(
    grad,
    x,
    mean,
    rstd,
    dshift,
    dscale,
    tokens,
    width,
    rows,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dshift and dscale alone, of some rows and columns; as in the kernel above."""
    columns = tl.cdiv(width, BLOCK)
    programs = tl.cdiv(tokens, rows)
    part = tl.program_id(0) // columns
    sample = (part // programs).to(tl.int64)
    first = (part % programs).to(tl.int64) * rows
    column = (tl.program_id(0) % columns) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    shift_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    scale_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + rows, tokens), ROWS):
        local = tl.arange(0, ROWS)
        valid = local < tl.minimum(first + rows, tokens) - start
        base = (sample * tokens + start) * width
        offset = local[:, None] * width + column[None, :]
        mask = valid[:, None] & inside[None, :]
        upstream = tl.load(grad + base + offset, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + base + offset, mask=mask, other=0.0).to(tl.float32)
        center = tl.load(mean + sample * tokens + start + local, mask=valid, other=0.0)
        spread = tl.load(rstd + sample * tokens + start + local, mask=valid, other=0.0)
        product = upstream * ((value - center[:, None]) * spread[:, None])
        if PER_TOKEN:
            tl.store(dshift + base + offset, upstream, mask=mask)
            tl.store(dscale + base + offset, product, mask=mask)
        else:
            shift_sum += upstream
            scale_sum += product
    if not PER_TOKEN:
        tl.store(dshift + part.to(tl.int64) * width + column, tl.sum(shift_sum, axis=0), mask=inside)
        tl.store(dscale + part.to(tl.int64) * width + column, tl.sum(scale_sum, axis=0), mask=inside)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LN(x) (1 + scale) + shift.

    Args:
        x: [B, S, d].
        shift: fp32 [B, 1 or S, d], the last dim contiguous.
        scale: as shift.
        eps: added to the variance.

    Returns:
        y in the dtype of x; mean and rstd of the tokens, fp32 [B, S].
    """
    samples, tokens, width = x.shape
    y, block = torch.empty_like(x), padded(width)
    mean = torch.empty(samples, tokens, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    rows = rows_per_program(samples, tokens)
    launch(
        modulated_layer_norm_kernel,
        (samples * triton.cdiv(tokens, rows),),
        num_warps=row_warps(block),
        x=x,
        shift=shift,
        scale=scale,
        y=y,
        mean=mean,
        rstd=rstd,
        tokens=tokens,
        width=width,
        shift_sample=shift.stride(0),
        shift_token=token_stride(shift),
        scale_sample=scale.stride(0),
        scale_token=token_stride(scale),
        inverse_width=1 / width,
        eps=eps,
        rows=rows,
        HELD=scale.shape[1] == 1 and block <= LONGEST_ROW_IN_COMPANY,
        BLOCK=block,
    )
    return y, mean, rstd


def modulated_layer_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, in one pass over grad and x (in two where rows are too long to keep sums beside them).

    Args:
        grad: d loss / d y [B, S, d].
        x: the input [B, S, d].
        scale: fp32 [B, 1 or S, d].
        mean: of the tokens, fp32 [B, S].
        rstd: as mean.
        mask: whether dx, and whether dshift and dscale are wanted.

    Returns:
        dx in the dtype of x, dshift and dscale in fp32 and the shape of scale; what is not wanted is empty.
    """
    samples, tokens, width = x.shape
    per_token, block = scale.shape[1] == tokens, padded(width)
    with_dx = mask[0] and (block <= LONGEST_ROW_IN_COMPANY or per_token)
    tile_rows, tile_columns = column_tile(width)
    rows = rows_per_program(samples, tokens, tile=1 if with_dx or not mask[1] else tile_rows)
    parts = triton.cdiv(tokens, rows)
    dx = torch.empty_like(x) if mask[0] else x.new_empty(0)
    dshift = scale.new_empty((samples, tokens if per_token else parts, width) if mask[1] else (0,))
    dscale = torch.empty_like(dshift)
    shared = {"grad": grad, "x": x, "mean": mean, "rstd": rstd, "dshift": dshift, "dscale": dscale}
    shared |= {"tokens": tokens, "width": width, "rows": rows, "PER_TOKEN": per_token}
    if mask[0]:
        launch(
            modulated_layer_norm_backward_kernel,
            (samples * parts,),
            num_warps=row_warps(block),
            scale=scale,
            dx=dx,
            scale_sample=scale.stride(0),
            scale_token=token_stride(scale),
            inverse_width=1 / width,
            HELD=not per_token and block <= LONGEST_ROW_IN_COMPANY,
            SUMS=mask[1] and with_dx,
            BLOCK=block,
            **shared,
        )
    if mask[1] and not with_dx:
        grid = (samples * parts * triton.cdiv(width, tile_columns),)
        launch(modulation_sums_kernel, grid, num_warps=4, ROWS=tile_rows, BLOCK=tile_columns, **shared)
    if mask[1] and not per_token:
        dshift, dscale = dshift.sum(1, keepdim=True), dscale.sum(1, keepdim=True)
    return dx, dshift, dscale
