"""Process groups of ranks that do not exist: each call succeeds at once, and this rank's objects stand for all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megatron_pdmd.parallel.patience import DESCRIPTION
from megatron_pdmd.parallel.topology import Topology, destroy_topology, initialize_topology


class FakeRanks:
    """One rank of a world of fake ones.

    Args:
        ranks: number of ranks.
        rank: this one.
    """

    def __init__(self, ranks: int, rank: int):
        self._ranks = ranks
        self._rank = rank
        self._on_cpu: set[str] = set()

    def initialize(self, **layout: Any) -> Topology:
        """Makes the process groups of `initialize_topology`'s arguments; on top of the ones that are there, if any."""
        os.environ.update(WORLD_SIZE=str(self._ranks), RANK=str(self._rank), LOCAL_RANK="0")
        return initialize_topology(**layout, backend="fake")

    def device_of(self, group: dist.ProcessGroup) -> str:
        """The type of device that a group's tensors must be on: gloo's on the CPU, NCCL's on a GPU."""
        return "cpu" if group.group_name in self._on_cpu else "cuda"

    @contextmanager
    def joined(self) -> Iterator[None]:
        """In this block torch.distributed makes fake groups, and exchanges of objects return at once."""
        new_group = dist.new_group

        def fake_group(*args: Any, backend: str | None = None, **options: Any) -> dist.ProcessGroup:
            group = new_group(*args, backend="fake", **options)
            on_cpu = backend == "gloo" or options.get("group_desc") == DESCRIPTION
            if on_cpu and isinstance(group, dist.ProcessGroup):
                self._on_cpu.add(group.group_name)
            return group

        stand_ins = {
            "new_group": fake_group,
            "all_gather_object": _all_gather_object,
            "gather_object": _gather_object,
            "broadcast_object_list": _nothing,
        }
        before = {name: getattr(dist, name) for name in stand_ins}
        try:
            for name, stand_in in stand_ins.items():
                setattr(dist, name, stand_in)
            yield
        finally:
            for name, original in before.items():
                setattr(dist, name, original)
            destroy_topology()


def _all_gather_object(found: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
    found[:] = [own] * len(found)


def _gather_object(own: Any, found: list[Any] | None = None, *unused: Any, **options: Any) -> None:
    if found is not None:
        found[:] = [own] * len(found)


def _nothing(*unused: Any, **options: Any) -> None:
    return None
