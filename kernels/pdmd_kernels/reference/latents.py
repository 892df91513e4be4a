"""The ops on latents: [B, ...] with one coefficient per sample [B]; computed in fp32, in fp64 if a tensor is fp64."""

import math

import torch
from torch import Tensor

from pdmd_kernels.reference.philox import normal


def subinterval_noise(x_s: Tensor, noise: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a x_s + b eps, in `dtype`."""
    eps = drawn(noise, x_s)
    exact = exact_dtype(x_s, eps)
    return (expanded(a, x_s, exact) * x_s.to(exact) + expanded(b, x_s, exact) * eps.to(exact)).to(dtype)


def subinterval_loss(
    output: Tensor, x_s: Tensor, noise: Tensor, c_out: Tensor, c_eps: Tensor, c_x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """weight mean((c_out output - c_eps eps - c_x x_s)^2) [B], and its gradient in the dtype of output.

    The gradient is 2 weight c_out / N times the residual; of no elements the mean is nan.
    """
    eps = drawn(noise, x_s)
    exact = exact_dtype(output, x_s, eps)
    factors = [expanded(c, output, exact) for c in (c_out, c_eps, c_x, weight)]
    residual = factors[0] * output.to(exact) - factors[1] * eps.to(exact) - factors[2] * x_s.to(exact)
    loss = weight.to(exact) * mean_per_sample(residual.square())
    numel = math.prod(output.shape[1:])
    gradient = (2 * factors[3] * factors[0] / max(numel, 1)) * residual
    return loss, gradient.to(output.dtype)


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
    """weight (guided - fake) and how many elements of it are not finite, int64 [B].

    With x_s it is divided by max(mean |x_s - (c_x x_t - weight guided)|, floor), the mean per sample.
    """
    tensors = [tensor for tensor in (teacher, unconditional, fake, x_s, x_t) if tensor is not None]
    exact = exact_dtype(*tensors)
    guided = teacher.to(exact)
    if unconditional is not None:
        guided = torch.lerp(unconditional.to(exact), guided, guidance)
    factor = expanded(weight, teacher, exact)
    gradient = factor * (guided - fake.to(exact))
    if x_s is not None:
        error = x_s.to(exact) - (expanded(c_x, x_t, exact) * x_t.to(exact) - factor * guided)
        scale = mean_per_sample(error.abs()).clamp(min=floor)
        gradient = gradient / expanded(scale, teacher, exact)
    finite = gradient.isfinite()
    return gradient, (~finite).flatten(1).sum(1) if gradient.ndim > 1 else (~finite).long()


def euler_step(x: Tensor, flow: Tensor, a: Tensor, b: Tensor, copy_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """a x + b flow in the dtype of x, and that in copy_dtype if asked for."""
    x_next = subinterval_noise(x, flow, a, b, x.dtype)
    return x_next, x.new_empty(0) if copy_dtype is None else x_next.to(copy_dtype, copy=True)


def drawn(noise: Tensor, like: Tensor) -> Tensor:
    """The noise itself, or the normals that int64 seeds [B] stand for, in the shape of `like`."""
    if noise.dtype != torch.int64:
        return noise
    return normal(noise, math.prod(like.shape[1:])).view(like.shape)


def exact_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 if one of the tensors is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def expanded(coefficient: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A coefficient [B] as [B, 1, ...]."""
    return coefficient.to(dtype).view(-1, *[1] * (like.ndim - 1))


def mean_per_sample(x: Tensor) -> Tensor:
    """[B, ...] to [B]."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x
