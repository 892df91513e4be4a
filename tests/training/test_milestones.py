"""Sheets and evaluations of a run whose launches end before they are done: none is lost, and all are as undisturbed."""

import json
import os
import signal
from pathlib import Path

import pytest

from megatron_pdmd import pretrain
from megatron_pdmd.config import Config, EvaluationConfig, LoggingConfig
from megatron_pdmd.training.milestones import Milestones
from megatron_pdmd.training.sheets import SampleSheets
from megatron_pdmd.training.validation import Validation

WATCHED = ("--save-interval", "1", "--sample-interval", "2", "--eval-interval", "3", "--eval-samples", "2")
SHORT = ("--train-iters", "2,2", "--fake-updates", "1")


def drawn(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "samples").iterdir())}


def evaluations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(launch, tmp_path_factory) -> Path:
    """An undisturbed run: sheets at 2, 3 (with the evaluation) and 4, phases of two iterations."""
    run = tmp_path_factory.mktemp("watched") / "run"
    assert launch(run, *SHORT, *WATCHED, sheets=True) == 0
    assert sorted(drawn(run)) == [f"iter_000000{i}.{kind}" for i in (2, 3, 4) for kind in ("gif", "png")]
    assert [row["iteration"] for row in evaluations(run)] == [3]
    return run


@pytest.mark.parametrize(
    ("every", "sampled", "last", "expected"),
    [
        (0, 0, False, (False, False)),
        (0, 0, True, (False, True)),
        (3, 0, False, (True, True)),
        (4, 3, False, (False, True)),
        (4, 4, True, (False, True)),
    ],
)
def test_what_is_due(every, sampled, last, expected):
    config = Config(evaluation=EvaluationConfig(eval_interval=every), logging=LoggingConfig(sample_interval=sampled))
    assert Milestones.after(config, 3, ends_phase=last) == Milestones(*expected)
    none = Config(evaluation=config.evaluation, logging=LoggingConfig(sample_interval=sampled, sample_prompts=0))
    assert Milestones.after(none, 3, ends_phase=last) == Milestones(expected[0], False)


def killed_before(owner: type, name: str, number: int, launch, run: Path, *more: str) -> None:
    """A launch that ends by SIGKILL at the `number`-th call of `name`."""
    calls, call = [], getattr(owner, name)

    def dying(*arguments, **options):
        calls.append(True)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dying)
        launch(run, *SHORT, *WATCHED, *more, sheets=True)


@pytest.mark.parametrize("moment", ["sheet", "sheet drawn in part", "evaluation", "last sheet"])
def test_a_kill_between_checkpoint_and_sheet_loses_neither(moment, watched, launch, in_child, tmp_path):
    """Sheets: of phase 1's end (2), with the evaluation (3), of phase 2's end (4)."""
    from megatron_pdmd.training import sheets

    owner, name, number, found = {
        "sheet": (SampleSheets, "draw", 1, []),
        "sheet drawn in part": (sheets, "save_animation", 1, []),
        "evaluation": (Validation, "evaluate", 1, ["iter_0000002.gif", "iter_0000002.png"]),
        "last sheet": (SampleSheets, "draw", 2, [f"iter_000000{i}.{kind}" for i in (2, 3) for kind in ("gif", "png")]),
    }[moment]
    run = tmp_path / "run"
    assert in_child(lambda: killed_before(owner, name, number, launch, run)) == -signal.SIGKILL
    assert sorted(path.name for path in run.glob("samples/*")) == found
    assert launch(run, *SHORT, *WATCHED, sheets=True) == 0
    assert drawn(run) == drawn(watched)
    assert evaluations(run) == evaluations(watched)
    assert (run / "summary.json").is_file() and not list(run.glob(".*"))


def test_an_evaluation_of_a_phases_end_is_made_up_by_the_fake_score_that_was_saved(launch, tmp_path):
    flags = (*SHORT, "--save-interval", "1", "--eval-interval", "2", "--eval-samples", "2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert launch(whole, *flags, sheets=True) == 0
    for _ in range(4):
        assert launch(run, *flags, "--exit-interval", "1", sheets=True) == 3
    assert launch(run, *flags, sheets=True) == 0
    assert (evaluations(run), drawn(run)) == (evaluations(whole), drawn(whole))
    before = (run / "evaluations.jsonl").read_bytes()
    assert launch(run, *flags, sheets=True) == 0
    assert (run / "evaluations.jsonl").read_bytes() == before


def test_what_another_folder_has_is_not_drawn_again(watched, launch, tmp_path):
    assert launch(tmp_path / "run", *SHORT, *WATCHED, "--load", str(watched), sheets=True) == 0
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_during_the_last_sheet_stops_before_the_export(rank, watched, launch, run_ranks, tmp_path):
    run = tmp_path / "run"

    def stopped() -> int:
        draw, finish, finished = SampleSheets.draw, pretrain.finish, []

        def signalled(self, sampler, iteration):
            if iteration == 4 and os.environ["RANK"] == str(rank):
                os.kill(os.getpid(), signal.SIGTERM)
            draw(self, sampler, iteration)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SampleSheets, "draw", signalled)
            patch.setattr(pretrain, "finish", lambda *given: finished.append(finish(*given)))
            code = launch(run, *SHORT, *WATCHED, "--export", sheets=True)
        assert not finished
        return code

    assert run_ranks(stopped, 2, timeout=100) == [3, 3]
    assert sorted(drawn(run)) == sorted(drawn(watched))
    assert not (run / "hf").exists() and not (run / "summary.json").exists()
    before = drawn(run)
    assert run_ranks(lambda: launch(run, *SHORT, *WATCHED, "--export", sheets=True), 2, timeout=100) == [0, 0]
    assert (run / "hf" / "model_index.json").is_file() and (run / "summary.json").is_file()
    assert drawn(run) == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluations_know_what_the_last_launch_found(ranks, launch, run_ranks, tmp_path):
    """To the bit, after a stop at every iteration; those of another phase or of other prompts are not compared with."""
    flags = ("--train-iters", "3,2", "--fake-updates", "1", "--save-interval", "0", "--keep-last", "1")
    flags += ("--eval-interval", "1", "--eval-samples", "3")

    def run(*arguments) -> set[int]:
        return set(run_ranks(lambda: launch(*arguments), 2, timeout=100)) if ranks == 2 else {launch(*arguments)}

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, *flags) == {0}
    for _ in range(5):
        assert run(parts, *flags, "--exit-interval", "1") == {3}
    assert run(parts, *flags) == {0}
    assert evaluations(parts) == evaluations(whole)
    assert [row["iteration"] for row in evaluations(whole) if row["sample_change"] is None] == [1, 4]
    kept = sorted(path.name for path in (parts / "evaluations").iterdir())
    assert kept == ["iter_0000004.safetensors", "iter_0000005.safetensors"]
    if ranks == 1:
        more = ("--train-iters", "3,3")
        assert run(parts, *flags, *more, "--eval-samples", "2") == {0}
        assert evaluations(parts)[-1]["sample_change"] is None
        (whole / "evaluations" / "iter_0000005.safetensors").write_bytes(b"\xff" * 100)
        assert run(whole, *flags, *more) == {0}
        assert evaluations(whole)[-1]["sample_change"] is None
