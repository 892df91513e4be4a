"""What the 2-D toy found: the mean and spread over seeds as a table, and in words where phases win and where not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rich.table import Table
from ring import METRICS, Metrics

BETTER = {"energy_distance": min, "mode_kl": min, "on_modes": max}
HEADINGS = {"energy_distance": "energy distance", "mode_kl": "mode-weight KL", "on_modes": "on the modes"}
DIGITS = {"energy_distance": 4, "mode_kl": 4, "on_modes": 3}
STANDARD_ERRORS = 2.0  # two means are told apart if they differ by so many standard errors of their difference


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        setting: shift and weighting in words; lines of one setting are compared with each other.
        name: of the method.
        phased: whether the method has phases; None for a reference, which is compared with nothing.
        metrics: of each seed.
        seconds: time of the training, all seeds.
    """

    setting: str
    name: str
    phased: bool | None
    metrics: Sequence[Metrics]
    seconds: float = 0.0

    def values(self, metric: str) -> list[float]:
        """The metric of each seed."""
        return [getattr(one, metric) for one in self.metrics]

    def summary(self) -> dict[str, dict[str, float | list[float]]]:
        """Mean, standard deviation and values of each metric, for JSON."""
        return {
            metric: {"mean": fmean(values), "std": _spread(values), "seeds": values}
            for metric, values in ((metric, self.values(metric)) for metric in METRICS)
        }


def as_table(rows: Sequence[Row]) -> Table:
    """Mean and standard deviation over the seeds, a section for each setting, the best of its methods bold."""
    table = Table(title="Figure 1's methods on the ring: mean ± standard deviation over the seeds")
    table.add_column("method", no_wrap=True)
    for metric in METRICS:
        table.add_column(HEADINGS[metric], justify="right", no_wrap=True)
    setting = None
    for row in rows:
        if row.setting != setting:
            table.add_section()
            table.add_row(f"[italic]{row.setting}[/italic]")
            setting = row.setting
        table.add_row(row.name, *(_cell(row, metric, rows) for metric in METRICS))
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """For every setting and every phased method, where it wins against each method without phases and where not."""
    return [
        f"{row.setting}, {row.name} against {other.name}: {_verdict(row, other)}"
        for row in rows
        for other in rows
        if row.phased and other.phased is False and other.setting == row.setting
    ]


def _verdict(row: Row, other: Row) -> str:
    found: dict[str, list[str]] = {"better": [], "worse": [], "the same within the spread": []}
    for metric in METRICS:
        mine, theirs = row.values(metric), other.values(metric)
        error = math.sqrt((_spread(mine) ** 2 + _spread(theirs) ** 2) / len(mine))
        if abs(fmean(mine) - fmean(theirs)) <= STANDARD_ERRORS * error:
            kind = "the same within the spread"
        else:
            kind = "better" if BETTER[metric](fmean(mine), fmean(theirs)) == fmean(mine) else "worse"
        digits = DIGITS[metric]
        found[kind].append(f"{HEADINGS[metric]} {fmean(mine):.{digits}f} to {fmean(theirs):.{digits}f}")
    return "; ".join(f"{kind}: {', '.join(metrics)}" for kind, metrics in found.items() if metrics)


def _cell(row: Row, metric: str, rows: Sequence[Row]) -> str:
    values, digits = row.values(metric), DIGITS[metric]
    text = f"{fmean(values):.{digits}f}" + (f" ±{_spread(values):.{digits}f}" if len(values) > 1 else "")
    if row.phased is None:
        return text
    rivals = [fmean(one.values(metric)) for one in rows if one.setting == row.setting and one.phased is not None]
    return f"[bold]{text}[/bold]" if fmean(values) == BETTER[metric](rivals) else text


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
