"""What a run logged and measured, read back from the files in its folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_pdmd.files.documents import parse_json, read_json_object, read_text

LARGEST_LOG = 2_000_000_000  # bytes
MOST_PHASES = 100
_MOST_METRICS = 100  # and sets of samples, of an evaluation
_LARGEST_NUMBER = 1e100  # what is drawn; a logged number in fp32 is far smaller

Row = dict[str, float | None]


def read_metrics(run: Path, name: str = "metrics.jsonl") -> list[Row]:
    """The logged iterations of a run, or with `evaluations.jsonl` its evaluations, oldest first.

    A last line without its end is left out: a running program has not finished writing it.

    Returns:
        A row for each line: `iteration` and `phase`, and every other value that is a number; None stands for the rest.

    Raises:
        ValueError: the file is missing, empty or no text, or a line is no log entry.
    """
    path = run / name
    if not path.exists():
        made = "trained with --eval-interval" if name == "evaluations.jsonl" else "the --save of its training"
        raise ValueError(f"no {path}; name a run's folder, {made}")
    lines = read_text(path, largest=LARGEST_LOG).split("\n")[:-1]
    rows = [_row(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
    if not rows:
        raise ValueError(f"{path} has no logged iteration yet; wait for the first, or lower --log-interval")
    return rows


def _row(line: str, where: str) -> Row:
    content = parse_json(line, where)
    if not isinstance(content, dict):
        raise ValueError(f"{where}: is not a JSON object; remove the line")
    for key, most in (("iteration", 2**53), ("phase", MOST_PHASES)):
        if type(content.get(key)) is not int or not 0 <= content[key] <= most:
            raise ValueError(f"{where}: its {key} is no whole number from 0 to {most}; remove the line")
    return {key: number_or_none(value) for key, value in content.items()}


def number_or_none(value: Any) -> float | None:
    """A number of a size that can be drawn and compared; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and -_LARGEST_NUMBER < value < _LARGEST_NUMBER else None


def read_evaluation(run: Path) -> dict[str, dict[str, float | None]]:
    """`evaluation` of the run's `summary.json`: the metrics of each set of samples; empty if the run has none (yet).

    Raises:
        ValueError: `summary.json` is not JSON of that form.
    """
    path = run / "summary.json"
    if not path.exists():
        return {}
    evaluation = read_json_object(path).get("evaluation")
    if evaluation is None:
        return {}
    sets = evaluation.values() if isinstance(evaluation, dict) else [None]
    if not all(isinstance(values, dict) and len(values) <= _MOST_METRICS for values in sets) or (
        len(evaluation) > _MOST_METRICS
    ):
        raise ValueError(f"{path} is not a run's summary (at 'evaluation'); run the training's last step again")
    return {name: {metric: number_or_none(value) for metric, value in own.items()} for name, own in evaluation.items()}


def all_finite(evaluation: Mapping[str, Mapping[str, float | None]]) -> bool:
    """Whether every metric that there is, is finite."""
    return all(value is None or math.isfinite(value) for values in evaluation.values() for value in values.values())
