"""Ring attention: keys and values travel around the ranks while each one attends to those it holds.

Rank r holds the queries, keys and values of its part of the sequence. At step i it attends to the keys and values of
rank r - i and passes them on to rank r + 1 meanwhile; partial results are combined by the online softmax, whatever
their order. In backward the keys' and values' gradients travel along and end at their owners. "Ring Attention with
Blockwise Transformers", arXiv:2310.01889. Attention here is not causal, so parts in their order are balanced.
"""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class BlockAttention(Protocol):
    """Attention to one block of keys that also tells the softmax's normaliser. Tensors are [B, heads, S, head_dim]."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The output [B, heads, S, head_dim] and the log of the softmax's denominator [B, heads, S], at least fp32."""
        ...

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value from a block, given output and log_sum over all blocks."""
        ...


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    block: BlockAttention,
    group: dist.ProcessGroup,
    rank: int,
    size: int,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the keys of all ranks.

    Args:
        query: this rank's tokens [B, S, heads, head_dim].
        key: of the same shape.
        value: of the same shape.
        length: tokens of the whole sequence; what the last ranks hold beyond it is padding.
        block: attends to one rank's keys.
        group: the ranks in the order of their parts.
        rank: this rank's index in the group.
        size: number of ranks.

    Returns:
        The shape of query.
    """
    return _RingAttention.apply(query, key, value, length, block, _Ring(group, rank, size))


class _Transfer(NamedTuple):
    """A tensor on its way to the next rank, and the one that is on its way here."""

    requests: list[dist.Work]
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received


class _Ring(NamedTuple):
    group: dist.ProcessGroup
    rank: int
    size: int

    def owner(self, step: int) -> int:
        """Whose keys are here at a step."""
        return (self.rank - step) % self.size

    def held(self, owner: int, tokens: int, length: int) -> int:
        """How many of a rank's tokens are not padding."""
        return min(max(length - owner * tokens, 0), tokens)

    def pass_on(self, tensor: Tensor) -> _Transfer:
        """Starts sending to the next rank and receiving as much from the previous one."""
        received = torch.empty_like(tensor)
        after, before = (
            dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, self.size - 1)
        )
        operations = [
            dist.P2POp(dist.isend, tensor, after, group=self.group),
            dist.P2POp(dist.irecv, received, before, group=self.group),
        ]
        return _Transfer(dist.batch_isend_irecv(operations), tensor, received)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, length: int, block: BlockAttention, ring: _Ring
    ) -> Tensor:
        query, keys_values = query.transpose(1, 2), torch.stack([key, value]).transpose(2, 3).contiguous()
        own, output, log_sum = keys_values, None, None
        for step in range(ring.size):
            transfer = ring.pass_on(keys_values) if step < ring.size - 1 else None
            held = ring.held(ring.owner(step), query.shape[2], length)
            if held:
                part = block.forward(query, *keys_values[:, :, :, :held])
                output, log_sum = part if output is None else _combined(output, log_sum, *part)
            if transfer:
                keys_values = transfer.wait()
        output = output.to(query.dtype)
        ctx.save_for_backward(query, own, output, log_sum)
        ctx.length, ctx.block, ctx.ring = length, block, ring
        return output.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """A gradient starts at the first foreign rank that has one for it and needs size - 1 passes to its owner."""
        query, keys_values, output, log_sum = ctx.saved_tensors
        ring, grad = ctx.ring, grad.transpose(1, 2).contiguous()
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.zeros_like(query, dtype=wide)
        own = torch.zeros_like(keys_values, dtype=wide)
        arriving, transfer = None, None
        for step in range(ring.size):
            transfer = ring.pass_on(keys_values) if step < ring.size - 1 else None
            present = own if step == 0 else torch.zeros_like(own)
            held = ring.held(ring.owner(step), query.shape[2], ctx.length)
            if held:
                parts = ctx.block.backward(grad, query, *keys_values[:, :, :, :held], output, log_sum)
                grad_query += parts[0]
                present[:, :, :, :held] = torch.stack(parts[1:])
            if transfer:
                keys_values = transfer.wait()
            if step > 0:
                present = present if arriving is None else present.add_(arriving.wait())
                arriving = ring.pass_on(present)
        own += arriving.wait()
        grad_key, grad_value = own.to(query.dtype).transpose(2, 3)
        return grad_query.to(query.dtype).transpose(1, 2), grad_key, grad_value, None, None, None


def _combined(output: Tensor, log_sum: Tensor, part: Tensor, part_log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Two blocks' outputs and normalisers as those of both blocks together."""
    total = torch.logaddexp(log_sum, part_log_sum)
    kept, added = (torch.exp(each - total).unsqueeze(-1) for each in (log_sum, part_log_sum))
    return output * kept + part * added, total
