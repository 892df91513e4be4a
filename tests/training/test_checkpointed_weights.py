"""Checkpoints of bf16 runs hold fp32 masters in place of weights; every way of loading rounds them back to the bit."""

import math
import sys
from pathlib import Path

import pytest
import torch

from megatron_pdmd.training.checkpoints.checkpointing import Checkpoint, latest_checkpoint
from megatron_pdmd.training.phase import PhaseTrainer

Weights = dict[str, torch.Tensor]

LORA, FULL = ("--bf16",), ("--bf16", "--generator", "full")
by_generator = pytest.mark.parametrize("generator", [LORA, FULL], ids=["lora", "full"])


def weights_of(trainer: PhaseTrainer) -> Weights:
    """The live weights of what learns in a phase."""
    trained = trainer._trained().items()
    return {
        f"{role}/{name}": parameter.detach().clone()
        for role, network in trained
        for name, parameter in network.module.named_parameters()
    }


def recorded(monkeypatch, method: str) -> list[Weights]:
    """Collects the weights after each call of a method of PhaseTrainer."""
    call, found = getattr(PhaseTrainer, method), []

    def record(self, *arguments, **options):
        result = call(self, *arguments, **options)
        found.append(weights_of(self))
        return result

    monkeypatch.setattr(PhaseTrainer, method, record)
    return found


def dtypes(checkpoint: Checkpoint, state: str) -> set[torch.dtype]:
    found = checkpoint.index.state_dict_metadata.items()
    return {entry.properties.dtype for name, entry in found if name.startswith(f"{state}.")}


@by_generator
def test_no_weight_is_written_that_a_master_implies(generator, launch, tmp_path):
    """Phase 1's expert has ended: it has no optimizer any more and keeps its own weights."""
    run = tmp_path / "run"
    assert launch(run, *generator, "--train-iters", "1") == 0
    found = latest_checkpoint(run / "checkpoints")
    assert found.progress.phase == 2
    fake = dtypes(found, "fake_score_low_noise"), dtypes(found, "fake_score_high_noise")
    assert fake == ({torch.float32}, {torch.float32})
    assert dtypes(found, "generator_phase_2") == {torch.float32}
    assert (torch.bfloat16 in dtypes(found, "generator_phase_1")) == (generator == FULL)
    elements = {state: sum(math.prod(shape) for shape in found.shapes(state).values()) for state in found.states}
    for name in ("fake_score_low_noise", "fake_score_high_noise"):
        assert elements[f"{name}_optimizer"] == elements[name]  # second moments and no masters


@by_generator
@pytest.mark.parametrize(
    "how", [(), ("--no-load-optim",), ("--use-distributed-optimizer",), ("--finetune",)], ids=lambda how: " ".join(how)
)
def test_weights_are_loaded_to_the_bit(generator, how, launch, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    short = (*generator, "--train-iters", "2", "--phase", "1")
    saved = recorded(monkeypatch, "state")
    assert launch(first, *short, "--exit-interval", "1") == 3
    loaded = recorded(monkeypatch, "load_state")
    assert launch(second, *short, "--load", str(first), *how, "--exit-interval", "1") in (0, 3)
    (ours,), (theirs, *_) = loaded, saved
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert torch.bfloat16 in {weight.dtype for weight in ours.values()}


@by_generator
def test_an_export_of_the_checkpoint_is_that_of_the_run(generator, launch, load_tool, tmp_path, monkeypatch, capsys):
    run, later = tmp_path / "run", tmp_path / "later"
    assert launch(run, *generator, "--train-iters", "1", "--export") == 0
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "export", "--load", str(run), "--hf", str(later)])
    load_tool("convert_checkpoint").main()
    assert files(later) == files(run / "hf")


def files(folder: Path) -> dict[str, bytes]:
    """Every file's content by its path in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
