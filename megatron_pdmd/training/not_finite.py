"""Numbers that are not finite: found in what is saved and read, and named where they stop a run."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pdmd.parallel.patience import patient_group
from megatron_pdmd.training.checkpoints.sharded_state import Shard


class NotFiniteError(RuntimeError):
    """A run's numbers are not finite any more. What it has saved is."""


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a number that is not finite.

    It reads each tensor once, allocates nothing of its size, and waits for a device once.
    """
    names, extremes = [], []
    for name, tensor in tensors:
        if tensor.numel() and tensor.is_floating_point():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(tensor)).float())  # a NaN is both
    if not names:
        return None
    finite = torch.stack(extremes).isfinite().all(dim=1).tolist()
    return next((name for name, is_finite in zip(names, finite, strict=True) if not is_finite), None)


def first_shard_not_finite(shards: Mapping[str, Shard]) -> str | None:
    """The same of this rank's parts."""
    return first_not_finite((name, box.tensor) for name, shard in shards.items() for box in shard.boxes)


def first_of_network(module: torch.nn.Module) -> str | None:
    """A network's first weight that is not finite, else its first such gradient, in words and on which rank.

    Called on all ranks, which get the same answer: the first rank's that has one.
    """
    named = dict(module.named_parameters())
    weight = first_not_finite(named.items())
    gradients = ((name, p.main_grad) for name, p in named.items() if getattr(p, "main_grad", None) is not None)
    gradient = None if weight else first_not_finite(gradients)
    return first_of_ranks((weight and f"weight {weight}") or (gradient and f"gradient of {gradient}"), patient_group())


def first_of_ranks(own: str | None, group: dist.ProcessGroup | None) -> str | None:
    """What the first rank of a group has found that found anything, and which rank that is; the same on all."""
    found = [own]
    if dist.get_world_size(group) > 1:
        found = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, own, group=group)
    return next((f"{words} on rank {rank}" for rank, words in enumerate(found) if words), None)
