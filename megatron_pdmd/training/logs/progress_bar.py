"""How far the present iteration is, on a terminal; an iteration of a large model takes minutes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressBar:
    """One line on stderr that follows the iterations; silent on all ranks but the first, and where stderr is a file.

    Args:
        rank: of this process.
        console: where to draw; stderr by default.
    """

    def __init__(self, rank: int, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._enabled = rank == 0 and self._console.is_terminal
        self._progress: Progress | None = None
        self._label = ""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draws the line inside the block; what is printed meanwhile appears above it."""
        if not self._enabled:
            yield
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        # Output that goes to a file stays there.
        options = {"redirect_stdout": sys.stdout.isatty(), "redirect_stderr": sys.stderr.isatty()}
        with Progress(*columns, console=self._console, transient=True, **options) as self._progress:
            self._progress.add_task("")
            yield
        self._progress = None

    def begin(self, label: str, done: int, parts: int) -> None:
        """Starts anew, with so many parts of which some are done already."""
        self._label = label
        self._update(description=label, total=parts, completed=done)

    def say(self, doing: str) -> None:
        """Names what is being done now."""
        self._update(description=f"{self._label}, {doing}")

    def advance(self) -> None:
        """One part is done."""
        self._update(advance=1)

    def _update(self, **changes: object) -> None:
        if self._progress is not None:
            (task,) = self._progress.task_ids
            self._progress.update(task, **changes)
