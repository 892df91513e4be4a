"""What a run achieved: its loss curves as a picture and its evaluation as a table, from the files in the run's folder.

python -m megatron_pdmd.evaluation.run_report runs/quickstart
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatron_pdmd.errors import parse_options

PANELS = {  # title of a panel -> the logged values drawn in it
    "fake score's loss": ("fake_loss",),
    "generator: mean |gradient| and score gap": ("dmd_gradient", "score_gap"),
    "gradient norms": ("fake_grad_norm", "generator_grad_norm"),
}
METRICS = {  # of the moving-digits task, and which values are better
    "digit_accuracy": "higher",
    "direction_accuracy": "higher",
    "speed_error": "lower",
    "diversity": "near real",
    "frechet_distance": "lower",
}


def read_metrics(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The logged iterations of a run, or with `evaluations.jsonl` its evaluations, oldest first.

    A last line without its end is left out: a running program has not finished writing it.

    Raises:
        ValueError: the file is missing or empty, or a line is not a JSON object.
    """
    path = run / name
    if not path.is_file():
        made = "trained with --eval-interval" if name == "evaluations.jsonl" else "the --save of its training"
        raise ValueError(f"no {path}; name a run's folder, {made}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error.msg}); remove the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not a JSON object; remove the line")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no logged iteration yet; wait for the first, or lower --log-interval")
    return rows


def read_evaluation(run: Path) -> dict[str, dict[str, float]]:
    """`evaluation` of the run's `summary.json`: the metrics of each set of samples; empty if the run has none (yet).

    Raises:
        ValueError: `summary.json` is not JSON of that form.
    """
    path = run / "summary.json"
    if not path.is_file():
        return {}
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8")).get("evaluation") or {}
        return {name: dict(values) for name, values in evaluation.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a run's summary ({error}); run the training's last step again") from error


def save_loss_curves(rows: list[dict], path: Path) -> None:
    """Draws a row of panels for each phase, the gradient norms on a logarithmic axis.

    Faint lines are the logged values, full ones their running mean; what was not logged or not finite is left out. The
    generator has no loss to show: its gradient's size and the gap between teacher and fake score need not fall.

    Args:
        rows: from `read_metrics`.
        path: the PNG to write.
    """
    phases = sorted({row.get("phase", 1) for row in rows})
    figure = Figure(figsize=(4.2 * len(PANELS), 2.8 * len(phases)), dpi=110, layout="constrained")
    axes = figure.subplots(len(phases), len(PANELS), squeeze=False)
    for phase, line_of_axes in zip(phases, axes, strict=True):
        logged = [row for row in rows if row.get("phase", 1) == phase]
        for (title, keys), panel in zip(PANELS.items(), line_of_axes, strict=True):
            _draw_panel(panel, logged, keys)
            panel.set_title(f"phase {phase}: {title}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_panel(panel: Axes, rows: list[dict], keys: tuple[str, ...]) -> None:
    panel.set_xlabel("iteration", fontsize=8)
    panel.tick_params(which="both", labelsize=8)
    panel.grid(alpha=0.3)
    for color, key in enumerate(keys):
        points = [
            (row["iteration"], row[key]) for row in rows if _finite(row.get(key)) and _finite(row.get("iteration"))
        ]
        if not points:
            continue
        iterations, values = zip(*points, strict=True)
        panel.plot(iterations, values, color=f"C{color}", alpha=0.3, linewidth=0.8)
        panel.plot(iterations, running_mean(values), color=f"C{color}", linewidth=1.4, label=key)
        if key.endswith("grad_norm") and min(values) > 0:
            panel.set_yscale("log")
    if len(keys) > 1 and panel.lines:
        panel.legend(fontsize=7)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential mean, unbiased at its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


def evaluation_table(evaluation: Mapping[str, Mapping[str, float]], title: str = "evaluation") -> Table:
    """A table with a row for each set of samples and a column for each metric, under which stands what is better."""
    known = [metric for metric in METRICS if any(metric in values for values in evaluation.values())]
    others = dict.fromkeys(m for values in evaluation.values() for m in values if m not in METRICS)
    table = Table(title=title)
    table.add_column("samples", no_wrap=True)
    for metric in (*known, *others):
        better = f"\n[dim]{METRICS[metric]}[/dim]" if metric in METRICS else ""
        table.add_column(metric.replace("_", " ") + better, justify="right")
    for name, values in evaluation.items():
        numbers = [values.get(metric) for metric in (*known, *others)]
        table.add_row(name, *(f"{number:.4g}" if _finite(number) else "-" for number in numbers))
    return table


def write_run_report(run: Path, console: Console | None = None) -> Path:
    """Draws `loss_curves.png` into the run's folder and prints its evaluation, if it has one.

    Returns:
        The picture's path.

    Raises:
        ValueError: the folder's files are missing or broken.
    """
    picture = run / "loss_curves.png"
    rows, evaluation = read_metrics(run), read_evaluation(run)
    save_loss_curves(rows, picture)
    if evaluation:
        (console or Console()).print(evaluation_table(evaluation, title=str(run)))
    return picture


@dataclass(frozen=True)
class ReportOptions:
    """Draws a run's loss curves and prints its evaluation."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with metrics.jsonl and summary.json."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    try:
        options = parse_options(ReportOptions, __doc__, arguments)
        print(f"loss curves: {write_run_report(options.run)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
