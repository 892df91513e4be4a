"""x_t = a x_s + b eps, eps drawn from a counter or given."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdmd_kernels.triton.launching import launch
from pdmd_kernels.triton.philox import normals

BLOCK = 1024


@triton.jit
def load_noise(noise, sample, start, numel, lane, mask, DRAW: tl.constexpr, BLOCK: tl.constexpr):
    """eps of the elements start + lane of a sample in fp32: read, or drawn from the sample's seed."""
    if DRAW:
        eps = normals(tl.load(noise + sample), start // 4, BLOCK // 4)
    else:
        eps = tl.load(noise + (sample.to(tl.int64) * numel + start) + lane, mask=mask).to(tl.float32)
    return eps


@triton.jit
def subinterval_noise_kernel(x_s, noise, a, b, out, numel, DRAW: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(numel, BLOCK)
    sample = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < numel - start
    base = sample.to(tl.int64) * numel + start
    x = tl.load(x_s + base + lane, mask=mask).to(tl.float32)
    eps = load_noise(noise, sample, start, numel, lane, mask, DRAW, BLOCK)
    value = tl.load(a + sample).to(tl.float32) * x + tl.load(b + sample).to(tl.float32) * eps
    tl.store(out + base + lane, value.to(out.dtype.element_ty), mask=mask)


def subinterval_noise(x_s: Tensor, noise: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a x_s + b eps.

    Args:
        x_s: [B, ...].
        noise: eps of the shape of x_s, or int64 seeds [B].
        a: factor of x_s [B].
        b: factor of eps [B].
        dtype: of the result.
    """
    out = torch.empty_like(x_s, dtype=dtype)
    if out.numel():
        numel = x_s[0].numel()
        launch(
            subinterval_noise_kernel,
            (x_s.shape[0] * triton.cdiv(numel, BLOCK),),
            num_warps=4,
            x_s=x_s,
            noise=noise,
            a=a,
            b=b,
            out=out,
            numel=numel,
            DRAW=noise.dtype == torch.int64,
            BLOCK=BLOCK,
        )
    return out
