"""The elementwise operations of Phased DMD, under names that do not depend on the backend that runs them.

Every op takes one coefficient per sample and no noise schedule, so that a kernel needs no knowledge of diffusion.
"""

from pdmd_kernels.reference import diffuse, dmd_gradient, euler_step, subinterval_loss

__all__ = ["diffuse", "dmd_gradient", "euler_step", "subinterval_loss"]
