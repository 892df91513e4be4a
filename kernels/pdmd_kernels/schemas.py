"""The primitive ops, without autograd, as torch.library definitions in the namespace ``pdmd``.

They stand here so that they exist without a compiler or Triton. Where no backend has registered a kernel for a device,
an op runs its plain twin of `pdmd_kernels.reference`. B is the number of samples, S of tokens, d of channels, n of a
token's units over the heads of this rank. ``noise`` is either eps, of x_s's shape, or int64 seeds [B] to draw it from.
Tensors are contiguous, except shift, scale and gate, of which the last dim is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pdmd_kernels.reference import primitives

SCHEMAS = {
    "random_words": "(Tensor seeds, int numel, int offset=0) -> Tensor",
    "normal": "(Tensor seeds, int numel, int offset=0) -> Tensor",
    "subinterval_noise": "(Tensor x_s, Tensor noise, Tensor a, Tensor b, ScalarType dtype) -> Tensor",
    "subinterval_loss": "(Tensor output, Tensor x_s, Tensor noise, Tensor c_out, Tensor c_eps, Tensor c_x,"
    " Tensor weight) -> (Tensor loss, Tensor grad)",
    "dmd_gradient": "(Tensor teacher, Tensor? unconditional, float guidance, Tensor fake, Tensor weight, Tensor? x_s,"
    " Tensor? x_t, Tensor? c_x, float floor) -> (Tensor gradient, Tensor nonfinite)",
    "euler_step": "(Tensor x, Tensor flow, Tensor a, Tensor b, ScalarType? copy_dtype) -> (Tensor x_next, Tensor copy)",
    "modulated_layer_norm": "(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    "modulated_layer_norm_backward": "(Tensor grad, Tensor x, Tensor scale, Tensor mean, Tensor rstd, bool[2] mask)"
    " -> (Tensor dx, Tensor dshift, Tensor dscale)",
    "gated_residual": "(Tensor x, Tensor h, Tensor gate) -> Tensor",
    "gated_residual_backward": "(Tensor grad, Tensor h, Tensor gate, bool[2] mask) -> (Tensor dh, Tensor dgate)",
    "sum_of_squares": "(Tensor x) -> Tensor",
    "rms_rope": "(Tensor x, Tensor weight, Tensor rstd, Tensor? rope, int heads) -> Tensor",
    "rms_rope_backward_dots": "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? rope, int heads)"
    " -> (Tensor dots, Tensor dweight)",
    "rms_rope_backward_dx": "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor mean_dots, Tensor? rope,"
    " int heads) -> Tensor",
    "rms_norm_rope": "(Tensor x, Tensor weight, Tensor? rope, int heads, float eps) -> (Tensor y, Tensor rstd)",
    "rms_norm_rope_backward": "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? rope, int heads)"
    " -> (Tensor dx, Tensor dweight)",
    "gelu_tanh": "(Tensor x) -> Tensor",
    "gelu_tanh_backward": "(Tensor grad, Tensor x) -> Tensor",
    "adamw_beta1_zero": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg_sqs, Tensor(c!)[] copies, float lr,"
    " float beta2, float eps, float weight_decay, int step, Tensor? grad_scale) -> ()",
}


def _random_words(seeds: Tensor, numel: int, offset: int = 0) -> Tensor:
    return seeds.new_empty(seeds.shape[0], numel, dtype=torch.int64)


def _normal(seeds: Tensor, numel: int, offset: int = 0) -> Tensor:
    return seeds.new_empty(seeds.shape[0], numel, dtype=torch.float32)


def _subinterval_noise(x_s: Tensor, noise: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x_s, dtype=dtype)


def _subinterval_loss(
    output: Tensor, x_s: Tensor, noise: Tensor, c_out: Tensor, c_eps: Tensor, c_x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(output)


def _dmd_gradient(
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
    return torch.empty_like(teacher, dtype=weight.dtype), torch.empty_like(weight, dtype=torch.int64)


def _euler_step(x: Tensor, flow: Tensor, a: Tensor, b: Tensor, copy_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    copy = x.new_empty(0) if copy_dtype is None else torch.empty_like(x, dtype=copy_dtype)
    return torch.empty_like(x), copy


def _modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty(x.shape[:-1]), scale.new_empty(x.shape[:-1])


def _modulated_layer_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if mask[0] else x.new_empty(0)
    shape = scale.shape if mask[1] else (0,)
    return dx, scale.new_empty(shape), scale.new_empty(shape)


def _gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


def _gated_residual_backward(grad: Tensor, h: Tensor, gate: Tensor, mask: Sequence[bool]) -> tuple[Tensor, Tensor]:
    dh = torch.empty_like(h) if mask[0] else h.new_empty(0)
    return dh, gate.new_empty(gate.shape if mask[1] else (0,))


def _sum_of_squares(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _rms_rope(x: Tensor, weight: Tensor, rstd: Tensor, rope: Tensor | None, heads: int) -> Tensor:
    return torch.empty_like(x)


def _rms_rope_backward_dots(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, rope: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rstd), torch.empty_like(weight, dtype=rstd.dtype)


def _rms_rope_backward_dx(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, mean_dots: Tensor, rope: Tensor | None, heads: int
) -> Tensor:
    return torch.empty_like(x)


def _rms_norm_rope(x: Tensor, weight: Tensor, rope: Tensor | None, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _sum_of_squares(x)


def _rms_norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, rope: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight, dtype=rstd.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _adamw_beta1_zero(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None,
) -> None:
    return None


_FAKES = {
    "random_words": _random_words,
    "normal": _normal,
    "subinterval_noise": _subinterval_noise,
    "subinterval_loss": _subinterval_loss,
    "dmd_gradient": _dmd_gradient,
    "euler_step": _euler_step,
    "modulated_layer_norm": _modulated_layer_norm,
    "modulated_layer_norm_backward": _modulated_layer_norm_backward,
    "gated_residual": _gated_residual,
    "gated_residual_backward": _gated_residual_backward,
    "sum_of_squares": _sum_of_squares,
    "rms_rope": _rms_rope,
    "rms_rope_backward_dots": _rms_rope_backward_dots,
    "rms_rope_backward_dx": _rms_rope_backward_dx,
    "rms_norm_rope": _rms_norm_rope,
    "rms_norm_rope_backward": _rms_norm_rope_backward,
    "gelu_tanh": _gelu_tanh,
    "gelu_tanh_backward": _gelu_tanh_backward,
    "adamw_beta1_zero": _adamw_beta1_zero,
}


def _define() -> torch.library.Library:
    library = torch.library.Library("pdmd", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, getattr(primitives, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"pdmd::{name}", _FAKES[name], lib=library)
    return library


LIBRARY = _define()  # the definitions live as long as this object
