"""Draws what runs logged, several side by side; docs/reading_the_log.md says how to read it.

python tools/plot_log.py --figure evaluations --runs runs/a runs/b --save evaluations.png
python tools/plot_log.py --figure score-gap --runs "rate 1e-5=runs/a" "rate 1e-4=runs/b" --save score_gap.png
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_pdmd.distillation.step import NOISE_BINS
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.evaluation.run_files import Row, read_metrics
from megatron_pdmd.evaluation.run_report import running_mean
from megatron_pdmd.files.whole import check_file_destination, written_whole

LARGEST_SHEET = 2**16  # pixels
MOST_RUNS = 20

# Title of a panel -> what is drawn of an evaluation, and whether on a logarithmic axis.
EVALUATION_PANELS: dict[str, tuple[Callable[[Row], float | None], bool]] = {
    "fake score's loss / floor": (lambda row: _quotient(row.get("eval_fake_loss"), row.get("fake_loss_floor")), True),
    "sample distance from the teacher": (lambda row: row.get("sample_distance"), False),
    "sample change since the last evaluation": (lambda row: row.get("sample_change"), True),
    "generator's movement": (lambda row: row.get("generator_movement"), True),
}


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draws a figure of one or more runs."""

    # What is drawn: evaluations, the score gap by level of noise, or each run's last sample sheet.
    figure: Literal["evaluations", "score-gap", "sheets"]
    # Folders of runs, each perhaps with a label before it: label=folder.
    runs: tuple[str, ...]
    # PNG to write.
    save: Path


def main(arguments: list[str] | None = None) -> None:
    with user_errors():
        options = parse_options(PlotOptions, __doc__, arguments)
        draw = {"evaluations": evaluation_figure, "score-gap": score_gap_figure, "sheets": sheet_figure}
        check_file_destination(options.save, "--save", (".png",))
        figure = draw[options.figure](labelled(options.runs))
        with written_whole(options.save) as partial:
            figure.savefig(partial, dpi=90, format="png")
        print(f"wrote {options.save}")


def labelled(runs: tuple[str, ...]) -> dict[str, Path]:
    """Label -> folder; a run without a label has its folder's name.

    Raises:
        ValueError: no run, too many, or two of the same label.
    """
    if len(runs) > MOST_RUNS:
        raise ValueError(f"--runs: names {len(runs)}; a figure has room for {MOST_RUNS}")
    pairs = [(label or Path(folder).name, Path(folder)) for label, _, folder in (run.rpartition("=") for run in runs)]
    if not pairs or len(dict(pairs)) < len(pairs):
        raise ValueError("--runs: name at least one folder, and give those of the same name labels, label=folder")
    return dict(pairs)


def evaluation_figure(runs: Mapping[str, Path]) -> Figure:
    """A panel for each number, a line for each run."""
    figure = Figure(figsize=(4.0 * len(EVALUATION_PANELS), 3.2), layout="constrained")
    for panel, (title, (value, logarithmic)) in zip(
        figure.subplots(1, len(EVALUATION_PANELS)), EVALUATION_PANELS.items(), strict=True
    ):
        for color, (label, run) in enumerate(runs.items()):
            _draw_phases(panel, read_metrics(run, "evaluations.jsonl"), value, f"C{color}", label, marker=".")
        _finish(panel, title, logarithmic)
    figure.axes[0].axhline(1, color="black", linewidth=0.8)
    figure.axes[-1].legend(fontsize=8, loc="center right")
    return figure


def score_gap_figure(runs: Mapping[str, Path]) -> Figure:
    """A panel for each run, a line for each bin of noise; all share their axes."""
    figure = Figure(figsize=(4.6 * len(runs), 3.4), layout="constrained")
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (label, run) in zip(panels, runs.items(), strict=True):
        rows = read_metrics(run)
        for index in range(NOISE_BINS):
            name = f"bin {index}" + {0: ", least noise", NOISE_BINS - 1: ", most noise"}.get(index, "")
            key = f"score_gap_bin_{index}"
            _draw_phases(panel, rows, lambda row, key=key: row.get(key), f"C{index}", name, smooth=True)
        _finish(panel, f"score gap: {label}", logarithmic=True)
    panels[0].legend(fontsize=8)
    return figure


def sheet_figure(runs: Mapping[str, Path]) -> Figure:
    """The last sample sheet of each run, one above the other.

    Raises:
        ValueError: a run has none.
    """
    pictures = []
    for run in runs.values():
        found = sorted((run / "samples").glob("iter_*.png"))
        if not found:
            raise ValueError(f"{run / 'samples'}: no sample sheet; train with --sample-prompts above 0")
        pictures.append(_read_picture(found[-1]))
    width = max(picture.shape[1] for picture in pictures)
    height = sum(picture.shape[0] for picture in pictures)
    figure = Figure(figsize=(8, 8 * height / width + 0.3 * len(pictures)), layout="constrained")
    panels = figure.subplots(len(pictures), 1, squeeze=False)[:, 0]
    for panel, label, picture in zip(panels, runs, pictures, strict=True):
        panel.imshow(picture, interpolation="nearest")
        panel.set_title(label, fontsize=9, loc="left")
        panel.axis("off")
    return figure


def _read_picture(path: Path) -> np.ndarray:
    try:
        picture = iio.imread(path, plugin="pillow")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: is no readable PNG ({' '.join(str(error).split())[:200]}); remove it") from None
    if picture.ndim not in (2, 3) or max(picture.shape[:2]) > LARGEST_SHEET:
        raise ValueError(f"{path}: is no sample sheet, but an image {list(picture.shape)}; remove it")
    return picture


def _draw_phases(
    panel: Axes,
    rows: list[Row],
    value: Callable[[Row], float | None],
    color: str,
    label: str,
    *,
    marker: str | None = None,
    smooth: bool = False,
) -> None:
    """One line for each phase, for their numbers have different scales; gaps where there is no number."""
    for phase in sorted({row["phase"] for row in rows}):
        points = [(row["iteration"], value(row)) for row in rows if row["phase"] == phase]
        points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        if points:
            x, y = zip(*points, strict=True)
            y = running_mean(y) if smooth else y
            panel.plot(x, y, color=color, marker=marker, linewidth=1.3, label=label)
            label = "_"  # matplotlib's way to leave a line out of the legend
        before = [row["iteration"] for row in rows if row["phase"] < phase]
        if before:
            panel.axvline(max(before) + 0.5, color="grey", linewidth=0.8, linestyle=":")


def _finish(panel: Axes, title: str, logarithmic: bool) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("iteration", fontsize=8)
    panel.tick_params(which="both", labelsize=8)
    panel.grid(alpha=0.3)
    if logarithmic:
        panel.set_yscale("log")


def _quotient(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


if __name__ == "__main__":
    main()
