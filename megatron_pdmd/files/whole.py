"""Files that are there as a whole or not at all: written beside under another name, and renamed."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Marks a folder that this program is writing, so that what a killed one left is known from a user's folder.
UNFINISHED = ".unfinished_by_megatron_pdmd"
LONGEST_NAME = 200  # bytes; disks take 255, and beside a folder there are others with an ending to its name


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` when the body is done and vanishes when it fails.

    The folder is made where it is missing. The new file is on the disk before it replaces an old one.

    Raises:
        OSError: the folder or the file cannot be written; an old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        synchronise(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, as a whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that a person can read, as a whole or not at all.

    Raises:
        ValueError: a number in it is not finite.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def synchronise(*paths: Path) -> None:
    """Returns when files or folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_destination(folder: Path, flag: str, is_ours: Callable[[Path], bool]) -> None:
    """Refuses a folder that `begin_folder` could not replace. It writes nothing.

    Args:
        folder: new, empty, or made by an earlier call.
        flag: option that names it.
        is_ours: tells whether a folder that is not empty may be replaced.

    Raises:
        ValueError: it holds something else, is a file, or lies where nothing can be written.
    """
    check_writable(folder, flag)
    if folder.exists() and any(folder.iterdir()) and not is_ours(folder):
        raise ValueError(f"{flag} {folder}: is not empty and not made by this program; name a new folder")
    for neighbour in (unfinished(folder), _replaced(folder)):
        if neighbour.exists() and not _is_leftover(neighbour):
            raise ValueError(f"{flag} {folder}: {neighbour} is in the way; move it, or name another folder")


def check_writable(folder: Path, flag: str) -> None:
    """Refuses a folder that could not be made or written to. It writes nothing.

    Args:
        folder: there already or not.
        flag: option that names it.

    Raises:
        ValueError: no permission, a file on the way, or a name that the disk does not take.
    """
    _check_name(folder, flag)
    try:
        above = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot be used ({error.strerror}); name another folder") from None
    if not above.is_dir():
        raise ValueError(f"{flag} {folder}: {above} is a file; name another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {folder}: {above} cannot be written; name another folder or change its permissions")


def check_file_destination(path: Path, flag: str, endings: Collection[str] = ()) -> None:
    """Refuses a file that `written_whole` could not write. It writes nothing.

    Args:
        path: the file, there already or not.
        flag: option that names it.
        endings: what its name may end in, as in `.png`; anything where there are none.

    Raises:
        ValueError: a folder, another ending, or a place where nothing can be written.
    """
    _check_name(path, flag)
    check_writable(path.absolute().parent, flag)
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder; name a file")
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{flag} {path}: name a file that ends in {' or '.join(endings)}")


def begin_folder(folder: Path, flag: str, is_ours: Callable[[Path], bool]) -> Path:
    """A folder to write into, beside the one it will replace; `finish_folder` or `drop_folder` ends it.

    Raises:
        ValueError: see `check_destination`.
    """
    check_destination(folder, flag, is_ours)
    partial, old = unfinished(folder), _replaced(folder)
    if old.exists() and not (folder.exists() and any(folder.iterdir())):  # a crash came between two renames
        if folder.exists():
            folder.rmdir()
        old.rename(folder)
    (folder / UNFINISHED).unlink(missing_ok=True)
    for leftover in (partial, old):
        if leftover.exists():
            _remove(leftover)
    partial.mkdir(parents=True)
    (partial / UNFINISHED).touch()
    return partial


def finish_folder(folder: Path) -> None:
    """Puts the folder that `begin_folder` made in the place of `folder`."""
    partial, old = unfinished(folder), _replaced(folder)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    elif folder.exists():
        (folder / UNFINISHED).touch()  # by which the next call knows it from a user's folder of that name
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
            (folder / UNFINISHED).unlink()
        raise
    (folder / UNFINISHED).unlink()
    synchronise(folder.absolute().parent)
    with contextlib.suppress(OSError):
        _remove(old)


def drop_folder(folder: Path) -> None:
    """Removes the folder that `begin_folder` made; `folder` stays as it was."""
    with contextlib.suppress(OSError):
        _remove(unfinished(folder))


@contextmanager
def replaced_whole(folder: Path, flag: str, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the body is done and vanishes when it fails.

    For one process; ranks that write together call the three functions above in turn.

    Args:
        folder: new, empty, or made by an earlier call.
        flag: option that names it.
        is_ours: tells whether a folder that is not empty may be replaced.

    Raises:
        ValueError: see `check_destination`.
    """
    partial = begin_folder(folder, flag, is_ours)
    try:
        yield partial
        finish_folder(folder)
    except BaseException:
        drop_folder(folder)
        raise


def _is_leftover(folder: Path) -> bool:
    """Whether a killed program left a folder, at whatever moment; an empty one is nobody's."""
    return (folder / UNFINISHED).is_file() or (folder.is_dir() and not any(folder.iterdir()))


def _remove(folder: Path) -> None:
    """Removes a folder, its mark last: what is left of it when the program is killed meanwhile is known again."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED:
            path.unlink()
    (folder / UNFINISHED).unlink(missing_ok=True)
    folder.rmdir()


def _check_name(path: Path, flag: str) -> None:
    if "\0" in str(path):
        raise ValueError(f"{flag} {str(path)!r}: has a null byte, which no name can have; choose another")
    if len(path.name.encode(errors="surrogateescape")) > LONGEST_NAME:
        raise ValueError(f"{flag} {path.name[:40]}...: the name has more than {LONGEST_NAME} bytes; choose a shorter")


def unfinished(folder: Path) -> Path:
    """Where `begin_folder` lets a folder be written."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    """Where the folder that another replaces waits until it has been."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.old")
