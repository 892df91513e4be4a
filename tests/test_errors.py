"""Mistakes of the user end in one line and exit code 2; ours keep their traceback."""

import errno
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_pdmd.errors import parse_options, user_errors


@dataclass(frozen=True)
class Options:
    """Two flags."""

    number: int
    path: Path | None = None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("--number 3:\n  is odd"),
        FileNotFoundError(errno.ENOENT, "No such file", "a"),
        PermissionError("locked"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_user_mistakes_exit_with_two(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, user_errors():
        raise error
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize("error", [RuntimeError("bug"), OSError(errno.EIO, "broken disk"), KeyError("x")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), user_errors():
        raise error


def test_flags_are_read() -> None:
    assert parse_options(Options, "Two flags.", ["--number", "3"]) == Options(3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--number", "x"], "--number"), (["--number", "1", "--pth", "a"], "--pth"), ([], "--number")],
)
def test_bad_flags_are_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named) as refused:
        parse_options(Options, "Two flags.", arguments)
    assert "\n" not in str(refused.value)
    assert not set(str(refused.value)) & set("│╭─")


def test_help_still_exits_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, "Two flags.", ["--help"])
    assert stop.value.code == 0
    assert "Two flags." in capsys.readouterr().out
