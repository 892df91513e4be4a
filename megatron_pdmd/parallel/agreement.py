"""A mistake that one rank meets is told to all, so that all end and none waits for the others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block on every rank of a group; what it raises on one rank is raised on all when all have ended it.

    Every rank of the group must enter the block. What communicates in it must do so on all ranks even if it fails.

    Args:
        group: all ranks where not given. Without process groups, or alone, nothing is exchanged.

    Raises:
        Exception: this rank's own, else the first that another rank met.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        errors: list[Exception | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, _portable(error), group=group)
        error = error or next((other for other in errors if other is not None), None)
    if error is not None:
        raise error


def _portable(error: Exception | None) -> Exception | None:
    """An exception that another process can be sent: what a user can mend keeps its type."""
    if error is None or isinstance(error, ValueError | OSError):
        return error
    return RuntimeError(f"another rank failed: {type(error).__name__}: {error}")
