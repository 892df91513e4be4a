"""The algorithm: the fake score's loss and the generator's gradient; models arrive as callables."""

from megatron_pdmd.distillation.distribution_matching import dmd_gradient, guided_flow
from megatron_pdmd.distillation.score_matching import score_matching_loss, subinterval_target

__all__ = ["dmd_gradient", "guided_flow", "score_matching_loss", "subinterval_target"]
