"""A run's metrics.jsonl and evaluations.jsonl as a launch finds them, and cutting them back to a checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from megatron_pdmd.files.documents import parse_json
from megatron_pdmd.files.whole import written_whole


def entries_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each whole entry's iteration and its line; none where there is no file.

    A line that a killed run left half-written, or that is no entry of a log, is left out.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            entry = parse_json(line, str(path))
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("iteration")) is int:
            yield entry["iteration"], line


def cut_log(path: Path, iteration: int) -> str | None:
    """Drops the entries after `iteration`, which a run that goes on from there logs again.

    Where that would leave nothing of a log, it is kept under another name: the checkpoints may be what is missing.

    Args:
        path: metrics.jsonl or evaluations.jsonl; there or not.
        iteration: the checkpoint's, 0 for a run that begins.

    Returns:
        What to tell of it, if anything.
    """
    if not path.exists():
        return None
    entries = list(entries_of(path))
    kept = [line for number, line in entries if number <= iteration]
    told = None
    if entries and not kept:
        old = path.with_name(f"{path.name}.old")
        path.replace(old)
        told = f"{path.name} had entries of {len(entries)} iterations and no checkpoint to go on from: now {old.name}"
    with written_whole(path) as partial:
        partial.write_bytes(b"".join(line + b"\n" for line in kept))
    return told
