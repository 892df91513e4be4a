"""Sequences split over ranks: who holds which tokens, and attention across them.

With context parallelism every rank holds one part of each sequence; with sequence parallelism the tensor-parallel ranks
split that part further. A sequence that the ranks do not divide is padded at its end, and no token attends to the
padding. Gradients of parameters are averaged over data and context ranks together, so a loss that every context rank
computes alike is worth one rank's share each: `SequenceSplit.join` multiplies by their number on the way back and
`SequenceSplit.split` divides again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_pdmd.parallel.ring_attention import BlockAttention, ring_attention
from megatron_pdmd.parallel.topology import Topology

ContextMethod = Literal["ulysses", "ring"]

# Query [B, S, heads, head_dim], key and value [B, L, heads, head_dim] -> [B, S, heads, head_dim].
AttentionBackend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SequenceSplit:
    """How the tokens of a sequence lie on the ranks, between a model's parallel regions.

    Attributes:
        group: the ranks that share a sequence, by position; None stands for a single rank.
        size: number of them.
        rank: this rank's index among them.
        context: how many of these ranks are context-parallel; the others split for sequence parallelism.
    """

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0
    context: int = 1

    @classmethod
    def of(cls, topology: Topology | None) -> "SequenceSplit":
        """The split of a topology; without one, a single rank."""
        if topology is None:
            return cls()
        if topology.sequence_parallel:
            rank = topology.context_rank * topology.tensor + topology.tensor_rank
            return cls(topology.groups.tp_cp, topology.context * topology.tensor, rank, topology.context)
        return cls(topology.groups.cp, topology.context, topology.context_rank, topology.context)

    @property
    def context_rank(self) -> int:
        """This rank's index among the context-parallel ranks."""
        return self.rank // (self.size // self.context)

    def padded(self, length: int) -> int:
        """Tokens of all ranks together, padding included."""
        return -(-length // self.size) * self.size

    def split(self, x: Tensor) -> Tensor:
        """This rank's tokens [B, padded / size, ...] of whole sequences [B, S, ...], padded with zeros."""
        return x if self.size == 1 else _Split.apply(x, self)

    def join(self, x: Tensor, length: int) -> Tensor:
        """Whole sequences [B, length, ...] on every rank from each one's tokens, for a loss that all compute alike."""
        return x if self.size == 1 else _Join.apply(x, self, length)

    def context_part(self, x: Tensor) -> Tensor:
        """The rows of a table [S, ...] that belong to the tokens of this rank's context part, zeros for padding.

        Sequence-parallel ranks gather that part before they need the table.
        """
        if self.context == 1:
            return _padded(x, self.padded(len(x)), dim=0)
        return _padded(x, self.padded(len(x)), dim=0).chunk(self.context)[self.context_rank]


def _padded(x: Tensor, length: int, dim: int) -> Tensor:
    if x.shape[dim] == length:
        return x
    padding = x.new_zeros(*x.shape[:dim], length - x.shape[dim], *x.shape[dim + 1 :])
    return torch.cat([x, padding], dim)


def _gather(x: Tensor, split: SequenceSplit, length: int) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(split.size)]
    dist.all_gather(parts, x.contiguous(), group=split.group)
    return torch.cat(parts, dim=1).narrow(1, 0, length)


def _part(x: Tensor, split: SequenceSplit) -> Tensor:
    return _padded(x, split.padded(x.shape[1]), dim=1).chunk(split.size, dim=1)[split.rank]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, split: SequenceSplit) -> Tensor:
        ctx.split, ctx.length = split, x.shape[1]
        return _part(x, split).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.split, ctx.length) / ctx.split.context, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, split: SequenceSplit, length: int) -> Tensor:
        ctx.split = split
        return _gather(x, split, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _part(grad, ctx.split) * ctx.split.context, None, None


@dataclass(frozen=True)
class ContextParallel:
    """Self-attention of sequences that are split over context-parallel ranks.

    Attributes:
        backend: attends within one rank.
        block_for: what attends to one rank's keys in the ring, for such a query.
        group: the context-parallel ranks; None stands for a single rank.
        size: number of them.
        rank: this rank's index among them.
        method: "ulysses" trades tokens for heads, "ring" passes keys and values on.
    """

    backend: AttentionBackend
    block_for: Callable[[Tensor], BlockAttention]
    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0
    method: ContextMethod = "ulysses"

    @classmethod
    def of(
        cls,
        topology: Topology | None,
        method: ContextMethod,
        backend: AttentionBackend,
        block_for: Callable[[Tensor], BlockAttention],
    ) -> "ContextParallel":
        """The context-parallel ranks of a topology; without one, a single rank."""
        if topology is None:
            return cls(backend, block_for)
        return cls(backend, block_for, topology.groups.cp, topology.context, topology.context_rank, method)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v over the whole sequence.

        Args:
            query: this rank's tokens [B, S, heads, head_dim], the heads of this tensor-parallel rank.
            key: of the same shape.
            value: of the same shape.
            length: tokens of the whole sequence without padding.

        Returns:
            The shape of query; rows of padding hold numbers without meaning.
        """
        if self.size == 1:
            return self.backend(query, key[:, :length], value[:, :length])
        if self.method == "ring":
            return ring_attention(query, key, value, length, self.block_for(query), self.group, self.rank, self.size)
        return self._ulysses(query, key, value, length)

    def _ulysses(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """Each rank attends with a part of the heads over all tokens; "DeepSpeed Ulysses", arXiv:2309.14509."""
        batch, tokens, heads, channels = query.shape
        # [3, B, S / C, C, heads / C, head_dim] -> a block for each rank.
        parts = torch.stack([query, key, value]).unflatten(3, (self.size, heads // self.size))
        traded = _AllToAll.apply(parts.permute(3, 0, 1, 2, 4, 5).contiguous(), self.group)
        whole = traded.permute(1, 2, 0, 3, 4, 5).reshape(3, batch, self.size * tokens, -1, channels)
        attended = self.backend(whole[0], whole[1, :, :length], whole[2, :, :length])
        returned = attended.unflatten(1, (self.size, tokens)).transpose(0, 1).contiguous()
        returned = _AllToAll.apply(returned, self.group)
        return returned.permute(1, 2, 0, 3, 4).reshape(batch, tokens, heads, channels)


class _AllToAll(torch.autograd.Function):
    """Block i of dim 0 goes to rank i; its own inverse, and so its own backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad.contiguous(), ctx.group), None


def context_method(asked: str, context: int, tensor: int, heads: int) -> ContextMethod:
    """The method that `--context-parallel-method` names, or for "auto" Ulysses where the heads divide and else ring.

    Args:
        asked: "auto", "ulysses" or "ring".
        context: context-parallel ranks.
        tensor: tensor-parallel ranks, which have divided the heads already.
        heads: of the model.

    Raises:
        ValueError: Ulysses where tensor times context ranks do not divide the heads; names the sizes that would.
    """
    divides = heads % (tensor * context) == 0
    if asked == "auto":
        return "ulysses" if divides else "ring"
    if asked == "ulysses" and not divides:
        works = [size for size in range(1, heads // tensor + 1) if heads % (tensor * size) == 0]
        raise ValueError(
            f"--context-parallel-method ulysses: {heads} heads are not divisible by --tensor-model-parallel-size "
            f"{tensor} x --context-parallel-size {context}; use a context size of {_listed(works)}, or ring"
        )
    return asked


def _listed(sizes: list[int]) -> str:
    return " or ".join([", ".join(map(str, sizes[:-1])), str(sizes[-1])] if len(sizes) > 1 else map(str, sizes))
