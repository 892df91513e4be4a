"""The ops in plain torch: the definition of what each computes.

Tensors are [B, ...] in any floating dtype, coefficients are [B]. The arithmetic is done in fp32 (in fp64 if a tensor is
fp64): the samples carry the precision, the model's outputs are only read.
"""

import torch
from torch import Tensor


def diffuse(x: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b eps: Eq. 1 with (alpha_t, sigma_t), Eq. 2 with (alpha_{t|s}, sigma_{t|s}).

    Args:
        x: samples [B, ...].
        eps: noise of the shape of x.
        a: factor of x [B].
        b: factor of eps [B].

    Returns:
        [B, ...] in the dtype of x.
    """
    return _combine(x, eps, a, b)


def euler_step(x: Tensor, flow: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b flow: one Euler step of the sampler.

    Args:
        x: latents [B, ...], kept in fp32 by the caller while flow may be bf16.
        flow: the model's output, of the shape of x.
        a: factor of x [B].
        b: factor of flow [B].

    Returns:
        [B, ...] in the dtype of x.
    """
    return _combine(x, flow, a, b)


def subinterval_loss(
    output: Tensor, x_s: Tensor, eps: Tensor, c_out: Tensor, c_eps: Tensor, c_x: Tensor, weight: Tensor
) -> Tensor:
    """weight * mean((c_out output - c_eps eps - c_x x_s)^2): the integrand of Eq. 13, differentiable in output.

    Args:
        output: the model's prediction [B, ...].
        x_s: the samples that were diffused, of the shape of output.
        eps: the noise they were diffused with, of the shape of output.
        c_out: factor of output [B].
        c_eps: factor of eps [B].
        c_x: factor of x_s [B].
        weight: factor of the squared residual [B].

    Returns:
        One number per sample [B], in fp32 (fp64 if a tensor is fp64).
    """
    output, x_s, eps = _widened(output, x_s, eps)
    residual = _expanded(c_out, output) * output - _expanded(c_eps, eps) * eps - _expanded(c_x, x_s) * x_s
    return weight.to(residual.dtype) * _mean_per_sample(residual.square())


def dmd_gradient(
    teacher_flow: Tensor,
    fake_flow: Tensor,
    weight: Tensor,
    x_s: Tensor | None = None,
    x_t: Tensor | None = None,
    c_x: Tensor | None = None,
    floor: float = 1e-6,
) -> Tensor:
    """weight (teacher - fake), the gradient of Eq. 9 to 11, or that over the teacher's error on the sample.

    Given x_s, x_t and c_x it is divided by max(mean|x_s - (c_x x_t - weight teacher)|, floor), mean per sample; the
    inner parenthesis is the teacher's posterior mean of x_s if c_x and weight are that mean's coefficients.

    Args:
        teacher_flow: [B, ...].
        fake_flow: of the shape of teacher_flow.
        weight: [B].
        x_s: the generator's samples, of the shape of teacher_flow.
        x_t: the diffused samples, of the shape of teacher_flow.
        c_x: factor of x_t [B].
        floor: the least denominator, in units of the latents.

    Returns:
        The gradient with respect to x_s [B, ...], in fp32 (fp64 if a flow is fp64).
    """
    assert (x_s is None) == (x_t is None) == (c_x is None), "x_s, x_t and c_x come together"
    if x_s is None:
        teacher_flow, fake_flow = _widened(teacher_flow, fake_flow)
        return _expanded(weight, teacher_flow) * (teacher_flow - fake_flow)
    teacher_flow, fake_flow, x_s, x_t = _widened(teacher_flow, fake_flow, x_s, x_t)
    factor = _expanded(weight, teacher_flow)
    error = x_s - (_expanded(c_x, x_t) * x_t - factor * teacher_flow)
    scale = _mean_per_sample(error.abs()).clamp(min=floor)
    return factor * (teacher_flow - fake_flow) / _expanded(scale, teacher_flow)


def _combine(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    wide_x, wide_y = _widened(x, y)
    return (_expanded(a, wide_x) * wide_x + _expanded(b, wide_y) * wide_y).to(x.dtype)


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the arithmetic: fp32, or fp64 if one of them is."""
    shape = tensors[0].shape
    assert all(tensor.shape == shape for tensor in tensors), f"shapes differ: {[tuple(x.shape) for x in tensors]}"
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def _expanded(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient [B] as [B, 1, ...], in the dtype of the tensor that it multiplies."""
    assert coefficient.shape == like.shape[:1], f"{tuple(coefficient.shape)} for a batch of {tuple(like.shape)}"
    return coefficient.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _mean_per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1) if x.ndim > 1 else x
