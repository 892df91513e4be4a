"""The plain-torch primitives, named like the ``pdmd`` ops and with their arguments (see `pdmd_kernels.schemas`)."""

from pdmd_kernels.reference.adamw import adamw_beta1_zero
from pdmd_kernels.reference.gelu import gelu_tanh, gelu_tanh_backward
from pdmd_kernels.reference.latents import dmd_gradient, euler_step, subinterval_loss, subinterval_noise
from pdmd_kernels.reference.modulation import (
    gated_residual,
    gated_residual_backward,
    modulated_layer_norm,
    modulated_layer_norm_backward,
)
from pdmd_kernels.reference.philox import normal, random_words
from pdmd_kernels.reference.rms_rope import (
    rms_norm_rope,
    rms_norm_rope_backward,
    rms_rope,
    rms_rope_backward_dots,
    rms_rope_backward_dx,
    sum_of_squares,
)

__all__ = [
    "adamw_beta1_zero",
    "dmd_gradient",
    "euler_step",
    "gated_residual",
    "gated_residual_backward",
    "gelu_tanh",
    "gelu_tanh_backward",
    "modulated_layer_norm",
    "modulated_layer_norm_backward",
    "normal",
    "random_words",
    "rms_norm_rope",
    "rms_norm_rope_backward",
    "rms_rope",
    "rms_rope_backward_dots",
    "rms_rope_backward_dx",
    "subinterval_loss",
    "subinterval_noise",
    "sum_of_squares",
]
