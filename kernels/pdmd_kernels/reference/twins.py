"""The public ops in plain torch, which autograd differentiates: the definition of what each computes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pdmd_kernels.reference import primitives
from pdmd_kernels.reference.rms_rope import rms_rope, sum_of_squares


def diffuse(x: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """See `pdmd_kernels.diffuse`."""
    return primitives.subinterval_noise(x, eps, a, b, x.dtype)


def subinterval_noise(x_s: Tensor, noise: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """See `pdmd_kernels.subinterval_noise`."""
    return primitives.subinterval_noise(x_s, noise, a, b, dtype or x_s.dtype)


def subinterval_loss(
    output: Tensor, x_s: Tensor, noise: Tensor, c_out: Tensor, c_eps: Tensor, c_x: Tensor, weight: Tensor
) -> Tensor:
    """See `pdmd_kernels.subinterval_loss`."""
    return primitives.subinterval_loss(output, x_s, noise, c_out, c_eps, c_x, weight)[0]


def dmd_gradient(
    teacher_flow: Tensor,
    fake_flow: Tensor,
    weight: Tensor,
    x_s: Tensor | None = None,
    x_t: Tensor | None = None,
    c_x: Tensor | None = None,
    floor: float = 1e-6,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    count_nonfinite: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `pdmd_kernels.dmd_gradient`."""
    result = primitives.dmd_gradient(teacher_flow, unconditional, guidance, fake_flow, weight, x_s, x_t, c_x, floor)
    return result if count_nonfinite else result[0]


def euler_step(
    x: Tensor, flow: Tensor, a: Tensor, b: Tensor, copy_dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `pdmd_kernels.euler_step`."""
    result = primitives.euler_step(x, flow, a, b, copy_dtype)
    return result[0] if copy_dtype is None else result


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """See `pdmd_kernels.modulated_layer_norm`."""
    return primitives.modulated_layer_norm(x, shift, scale, eps)[0]


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """See `pdmd_kernels.gated_residual`."""
    return primitives.gated_residual(x, h, gate)


def gelu_tanh(x: Tensor) -> Tensor:
    """See `pdmd_kernels.gelu_tanh`."""
    return primitives.gelu_tanh(x)


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
    reduce: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `pdmd_kernels.qk_norm_rope`; `reduce` must be differentiable here, if gradients are wanted."""
    squares = torch.cat((sum_of_squares(query), sum_of_squares(key)), dim=1)
    if reduce is not None:
        reduce(squares)
    rstd = (squares / size + eps).rsqrt().split((query.shape[1], key.shape[1]), dim=1)
    return (
        rms_rope(query, query_weight, rstd[0], rope, heads),
        rms_rope(key, key_weight, rstd[1], rope, heads),
    )


def adamw_beta1_zero(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
    *,
    lr: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
) -> None:
    """See `pdmd_kernels.adamw_beta1_zero`."""
    primitives.adamw_beta1_zero(params, grads, exp_avg_sqs, copies, lr, beta2, eps, weight_decay, step, grad_scale)


def normal(seeds: Tensor, numel: int, offset: int = 0) -> Tensor:
    """See `pdmd_kernels.normal`."""
    return primitives.normal(seeds, numel, offset)


def random_words(seeds: Tensor, numel: int, offset: int = 0) -> Tensor:
    """See `pdmd_kernels.random_words`."""
    return primitives.random_words(seeds, numel, offset)
