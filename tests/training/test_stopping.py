"""A run that is stopped between two updates, at any of them, goes on to the bit."""

import contextlib
import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_pdmd.config import CheckpointConfig, TrainingConfig
from megatron_pdmd.training import stopping
from megatron_pdmd.training.checkpoints import torch_dist
from megatron_pdmd.training.checkpoints.checkpointing import CheckpointWriter, latest_checkpoint
from megatron_pdmd.training.phase import PhaseTrainer
from megatron_pdmd.training.sheets import SampleSheets
from megatron_pdmd.training.stopping import StopRequest

VARIANTS = {
    "lora, average": ("--ema-decay", "0.9"),
    "full, bf16": ("--generator", "full", "--bf16"),
    "distributed optimizer": ("--use-distributed-optimizer", "--overlap-param-gather", "--async-save"),
    "shared starts": ("--phase-start-reuse", "3"),
}
PLAIN = VARIANTS["lora, average"]
UPDATES = 6 * 3  # six iterations of two fake updates and one of the generator


def logged(run: Path) -> list[dict]:
    """What metrics.jsonl has, without the time an iteration took."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "milliseconds"} for row in rows]


def position(run: Path) -> tuple[int, int, int]:
    """Iterations done, the phase, and updates done of the open iteration."""
    manifest = latest_checkpoint(run / "checkpoints").manifest
    return manifest.progress.iteration, manifest.progress.phase, len(manifest.open_updates)


def assert_same_checkpoint(run: Path, other: Path) -> None:
    """The last checkpoints of two runs on the same ranks are at the same place and have the same files of tensors."""
    ours, theirs = (latest_checkpoint(folder / "checkpoints") for folder in (run, other))
    assert position(run) == position(other)
    assert ours.manifest.optimizer_steps == theirs.manifest.optimizer_steps
    files = [{path.name: path.read_bytes() for path in found.folder.glob("*.distcp")} for found in (ours, theirs)]
    assert files[0] and files[0] == files[1]


@contextlib.contextmanager
def on_update(number: int, action, rank: int = 0):
    """Calls `action` on one rank while the launch's update of this number, from 1, is under way."""
    update, numbers = PhaseTrainer._update, itertools.count(1)

    def run(self, *arguments):
        if next(numbers) == number and os.environ.get("RANK", "0") == str(rank):
            action()
        return update(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseTrainer, "_update", run)
        yield


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_after_any_update_is_the_undisturbed_one(variant, finished, launch, tmp_path, capsys):
    """Stopped after each of the 17 updates before the last, or after some: generator updates and a phase's last too."""
    more = VARIANTS[variant]
    run, expected = tmp_path / "run", finished(*more)
    stops = range(1, UPDATES) if more == PLAIN else (2, 6, 9, 10)
    for before, update in itertools.pairwise((0, *stops)):
        with on_update(update - before, terminate):
            assert launch(run, *more) == 3
        iteration, done = divmod(update, 3)
        assert position(run) == (iteration, 1 if update <= 9 else 2, done)
        where = f"iteration {iteration}" + (f" and {done} updates of the next" if done else "")
        assert f"stopped by SIGTERM after {where}, saved" in capsys.readouterr().out
        rows = logged(run) if iteration else []
        assert [row["iteration"] for row in rows] == list(range(1, iteration + 1))
    assert launch(run, *more) == 0
    assert logged(run) == logged(expected)
    assert_same_checkpoint(run, expected)


def test_a_time_limit_holds_between_updates(launch, tmp_path):
    assert launch(tmp_path / "run", *PLAIN, "--exit-duration-in-mins", "1e-6") == 3
    assert position(tmp_path / "run") == (0, 1, 1)


def test_an_open_iteration_goes_on_in_another_run_and_layout(finished, launch, run_ranks, tmp_path):
    """Two ranks, of which only the second is asked to stop, and one rank."""
    ranks, one, same = (tmp_path / name for name in ("ranks", "one", "same"))

    def stopped() -> int:
        with on_update(5, terminate, rank=1):
            return launch(ranks, *PLAIN)

    assert run_ranks(stopped, 2) == [3, 3]
    assert position(ranks) == (1, 1, 2)
    assert run_ranks(launch, 2, same, *PLAIN, "--load", str(ranks)) == [0, 0]
    whole = tmp_path / "whole"
    assert run_ranks(launch, 2, whole, *PLAIN) == [0, 0]
    assert logged(same) == logged(whole)[1:]
    assert_same_checkpoint(same, whole)
    assert launch(one, *PLAIN, "--load", str(ranks), "--train-iters", "2", "--phase", "1") == 0
    (ours,), theirs = logged(one), logged(whole)[1]
    assert ours.keys() == theirs.keys()
    eps = torch.finfo(torch.float32).eps
    told = {name: value for name, value in theirs.items() if value is not None}
    assert all(abs(ours[name] - value) <= eps**0.5 * abs(value) for name, value in told.items())


def test_a_phase_that_is_cut_short_forgets_its_open_iteration(launch, tmp_path):
    run = tmp_path / "run"
    with on_update(4, terminate):
        assert launch(run, *PLAIN) == 3
    assert position(run) == (1, 1, 1)
    with on_update(1, terminate):
        assert launch(run, *PLAIN, "--train-iters", "1,3") == 3
    assert position(run) == (1, 2, 1)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", ["sheet", "save", "background save", "agreement"])
def test_a_signal_to_one_rank_at_a_bad_moment_stops_both_after_saving(moment, rank, launch, run_ranks, tmp_path):
    """The first checkpoint and sheet are those of iteration 1; the next chance to agree is after the next update."""

    def stopped() -> int:
        mine = os.environ["RANK"] == str(rank)
        owner, name = {
            "sheet": (SampleSheets, "draw"),
            "save": (torch_dist.dcp, "save"),
            "background save": (torch_dist.dcp, "save"),
            "agreement": (StopRequest, "agree"),
        }[moment]
        call, calls = getattr(owner, name), itertools.count(1)

        def interrupted(*arguments, **options):
            if moment == "sheet":
                time.sleep(0.5 * (os.environ["RANK"] == "0"))  # only rank 0 writes
            result = None if moment == "sheet" else call(*arguments, **options)
            if mine and next(calls) == (3 if moment == "agreement" else 1):
                terminate()
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            more = ("--async-save",) if moment == "background save" else ()
            flags = ("--save-interval", "1", "--sample-interval", "1", *more)
            return launch(tmp_path / "run", *PLAIN, *flags, sheets=moment == "sheet")

    assert run_ranks(stopped, 2, timeout=100) == [3, 3]
    if moment == "background save":  # when that happens is anyone's guess
        assert position(tmp_path / "run") >= (1, 1, 1)
    else:
        assert position(tmp_path / "run") == (1, 1, 1)


def test_a_checkpoint_is_saved_when_its_minutes_have_passed_on_any_rank(launch, run_ranks, tmp_path):
    """Rank 1's clock says so after the fourth update of six; nothing else asks for a save before the phase ends."""

    def rank() -> list[tuple[int, int]]:
        places, save = [], CheckpointWriter.save

        def recorded(self, manifest, states):
            places.append((manifest.progress.iteration, len(manifest.open_updates)))
            save(self, manifest, states)

        late = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CheckpointWriter, "save", recorded)
            patch.setattr(stopping.time, "monotonic", lambda: 600.0 * len(late))
            with on_update(4, lambda: late.append(True), rank=1):
                flags = ("--save-interval", "0", "--save-interval-minutes", "10", "--train-iters", "2", "--phase", "1")
                assert launch(tmp_path / "run", *PLAIN, *flags) == 0
        return places

    assert run_ranks(rank, 2) == [[(1, 1), (2, 0)]] * 2


def test_minutes_count_from_the_last_checkpoint(topology, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop = StopRequest(TrainingConfig(), CheckpointConfig(save_interval_minutes=2.0))
    due = []
    for now[0] in (60.0, 119.0, 120.0, 121.0, 239.0, 241.0):
        stop.agree(iterations=1)
        due.append(stop.save_is_due)
        if due[-1]:
            stop.saved()
    assert due == [False, False, True, False, False, True]
    never = StopRequest(TrainingConfig(), CheckpointConfig())
    now[0] = 1e9
    never.agree(iterations=1)
    assert (never.save_is_due, never.reason) == (False, None)


def test_ranks_with_several_reasons_agree_on_one(run_ranks):
    def rank() -> list[str | None]:
        from megatron_pdmd.parallel import initialize_topology

        topology = initialize_topology()
        stop = StopRequest(TrainingConfig(exit_interval=1 + topology.rank), CheckpointConfig())
        reasons = []
        with stop.on_signals():
            for iterations in range(3):
                if (topology.rank, iterations) == (0, 2):
                    os.kill(os.getpid(), signal.SIGINT)
                stop.agree(iterations)
                reasons.append(stop.reason)
        return reasons

    assert run_ranks(rank, 2) == [[None, "--exit-interval", "SIGINT"]] * 2


def test_signals_end_the_process_where_the_handler_is_not_wanted(topology):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(TrainingConfig(exit_signal_handler=False), CheckpointConfig()).on_signals():
        assert signal.getsignal(signal.SIGTERM) is before
