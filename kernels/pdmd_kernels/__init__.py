"""The elementwise operations of Phased DMD, under names that do not depend on the backend that runs them.

Every op takes one coefficient per sample and no noise schedule, so that a kernel needs no knowledge of diffusion. Its
plain-torch twin is `pdmd_kernels.reference.<op>`; `use_backend` chooses who runs it.
"""

from pdmd_kernels import reference
from pdmd_kernels.backend import available_backends, use_backend
from pdmd_kernels.blocks import gated_residual, gelu_tanh, modulated_layer_norm, qk_norm_rope
from pdmd_kernels.latents import (
    diffuse,
    dmd_gradient,
    euler_step,
    normal,
    random_words,
    subinterval_loss,
    subinterval_noise,
)
from pdmd_kernels.optimizer import adamw_beta1_zero

__all__ = [
    "adamw_beta1_zero",
    "available_backends",
    "diffuse",
    "dmd_gradient",
    "euler_step",
    "gated_residual",
    "gelu_tanh",
    "modulated_layer_norm",
    "normal",
    "qk_norm_rope",
    "random_words",
    "reference",
    "subinterval_loss",
    "subinterval_noise",
    "use_backend",
]
