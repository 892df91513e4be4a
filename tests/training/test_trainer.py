"""Whole runs: stopped, killed, split and shared between ranks, they are the uninterrupted run of one rank."""

import contextlib
import functools
import io
import json
import math
import operator
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_pdmd.conversion.weight_files import write_model
from megatron_pdmd.distillation.roles import Roles
from megatron_pdmd.models import WanConfig, WanModel, to_hf_state_dict
from megatron_pdmd.parallel import without_cuda
from megatron_pdmd.training.checkpoints.checkpointing import TRACKER, Checkpoint, latest_checkpoint
from megatron_pdmd.training.checkpoints.sharded_state import Shard
from megatron_pdmd.training.phase import PhaseTrainer

VARIANTS = {
    "lora, average": ("--ema-decay", "0.9"),
    "lora, average, bf16": ("--ema-decay", "0.9", "--bf16"),
    "full, average": ("--generator", "full", "--ema-decay", "0.9"),
    "full, bf16": ("--generator", "full", "--bf16"),
}
by_variant = pytest.mark.parametrize("more", VARIANTS.values(), ids=VARIANTS.keys())
PLAIN = VARIANTS["lora, average"]


def logged(run: Path) -> list[dict]:
    """What metrics.jsonl has, without the time an iteration took."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "milliseconds"} for row in rows]


def saved(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    found = latest_checkpoint(run / "checkpoints")
    return {f"{state}/{name}": tensor for state in found.states for name, tensor in state_of(found, state).items()}


def state_of(checkpoint: Checkpoint, state: str) -> dict[str, torch.Tensor]:
    """The whole tensors of a state; fp32 holds all that is saved exactly."""
    tensors = {name: torch.empty(shape) for name, shape in checkpoint.shapes(state).items()}
    checkpoint.read(state, {name: Shard.of(tensor) for name, tensor in tensors.items()})
    return tensors


def progress(run: Path) -> tuple[int, int, int, int, int]:
    at = latest_checkpoint(run / "checkpoints").progress
    return at.iteration, at.phase, at.phase_iteration, at.consumed_samples, at.skipped_updates


def assert_same_run(run: Path, other: Path) -> None:
    assert logged(run) == logged(other)
    assert progress(run) == progress(other)
    ours, theirs = saved(run), saved(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@contextlib.contextmanager
def after_iteration(phase: int, index: int, action):
    """Calls `action` when this iteration has been computed, before it is logged or saved."""
    run_iteration = PhaseTrainer.run_iteration

    def run(self, at, *more):
        metrics = run_iteration(self, at, *more)
        if (self.index, at) == (phase, index):
            action()
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseTrainer, "run_iteration", run)
        yield


def test_a_run_trains_both_phases_and_says_so(finished):
    run = finished(*PLAIN)
    rows = logged(run)
    assert [(row["iteration"], row["phase"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert [row["consumed_samples"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert all(row["skipped_updates"] == 0 and row["fake_loss"] > 0 for row in rows)
    assert progress(run) == (6, 2, 3, 24, 0)
    tensors = saved(run)
    for phase in (1, 2):
        trained = [t for name, t in tensors.items() if f"generator_phase_{phase}/expert" in name and "lora_B" in name]
        assert trained and all(t.abs().max() > 0 for t in trained)
    summary = json.loads((run / "summary.json").read_text())
    assert [phase["expert"] for phase in summary["phases"]] == ["high_noise", "low_noise"]
    assert [phase["iterations"] for phase in summary["phases"]] == [3, 3]
    assert summary["train_seconds"] > 0 and summary["skipped_updates"] == 0
    assert sorted(path.name for path in (run / "checkpoints").glob("iter_*")) == ["iter_0000004", "iter_0000006"]


@by_variant
def test_a_run_killed_in_each_phase_goes_on_to_the_bit(more, finished, launch, in_child, tmp_path):
    def killed(phase: int, index: int) -> None:
        with after_iteration(phase, index, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            launch(tmp_path / "run", *more)

    expected = finished(*more)
    assert in_child(lambda: killed(1, 1)) == -signal.SIGKILL
    assert len(logged(tmp_path / "run")) == 1 and not (tmp_path / "run" / "checkpoints").exists()
    assert in_child(lambda: killed(2, 2)) == -signal.SIGKILL
    assert len(logged(tmp_path / "run")) == 5 and progress(tmp_path / "run")[:3] == (4, 2, 1)
    assert launch(tmp_path / "run", *more) == 0
    assert_same_run(tmp_path / "run", expected)


def test_a_run_stopped_on_request_saves_exits_with_3_and_goes_on_to_the_bit(finished, launch, tmp_path, capsys):
    run = tmp_path / "run"
    assert launch(run, *PLAIN, "--exit-interval", "1") == 3
    assert progress(run)[0] == 1
    assert "stopped by --exit-interval after iteration 1, saved" in capsys.readouterr().out
    with after_iteration(2, 0, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert launch(run, *PLAIN) == 3
    assert progress(run)[:3] == (4, 2, 1)
    assert "stopped by SIGTERM after iteration 4, saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (run / "summary.json").exists()
    assert launch(run, *PLAIN) == 0
    assert_same_run(run, finished(*PLAIN))


def numbers_of(rows: list[dict]) -> list[dict]:
    """The numbers of some rows that are means."""
    names = ("fake_loss", "fake_grad_norm", "dmd_gradient", "score_gap", "generator_grad_norm")
    return [{name: row[name] for name in names} for row in rows]


def mean(rows: list[dict]) -> dict:
    """The mean of every number, added up in the rows' order."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: functools.reduce(operator.add, column) / len(column) for name, column in columns.items()}


LONGER = (*PLAIN, "--train-iters", "6,3")


def test_an_entry_is_the_mean_since_the_last_one_and_of_one_phase(finished):
    each = numbers_of(logged(finished(*LONGER)))
    rows = logged(finished(*LONGER, "--log-interval", "4"))
    assert [row["iteration"] for row in rows] == [1, 4, 6, 7, 8, 9]
    assert numbers_of(rows) == [each[0], mean(each[1:4]), mean(each[4:6]), *each[6:9]]


@pytest.mark.parametrize("interval", ["2", "4", "100"])
def test_a_run_stopped_between_two_entries_writes_those_of_the_whole_one(interval, finished, launch, tmp_path):
    """To the bit, after a stop at every iteration."""
    flags, run = (*LONGER, "--log-interval", interval), tmp_path / "run"
    for _ in range(8):
        assert launch(run, *flags, "--exit-interval", "1") == 3
    assert launch(run, *flags) == 0
    assert_same_run(run, finished(*flags))


def test_a_run_killed_between_two_entries_writes_those_of_the_whole_one(finished, launch, in_child, tmp_path):
    """It goes on from the checkpoint at iteration 2, with the sums that were saved there."""

    def killed() -> None:
        with after_iteration(1, 3, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            launch(tmp_path / "run", *flags)

    flags = (*LONGER, "--log-interval", "5")
    assert in_child(killed) == -signal.SIGKILL
    assert progress(tmp_path / "run")[0] == 2
    assert launch(tmp_path / "run", *flags) == 0
    assert_same_run(tmp_path / "run", finished(*flags))


def test_without_clipping_a_run_is_the_one_whose_limit_is_never_met(finished):
    assert_same_run(finished(*PLAIN, "--clip-grad", "0"), finished(*PLAIN, "--clip-grad", "1e9"))
    assert logged(finished(*PLAIN, "--clip-grad", "0")) != logged(finished(*PLAIN, "--clip-grad", "1e-3"))


def test_a_run_says_what_it_loads_and_trains_once_and_where_it_goes_on(
    launch, pipeline, encoded_prompts, teachers, tmp_path, capsys
):
    def told() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" [")]

    run = tmp_path / "run"
    assert launch(run, "--exit-interval", "2") == 3
    first = told()
    assert first[:3] == [
        "1 rank on cpu over gloo: tensor 1 x context 1 x data 1",
        f"prompts: 6 of {encoded_prompts}",
        f"loading the teacher {pipeline}: high_noise, low_noise",
    ]
    assert first[3].startswith("phase 1 of 2 (high_noise) begins: 3 iterations, sampling steps at t = 1.000, 0.900,")
    fake = sum(p.numel() for p in teachers["high_noise"].parameters())
    adapted = 4 * (8 * (24 + 24) + 2 * (24 + 32))  # rank times inputs and outputs of a block's linears
    assert first[3].endswith(f"trained parameters: generator {adapted:,}, fake_score_high_noise {fake:,}")
    assert launch(run) == 0
    again = told()
    assert again[:3] == first[:3]
    assert f"going on from {run / 'checkpoints' / 'iter_0000002'}, after iteration 2" in again
    phases = [line for line in again if line.startswith("phase ")]
    assert "goes on after iteration 2" in phases[0] and "phase 2 of 2 (low_noise) begins" in phases[1]
    assert len(phases) == 2


def test_phases_trained_one_by_one_are_the_run_of_both(finished, launch, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        launch(run, *PLAIN, "--phase", "2")
    assert stop.value.code == 2
    assert "--phase 2: phase 1 is not trained yet; train it first" in capsys.readouterr().err
    assert launch(run, *PLAIN, "--phase", "1") == 0
    assert progress(run)[:3] == (3, 1, 3) and not (run / "summary.json").exists()
    assert launch(run, *PLAIN, "--phase", "2") == 0
    assert_same_run(run, finished(*PLAIN))
    assert (run / "summary.json").exists()


def test_a_finished_run_trains_nothing_more_unless_it_is_prolonged_elsewhere(finished, launch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished(*PLAIN), run)
    assert launch(run, *PLAIN) == 0
    assert_same_run(run, finished(*PLAIN))
    assert launch(tmp_path / "longer", *PLAIN, "--load", str(run), "--train-iters", "3,4") == 0
    assert [row["iteration"] for row in logged(tmp_path / "longer")] == [7]
    assert progress(tmp_path / "longer") == (7, 2, 4, 28, 0)
    assert_same_run(run, finished(*PLAIN))


def test_an_asynchronous_run_is_the_synchronous_one(finished, launch, tmp_path):
    assert launch(tmp_path / "run", *PLAIN, "--async-save", "--save-interval", "1", "--keep-last", "3") == 0
    assert_same_run(tmp_path / "run", finished(*PLAIN))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("iter_*"))
    assert names == ["iter_0000004", "iter_0000005", "iter_0000006"]


def test_finetuning_begins_anew_from_the_weights_alone(finished, launch, tmp_path):
    """With nothing learnt, what was taken over is still there; the run's own folder then continues by itself."""
    run, frozen = tmp_path / "run", ("--lr", "1e-30", "--fake-lr", "1e-30", "--seed", "7", "--train-iters", "2")
    flags = (*PLAIN, *frozen, "--load", str(finished(*PLAIN)), "--finetune")
    assert launch(run, *flags, "--exit-interval", "3") == 3
    assert launch(run, *flags) == 0
    assert [row["iteration"] for row in logged(run)] == [1, 2, 3, 4]
    assert progress(run) == (4, 2, 2, 16, 0)
    assert latest_checkpoint(run / "checkpoints").manifest.optimizer_steps["generator"] == 2
    ours, theirs = saved(run), saved(finished(*PLAIN))
    weights = [name for name in ours if "expert." in name or name.startswith(("fake_score_low_noise/",))]
    assert weights and [name for name in weights if not torch.equal(ours[name], theirs[name])] == []


def test_without_its_optimizers_a_run_goes_on_with_new_ones(finished, launch, tmp_path):
    run, whole = tmp_path / "run", finished(*PLAIN)
    assert launch(tmp_path / "half", *PLAIN, "--exit-interval", "2") == 3
    assert launch(run, *PLAIN, "--load", str(tmp_path / "half"), "--no-load-optim", "--exit-interval", "1") == 3
    found = latest_checkpoint(run / "checkpoints")
    assert found.progress.iteration == 3
    assert found.manifest.optimizer_steps == {"generator": 1, "fake_score_high_noise": 2}
    (ours,), theirs = logged(run), logged(whole)[2]
    assert ours["dmd_gradient"] != theirs["dmd_gradient"] and ours["iteration"] == theirs["iteration"]


def test_a_checkpoint_of_another_network_is_refused_in_one_line(finished, launch, pipeline, tmp_path, capsys):
    other = tmp_path / "teacher"
    shutil.copytree(pipeline, other)
    torch.manual_seed(0)
    shape = json.loads((pipeline / "transformer" / "config.json").read_text())
    deeper = WanConfig.from_hf(shape | {"num_layers": 2})
    for name in ("transformer", "transformer_2"):
        (other / name / "config.json").write_text(json.dumps(deeper.to_hf()))
        with without_cuda():
            write_model(other / name, to_hf_state_dict(WanModel(deeper)).items())
    with pytest.raises(SystemExit) as stop:
        launch(tmp_path / "run", *PLAIN, "--teacher", str(other), "--load", str(finished(*PLAIN)), "--finetune")
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "another model: num_layers of high_noise is 1 there, 2 in --teacher" in told and told.count("\n") == 1


def test_another_configuration_of_the_same_folder_is_refused(finished, launch, capsys):
    with pytest.raises(SystemExit) as stop:
        launch(finished(*PLAIN), *PLAIN, "--lora-rank", "8")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "--lora-rank is 8 here, 4 there" in captured.err and captured.err.count("\n") == 1


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_no_checkpoint(launch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit) as stop:
        launch(tmp_path / "run", *PLAIN)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "no space on disk" in captured.err and "--save" in captured.err and captured.err.count("\n") == 1
    assert not list((tmp_path / "run").rglob("iter_*")) and not list((tmp_path / "run").rglob(TRACKER))


def test_a_damaged_checkpoint_ends_the_run_in_one_line(finished, launch, tmp_path, capsys):
    for name, damage in (
        ("__0_0.distcp", lambda path: path.write_bytes(path.read_bytes()[:-8])),
        ("metadata.json", lambda path: path.write_text("{}")),
        (".metadata", lambda path: path.write_bytes(b"")),
    ):
        run = tmp_path / Path(name).stem
        shutil.copytree(finished(*PLAIN), run)
        damage(run / "checkpoints" / "iter_0000006" / name)
        with pytest.raises(SystemExit) as stop:
            launch(run, *PLAIN, "--train-iters", "3,4")
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert Path(name).name in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("damage", [Path.unlink, lambda tracker: tracker.write_text("many")], ids=["lost", "damaged"])
def test_a_run_whose_tracker_is_lost_goes_on_and_keeps_its_log(damage, finished, launch, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished(*PLAIN), run)
    damage(run / "checkpoints" / TRACKER)
    assert launch(run, *PLAIN) == 0
    told = capsys.readouterr().out
    assert "after iteration 6 (" in told and "the newest whole checkpoint is iter_0000006)" in told
    assert_same_run(run, finished(*PLAIN))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"consumed_samples": 25}, "25 samples are not 6 batches of 4"),
        ({"phase": 3, "phase_iteration": 2}, "phase is 3, and --phase-steps names 2"),
        ({"phase": 1, "phase_iteration": 6}, "phase is 1, and its tensors are of generator_phase_1, generator_phase_2"),
    ],
)
def test_progress_that_the_run_cannot_have_made_is_refused(changes, words, finished, launch, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished(*PLAIN), run)
    path = run / "checkpoints" / "iter_0000006" / "metadata.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"progress": content["progress"] | changes, "optimizer_steps": {}}))
    for flags in (("--save", str(run)), ("--save", str(tmp_path / "new"), "--load", str(run))):
        with pytest.raises(SystemExit) as stop:
            launch(run, *PLAIN, *flags)
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert f"metadata.json: {words}" in told and told.count("\n") == 1
    assert not (tmp_path / "new").exists()


def launch_once(launch, run: Path, micro_batch_size: int) -> None:
    """One update of either role, without clipping."""
    single = ["--train-iters", "1", "--phase", "1", "--fake-updates", "1", "--clip-grad", "0"]
    assert launch(run, *single, "--micro-batch-size", str(micro_batch_size)) == 0


def read_first_update(run: Path) -> dict[str, torch.Tensor]:
    """What was logged, and the magnitudes of both roles' gradients from AdamW's second moments (1 - beta_2) g^2."""
    (row,) = logged(run)
    names = ("fake_loss", "fake_grad_norm", "dmd_gradient", "score_gap", "generator_grad_norm")
    found = {name: torch.tensor([row[name]], dtype=torch.float64) for name in names}
    moments = {name: tensor for name, tensor in saved(run).items() if name.endswith("exp_avg_sq")}
    for role in ("generator", "fake_score"):
        own = [tensor.double().flatten() for name, tensor in sorted(moments.items()) if name.startswith(role)]
        found[f"gradient of {role}"] = (torch.cat(own) / 1e-3).sqrt()
    return found


def first_update(launch, run: Path, micro_batch_size: int) -> dict[str, torch.Tensor]:
    launch_once(launch, run, micro_batch_size)
    return read_first_update(run)


def test_two_ranks_have_the_losses_and_gradients_of_one(launch, run_ranks, tmp_path):
    """Their error is at most twice that between two micro-batch sizes of one rank, plus one eps.

    That between micro-batch sizes is rounding: another weight of a micro-batch would be an error of order one.
    """
    whole = first_update(launch, tmp_path / "whole", 4)
    parts = first_update(launch, tmp_path / "parts", 1)
    run_ranks(lambda: launch_once(launch, tmp_path / "ranks", 2), 2)
    ranks = read_first_update(tmp_path / "ranks")
    eps = torch.finfo(torch.float32).eps
    limit = max(relative_errors(parts, whole).values())
    assert limit < math.sqrt(eps)
    for name, error in relative_errors(ranks, whole).items():
        assert error <= 2 * limit + eps, (name, error, limit)


def relative_errors(update: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert all(tensor.norm() > 0 for tensor in expected.values())
    return {name: ((update[name] - tensor).norm() / tensor.norm()).item() for name, tensor in expected.items()}


@pytest.mark.parametrize(("role", "learning"), [("teacher", False), ("fake_score", True)])
def test_a_nan_on_one_rank_skips_the_update_on_all(role, learning, launch, run_ranks, tmp_path):
    def rank() -> tuple[int, str]:
        answer = Roles.run

        def with_nan(self, request):
            flow = answer(self, request)
            poisoned = request.role == role and request.gradient == learning and os.environ["RANK"] == "1"
            return flow * float("nan") if poisoned else flow

        told = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
            patch.setattr(Roles, "run", with_nan)
            steps = []
            run_iteration = PhaseTrainer.run_iteration

            def run(self, index, *more):
                metrics = run_iteration(self, index, *more)
                done = self.optimizer_steps()
                steps.append((done["generator"], metrics["skipped_updates"]))
                steps.append(done["fake_score_high_noise"])
                return metrics

            patch.setattr(PhaseTrainer, "run_iteration", run)
            assert launch(tmp_path / "run", *PLAIN, "--train-iters", "1", "--phase", "1") == 0
        return steps, told.getvalue()

    (first, told), (second, silent) = run_ranks(rank, 2)
    assert first == second == ([(0, 1), 2] if role == "teacher" else [(1, 2), 0])
    run = tmp_path / "run"
    skipped, name = (1, "dmd_gradient") if role == "teacher" else (2, "fake_loss")
    assert progress(run) == (1, 1, 1, 4, skipped)
    assert f"iteration 1: {skipped} update" in told and "skipped on all ranks, not finite:" in told and name in told
    assert "skipped on all ranks" not in silent
    assert logged(run)[0]["skipped_updates"] == skipped and logged(run)[0][name] is None
    tensors = saved(run)
    if role == "teacher":
        for kind in ("expert", "average"):
            up = [t for key, t in tensors.items() if f"generator_phase_1/{kind}" in key and "lora_B" in key]
            assert up and all(not t.any() for t in up)


def test_a_skipped_fake_update_leaves_the_fake_score_as_it_was(launch, pipeline, tmp_path, monkeypatch):
    answer = Roles.run

    def with_nan(self, request):
        flow = answer(self, request)
        return flow * float("nan") if request.role == "fake_score" and request.gradient else flow

    monkeypatch.setattr(Roles, "run", with_nan)
    assert launch(tmp_path / "run", "--train-iters", "1", "--phase", "1") == 0
    fake = state_of(latest_checkpoint(tmp_path / "run" / "checkpoints"), "fake_score_high_noise")
    teacher = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    assert fake.keys() == teacher.keys()
    assert all(torch.equal(fake[name], teacher[name]) for name in fake)


def test_a_batch_that_ranks_and_micro_batches_do_not_divide_is_refused(launch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        launch(tmp_path / "run", "--global-batch-size", "5")
    assert stop.value.code == 2
    assert "--global-batch-size 5: not divisible by --micro-batch-size 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
