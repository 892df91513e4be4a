"""Multi-head attention: the choice of a backend, and the module around it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload

from megatron_pdmd.models.layers.flash_attention import flash_attention, flash_attention_available
from megatron_pdmd.models.layers.linear import ColumnLinear, RowLinear
from megatron_pdmd.models.layers.norm import RMSNormWeight
from megatron_pdmd.models.layers.tensor_parallel import TensorParallel
from megatron_pdmd.parallel.context import AttentionBackend, ContextParallel
from pdmd_kernels import qk_norm_rope


class Positions(NamedTuple):
    """Where this rank's tokens stand in a sequence.

    Attributes:
        rope: rotations of the tokens of this rank's context part, [S, head_dim / 2, 2].
        length: tokens of the whole sequence, without the padding that splitting needs.
    """

    rope: Tensor
    length: int


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


def attention_operators() -> list[OpOverload]:
    """The operators that compute attention, whatever the backend, for a recomputation that keeps their outputs."""
    aten = torch.ops.aten
    operators = [
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]
    return operators + ([torch.ops.flash_attn._flash_attn_forward.default] if flash_attention_available() else [])


class Attention(nn.Module):
    """Attention with q/k RMSNorm across all heads, of a sequence on itself or on a context.

    Args:
        size: hidden units d.
        heads: number of heads over all ranks.
        eps: of the q/k norms.
        parallel: the tensor-parallel group, which the heads are split over.
        dtype: of the linears and the norms' weights.
        context: computes softmax(q k^T / sqrt(head_dim)) v, over all ranks that share the sequence.
    """

    def __init__(
        self,
        size: int,
        heads: int,
        *,
        eps: float,
        parallel: TensorParallel,
        dtype: torch.dtype,
        context: ContextParallel,
    ):
        super().__init__()
        self.size = size
        self.eps = eps
        self.local_heads = heads // parallel.size
        self.parallel = parallel
        self.context = context
        self.to_q = ColumnLinear(size, size, parallel=parallel, dtype=dtype)
        self.to_k = ColumnLinear(size, size, parallel=parallel, dtype=dtype)
        self.to_v = ColumnLinear(size, size, parallel=parallel, dtype=dtype)
        self.to_out = nn.ModuleList([RowLinear(size, size, parallel=parallel, dtype=dtype)])
        self.norm_q = RMSNormWeight(size, parallel=parallel, dtype=dtype)
        self.norm_k = RMSNormWeight(size, parallel=parallel, dtype=dtype)

    def forward(
        self, x: Tensor, text: Tensor | None = None, positions: Positions | None = None, adapter: str | None = None
    ) -> Tensor:
        """Attends to the sequence itself, or to a text that every rank holds whole.

        Args:
            x: [B, S, d], or this rank's share of the sequence.
            text: [B, L, d], already entered into the parallel region; None for self-attention.
            positions: of the tokens, for self-attention.
            adapter: name of the adapter to apply, if any.

        Returns:
            The shape of x.
        """
        x = self.parallel.enter(x)
        source = x if text is None else text
        query, key = qk_norm_rope(
            self.to_q(x, adapter),
            self.to_k(source, adapter),
            self.norm_q.weight,
            self.norm_k.weight,
            eps=self.eps,
            size=self.size,
            heads=self.local_heads,
            rope=None if positions is None else positions.rope,
            reduce=self.parallel.all_reduce if self.parallel.size > 1 else None,
        )
        projected = (query, key, self.to_v(source, adapter))
        heads = [tensor.unflatten(-1, (self.local_heads, -1)) for tensor in projected]
        attended = self.context.backend(*heads) if positions is None else self.context.attend(*heads, positions.length)
        return self.to_out[0](attended.flatten(2), adapter)
