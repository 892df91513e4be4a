"""Numbers that are not finite: found in what is saved and read, and named where they stop a run."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_pdmd.files.finite import first_not_finite
from megatron_pdmd.parallel.patience import patient_group
from megatron_pdmd.training.checkpoints.sharded_state import Shard


class NotFiniteError(RuntimeError):
    """A run's numbers are not finite any more. What it has saved is."""


def first_shard_not_finite(shards: Mapping[str, Shard]) -> str | None:
    """The first tensor of which this rank's part has such a number."""
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
