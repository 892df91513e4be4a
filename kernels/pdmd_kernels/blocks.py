"""The transformer block's memory-bound ops: adaptive layer norm, gated residual, and the norm and rotation of q and k.

Each saves its inputs in the dtype they came in, and computes in fp32 (fp64 for fp64 input).

For CPU tensors the C++ library differentiates its kernels itself, and checks the arguments, because Python would take
longer than the kernels do on small tensors. What it refuses goes through the checks here, which say why.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from pdmd_kernels import checks
from pdmd_kernels.backend import runs_native, select
from pdmd_kernels.reference import primitives

Reduce = Callable[[Tensor], object]


class _ModulatedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.kernels = select(x)
        y, mean, rstd = ctx.kernels.modulated_layer_norm(x, shift, scale, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_shift, need_scale, _ = ctx.needs_input_grad
        mask = [need_x, need_shift or need_scale]
        dx, dshift, dscale = ctx.kernels.modulated_layer_norm_backward(grad.contiguous(), *ctx.saved_tensors, mask)
        return dx if need_x else None, dshift if need_shift else None, dscale if need_scale else None, None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
        ctx.kernels = select(x)
        ctx.save_for_backward(h, gate)
        return ctx.kernels.gated_residual(x, h, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_h, need_gate = ctx.needs_input_grad
        dh = dgate = None
        if need_h or need_gate:
            h, gate = ctx.saved_tensors
            dh, dgate = ctx.kernels.gated_residual_backward(grad.contiguous(), h, gate, [need_h, need_gate])
        return grad if need_x else None, dh if need_h else None, dgate if need_gate else None


class _QKNormRope(torch.autograd.Function):
    """Both norms, so that the sums over the tensor-parallel ranks are one message each way."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        rope: Tensor | None,
        heads: int,
        eps: float,
        size: int,
        reduce: Reduce | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels = kernels = select(query, query_weight, key_weight)
        ctx.heads, ctx.size, ctx.reduce = heads, size, reduce
        if reduce is None:
            query_out, query_rstd = kernels.rms_norm_rope(query, query_weight, rope, heads, eps)
            key_out, key_rstd = kernels.rms_norm_rope(key, key_weight, rope, heads, eps)
        else:
            squares = torch.cat([kernels.sum_of_squares(x).flatten() for x in (query, key)])
            reduce(squares)
            query_rstd, key_rstd = _halves(squares.div_(size).add_(eps).rsqrt_(), query, key)
            query_out = kernels.rms_rope(query, query_weight, query_rstd, rope, heads)
            key_out = kernels.rms_rope(key, key_weight, key_rstd, rope, heads)
        ctx.save_for_backward(query, key, query_weight, key_weight, query_rstd, key_rstd, rope)
        return query_out, key_out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, query_grad: Tensor, key_grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, query_weight, key_weight, query_rstd, key_rstd, rope = ctx.saved_tensors
        sides = (
            (query_grad.contiguous(), query, query_weight, query_rstd),
            (key_grad.contiguous(), key, key_weight, key_rstd),
        )
        kernels, rest = ctx.kernels, (rope, ctx.heads)
        if ctx.reduce is None:
            (dquery, dquery_weight), (dkey, dkey_weight) = (
                kernels.rms_norm_rope_backward(*side, *rest) for side in sides
            )
        else:
            (query_dots, dquery_weight), (key_dots, dkey_weight) = (
                kernels.rms_rope_backward_dots(*side, *rest) for side in sides
            )
            dots = torch.cat((query_dots.flatten(), key_dots.flatten()))
            ctx.reduce(dots)
            means = _halves(dots.div_(ctx.size), query, key)
            dquery, dkey = (
                kernels.rms_rope_backward_dx(*side, mean, *rest) for side, mean in zip(sides, means, strict=True)
            )
        grads = dquery, dkey, dquery_weight.to(query_weight.dtype), dkey_weight.to(key_weight.dtype)
        needed = zip(grads, ctx.needs_input_grad[:4], strict=True)
        return (*(grad if need else None for grad, need in needed), *(None,) * 5)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift, without affine weights.

    Args:
        x: [B, S, d].
        shift: [B, 1, d] for one time per sample or [B, S, d] for one per token, fp32 (fp64 for an fp64 x).
        scale: as shift.
        eps: added to the variance.

    Returns:
        [B, S, d] in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if runs_native(x, shift, scale):
        result = _accepted(torch.ops.pdmd.differentiable_modulated_layer_norm.default, x, shift, scale, eps)
        if result is not None:
            return result
    checks.rows(x, "x")
    checks.modulation(shift, x, "shift")
    checks.modulation(scale, x, "scale")
    if shift.shape != scale.shape:
        raise ValueError(f"shift is {list(shift.shape)} and scale {list(scale.shape)}; give both in one shape")
    x, shift, scale = x.contiguous(), _rows_contiguous(shift), _rows_contiguous(scale)
    if torch.is_grad_enabled():
        return _ModulatedLayerNorm.apply(x, shift, scale, eps)
    return select(x).modulated_layer_norm(x, shift, scale, eps)[0]


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate h.

    Args:
        x: [B, S, d].
        h: of the shape and dtype of x.
        gate: [B, 1, d] for one time per sample or [B, S, d] for one per token, fp32 (fp64 for an fp64 x).

    Returns:
        [B, S, d] in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if runs_native(x, h, gate):
        result = _accepted(torch.ops.pdmd.differentiable_gated_residual.default, x, h, gate)
        if result is not None:
            return result
    checks.rows(x, "x")
    checks.same_shape(h, x, "h", "x")
    checks.same_dtype(h, x, "h", "x")
    checks.modulation(gate, x, "gate")
    x, h, gate = x.contiguous(), h.contiguous(), _rows_contiguous(gate)
    if torch.is_grad_enabled():
        return _GatedResidual.apply(x, h, gate)
    return select(x).gated_residual(x, h, gate)


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))); the backward pass computes it again from x.

    There is no Triton kernel: on CUDA torch's own gelu already takes no longer than its memory traffic.

    Args:
        x: of any shape.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: x is not floating, or the chosen backend does not run on its device.
    """
    checks.floating(x, "x")
    if runs_native(x):
        return torch.ops.pdmd.differentiable_gelu_tanh.default(x)
    select(x)  # refuses a backend that does not run here, and says so where the C++ kernels are missing
    return primitives.gelu_tanh(x.contiguous())


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    *,
    eps: float,
    size: int,
    heads: int,
    rope: Tensor | None = None,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys by their root mean square over all heads, times a weight, turned by their position.

    Args:
        query: [B, S, n], n = heads * head_dim.
        key: [B, L, n] of the dtype of query; L is S where there is a rope.
        query_weight: [n].
        key_weight: [n].
        eps: added to the mean square.
        size: units over all tensor-parallel ranks, the mean's divisor.
        heads: of this rank.
        rope: (cos, sin) of the channels (2i, 2i + 1) of a head, fp32 [S, head_dim / 2, 2]; none does not turn.
        reduce: sums a tensor in place over the tensor-parallel ranks; called once forward and once backward.

    Returns:
        Queries and keys in their shapes and dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    turns = rope is not None
    alone = reduce is None and size == query.shape[-1] and not (turns and key.shape != query.shape)
    if alone and runs_native(query, key, query_weight, key_weight, *((rope,) if turns else ())):
        arguments = query, key, query_weight, key_weight, rope, heads, eps
        result = _accepted(torch.ops.pdmd.differentiable_qk_norm_rope.default, *arguments)
        if result is not None:
            return result
    checks.rows(query, "query")
    _check_key(query, key, rope)
    _check_weight(query_weight, query, "query_weight")
    _check_weight(key_weight, query, "key_weight")
    _check_heads(query, heads, size, rope, reduce)
    arguments = query.contiguous(), key.contiguous(), query_weight.contiguous(), key_weight.contiguous()
    rope = None if rope is None else rope.contiguous()
    return _QKNormRope.apply(*arguments, rope, heads, eps, size, reduce)


def _accepted(op: Callable[..., Any], *arguments: Any) -> Any:
    """The result of an op of the C++ library, or none if it refuses its arguments."""
    try:
        return op(*arguments)
    except ValueError:
        return None


def _halves(joined: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """[B S + B L] as [B, S] and [B, L]."""
    split = query.shape[0] * query.shape[1]
    return joined[:split].view(query.shape[:2]), joined[split:].view(key.shape[:2])


def _rows_contiguous(m: Tensor) -> Tensor:
    return m if m.stride(-1) == 1 else m.contiguous()


def _check_key(query: Tensor, key: Tensor, rope: Tensor | None) -> None:
    checks.rows(key, "key")
    checks.same_dtype(key, query, "key", "query")
    checks.on_device(key, query, "key")
    batch, tokens, n = query.shape
    if (key.shape[0], key.shape[2]) != (batch, n) or (rope is not None and key.shape[1] != tokens):
        length = "L" if rope is None else tokens
        raise ValueError(f"key is {list(key.shape)}; it must be [{batch}, {length}, {n}] for this query and rope")


def _check_weight(weight: Tensor, query: Tensor, name: str) -> None:
    checks.floating(weight, name)
    checks.on_device(weight, query, name)
    if weight.shape != query.shape[2:]:
        raise ValueError(f"{name} is {list(weight.shape)}; it must be [{query.shape[2]}]")


def _check_heads(query: Tensor, heads: int, size: int, rope: Tensor | None, reduce: Reduce | None) -> None:
    n = query.shape[2]
    if heads < 1 or n % heads:
        raise ValueError(f"heads is {heads}; it must divide the {n} units of query")
    if reduce is None and size != n:
        raise ValueError(f"size is {size} for {n} units; give reduce, which sums over the ranks that hold the others")
    if rope is None:
        return
    wanted = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = (query.shape[1], n // heads // 2, 2)
    if rope.dtype != wanted or rope.shape != shape or n // heads % 2:
        raise ValueError(
            f"rope is {rope.dtype} {list(rope.shape)}; it must be {wanted} {list(shape)}, with head_dim even"
        )
    checks.on_device(rope, query, "rope")
