"""What may come of an input that nobody checked: it is refused in one line without a trace, or it works."""

import re
from collections import Counter
from pathlib import Path

from fault_programs import Outcome
from fault_world import World
from safetensors.torch import load_file

_LONGEST_LINE = 1000
# What Python and libraries say where nobody said which file or flag is meant.
_UNHELPFUL = ("Traceback", "[Errno", "embedded null", "NoneType", "object has no attribute", "list index", "unhashable")

_PROGRESS = re.compile(r"\d+%|\d+/\d+")  # a bar that was being drawn

TALLY: Counter[str] = Counter()


def judge(outcome: Outcome, world: World, before: dict[str, bytes | None]) -> None:
    """Lets pass what accepts its input or refuses it well, and fails with what was printed of all else.

    Args:
        outcome: of the program.
        world: where it ran.
        before: the world's content when it started.
    """
    problem = _problem(outcome, world, before)
    TALLY[problem or ("accepted" if outcome.code == 0 else "refused")] += 1
    printed = outcome.out[-500:] + outcome.err[-4000:]
    told = f"{problem}: {outcome.command}\nexit code {outcome.code}\n{printed}"
    assert problem is None, told


def _problem(outcome: Outcome, world: World, before: dict[str, bytes | None]) -> str | None:
    if outcome.hung:
        return "hung"
    if "Traceback" in outcome.err:
        return "traceback"
    if outcome.code == 0:
        return None if _is_finite(world.folder) else "accepted what is not finite"
    if outcome.code != 2:
        return "wrong exit code"
    lines = [line for line in outcome.err.splitlines() if line.strip() and not _PROGRESS.search(line)]
    if len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > _LONGEST_LINE:
        return "not one line"
    if any(phrase in lines[0] for phrase in _UNHELPFUL):
        return "unhelpful line"
    return None if world.content() == before else "partial output"


def _is_finite(folder: Path) -> bool:
    """Whether all that programs wrote there holds finite numbers alone."""
    written = [path for name in ("new", "out") for path in (folder / name).rglob("*.safetensors")]
    tensors = (tensor for path in written for tensor in load_file(path).values())
    return all(tensor.isfinite().all() for tensor in tensors if tensor.dtype.is_floating_point)
