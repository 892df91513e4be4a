"""x' = a x + b flow on fp32 latents, and x' once more in the dtype of the next pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdmd_kernels.triton.launching import launch

BLOCK = 1024


@triton.jit
def euler_step_kernel(x, flow, a, b, x_next, copy, numel, COPY: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(numel, BLOCK)
    sample = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < numel - start
    base = sample.to(tl.int64) * numel + start
    latent = tl.load(x + base + lane, mask=mask).to(tl.float32)
    direction = tl.load(flow + base + lane, mask=mask).to(tl.float32)
    value = tl.load(a + sample).to(tl.float32) * latent + tl.load(b + sample).to(tl.float32) * direction
    value = value.to(x_next.dtype.element_ty)
    tl.store(x_next + base + lane, value, mask=mask)
    if COPY:
        tl.store(copy + base + lane, value.to(tl.float32).to(copy.dtype.element_ty), mask=mask)


def euler_step(x: Tensor, flow: Tensor, a: Tensor, b: Tensor, copy_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """One step of the sampler.

    Args:
        x: latents [B, ...], usually fp32.
        flow: the model's output, of the shape of x.
        a: factor of x [B].
        b: factor of flow [B].
        copy_dtype: of the copy, or none.

    Returns:
        x' in the dtype of x, and its copy in copy_dtype (empty if not asked for).
    """
    x_next = torch.empty_like(x)
    copy = x.new_empty(0) if copy_dtype is None else torch.empty_like(x, dtype=copy_dtype)
    if x.numel():
        numel = x[0].numel()
        launch(
            euler_step_kernel,
            (x.shape[0] * triton.cdiv(numel, BLOCK),),
            num_warps=4,
            x=x,
            flow=flow,
            a=a,
            b=b,
            x_next=x_next,
            copy=copy,
            numel=numel,
            COPY=copy_dtype is not None,
            BLOCK=BLOCK,
        )
    return x_next, copy
