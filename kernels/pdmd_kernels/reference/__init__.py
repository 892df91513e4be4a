"""The plain-torch twin of each op: `pdmd_kernels.reference.<op>` takes what `pdmd_kernels.<op>` takes.

The arithmetic is done in fp32 (in fp64 if a tensor is fp64). `pdmd_kernels.reference.primitives` holds the twins of the
``pdmd`` ops that kernels implement.
"""

from pdmd_kernels.reference.twins import (
    adamw_beta1_zero,
    diffuse,
    dmd_gradient,
    euler_step,
    gated_residual,
    gelu_tanh,
    modulated_layer_norm,
    normal,
    qk_norm_rope,
    random_words,
    subinterval_loss,
    subinterval_noise,
)

__all__ = [
    "adamw_beta1_zero",
    "diffuse",
    "dmd_gradient",
    "euler_step",
    "gated_residual",
    "gelu_tanh",
    "modulated_layer_norm",
    "normal",
    "qk_norm_rope",
    "random_words",
    "subinterval_loss",
    "subinterval_noise",
]
