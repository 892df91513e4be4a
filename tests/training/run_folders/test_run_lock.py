"""One launch at a time in a folder, whatever becomes of the one that had it."""

import errno
import fcntl
import json
import os
import signal
import socket

import pytest

from megatron_pdmd.training.run_folders import run_lock
from megatron_pdmd.training.run_folders.run_lock import LOCK, RunLock, check_unlocked


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "_PAUSE", 0.001)


def test_who_has_it_is_told_to_whom_it_keeps_out(tmp_path):
    check_unlocked(tmp_path)
    held = RunLock(tmp_path)
    assert held.acquire() is None
    who = (
        rf"--save {tmp_path}: another launch is at work there \(host {socket.gethostname()}, pid {os.getpid()}, since 2"
    )
    for ask in (RunLock(tmp_path).acquire, lambda: check_unlocked(tmp_path)):
        with pytest.raises(ValueError, match=who):
            ask()
    held.release()
    assert not list(tmp_path.iterdir())
    check_unlocked(tmp_path)
    again = RunLock(tmp_path)
    assert again.acquire() is None
    again.release()
    again.release()


def test_a_killed_process_leaves_a_file_that_locks_nobody_out(tmp_path, in_child):
    def killed() -> None:
        assert RunLock(tmp_path).acquire() is None
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    assert json.loads((tmp_path / LOCK).read_text())["pid"] != os.getpid()
    check_unlocked(tmp_path)
    lock = RunLock(tmp_path)
    assert lock.acquire() is None
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_file_that_was_removed_before_it_was_locked_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Between opening and locking, the launch that had it ends, and a third one begins with a new file."""
    flock, others = fcntl.flock, []

    def late(descriptor, operation):
        if not others:
            (tmp_path / LOCK).unlink()
            others.append(RunLock(tmp_path))
            others[0].acquire()
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another launch is at work"):
        RunLock(tmp_path).acquire()
    others[0].release()


def test_a_disk_without_locks_is_told_and_used(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock = RunLock(tmp_path)
    assert "this disk has no locks; see that no other launch writes there" in lock.acquire()
    check_unlocked(tmp_path)
    lock.release()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b"[" * 9999])
def test_an_odd_file_of_a_lock_is_no_obstacle(content, tmp_path):
    (tmp_path / LOCK).write_bytes(content)
    check_unlocked(tmp_path)
    with (tmp_path / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"at work there \(unknown\)"):
            check_unlocked(tmp_path)
