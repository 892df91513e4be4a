"""Adaptive layer norm and gated residuals, y = LN(x) (1 + scale) + shift and y = x + gate h.

Both compute in at least fp32, save their inputs in the dtype they came in, and broadcast shift, scale and gate over the
tokens: [B, 1, d] for one time per sample, [B, S, d] for one per token.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_pdmd.models.layers.tensor_parallel import compute_dtype


class _ModulatedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        wide = x.to(compute_dtype(x.dtype))
        normed, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
        factor = 1 + scale
        ctx.save_for_backward(x, factor, mean, rstd)
        return torch.addcmul(shift, normed, factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, mean, rstd = ctx.saved_tensors
        wide, grad = x.to(rstd.dtype), grad.to(rstd.dtype)
        grad_x = grad_shift = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad * factor, wide, x.shape[-1:], mean, rstd, None, None, [True, False, False]
            )[0].to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_shift = grad.sum_to_size(factor.shape)
        if ctx.needs_input_grad[2]:
            grad_scale = (wide - mean).mul_(rstd).mul_(grad).sum_to_size(factor.shape)
        return grad_x, grad_shift, grad_scale, None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(h, gate)
        exact = compute_dtype(x.dtype)
        return torch.addcmul(x.to(exact), h.to(exact), gate).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, gate = ctx.saved_tensors
        wide = grad.to(gate.dtype)
        grad_h = (wide * gate).to(h.dtype) if ctx.needs_input_grad[1] else None
        grad_gate = (wide * h).sum_to_size(gate.shape) if ctx.needs_input_grad[2] else None
        return grad, grad_h, grad_gate


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift, without affine weights.

    Args:
        x: [B, S, d].
        shift: [B, 1 or S, d], fp32 (fp64 for an fp64 x).
        scale: as shift.
        eps: added to the variance.

    Returns:
        [B, S, d] in the dtype of x.
    """
    return _ModulatedLayerNorm.apply(x, shift, scale, eps)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate h, with x and h [B, S, d] of one dtype and gate [B, 1 or S, d] in fp32; returns the dtype of x."""
    return _GatedResidual.apply(x, h, gate)
