"""Waiting for a rank that writes or draws, which takes longer than any pass of a model."""

import functools
from datetime import timedelta

import torch.distributed as dist

# How long ranks wait for one that writes to a slow disk; a rank that dies is noticed at once.
PATIENCE = timedelta(hours=1)
DESCRIPTION = "patient"


def patient_group() -> dist.ProcessGroup | None:
    """All ranks, on gloo and for an hour: who waits in it holds up no device and meets no watchdog of NCCL.

    Its collectives take CPU tensors and objects. `initialize_topology` makes it and `destroy_topology` takes it down.
    It is the main thread's; another thread that communicates needs a group of its own, `new_patient_group`.

    Returns:
        The group, or None where this process has no process groups.
    """
    return _shared_group() if dist.is_initialized() else None


def new_patient_group() -> dist.ProcessGroup:
    """Another such group, which the caller destroys. Called on all ranks."""
    backend = "fake" if dist.get_backend() == "fake" else "gloo"
    return dist.new_group(backend=backend, timeout=PATIENCE, group_desc=DESCRIPTION)


def forget_patient_group() -> None:
    """Lets go of the group before the process groups are destroyed."""
    _shared_group.cache_clear()


@functools.cache
def _shared_group() -> dist.ProcessGroup:
    return new_patient_group()
