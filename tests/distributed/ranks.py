"""Run a function on real gloo ranks, forked from a process that has already paid for importing megatron-core.

A rank is a forked child: it shares the parent's imports and memory, so a test function may be a closure. Ranks meet
through a file, not a port. The first rank to fail takes the others down at once, and its traceback reaches the test.
"""

import datetime
import gc
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_POLL_SECONDS = 0.01


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, rendezvous: bool = True
) -> list[Any]:
    """Call ``function(*args)`` on `world_size` forked ranks and return what each returned, by rank.

    Args:
        function: runs with ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` set, as under torchrun. What it returns is
            pickled.
        world_size: number of ranks.
        timeout: seconds until all ranks are killed.
        rendezvous: create the gloo process group before calling `function`; without it that is left to `function`.

    Raises:
        RuntimeError: a rank failed (the message holds its traceback), was killed, or did not finish in time.
    """
    assert not dist.is_initialized(), "the parent's process group would be inherited; destroy it before forking"
    # A process group that the parent dropped must not be collected in a child, which lacks the threads it waits for.
    gc.collect()
    torch.set_num_threads(1)  # a forked child cannot use the parent's OpenMP threads and would wait for them forever
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running: dict[int, int] = {}
        try:
            for rank in range(world_size):
                pid = os.fork()
                if pid == 0:
                    _run_rank(function, args, rank, world_size, folder, timeout, rendezvous)
                running[pid] = rank
            _wait(running, folder, timeout)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _run_rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    folder: Path,
    timeout: float,
    rendezvous: bool,
) -> None:
    """Be one rank. Never returns: the child must not unwind into the parent's test session."""
    exit_code = 1
    inherited = set(multiprocessing.active_children())
    gc.freeze()
    try:
        signal.alarm(math.ceil(timeout) + 1)  # ends the rank even if its parent is gone
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        if rendezvous:
            store = dist.FileStore(str(folder / "store"), world_size)
            limit = datetime.timedelta(seconds=timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        result = function(*args)
        if dist.is_initialized():
            dist.barrier()
        torch.save(result, folder / f"{rank}.result")
        exit_code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for child in set(multiprocessing.active_children()) - inherited:  # megatron-core's writers would outlive us
            child.kill()
            child.join()
        os._exit(exit_code)


def _wait(running: dict[int, int], folder: Path, timeout: float) -> None:
    """Reap ranks, removing them from `running`, until all are done; raise as soon as one fails or the time is up."""
    deadline = time.monotonic() + timeout
    while running:
        for pid, rank in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            del running[pid]
            if status != 0:
                raise RuntimeError(_describe_failure(rank, status, folder))
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(running.values())} did not finish in {timeout} s")
        time.sleep(_POLL_SECONDS)


def _describe_failure(rank: int, status: int, folder: Path) -> str:
    """Tell of the rank that failed first: those that it left alone in a collective fail soon after."""
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        return f"rank {errors[0].stem} failed:\n{errors[0].read_text()}"
    return f"rank {rank} ended with exit code {os.waitstatus_to_exitcode(status)} (negative: killed by that signal)"
