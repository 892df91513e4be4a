"""Norms in at least fp32, whatever the model's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_pdmd.models.layers.tensor_parallel import TensorParallel, mark_sharded


class RMSNormWeight(nn.Module):
    """The weight of a root-mean-square norm over all heads, which the attention applies to queries or keys.

    Args:
        size: units over all ranks; each rank holds those of its own heads.
        parallel: the tensor-parallel group.
        dtype: of the weight.
    """

    def __init__(self, size: int, *, parallel: TensorParallel, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size // parallel.size, dtype=dtype))
        mark_sharded(self.weight, 0)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with fp32 weights (fp64 in an fp64 model) for input of any dtype, which the output keeps."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.to(x.dtype)
