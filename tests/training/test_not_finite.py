"""A run whose numbers are not finite ends, says where, and has saved nothing that is not."""

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_pdmd.distillation.roles import Roles
from megatron_pdmd.training.checkpoints.checkpointing import (
    CheckpointError,
    CheckpointWriter,
    Manifest,
    Progress,
    latest_checkpoint,
)
from megatron_pdmd.training.checkpoints.sharded_state import Shard
from megatron_pdmd.training.not_finite import NotFiniteError, first_not_finite
from megatron_pdmd.training.optimizers.optimizer import RoleOptimizer

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_tensor_that_is_not_finite_is_named(dtype):
    whole = {"a": torch.full((3, 5), 3e38), "b": torch.zeros(0), "c": -torch.full((), 3e38)}
    tensors = {name: tensor.to(dtype) for name, tensor in whole.items()} | {"steps": torch.tensor([3])}
    assert first_not_finite(tensors.items()) is None and first_not_finite([]) is None
    for value in (NAN, INF, -INF):
        for spoilt in ("a", "c"):
            odd = {name: tensor.clone() for name, tensor in tensors.items()}
            odd[spoilt].view(-1)[-1] = value
            assert first_not_finite(odd.items()) == spoilt


def poisoned(role: str, rank: int = 0, after: int = 0):
    """`Roles.run` that answers a role's passes with gradient with NaN on a rank, from some call on."""
    answer, calls = Roles.run, []

    def run(self, request):
        flow = answer(self, request)
        mine = request.role == role and request.gradient and os.environ.get("RANK", "0") == str(rank)
        calls.extend([True] if mine else [])
        return flow * NAN if mine and len(calls) > after else flow

    return run


def rows(run: Path) -> list[dict]:
    def refuse(name: str):
        raise AssertionError(f"{name} in JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("asynchronous", [(), ("--async-save",)], ids=["", "async"])
def test_a_run_stops_after_so_many_skipped_updates_in_a_row_across_launches(
    asynchronous, launch, tmp_path, monkeypatch, capsys
):
    """Two micro-batches make an update and two fake updates an iteration: skipped from iteration 2 on."""
    monkeypatch.setattr(Roles, "run", poisoned("fake_score", after=4))
    run = tmp_path / "run"
    flags = ("--save-interval", "1", "--max-skipped-updates", "5", *asynchronous)
    assert launch(run, *flags, "--exit-interval", "3") == 3
    assert latest_checkpoint(run / "checkpoints").manifest.skipped_in_a_row == {
        "generator": 0,
        "fake_score_high_noise": 4,
    }
    capsys.readouterr()
    monkeypatch.setattr(Roles, "run", poisoned("fake_score"))
    assert launch(run, *flags, "--train-iters", "4,3") == 1
    told = capsys.readouterr().err
    words = (
        "error: fake_score_high_noise: 5 updates in a row were skipped, for fake_loss, fake_grad_norm was not finite"
    )
    assert told.startswith(words) and told.count("\n") == 1
    assert "(first of its tensors: gradient of " in told and "on rank 0)" in told
    assert f"the last checkpoint is {run / 'checkpoints' / 'iter_0000003'}" in told
    assert latest_checkpoint(run / "checkpoints").progress.iteration == 3
    assert [row["skipped_updates"] for row in rows(run)] == [0, 2, 4]
    assert not (run / "summary.json").exists()


def test_updates_that_are_not_skipped_begin_the_count_anew_and_zero_never_stops(launch, tmp_path, monkeypatch):
    answer, calls = Roles.run, []

    def every_other(self, request):
        flow = answer(self, request)
        learns = request.role == "fake_score" and request.gradient
        calls.extend([True] if learns else [])
        return flow * NAN if learns and (len(calls) - 1) // 2 % 2 else flow

    monkeypatch.setattr(Roles, "run", every_other)
    assert launch(tmp_path / "half", "--max-skipped-updates", "2") == 0
    monkeypatch.setattr(Roles, "run", lambda self, request: answer(self, request) * NAN)
    assert launch(tmp_path / "all", "--max-skipped-updates", "0", "--train-iters", "1") == 0
    assert rows(tmp_path / "all")[-1]["skipped_updates"] == 6


def test_all_ranks_stop_and_one_of_them_says_why(launch, run_ranks, tmp_path):
    def rank() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Roles, "run", poisoned("generator", rank=1))
            stderr = (tmp_path / f"{os.environ['RANK']}").open("w")
            patch.setattr("sys.stderr", stderr)
            return launch(tmp_path / "run", "--max-skipped-updates", "2")

    assert run_ranks(rank, 2) == [1, 1]
    told = (tmp_path / "0").read_text()
    assert told.startswith("error: generator: 2 updates in a row were skipped") and told.count("\n") == 1
    assert "no checkpoint was saved" in told and (tmp_path / "1").read_text() == ""


@pytest.mark.parametrize("asynchronous", [(), ("--async-save",)], ids=["", "async"])
def test_weights_that_are_not_finite_are_not_saved(asynchronous, launch, run_ranks, tmp_path):
    """Rank 1's share of the fake score is spoilt in the last update of iteration 2, which no loss tells of."""

    def rank() -> int:
        step, calls = RoleOptimizer.step, []

        def spoil(self, norm):
            step(self, norm)
            calls.append(True)
            if len(calls) == 6 and os.environ["RANK"] == "1":
                next(iter(self.sharded_state().values())).boxes[0].tensor.view(-1)[0] = INF

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RoleOptimizer, "step", spoil)
            patch.setattr("sys.stderr", (tmp_path / f"{os.environ['RANK']}").open("w"))
            flags = ("--save-interval", "1", "--use-distributed-optimizer", *asynchronous)
            return launch(tmp_path / "run", *flags)

    assert run_ranks(rank, 2) == [1, 1]
    told = (tmp_path / "0").read_text()
    assert told.startswith("error: iteration 2: not saved, for generator_optimizer.") and told.count("\n") == 1
    assert ".exp_avg_sq on rank 1 is not finite; the last checkpoint is" in told and "iter_0000001" in told
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").progress.iteration == 1
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


def test_a_rate_without_bounds_ends_with_one_and_exports_nothing(launch, tmp_path, capsys):
    run = tmp_path / "run"
    flags = (
        "--lr",
        "10",
        "--fake-lr",
        "10",
        "--weight-decay",
        "100",
        "--fake-updates",
        "5",
        "--clip-grad",
        "0",
        "--export",
    )
    assert launch(run, *flags, "--max-skipped-updates", "2") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (run / "hf").exists() and not (run / "summary.json").exists()


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_checkpoint_that_is_not_finite_is_refused_where_it_is_read(value, topology, tmp_path, monkeypatch):
    writer, spoilt = CheckpointWriter(tmp_path), {"generator": {"a": Shard.of(torch.tensor([1.0, value]))}}
    with pytest.raises(NotFiniteError, match=r"iteration 1: not saved, for generator.a on rank 0 is not finite"):
        writer.save(Manifest(Progress(1, 1, 1, 4)), spoilt)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("megatron_pdmd.training.checkpoints.checkpointing.first_shard_not_finite", lambda shards: None)
        writer.save(Manifest(Progress(1, 1, 1, 4)), spoilt)
    writer.close()
    with pytest.raises(CheckpointError, match="iter_0000001: generator: 'a' is not finite; go on from another"):
        latest_checkpoint(tmp_path).read("generator", {"a": Shard.of(torch.zeros(2))})
