"""Errors end in one line and the right exit code; ours keep their traceback."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
import tyro

from megatron_pdmd import errors
from megatron_pdmd.config import Ints
from megatron_pdmd.errors import NoSpaceError, OtherRankError, parse_options, raised_by_us, user_errors
from megatron_pdmd.limits import check_range

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """Flags of every kind."""

    number: int
    path: Path | None = None
    sizes: Ints | None = None
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    export: bool = True


def end(error: BaseException, capsys: pytest.CaptureFixture[str], **options) -> tuple[int, str]:
    """The exit code and the line in which an error ends."""
    with pytest.raises(SystemExit) as stop, user_errors(**options):
        raise error
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return stop.value.code, captured.err.rstrip("\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("--number 3:\n  is odd"), 2, "error: --number 3: is odd"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 2, "error: a: no such file; is the path right?"),
        (PermissionError(errno.EACCES, "Denied", b"a"), 2, "error: a: denied; change its permissions, or name another"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 2, "error: a: file name too long; choose a shorter"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: no space left on device; make room"),
        (OSError("no model in there"), 2, "error: no model in there"),
        (OSError(errno.EIO, "Input/output error", "a"), 1, "error: a: input/output error; the machine failed"),
        (MemoryError(), 1, "error: out of memory (the machine has no more); take smaller batches"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."), 1, "error: out of memory (CUDA out of memory);"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), 1, "error: out of memory ("),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OtherRankError("rank 1 failed: KeyError: 'x'"), 1, "error: rank 1 failed: KeyError: 'x'"),
        (RuntimeError("[pair.cc:5] Connection closed by peer [::1]:7"), 1, "error: another rank ended or no longer"),
    ],
    ids=repr,
)
def test_what_a_user_can_mend_is_one_line(error, code, line, capsys, monkeypatch):
    monkeypatch.setattr(errors, "SILENCE_FOR_PEERS", 0.0)
    ended_with, told = end(error, capsys)
    assert ended_with == code and told.startswith(line)


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyError("x"), AssertionError()])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), user_errors():
        raise error


def test_a_narrower_mistake_lets_other_value_errors_pass(capsys):
    assert end(NoSpaceError("full"), capsys, mistake=NoSpaceError) == (2, "error: full")
    with pytest.raises(ValueError, match="bug"), user_errors(NoSpaceError):
        raise ValueError("bug")


def test_a_value_error_of_a_library_is_a_bug_where_input_has_been_judged(capsys):
    with pytest.raises(ValueError, match="invalid literal"), user_errors(foreign=False):
        int("x")
    with pytest.raises(SystemExit), user_errors(foreign=False):
        check_range("--x", 2, 0, 1)
    assert capsys.readouterr().err == "error: --x 2: must lie in [0, 1]\n"
    with pytest.raises(ValueError) as caught:
        check_range("--x", 2, 0, 1)
    assert raised_by_us(caught.value) and raised_by_us(ValueError("from another process"))


def test_a_line_is_bounded_and_moves_no_cursor(capsys):
    _, line = end(ValueError("a\x1b[2Jb" + "x" * 5000 + " the mend"), capsys)
    assert line.startswith("error: a\\x1b[2Jb") and line.endswith("the mend") and len(line) < 1100


def test_of_the_ranks_of_one_start_the_first_tells(capsys, monkeypatch, tmp_path):
    told = []
    for rank in ("1", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        with pytest.raises(SystemExit), user_errors():
            raise ValueError("the same")
        told.append(capsys.readouterr().err)
    assert told == ["error: the same\n", "", ""]
    with pytest.raises(SystemExit), user_errors():
        raise ValueError("another, on rank 1 alone")
    assert capsys.readouterr().err == "error: another, on rank 1 alone\n"


def test_a_reader_that_leaves_is_no_error():
    program = "from megatron_pdmd.errors import user_errors\nwith user_errors():\n    print('line\\n' * 100_000)"
    command = f'{sys.executable} -c "$PROGRAM" | head -n 1; exit ${{PIPESTATUS[0]}}'
    environment = os.environ | {"PROGRAM": program}
    done = subprocess.run(["bash", "-c", command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGPIPE, "line\n", "")


def test_flags_are_read() -> None:
    arguments = ["--number", "1", "--number=-3", "--no-export", "--sizes", "1,2", "--names", "x", "y", "--kind=b"]
    expected = Options(-3, sizes=(1, 2), names=("x", "y"), kind="b", export=False)
    assert parse_options(Options, "Flags.", arguments) == expected
    assert parse_options(Options, "Flags.", ["--sizes", "None"], default=expected) == Options(
        -3, names=("x", "y"), kind="b", export=False
    )


def test_a_positional_value_is_read() -> None:
    @dataclass(frozen=True)
    class Positional:
        action: tyro.conf.Positional[Literal["export"]]
        load: Path = Path("a")

    assert parse_options(Positional, "Flags.", ["--load", "b", "export"]) == Positional("export", Path("b"))
    with pytest.raises(ValueError, match="action"):
        parse_options(Positional, "Flags.", [])
    with pytest.raises(ValueError, match="'import' is not one of export"):
        parse_options(Positional, "Flags.", ["import"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--number", "x"], "--number: expected a whole number, got 'x'; see --help"),
        (["--number", "1", "--pth", "a"], "unknown flag '--pth'; did you mean '--path'?"),
        (["--number", "1", "--no-number"], "unknown flag '--no-number'; did you mean '--number'?"),
        (["--number", "1", "--no-exprt"], "unknown flag '--no-exprt'; did you mean '--no-export'?"),
        (["--number", "1", "--kind", "c"], "--kind: 'c' is not one of a, b; see --help"),
        (["--number", "1", "stray"], "Unrecognized options: stray; see --help"),
        ([], "Missing from the program: --number INT (required); see --help"),
    ],
)
def test_bad_flags_are_one_line(arguments: list[str], line: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_options(Options, "Flags.", arguments)
    assert str(refused.value) == line


def test_help_still_exits_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, "Flags of a test.", ["--help"])
    assert stop.value.code == 0
    assert "Flags of a test." in capsys.readouterr().out
