"""One launch at a time in a run's folder."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from megatron_pdmd.files.documents import read_json_object

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_ATTEMPTS, _PAUSE = 10, 0.1  # seconds; another launch's `check_unlocked` holds the lock for an instant


class RunLock:
    """Keeps other launches out of a folder: `flock` on a file in it, held by the process that made this.

    The system drops it when that process ends, however it ends; the file that a killed one leaves locks nobody out.
    It holds on all nodes where the disk passes `flock` on, as NFS does, and Lustre mounted with it.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK
        self._descriptor: int | None = None

    def acquire(self) -> str | None:
        """Takes the lock.

        Returns:
            What to tell where this disk has no locks; None where the lock is held.

        Raises:
            ValueError: another launch has it; says which.
        """
        for _ in range(_ATTEMPTS):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in _UNSUPPORTED:
                    return f"{self._path.parent}: this disk has no locks; see that no other launch writes there"
                if not isinstance(error, BlockingIOError):
                    raise
                time.sleep(_PAUSE)
                continue
            if _is_at(descriptor, self._path):
                self._descriptor = descriptor
                self._sign()
                return None
            os.close(descriptor)  # whoever had it has just removed it
        raise ValueError(in_use(self._path.parent))

    def release(self) -> None:
        """Lets go of the lock, if it is held, and removes its file."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            if _is_at(self._descriptor, self._path):
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _sign(self) -> None:
        """Writes down who holds it, for who is kept out."""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, (json.dumps(holder) + "\n").encode())


def check_unlocked(folder: Path) -> None:
    """Refuses a folder in which another launch is at work.

    Raises:
        ValueError: says which.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(in_use(folder)) from None
    except OSError:
        return
    finally:
        os.close(descriptor)


def in_use(folder: Path) -> str:
    """Who is at work in a folder, and what to do."""
    try:
        holder = read_json_object(folder / LOCK)
    except ValueError:  # it has just been taken, or let go
        holder = {}
    who = ", ".join(f"{name} {holder[name]}" for name in ("host", "pid", "since") if name in holder)
    return (
        f"--save {folder}: another launch is at work there ({who or 'unknown'}); wait for it or choose another folder"
    )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
