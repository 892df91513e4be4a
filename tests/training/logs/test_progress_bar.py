"""The line on the terminal: what it shows, and where there is none."""

import io
import sys

import pytest
from rich.console import Console

from megatron_pdmd.training.logs import progress_bar
from megatron_pdmd.training.logs.progress_bar import ProgressBar


def drawn(rank: int, *, terminal: bool) -> str:
    """What an iteration of four updates draws."""
    screen = io.StringIO()
    bar = ProgressBar(rank, Console(file=screen, force_terminal=terminal, width=120))
    with bar.shown():
        bar.begin("phase 1, iteration 7", 1, 4)
        for update in range(2):
            bar.say(f"update {update}")
            bar.advance()
    bar.say("nothing is drawn after the block")
    return screen.getvalue()


def test_the_line_names_the_iteration_what_is_done_and_how_far_it_is():
    shown = drawn(0, terminal=True)
    assert "phase 1, iteration 7, update 1" in shown and "3/4" in shown
    assert "nothing is drawn" not in shown


@pytest.mark.parametrize(("rank", "terminal"), [(1, True), (0, False)])
def test_other_ranks_and_files_get_nothing(rank, terminal):
    assert drawn(rank, terminal=terminal) == ""


def test_output_that_goes_to_a_file_stays_there(monkeypatch, tmp_path):
    """Only what would cross the line on the same terminal is drawn above it."""
    path = tmp_path / "log"
    screen = io.StringIO()
    with path.open("w") as file:
        monkeypatch.setattr("sys.stdout", file)
        with ProgressBar(0, Console(file=screen, force_terminal=True)).shown():
            print("a log line", file=sys.stdout)
    assert path.read_text() == "a log line\n" and "a log line" not in screen.getvalue()


def test_a_run_draws_its_passes_and_leaves_its_log_lines_alone(launch, tmp_path, monkeypatch, capsys):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(progress_bar, "Console", lambda stderr: terminal)
    monkeypatch.setattr(ProgressBar, "advance", lambda self: self._progress.refresh())
    assert launch(tmp_path / "run", "--exit-interval", "1") == 3
    told = screen.getvalue()
    assert "phase 1, iteration 1, fake update: fake backward" in told
    assert "phase 1, iteration 1, generator update: generator backward" in told
    assert "elapsed time per iteration" in capsys.readouterr().out
