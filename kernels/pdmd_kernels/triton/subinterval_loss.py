"""loss = weight mean(r^2) and d loss / d output = 2 weight c_out / N r, with r = c_out output - c_eps eps - c_x x_s."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdmd_kernels.triton.launching import launch
from pdmd_kernels.triton.subinterval_noise import load_noise

BLOCK = 1024


@triton.jit
def subinterval_loss_kernel(
    output, x_s, noise, c_out, c_eps, c_x, weight, grad, sums, numel, inverse, DRAW: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of a sample: its part of the gradient and of the sum of squares."""
    blocks = tl.cdiv(numel, BLOCK)
    sample = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < numel - start
    base = sample.to(tl.int64) * numel + start
    out = tl.load(output + base + lane, mask=mask).to(tl.float32)
    x = tl.load(x_s + base + lane, mask=mask).to(tl.float32)
    eps = load_noise(noise, sample, start, numel, lane, mask, DRAW, BLOCK)
    factor = tl.load(c_out + sample).to(tl.float32)
    residual = factor * out - tl.load(c_eps + sample).to(tl.float32) * eps - tl.load(c_x + sample).to(tl.float32) * x
    scale = 2.0 * tl.load(weight + sample).to(tl.float32) * factor * inverse
    tl.store(grad + base + lane, (scale * residual).to(grad.dtype.element_ty), mask=mask)
    residual = tl.where(mask, residual, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(residual * residual))


def subinterval_loss(
    output: Tensor, x_s: Tensor, noise: Tensor, c_out: Tensor, c_eps: Tensor, c_x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, in one pass.

    Args:
        output: the model's prediction [B, ...].
        x_s: of the shape of output.
        noise: eps of the shape of output, or int64 seeds [B].
        c_out: factor of output [B].
        c_eps: factor of eps [B].
        c_x: factor of x_s [B].
        weight: factor of the loss [B].

    Returns:
        loss fp32 [B], and d loss / d output in the dtype of output.
    """
    grad = torch.empty_like(output)
    numel = output.shape[1:].numel()
    blocks = triton.cdiv(numel, BLOCK)
    sums = torch.empty(output.shape[0], blocks, dtype=torch.float32, device=output.device)
    launch(
        subinterval_loss_kernel,
        (sums.numel(),),
        num_warps=4,
        output=output,
        x_s=x_s,
        noise=noise,
        c_out=c_out,
        c_eps=c_eps,
        c_x=c_x,
        weight=weight,
        grad=grad,
        sums=sums,
        numel=numel,
        inverse=1 / max(numel, 1),
        DRAW=noise.dtype == torch.int64,
        BLOCK=BLOCK,
    )
    return weight.float() * (sums.sum(1) / numel), grad
