"""One block of the Wan transformer: self-attention, cross-attention on the text, feed-forward."""

import math

import torch
from torch import Tensor, nn

from megatron_pdmd.models.layers.attention import Attention, Positions
from megatron_pdmd.models.layers.linear import ColumnLinear, RowLinear
from megatron_pdmd.models.layers.norm import LayerNorm
from megatron_pdmd.models.layers.tensor_parallel import TensorParallel, compute_dtype
from megatron_pdmd.models.wan.config import WanConfig
from megatron_pdmd.parallel.context import ContextParallel
from pdmd_kernels import gated_residual, gelu_tanh, modulated_layer_norm


class _GeluProjection(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, parallel: TensorParallel, dtype: torch.dtype):
        super().__init__()
        self.proj = ColumnLinear(inputs, outputs, parallel=parallel, dtype=dtype)

    def forward(self, x: Tensor, adapter: str | None) -> Tensor:
        return gelu_tanh(self.proj(x, adapter))


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, linear; parameters named as diffusers names them, net.0.proj and net.2."""

    def __init__(self, size: int, hidden: int, *, parallel: TensorParallel, dtype: torch.dtype):
        super().__init__()
        self.parallel = parallel
        projection = _GeluProjection(size, hidden, parallel=parallel, dtype=dtype)
        self.net = nn.ModuleList([projection, nn.Identity(), RowLinear(hidden, size, parallel=parallel, dtype=dtype)])

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        """[B, S, d] or this rank's share of the sequence, to the same."""
        return self.net[2](self.net[0](self.parallel.enter(x), adapter), adapter)


class WanBlock(nn.Module):
    """A transformer block modulated by the time.

    Args:
        config: the model's shape.
        parallel: the tensor-parallel group.
        dtype: of all parameters but norms and modulation tables, which stay in at least fp32.
        context: the ranks that share a sequence, and how both attentions compute.
    """

    def __init__(self, config: WanConfig, *, parallel: TensorParallel, dtype: torch.dtype, context: ContextParallel):
        super().__init__()
        size, exact = config.hidden_size, compute_dtype(dtype)
        self.eps = config.eps
        self.attn1, self.attn2 = (
            Attention(
                size,
                config.num_attention_heads,
                eps=config.eps,
                parallel=parallel,
                dtype=dtype,
                context=context,
            )
            for _ in range(2)
        )
        self.norm2 = LayerNorm(size, eps=config.eps, dtype=exact) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(size, config.ffn_dim, parallel=parallel, dtype=dtype)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, size, dtype=exact) / math.sqrt(size))
        parallel.mark_replicated(self.norm2)
        parallel.mark_replicated_parameter(self.scale_shift_table)

    def forward(self, x: Tensor, text: Tensor, modulation: Tensor, positions: Positions, adapter: str | None) -> Tensor:
        """Runs the block.

        Args:
            x: tokens [B, S, d], or this rank's share of them.
            text: embedded text [B, L, d], already entered into the parallel region.
            modulation: the time's part of shift, scale and gate of both branches, [B, 1 or S, 6, d].
            positions: of the tokens in the whole sequence.
            adapter: name of the adapter to apply, if any.

        Returns:
            The shape and dtype of x.
        """
        modulation = self.scale_shift_table + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(-2)
        h = modulated_layer_norm(x, shift, scale, eps=self.eps)
        x = gated_residual(x, self.attn1(h, positions=positions, adapter=adapter), gate)
        x = x + self.attn2(self.norm2(x), text=text, adapter=adapter)
        h = modulated_layer_norm(x, ffn_shift, ffn_scale, eps=self.eps)
        return gated_residual(x, self.ffn(h, adapter), ffn_gate)
