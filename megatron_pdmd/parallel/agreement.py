"""A mistake that one rank meets is told to all, so that all end and none waits for the others."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_pdmd.errors import OtherRankError, one_line, raised_by_us


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block on every rank of a group; what it raises on one rank is raised on all when all have ended it.

    Every rank of the group must enter the block. What communicates in it must do so on all ranks even if it fails.

    Args:
        group: all ranks where not given. Without process groups, or alone, nothing is exchanged.

    Raises:
        Exception: this rank's own, else the first that another rank met: as it was if a user can mend it, and as an
            OtherRankError if it is ours.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        errors: list[Exception | None] = [None] * dist.get_world_size(group)
        # Where this rank has an error of its own, a peer that is gone is no news.
        with contextlib.suppress(RuntimeError) if error is not None else contextlib.nullcontext():
            dist.all_gather_object(errors, _portable(error), group=group)
        error = error or next((other for other in errors if other is not None), None)
    if error is not None:
        raise error


def _portable(error: Exception | None) -> Exception | None:
    """An exception that another process can be sent: what a user can mend keeps its type."""
    if error is None or isinstance(error, OtherRankError):
        return error
    if isinstance(error, OSError) or (isinstance(error, ValueError) and raised_by_us(error)):
        known = type(error).__module__.partition(".")[0] in ("builtins", __name__.partition(".")[0])
        return error if known else ValueError(str(error))  # a library's type may not be one that can be sent
    return OtherRankError(f"rank {dist.get_rank()} failed: {one_line(f'{type(error).__name__}: {error}')}")
