"""How a program ends on an error: one line on stderr and an exit code, and a traceback only where the mistake is ours.

Exit codes: 2 bad input, 130 interrupted, 1 all else.
"""

import contextlib
import dis
import errno
import hashlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from megatron_pdmd.options import print_help, read_options

Options = TypeVar("Options")

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 128 + signal.SIGINT
READER_LEFT = 128 + signal.SIGPIPE

LONGEST_LINE = 900  # characters
# Seconds that a rank whose peer is gone waits to be ended too, so that the peer's own error is the one that is told.
SILENCE_FOR_PEERS = 5.0

_MENDS = {
    errno.ENOENT: "is the path right?",
    errno.EEXIST: "name another path",
    errno.ENOTDIR: "name another path",
    errno.EISDIR: "name a file",
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "name another path",
    errno.ENOSPC: "make room, or choose another folder",
    errno.EDQUOT: "make room, or choose another folder",
    errno.EROFS: "choose another folder",
}
# What gloo and NCCL say where a rank that they talk to is gone, or no longer answers.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Broken pipe",
    "Socket Timeout",
    "remote process exited",
    "Watchdog caught collective operation timeout",
    "recvValue failed",
    "sendBytes failed",
)


class NoSpaceError(ValueError):
    """The disk cannot hold what is to be written."""


class OtherRankError(RuntimeError):
    """Another rank met an error that is no user's mistake; it tells of it itself."""


@contextlib.contextmanager
def user_errors(mistake: type[ValueError] = ValueError, *, foreign: bool = True) -> Iterator[None]:
    """Ends the process with one line on stderr and its exit code where the body meets what a user can mend.

    That is a ValueError and what a disk says of a path (exit code 2), too little memory, a disk that fails, another
    rank that ended (1), and an interruption (130). Every other exception passes through with its traceback, for it is
    ours to mend. Of ranks that a launcher started on one machine, the first to meet an error tells it.

    Args:
        mistake: the kind of ValueError that counts; a narrower one where the body's own ValueErrors would be bugs.
        foreign: whether ValueErrors count that another library raised, as it does for input that nobody judged.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a reader that left is noticed quietly
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(READER_LEFT) from None
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, ValueError) and not (isinstance(error, mistake) and (foreign or raised_by_us(error))):
            raise
        end = line_and_code(error)
        if end is None:
            raise
        line, code = end
        if isinstance(error, OtherRankError) or _is_lost_peer(error):
            time.sleep(SILENCE_FOR_PEERS)
        tell_once(f"error: {line}")
        raise SystemExit(code) from None


def line_and_code(error: BaseException) -> tuple[str, int] | None:
    """What to say of an error and the exit code; None where it is ours to mend."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, ValueError):
        return text, BAD_INPUT
    if isinstance(error, OtherRankError):
        return text, FAILED
    if isinstance(error, OSError):
        return _os_error(error, text)
    if is_out_of_memory(error):
        told = text.partition(". ")[0] or "the machine has no more"
        mend = "take smaller batches, or for training more ranks or --recompute-granularity full"
        return f"out of memory ({told}); {mend}", FAILED
    if _is_lost_peer(error):
        told = re.sub(r"^\[\S+\] ", "", text).partition(". ")[0]  # without the line of gloo's source, and its advice
        return f"another rank ended or no longer answers ({told}); its own error says why", FAILED
    return None


def _os_error(error: OSError, text: str) -> tuple[str, int]:
    """The line names the file; the code is 2 where the user chose a path that cannot be used."""
    if error.errno is None:  # raised by a library, in its own words
        return text, BAD_INPUT
    path = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    mend = _MENDS.get(error.errno, "the machine failed; see that its disk and network work, and start again")
    return f"{path}{(error.strerror or text).lower()}; {mend}", BAD_INPUT if error.errno in _MENDS else FAILED


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a device's or the machine's; torch's CPU allocator raises a plain RuntimeError."""
    names = {kind.__name__ for kind in type(error).__mro__}  # torch's own, without importing torch
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator: can't allocate" in str(error)


def _is_lost_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_PEER)


def raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` of this package is where an exception comes from, and no library that it called."""
    last = error.__traceback__
    if last is None:
        return True  # made here, and raised nowhere yet
    while last.tb_next is not None:
        last = last.tb_next
    code, module = last.tb_frame.f_code, last.tb_frame.f_globals.get("__name__", "")
    is_raise = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_raise and module.partition(".")[0] == __name__.partition(".")[0]


def tell_once(line: str) -> None:
    """Writes a line to stderr, unless another rank that the same launcher started on this machine has."""
    line = one_line(line)
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <folder of this start>/<local rank>/error.json
    if error_file:
        digest = hashlib.blake2b(line.encode(errors="replace"), digest_size=8).hexdigest()
        try:
            (Path(error_file).parent.parent / f"told_{digest}").touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:  # told twice is better than not at all
            pass
    with contextlib.suppress(OSError, AttributeError):  # where there is no stderr the exit code must do
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def has_told(folder: Path) -> bool:
    """Whether a rank has told an error in a line.

    Args:
        folder: of this start; that of the ranks' folders.
    """
    return any(folder.glob("told_*"))


def one_line(text: str) -> str:
    """A text as one line of bounded length, without what would move a terminal's cursor."""
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def parse_options(
    options: type[Options],
    description: str,
    arguments: Sequence[str] | None = None,
    default: Options | None = None,
) -> Options:
    """Reads a dataclass of options from the command line, or prints the help and exits.

    Args:
        options: the dataclass; its fields become flags.
        description: text above the flags in `--help`.
        arguments: the flags; those of the process where not given.
        default: values of the flags that are not given, instead of the dataclass's own.

    Raises:
        ValueError: an unknown flag or a bad value, in one line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        print_help(options, description, default)
    return read_options(options, arguments, default)


def library_reason(error: Exception) -> str:
    """What a library says of a user's file that it cannot load, in one line of bounded length."""
    if isinstance(error, TypeError | AttributeError | LookupError):  # a slip of its own, on what it did not expect
        return "an entry of its JSON files is missing or of the wrong type"
    return " ".join(str(error).split()).replace("NoneType", "null")[:300] or type(error).__name__


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
