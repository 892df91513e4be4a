"""Normalisation in at least fp32, whatever the model's dtype.

RMSNorm is an autograd function because torch's own is composed of single operations on CPU, whose backward costs
several times as much, and because the sum of squares runs over the heads of all tensor-parallel ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_pdmd.models.layers.tensor_parallel import TensorParallel, compute_dtype, mark_sharded


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps)^(-1/2); dx = r (g w - x r mean(g w x r)), means over all ranks' units."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float, parallel: TensorParallel) -> Tensor:
        exact = compute_dtype(x.dtype)
        wide = x.to(exact)
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        r = parallel.all_reduce(squares).div_(x.shape[-1] * parallel.size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        ctx.parallel = parallel
        return (wide * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        normed = x * r
        grad = grad.to(normed.dtype)
        product = (grad * normed).reshape(-1, x.shape[-1])
        grad_weight = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None
        dots = ctx.parallel.all_reduce(torch.mv(product, weight.to(product.dtype)))
        means = dots.div_(x.shape[-1] * ctx.parallel.size).view_as(r)
        grad_x = (grad * weight).addcmul_(normed, means, value=-1).mul_(r)
        return grad_x.to(x.dtype), grad_weight, None, None


class RMSNorm(nn.Module):
    """Root-mean-square norm over all heads; each rank holds the units of its own heads.

    Args:
        size: units over all ranks.
        eps: added to the mean square.
        parallel: the tensor-parallel group.
        dtype: of the weight.
    """

    def __init__(self, size: int, *, eps: float, parallel: TensorParallel, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.parallel = parallel
        self.weight = nn.Parameter(torch.ones(size // parallel.size, dtype=dtype))
        mark_sharded(self.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [..., size / ranks] to the same shape and dtype."""
        return _RMSNorm.apply(x, self.weight, self.eps, self.parallel)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with fp32 weights (fp64 in an fp64 model) for input of any dtype, which the output keeps."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.to(x.dtype)
