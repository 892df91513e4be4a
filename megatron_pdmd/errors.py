"""How a program tells its user about bad input: one line on stderr, exit code 2, no traceback."""

import contextlib
import errno
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

Options = TypeVar("Options")

_USER_OS_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class NoSpaceError(ValueError):
    """The disk cannot hold what is to be written."""


@contextlib.contextmanager
def user_errors(mistake: type[ValueError] = ValueError) -> Iterator[None]:
    """Ends the process with exit code 2 and one line on stderr when the body meets a user's mistake.

    A mistake is a ValueError, a path that is missing, occupied or forbidden, or a disk that is full or read-only. Every
    other exception passes through with its traceback, for it is ours to mend.

    Args:
        mistake: the kind of ValueError that counts; a narrower one where the body's own ValueErrors would be bugs.
    """
    try:
        yield
    except (mistake, OSError) as error:
        is_user_error = isinstance(error, (mistake, *_USER_OS_ERRORS)) or error.errno in _FULL_OR_READ_ONLY
        if not is_user_error:
            raise
        if os.environ.get("RANK", "0") == "0":  # every rank meets the same mistake; one tells it
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


def parse_options(
    options: type[Options],
    description: str,
    arguments: Sequence[str] | None = None,
    default: Options | None = None,
) -> Options:
    """Reads a dataclass of options from the command line.

    Args:
        options: the dataclass; its fields become flags.
        description: text above the flags in `--help`.
        arguments: the flags; those of the process where not given.
        default: values of the flags that are not given, instead of the dataclass's own.

    Raises:
        ValueError: an unknown flag or a bad value, in one line.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            program, given = Path(sys.argv[0]).name, {} if default is None else {"default": default}
            return tyro.cli(options, description=description, args=arguments, prog=program, **given)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_without_frame(messages.getvalue())) from None


def _without_frame(box: str) -> str:
    """What a framed message of tyro says, without the frame, its title and the help text below it."""
    text = " ".join(re.sub(r"[─-╿]+", " ", box).split())
    text = re.split(r"For full helptext|Argument helptext:|Full helptext:", text)[0]
    titles = "Parsing error|Value error|Invalid choice|Missing argument|Required options|Unrecognized options"
    return re.sub(rf"^(?:{titles})\s+", "", text).strip() + " (see --help)"


def require_space(path: Path, needed: int, flag: str) -> None:
    """Refuses to start writing what the disk cannot hold.

    Args:
        path: file or folder to be written, there already or not.
        needed: bytes.
        flag: option that names the path, for the error's line.

    Raises:
        NoSpaceError: fewer than `needed` bytes are free, with a hundredth and 1 MiB to spare.
    """
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed * 1.01 + 2**20:
        raise NoSpaceError(
            f"{flag} {path}: no space on disk: {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free; "
            "make room or choose another folder"
        )
