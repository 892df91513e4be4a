"""Multi-head attention: the choice of a backend, and the module around it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_pdmd.models.layers.flash_attention import flash_attention, flash_attention_available
from megatron_pdmd.models.layers.linear import ColumnLinear, RowLinear
from megatron_pdmd.models.layers.norm import RMSNorm
from megatron_pdmd.models.layers.rope import rotate
from megatron_pdmd.models.layers.tensor_parallel import TensorParallel

# Query [B, S, heads, head_dim], key and value [B, L, heads, head_dim] -> [B, S, heads, head_dim].
AttentionBackend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's scaled dot-product attention, on any device and in any dtype."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def attention_backend(name: str) -> AttentionBackend:
    """The backend that `--attention-backend` names.

    Raises:
        ValueError: there is no such backend, or its package is not installed.
    """
    if name == "sdpa":
        return sdpa_attention
    if name != "flash":
        raise ValueError(f"--attention-backend {name}: unknown; choose sdpa or flash")
    if not flash_attention_available():
        raise ValueError("--attention-backend flash: flash-attn is not installed; install it or choose sdpa")
    return flash_attention


class Attention(nn.Module):
    """Attention with q/k RMSNorm across all heads, of a sequence on itself or on a context.

    Args:
        size: hidden units d.
        heads: number of heads over all ranks.
        eps: of the q/k norms.
        parallel: the tensor-parallel group, which the heads are split over.
        dtype: of the linears and the norms' weights.
        backend: computes softmax(q k^T / sqrt(head_dim)) v.
    """

    def __init__(
        self,
        size: int,
        heads: int,
        *,
        eps: float,
        parallel: TensorParallel,
        dtype: torch.dtype,
        backend: AttentionBackend,
    ):
        super().__init__()
        self.local_heads = heads // parallel.size
        self.parallel = parallel
        self.backend = backend
        self.to_q = ColumnLinear(size, size, parallel=parallel, dtype=dtype)
        self.to_k = ColumnLinear(size, size, parallel=parallel, dtype=dtype)
        self.to_v = ColumnLinear(size, size, parallel=parallel, dtype=dtype)
        self.to_out = nn.ModuleList([RowLinear(size, size, parallel=parallel, dtype=dtype)])
        self.norm_q = RMSNorm(size, eps=eps, parallel=parallel, dtype=dtype)
        self.norm_k = RMSNorm(size, eps=eps, parallel=parallel, dtype=dtype)

    def forward(
        self, x: Tensor, context: Tensor | None = None, rope: Tensor | None = None, adapter: str | None = None
    ) -> Tensor:
        """Attends.

        Args:
            x: [B, S, d], or this rank's share of the sequence.
            context: [B, L, d], already entered into the parallel region; None for self-attention.
            rope: rotations of the tokens, [S, 1, head_dim / 2].
            adapter: name of the adapter to apply, if any.

        Returns:
            The shape of x.
        """
        x = self.parallel.enter(x)
        source = x if context is None else context
        query = self._heads(self.norm_q(self.to_q(x, adapter)))
        key = self._heads(self.norm_k(self.to_k(source, adapter)))
        value = self._heads(self.to_v(source, adapter))
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        return self.to_out[0](self.backend(query, key, value).flatten(2), adapter)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.local_heads, -1))
