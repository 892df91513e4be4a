"""What stages send each other: point-to-point, asynchronous, a process group of its own for each kind of message.

Messages of a kind from one stage to another arrive in the order in which they were sent, and who receives knows that
order, for every stage knows every stage's tasks. So receives are posted ahead, and nothing is said about what comes.
Kinds have process groups of their own, because one of NCCL's handles what two ranks send each other in one order for
both directions, where a message that waits for its receiver would hold up those that come back.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pdmd.parallel.pipeline.passes import Message
from megatron_pdmd.parallel.topology import Topology

Tensors = tuple[Tensor, ...]

# What tensors travel as; a norm is summed instead.
CARRIED = (Message.SAMPLE, Message.ACTIVATION, Message.GRADIENT, Message.LATENT_GRADIENT)

AHEAD = 2  # receives of a channel that are posted before they are asked for


@dataclass(frozen=True)
class PipelineGroups:
    """The stages that share a replica with this rank, and a process group for each kind of message between them.

    Attributes:
        ranks: the stages' ranks, first stage first.
        stage: this rank's.
        by_message: the groups.
    """

    ranks: tuple[int, ...]
    stage: int
    by_message: dict[Message, dist.ProcessGroup]

    @classmethod
    def of(cls, topology: Topology, timeout_minutes: float) -> "PipelineGroups":
        """Makes them. Called on all ranks, once a run.

        Args:
            topology: this rank's place.
            timeout_minutes: how long a message that is waited for may take (`--distributed-timeout-minutes`).
        """
        timeout = timedelta(minutes=timeout_minutes)
        stride = topology.world_size // topology.pipeline
        columns = [tuple(range(first, topology.world_size, stride)) for first in range(stride)]
        own = columns[topology.rank % stride]
        by_message = {}
        for message in CARRIED:
            made = [dist.new_group(list(ranks), timeout=timeout) for ranks in columns]
            by_message[message] = made[topology.rank % stride]
        groups = cls(own, topology.pipeline_rank, by_message)
        groups._connect(topology.device)
        return groups

    def way(self, message: Message, stage: int) -> tuple[int, int] | None:
        """From which stage to which a stage's messages of a kind go; None where it sends none."""
        last = len(self.ranks) - 1
        to = {
            Message.ACTIVATION: stage + 1 if stage < last else None,
            Message.GRADIENT: stage - 1 if stage else None,
            Message.SAMPLE: 0 if stage == last else None,
            Message.LATENT_GRADIENT: last if stage == 0 else None,
        }[message]
        return None if to is None else (stage, to)

    def _connect(self, device: torch.device) -> None:
        """Sends one number along every way, in the same order on all ranks.

        A connection of NCCL's is made by the first message, and both sides wait for it: in the middle of a schedule
        they might wait for each other.
        """
        for message, group in self.by_message.items():
            for stage in range(len(self.ranks)):
                way, number = self.way(message, stage), torch.zeros(1, device=device)
                if way and way[0] == self.stage:
                    dist.isend(number, self.ranks[way[1]], group).wait()
                elif way and way[1] == self.stage:
                    dist.irecv(number, self.ranks[way[0]], group).wait()


@dataclass
class Outbox:
    """Messages of one kind to one stage.

    Attributes:
        group, rank: where they go.
    """

    group: dist.ProcessGroup
    rank: int
    _sent: deque[tuple[dist.Work, Tensor]] = field(default_factory=deque)

    def put(self, message: Tensors) -> None:
        """Sends a message and returns at once; its tensors must not change any more."""
        while self._sent and self._sent[0][0].is_completed():  # NCCL says so; gloo only to who waits
            self._sent.popleft()
        for tensor in message:
            whole = tensor.contiguous()
            self._sent.append((dist.isend(whole, self.rank, self.group), whole))

    def finish(self) -> None:
        """Returns when everything has been sent."""
        while self._sent:
            self._sent.popleft()[0].wait()


class Inbox:
    """Messages of one kind from one stage.

    Args:
        group, rank: where they come from.
        order: names of the messages, in the order in which they are sent.
        empty: tensors of the shapes and dtypes of a message.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        rank: int,
        order: Sequence[tuple[int, ...]],
        empty: Callable[[tuple[int, ...]], Tensors],
    ):
        self._group, self._rank, self._empty = group, rank, empty
        self._expected = deque(order)
        self._posted: deque[tuple[tuple[int, ...], Tensors, list[dist.Work]]] = deque()
        self._arrived: dict[tuple[int, ...], Tensors] = {}
        self._post()

    def take(self, name: tuple[int, ...]) -> Tensors:
        """Waits for a message. Those sent before it are kept until they are asked for."""
        while name not in self._arrived:
            own, tensors, works = self._posted.popleft()
            for work in works:
                work.wait()
            self._arrived[own] = tensors
            self._post()
        return self._arrived.pop(name)

    @property
    def is_empty(self) -> bool:
        """Whether all messages were taken."""
        return not (self._expected or self._posted or self._arrived)

    def _post(self) -> None:
        while self._expected and len(self._posted) < AHEAD:
            name = self._expected.popleft()
            tensors = self._empty(name)
            works = [dist.irecv(tensor, self._rank, self._group) for tensor in tensors]
            self._posted.append((name, tensors, works))
