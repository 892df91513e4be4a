"""Starts that fail leave no trace, starts beside another launch touch nothing, and a start knows a run's own inputs."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_pdmd import preflight, pretrain
from megatron_pdmd.training.checkpoints.checkpointing import latest_checkpoint
from megatron_pdmd.training.checkpoints.torch_dist import read_index
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.phase import PhaseTrainer
from megatron_pdmd.training.run_folders import run_lock
from megatron_pdmd.training.run_folders.fingerprints import FINGERPRINTS, Fingerprints
from megatron_pdmd.training.run_folders.run_lock import RunLock

SHORT = ("--train-iters", "1", "--fake-updates", "1")


def refused(launch, capsys, *arguments: str | Path) -> str:
    """The one line of a launch that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        launch(*arguments)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1, told
    return told


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fail(*_, **__):
    raise PermissionError(errno.EACCES, "it does not work", "somewhere")


@pytest.mark.parametrize("made", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("stage", ["load", "first phase", "optimizer", "wandb", "logs"])
def test_a_start_that_fails_leaves_no_trace_and_a_right_one_follows(stage, made, launch, tmp_path, monkeypatch, capsys):
    run = tmp_path / "more" / "run"
    if made:
        run.mkdir(parents=True)

    def wandb_refuses(options, folder, *_):
        (folder / "wandb" / "run-1").mkdir(parents=True)
        fail()

    owner, name, failing, more = {
        "load": (pretrain, "from_hf", fail, ()),
        "first phase": (Networks, "start_phase", fail, ()),
        "optimizer": (PhaseTrainer, "__init__", fail, ()),
        "wandb": (pretrain, "WandbLog", wandb_refuses, ("--wandb-project", "pdmd")),
        "logs": (pretrain, "cut_log", fail, ()),
    }[stage]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__version__="1"))
    monkeypatch.setattr(preflight, "check_wandb", lambda options: None)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        assert "it does not work" in refused(launch, capsys, run, *SHORT, "--lora-rank", "2", *more)
    assert [path.name for path in tmp_path.rglob("*")] == (["more", "run"] if made else [])
    assert launch(run, *SHORT) == 0


def test_a_start_that_was_killed_does_not_claim_the_folder(launch, in_child, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Networks, "start_phase", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            launch(run, *SHORT, "--lora-rank", "2")

    assert in_child(killed) == -signal.SIGKILL
    assert [path.name for path in run.iterdir()] == [".lock"]
    assert launch(run, *SHORT) == 0
    assert not list(run.glob(".*"))


def test_a_resumed_run_whose_start_fails_keeps_all_it_had(finished, launch, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished(*SHORT), run)
    before = contents(run)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "from_hf", fail)
        refused(launch, capsys, run, *SHORT)
    assert contents(run) == before


@pytest.mark.parametrize("at", ["preflight", "start"])
def test_a_second_launch_touches_nothing(at, finished, launch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "_PAUSE", 0.001)
    run = tmp_path / "run"
    shutil.copytree(finished(*SHORT), run)
    first = RunLock(run)
    assert first.acquire() is None
    before = contents(run)
    if at == "start":  # the first one began after the second one's preflight
        monkeypatch.setattr(preflight, "check_unlocked", lambda folder: None)
    told = refused(launch, capsys, run, *SHORT, "--train-iters", "2")
    assert f"--save {run}: another launch is at work there (host " in told and f"pid {os.getpid()}" in told
    assert contents(run) == before
    first.release()
    assert launch(run, *SHORT) == 0


def test_two_ranks_are_one_launch(launch, run_ranks, tmp_path):
    assert run_ranks(lambda: launch(tmp_path / "run", *SHORT), 2) == [0, 0]
    assert not list((tmp_path / "run").glob(".*"))


def other_weights(folder: Path) -> None:
    path = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)


def other_prompts(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    save_file(tensors | {"embeddings": tensors["embeddings"].flip(0).contiguous()}, path)


def test_a_run_goes_on_with_the_same_inputs_at_another_path(
    finished, launch, pipeline, encoded_prompts, tmp_path, capsys
):
    run, teacher, prompts = tmp_path / "run", tmp_path / "moved", tmp_path / "texts"
    shutil.copytree(finished(*SHORT), run)
    shutil.copytree(pipeline, teacher)
    shutil.copytree(encoded_prompts, prompts)
    config = json.loads((teacher / "transformer" / "config.json").read_text())
    (teacher / "transformer" / "config.json").write_text(json.dumps(config | {"_name_or_path": "x"}, indent=7))
    moved = ("--teacher", str(teacher), "--prompts", str(prompts))
    assert launch(run, *SHORT, *moved, "--train-iters", "1,2") == 0
    assert latest_checkpoint(run / "checkpoints").progress.iteration == 3
    assert launch(tmp_path / "new", *SHORT, *moved, "--load", str(run)) == 0
    other_weights(teacher)
    before = contents(run)
    name = "transformer_2/diffusion_pytorch_model.safetensors"
    for folder, flag, more in ((run, "--save", ()), (tmp_path / "other", "--load", ("--load", str(run)))):
        told = refused(launch, capsys, folder, *SHORT, *moved, *more)
        assert f"{flag} {run}: holds another run: --teacher has another {name} than the run began with" in told
    shutil.rmtree(teacher)
    shutil.copytree(pipeline, teacher)
    other_prompts(prompts)
    told = refused(launch, capsys, run, *SHORT, *moved)
    assert "--prompts has another prompts-00001-of-00001.safetensors than the run began with" in told
    assert contents(run) == before
    assert launch(tmp_path / "tuned", *SHORT, *moved, "--load", str(run), "--finetune") == 0


def test_an_older_run_goes_on_and_it_is_said_that_its_inputs_are_not_known(
    finished, launch, pipeline, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished(*SHORT), run)
    (run / FINGERPRINTS).unlink()
    told = refused(launch, capsys, run, *SHORT, "--teacher", str(shutil.copytree(pipeline, tmp_path / "moved")))
    assert f"--teacher is {tmp_path / 'moved'} here, {pipeline} there" in told
    assert launch(run, *SHORT) == 0
    assert f"--save {run}: has no digests of its teacher and prompts" in capsys.readouterr().out
    assert (run / FINGERPRINTS).read_bytes() == (finished(*SHORT) / FINGERPRINTS).read_bytes()
    (run / FINGERPRINTS).write_text('{"teacher": 3}')
    assert "fingerprints.json: holds no digests" in refused(launch, capsys, run, *SHORT)


def test_a_large_file_is_known_by_its_header_its_size_and_blocks_of_it(pipeline, prompt_file, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(pipeline, teacher)
    path = teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    source = SimpleNamespace(path=teacher, experts={"single": "transformer"}, boundary_ratio=None)
    digests = set()
    for tensors in (
        {"a": torch.zeros(2**20)},
        {"b": torch.zeros(2**20)},
        {"a": torch.zeros(2**20 + 1)},
        {"a": torch.zeros(2**20).index_fill_(0, torch.tensor([2**20 - 1]), 1)},
        {"a": torch.zeros(2**20).add_(1e-6)},
    ):
        save_file(tensors, path)
        digests.add(Fingerprints.of(source, prompt_file).teacher["transformer/diffusion_pytorch_model.safetensors"])
    assert len(digests) == 5
    assert "text_encoder/model.safetensors" in Fingerprints.of(source, prompt_file).teacher


@pytest.mark.parametrize("place", ["checkpoints/iter_0000002/run", "checkpoints/run", "checkpoints"])
def test_a_folder_among_checkpoints_is_refused(place, finished, launch, capsys):
    run = finished(*SHORT)
    before = contents(run)
    told = refused(launch, capsys, run / place, *SHORT)
    assert "lies among the checkpoints of a run" in told
    assert contents(run) == before


def test_a_folder_that_cannot_be_is_refused(launch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--save" in refused(launch, capsys, tmp_path / "file" / "run", *SHORT)
    for name in ("x" * 256, "x" * 256 + "/run", "a\0b"):
        assert "--save" in refused(launch, capsys, tmp_path / name, *SHORT)
        assert "--load" in refused(launch, capsys, tmp_path / "run", *SHORT, "--load", str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_cannot_hold_a_checkpoint_and_the_export_is_refused_at_the_start(
    finished, launch, tmp_path, monkeypatch, capsys
):
    full, more = ("--generator", "full"), ("--train-iters", "1", "--fake-updates", "1", "--export")
    for flags in ((), full):
        run = finished(*flags, *more)
        checkpoint = latest_checkpoint(run / "checkpoints").folder
        written = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
        written += sum(path.stat().st_size for path in run.glob("hf/transformer*/*.safetensors"))
        told = []
        monkeypatch.setattr(preflight, "require_space", lambda path, needed, flag, told=told: told.append(needed))
        assert launch(tmp_path / f"run{len(flags)}", *flags, *more) == 0
        assert 0.4 * written < told[0] <= written
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=told[0]))
    assert "no space on disk" in refused(launch, capsys, tmp_path / "other", *full, *more)
    assert not (tmp_path / "other").exists()


def test_a_later_phase_that_is_damaged_in_a_run_to_be_finetuned_is_refused_at_the_start(
    finished, launch, tmp_path, capsys
):
    loaded = tmp_path / "loaded"
    shutil.copytree(finished(*SHORT), loaded)
    index = read_index(latest_checkpoint(loaded / "checkpoints").folder)
    key = next(key for key in index.storage_data if key.fqn.startswith("generator_phase_2."))
    path = next(loaded.rglob(index.storage_data[key].relative_path))
    content, place = bytearray(path.read_bytes()), index.storage_data[key]
    content[place.offset : place.offset + place.length] = bytes(place.length)
    path.write_bytes(content)
    told = refused(launch, capsys, tmp_path / "run", *SHORT, "--load", str(loaded), "--finetune")
    assert "damaged" in told and not (tmp_path / "run").exists()
