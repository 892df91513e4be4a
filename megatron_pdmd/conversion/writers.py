"""Who of the ranks writes which file of an export."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from megatron_pdmd.parallel.patience import patient_group
from megatron_pdmd.parallel.topology import existing_topology

File = TypeVar("File")


@dataclass(frozen=True)
class Writers:
    """The replicas of a model, its data- and context-parallel ranks, share the files.

    In each replica the tensor-parallel ranks and stages gather a file's tensors among themselves, and the first rank of
    the first stage writes it.

    Attributes:
        replicas, replica: how many there are, and this rank's.
        writes: whether this rank writes its replica's files.
        group: where the ranks wait for each other; None where there is one process.
    """

    replicas: int = 1
    replica: int = 0
    writes: bool = True
    group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls) -> "Writers":
        """Those of the current topology; this process alone where there is none."""
        topology = existing_topology()
        if topology is None:
            return cls()
        replica = topology.data_rank * topology.context + topology.context_rank
        writes = topology.tensor_rank == topology.pipeline_rank == 0
        return cls(topology.data * topology.context, replica, writes, patient_group())

    @property
    def leads(self) -> bool:
        """Whether this rank also does what one rank does for all."""
        return self.writes and self.replica == 0

    def rounds(self, files: Sequence[File]) -> Iterator[File | None]:
        """This replica's file of each round, or None; in a round every replica has one at most.

        They are dealt out from the last replica on, for the first has other things to write.
        """
        place = self.replicas - 1 - self.replica
        for start in range(0, len(files), self.replicas):
            dealt = files[start : start + self.replicas]
            yield dealt[place] if place < len(dealt) else None
