"""A program run as a user runs it, in a fork of a process that has paid for its imports."""

import gc
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

LONGEST_SECONDS = 60.0
_MORE_MEMORY = 8 << 30  # bytes of address space beyond the parent's


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        command: what was run.
        code: exit code, or minus the signal that ended it; minus SIGKILL where the time was up.
        out, err: what it printed.
        seconds: how long it took.
    """

    command: str
    code: int
    out: str
    err: str
    seconds: float

    @property
    def hung(self) -> bool:
        """Whether the time was up."""
        return self.code == -signal.SIGKILL and self.seconds >= LONGEST_SECONDS


def run_program(
    program: ModuleType, arguments: Sequence[str], folder: Path, environment: dict[str, str] | None = None
) -> Outcome:
    """Calls a program's `main()` with these flags, in a folder.

    Args:
        program: a module with `main`, which reads `sys.argv`.
        arguments: its flags.
        folder: where it runs.
        environment: variables that it sees besides the present ones.
    """
    command = " ".join([program.__name__, *map(repr, arguments)])
    gc.collect()  # a dropped process group that the child collected would wait there for the parent's threads
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_program(program, arguments, folder, environment or {}, out.fileno(), err.fileno())
        code = _wait(child, started + LONGEST_SECONDS)
        seconds = time.monotonic() - started
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Outcome(command, code, *texts, seconds)


def _wait(child: int, deadline: float) -> int:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)


def _be_program(
    program: ModuleType, arguments: Sequence[str], folder: Path, environment: dict[str, str], out: int, err: int
) -> None:
    """Never returns: the child must not unwind into the parent's tests."""
    code = 1
    try:
        gc.freeze()
        os.setpgid(0, 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.chdir(folder)
        os.environ.update(environment)
        limit = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _MORE_MEMORY, limit))
        torch.set_num_threads(1)
        sys.argv = [program.__name__, *arguments]
        code = _exit_code(program)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(program: ModuleType) -> int:
    """The code with which the interpreter would end."""
    try:
        code = program.main()
    except SystemExit as stop:
        code = stop.code
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    return pages * resource.getpagesize()
