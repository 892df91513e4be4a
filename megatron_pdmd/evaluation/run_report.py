"""What a run achieved: its loss curves as a picture and its evaluation as a table, from the files in the run's folder.

python -m megatron_pdmd.evaluation.run_report runs/quickstart
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_pdmd.errors import one_line, parse_options, user_errors
from megatron_pdmd.evaluation.run_files import Row, number_or_none, read_evaluation, read_metrics
from megatron_pdmd.files.whole import check_file_destination, written_whole

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


def save_loss_curves(rows: list[Row], path: Path) -> None:
    """Draws a row of panels for each phase, the gradient norms on a logarithmic axis.

    Faint lines are the logged values, full ones their running mean; what was not logged or not finite is left out. The
    generator has no loss to show: its gradient's size and the gap between teacher and fake score need not fall.

    Args:
        rows: from `read_metrics`.
        path: the PNG to write.
    """
    phases = sorted({row["phase"] for row in rows})
    figure = Figure(figsize=(4.2 * len(PANELS), 2.8 * len(phases)), dpi=110, layout="constrained")
    axes = figure.subplots(len(phases), len(PANELS), squeeze=False)
    for phase, line_of_axes in zip(phases, axes, strict=True):
        logged = [row for row in rows if row["phase"] == phase]
        for (title, keys), panel in zip(PANELS.items(), line_of_axes, strict=True):
            _draw_panel(panel, logged, keys)
            panel.set_title(f"phase {phase}: {title}", fontsize=9)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png")


def _draw_panel(panel: Axes, rows: list[Row], keys: tuple[str, ...]) -> None:
    panel.set_xlabel("iteration", fontsize=8)
    panel.tick_params(which="both", labelsize=8)
    panel.grid(alpha=0.3)
    for color, key in enumerate(keys):
        points = [(row["iteration"], row[key]) for row in rows if row.get(key) is not None]
        if not points:
            continue
        iterations, values = zip(*points, strict=True)
        panel.plot(iterations, values, color=f"C{color}", alpha=0.3, linewidth=0.8)
        panel.plot(iterations, running_mean(values), color=f"C{color}", linewidth=1.4, label=key)
        if key.endswith("grad_norm") and min(values) > 0:
            panel.set_yscale("log")
    if len(keys) > 1 and panel.lines:
        panel.legend(fontsize=7)


def running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential mean, unbiased at its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


def evaluation_table(evaluation: Mapping[str, Mapping[str, float | None]], title: str = "evaluation") -> Table:
    """A table with a row for each set of samples and a column for each metric, under which stands what is better."""
    known = [metric for metric in METRICS if any(metric in values for values in evaluation.values())]
    others = dict.fromkeys(m for values in evaluation.values() for m in values if m not in METRICS)
    table = Table(title=_plain(title))
    table.add_column("samples", no_wrap=True)
    for metric in (*known, *others):
        better = f"\n[dim]{METRICS[metric]}[/dim]" if metric in METRICS else ""
        table.add_column(_plain(metric.replace("_", " ")) + better, justify="right")
    for name, values in evaluation.items():
        numbers = [number_or_none(values.get(metric)) for metric in (*known, *others)]
        table.add_row(_plain(name), *("-" if number is None else f"{number:.4g}" for number in numbers))
    return table


def _plain(text: str) -> str:
    """A text out of a file as a table shows it, whatever is in it."""
    return escape(one_line(text))


def write_run_report(run: Path, console: Console | None = None) -> Path:
    """Draws `loss_curves.png` into the run's folder and prints its evaluation, if it has one.

    Returns:
        The picture's path.

    Raises:
        ValueError: the folder's files are missing or broken.
    """
    picture = run / "loss_curves.png"
    check_file_destination(picture, "the picture")
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


def main(arguments: list[str] | None = None) -> None:
    with user_errors():
        options = parse_options(ReportOptions, __doc__, arguments)
        print(f"loss curves: {write_run_report(options.run)}")


if __name__ == "__main__":
    main()
