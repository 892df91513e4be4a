"""Attention to one block of keys with the softmax's normaliser, which ring attention combines over ranks.

torch's fused kernels compute it: `_scaled_dot_product_flash_attention_for_cpu` on the CPU in any dtype, and on a GPU
`_scaled_dot_product_flash_attention` in 16 bits where the head's size is a multiple of 8, up to 256. Everything else
composes it.
"""

import math

import torch
from torch import Tensor

from megatron_pdmd.parallel.ring_attention import BlockAttention


class ComposedBlocks:
    """The definition, in at least fp32; it holds the whole matrix of scores."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `BlockAttention`."""
        scores = self._scores(query, key)
        log_sum = scores.logsumexp(-1)
        output = (scores - log_sum.unsqueeze(-1)).exp() @ value.to(scores.dtype)
        return output.to(query.dtype), log_sum

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dS = P (dO V^T - sum(dO O)); see `BlockAttention`."""
        scores = self._scores(query, key)
        grad, output, query, key, value = (x.to(scores.dtype) for x in (grad, output, query, key, value))
        weights = (scores - log_sum.unsqueeze(-1)).exp()
        inner = grad @ value.transpose(-1, -2) - (grad * output).sum(-1, keepdim=True)
        grad_scores = weights * inner / math.sqrt(query.shape[-1])
        return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad

    @staticmethod
    def _scores(query: Tensor, key: Tensor) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        return query.to(wide) @ key.to(wide).transpose(-1, -2) / math.sqrt(query.shape[-1])


class CpuFlashBlocks:
    """torch's flash attention for the CPU."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `BlockAttention`."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `BlockAttention`."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, log_sum, 0.0, False
        )


class CudaFlashBlocks:
    """torch's flash attention for a GPU."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `BlockAttention`."""
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `BlockAttention`. The op is called with what its forward returns for sequences that are not packed.

        That is None for the offsets of packed sequences: a tensor in their place, even an empty one, sends the kernel
        down the packed path. The random state belongs to dropout and is not read without it.
        """
        random_state, unused = (torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, output, log_sum, None, None, query.shape[2], key.shape[2], 0.0, False,
            random_state, unused,
        )  # fmt: skip


def block_attention_for(query: Tensor) -> BlockAttention:
    """The fastest of these for the device, dtype and head size of a query."""
    if query.device.type == "cpu":
        return CpuFlashBlocks()
    size = query.shape[-1]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256:
        return CudaFlashBlocks()
    return ComposedBlocks()
