"""Adaptive layer norm and gated residuals: y = LN(x) (1 + scale) + shift and y = x + gate h.

x and h are [B, S, d]; shift, scale and gate are fp32 (fp64 for an fp64 x), [B, 1, d] for one time per sample or
[B, S, d] for one per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype of x, and each token's mean and 1 / sqrt(variance + eps), [B, S] in the dtype of scale."""
    exact = torch.promote_types(x.dtype, scale.dtype)
    normed, mean, rstd = torch.native_layer_norm(x.to(exact), x.shape[-1:], None, None, eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def modulated_layer_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the dtype of x if mask[0], dshift and dscale in the shape and dtype of scale if mask[1], else empty.

    With g = grad (1 + scale) and n = (x - mean) rstd: dx = rstd (g - mean(g) - n mean(g n)).
    """
    exact = torch.promote_types(x.dtype, scale.dtype)
    grad, mean, rstd = grad.to(exact), mean.unsqueeze(-1), rstd.unsqueeze(-1)
    dx, dshift, dscale = x.new_empty(0), scale.new_empty(0), scale.new_empty(0)
    if mask[0]:
        arguments = (x.to(exact), x.shape[-1:], mean, rstd, None, None, [True, False, False])
        dx = torch.ops.aten.native_layer_norm_backward(grad * (1 + scale), *arguments)[0].to(x.dtype)
    if mask[1]:
        dshift = grad.sum_to_size(scale.shape).clone()
        dscale = (x - mean).mul_(rstd).mul_(grad).sum_to_size(scale.shape)
    return dx, dshift, dscale


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate h in the dtype of x."""
    exact = torch.promote_types(x.dtype, gate.dtype)
    return torch.addcmul(x.to(exact), h.to(exact), gate).to(x.dtype)


def gated_residual_backward(grad: Tensor, h: Tensor, gate: Tensor, mask: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """dh = grad gate in the dtype of h if mask[0], dgate = grad h in the shape of gate if mask[1], else empty."""
    wide = grad.to(torch.promote_types(h.dtype, gate.dtype))
    dh = (wide * gate).to(h.dtype) if mask[0] else h.new_empty(0)
    dgate = (wide * h).sum_to_size(gate.shape) if mask[1] else gate.new_empty(0)
    return dh, dgate
