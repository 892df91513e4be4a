"""RMS norm over the units of all heads, weight and rotation: y = rope(x rstd weight), rstd = (mean(x^2) + eps)^(-1/2).

x is [B, S, n] with n = heads * head_dim, rope fp32 [S, head_dim / 2, 2] holds (cos, sin) for the channels (2i, 2i + 1)
of a head. The pieces stand apart because the sum of squares, and in the backward pass the dots, run over the heads of
all tensor-parallel ranks. With g = unrope(grad): dx = rstd (g weight - x rstd mean(g weight x rstd)),
dweight = sum(g x rstd).
"""

import torch
from torch import Tensor


def sum_of_squares(x: Tensor) -> Tensor:
    """sum(x^2) over the last dim, in fp32 (fp64 for an fp64 x)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1)


def rms_rope(x: Tensor, weight: Tensor, rstd: Tensor, rope: Tensor | None, heads: int) -> Tensor:
    """rope(x rstd weight) in the dtype of x; rstd [B, S], weight [n]."""
    y = x.to(rstd.dtype) * rstd.unsqueeze(-1) * weight.to(rstd.dtype)
    return _rotated(y, rope, heads).to(x.dtype)


def rms_rope_backward_dots(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, rope: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """sum(unrope(grad) weight x rstd) over this rank's units [B, S], and dweight [n], both in the dtype of rstd."""
    product = (_unrotated(grad.to(rstd.dtype), rope, heads) * (x * rstd.unsqueeze(-1))).flatten(0, 1)
    return torch.mv(product, weight.to(rstd.dtype)).view_as(rstd), product.sum(0)


def rms_rope_backward_dx(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, mean_dots: Tensor, rope: Tensor | None, heads: int
) -> Tensor:
    """rstd (unrope(grad) weight - x rstd mean_dots) in the dtype of x; mean_dots [B, S]."""
    rstd = rstd.unsqueeze(-1)
    weighted = _unrotated(grad.to(rstd.dtype), rope, heads) * weight.to(rstd.dtype)
    return (rstd * (weighted - x * rstd * mean_dots.unsqueeze(-1))).to(x.dtype)


def rms_norm_rope(x: Tensor, weight: Tensor, rope: Tensor | None, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """y in the dtype of x and rstd [B, S], where one rank holds all heads."""
    rstd = (sum_of_squares(x) / x.shape[-1] + eps).rsqrt()
    return rms_rope(x, weight, rstd, rope, heads), rstd


def rms_norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, rope: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """dx in the dtype of x and dweight [n] in the dtype of rstd, where one rank holds all heads."""
    dots, dweight = rms_rope_backward_dots(grad, x, weight, rstd, rope, heads)
    return rms_rope_backward_dx(grad, x, weight, rstd, dots / x.shape[-1], rope, heads), dweight


def _rotated(x: Tensor, rope: Tensor | None, heads: int) -> Tensor:
    if rope is None:
        return x
    even, odd = x.unflatten(-1, (heads, -1, 2)).unbind(-1)
    cos, sin = rope.unsqueeze(1).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-3)


def _unrotated(x: Tensor, rope: Tensor | None, heads: int) -> Tensor:
    if rope is None:
        return x
    cos, sin = rope.unbind(-1)
    return _rotated(x, torch.stack((cos, -sin), dim=-1), heads)
