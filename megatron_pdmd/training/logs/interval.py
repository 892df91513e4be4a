"""Means over the iterations between two log entries."""

import math
from collections.abc import Mapping

Sums = dict[str, list[float]]


class IntervalMeans:
    """Sums up what each iteration gives until a log entry is due.

    The sums are part of a checkpoint, so a run that is stopped between two entries logs the same numbers as one that is
    not. A number that is not finite, of an update that was skipped, is left out of its mean.

    Args:
        sums: those of a checkpoint, by name: the sum of the finite numbers, and how many they are.
    """

    def __init__(self, sums: Mapping[str, list[float]] | None = None):
        self._sums: Sums = {name: list(pair) for name, pair in (sums or {}).items()}

    @property
    def sums(self) -> Sums:
        """What a checkpoint keeps."""
        return {name: list(pair) for name, pair in self._sums.items()}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of one iteration; not every one needs to give each name."""
        for name, value in metrics.items():
            pair = self._sums.setdefault(name, [0.0, 0.0])
            if math.isfinite(value):
                pair[0] += value
                pair[1] += 1

    def take(self) -> dict[str, float]:
        """The means since the last call, NaN where no number was finite; begins anew."""
        means = {name: total / count if count else math.nan for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


def closes_interval(iteration: int, phase_iteration: int, phase_iterations: int, log_interval: int) -> bool:
    """Whether an iteration ends with a log entry: every `log_interval`-th, and a phase's first and last one.

    So no entry averages over two phases, or over a first iteration with its warm-up and later ones.

    Args:
        iteration: iterations done in the run.
        phase_iteration: those of them in the present phase.
        phase_iterations: all of the phase.
        log_interval: `--log-interval`.
    """
    return iteration % log_interval == 0 or phase_iteration in (1, phase_iterations)
