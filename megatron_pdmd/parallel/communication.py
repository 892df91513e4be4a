"""What ranks tell each other, counted where it happens and by kind."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast", "send"]

# torch's operators of each kind, and which of their arguments is the whole: what all ranks gather, scatter or sum.
_OPERATORS: dict[str, tuple[Kind | None, int]] = {
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "alltoall_base_": ("all-to-all", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "recv_": (None, 0),  # counted where it is sent
    "barrier": (None, 0),
}


@dataclass(frozen=True)
class Volume:
    """What one rank communicated.

    Attributes:
        calls: number of calls by kind.
        bytes: payload by kind: the whole tensor that is gathered, scattered or summed, or what is sent.
    """

    calls: Counter[Kind] = field(default_factory=Counter)
    bytes: Counter[Kind] = field(default_factory=Counter)

    def add(self, kind: Kind, payload: int, calls: int = 1) -> None:
        """Counts `calls` calls of `payload` bytes each."""
        if payload and calls:
            self.calls[kind] += calls
            self.bytes[kind] += calls * payload

    def __add__(self, other: "Volume") -> "Volume":
        return Volume(self.calls + other.calls, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Volume":
        return Volume(*(Counter({kind: n * times for kind, n in part.items()}) for part in (self.calls, self.bytes)))


class CommunicationCounter(TorchDispatchMode):
    """Counts the collective and point-to-point calls of a block, backward passes on the CPU included.

    Calls in a group of one rank, which move nothing, are left out.

    Attributes:
        volume: what has been counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.volume = Volume()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            kind, whole = _OPERATORS[func._schema.name.removeprefix("c10d::")]
            if kind and _group_size(func, args) > 1:
                tensors = [leaf for leaf in tree_leaves(args[whole]) if isinstance(leaf, Tensor)]
                self.volume.add(kind, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return func(*args, **(kwargs or {}))


def _group_size(func: Callable[..., Any], args: tuple[Any, ...]) -> int:
    position = [argument.name for argument in func._schema.arguments].index("process_group")
    return dist.ProcessGroup.unbox(args[position]).size()
