"""What stages do together outside of a schedule: passes for which each waits for the one before it, sums, and what one
of them tells the others of the tensors that it alone has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from megatron_pdmd.parallel.topology import Topology

Word = TypeVar("Word")


@dataclass(frozen=True)
class Relay:
    """One rank's view of the ranks that have its place on all other axes, one on each stage.

    Attributes:
        group: the process group, by stage; None stands for a single stage.
        rank: this stage's index.
        size: number of stages.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, topology: Topology | None) -> "Relay":
        """The stages of a topology; without one, a single stage."""
        if topology is None:
            return cls()
        return cls(topology.groups.pp, topology.pipeline_rank, topology.pipeline)

    def receive(self, tensors: Sequence[Tensor]) -> None:
        """Fills contiguous tensors with what the stage before sends."""
        for tensor in tensors:
            dist.recv(tensor, group=self.group, group_src=self.rank - 1)

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Gives the next stage tensors of the shapes and dtypes that it expects."""
        for tensor in tensors:
            dist.send(tensor.contiguous(), group=self.group, group_dst=self.rank + 1)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums x over the stages in place, outside autograd."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def from_last(self, tensor: Tensor) -> Tensor:
        """The last stage's tensor on all stages; the others give a contiguous one of its shape to be filled."""
        return self.from_stage(self.size - 1, tensor)

    def from_stage(self, stage: int, tensor: Tensor) -> Tensor:
        """The same of any stage's tensor."""
        tensor = tensor.contiguous()
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=stage)
        return tensor

    def words_of_all(self, own: Word) -> list[Word]:
        """What each stage says, first stage first: objects that are small, and pickled."""
        words = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(words, own, group=self.group)
        return words
