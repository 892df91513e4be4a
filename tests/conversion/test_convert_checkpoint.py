"""Exports of a run's checkpoint: what diffusers draws from them is what the run's own networks draw."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_pdmd.arguments import to_yaml
from megatron_pdmd.config import Config, DataConfig, MethodConfig, ModelConfig
from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.models import from_hf
from megatron_pdmd.training.checkpointing import CheckpointWriter, Manifest, Progress
from megatron_pdmd.training.networks import Networks

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def _make_run(folder: Path, teacher: Path, generator: str = "lora", phases: int = 2) -> dict[str, torch.Tensor]:
    """A run folder whose experts differ from the teacher's; returns the first phase's state."""
    method = MethodConfig(timestep_shift=3.0, lora_rank=4, lora_alpha=2.0, generator=generator)
    config = Config(model=ModelConfig(teacher), method=method, data=DataConfig(prompt_length=16, frames=2))
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    source = read_pipeline(teacher)
    networks = Networks({name: from_hf(teacher, sub) for name, sub in source.experts.items()}, method, seed=0)
    bases = list(source.experts) * 2
    states, random = {}, torch.Generator().manual_seed(0)
    for phase, base in zip(range(1, phases + 1), bases, strict=False):
        networks.add_expert(phase, base)
        states[f"generator_phase_{phase}"] = networks.expert_state(phase)
        for shard in states[f"generator_phase_{phase}"].values():
            tensor = shard.boxes[0].tensor
            tensor += 0.05 * torch.randn(tensor.shape, generator=random)
    writer = CheckpointWriter(folder / "checkpoints")
    writer.save(Manifest(Progress(iteration=3)), states)
    writer.close()
    return {name: shard.boxes[0].tensor for name, shard in states["generator_phase_1"].items()}


def _run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str:
    monkeypatch.setattr(sys, "argv", [str(TOOL), "export", *map(str, arguments)])
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize("teacher", ["one_expert", "two_experts"])
@pytest.mark.parametrize(
    "options",
    [
        ["--weights", "merged"],
        *(["--weights", "lora", "--lora-format", f] for f in ("diffusers", "comfyui", "lightx2v")),
    ],
)
def test_diffusers_draws_what_the_run_draws(
    teacher: str,
    options: list[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _make_run(tmp_path / "run", request.getfixturevalue(teacher))
    code = _run_tool(monkeypatch, "--load", tmp_path / "run", "--hf", tmp_path / "hf", "--verify", *options)
    told = capsys.readouterr().out
    assert code == 0, told
    assert float(told.rsplit(" ", 1)[1]) < 100 * torch.finfo(torch.float32).eps


def test_full_copies_are_exported_as_they_are(
    tmp_path: Path, two_experts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = _make_run(tmp_path / "run", two_experts, generator="full")
    assert _run_tool(monkeypatch, "--load", tmp_path / "run", "--hf", tmp_path / "hf") == 0
    exported = load_file(tmp_path / "hf" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == {name.removeprefix("expert.") for name in state}
    assert all(torch.equal(tensor, state[f"expert.{name}"]) for name, tensor in exported.items())
    capsys.readouterr()
    assert _run_tool(monkeypatch, "--load", tmp_path / "run", "--hf", tmp_path / "lora", "--weights", "lora") == 2
    assert "--weights merged" in capsys.readouterr().err


def test_a_wrong_export_is_noticed(
    tmp_path: Path, two_experts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _make_run(tmp_path / "run", two_experts)
    monkeypatch.setattr("megatron_pdmd.training.outcome.merged_weights", _without_adapter)
    code = _run_tool(monkeypatch, "--load", tmp_path / "run", "--hf", tmp_path / "hf", "--verify")
    assert "other samples than the run" in str(code)


def _without_adapter(model: torch.nn.Module, name: str | None):
    return {key: value for key, value in model.named_parameters() if ".lora_" not in key}


def test_mistakes_are_told(
    tmp_path: Path, two_experts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run_tool(monkeypatch, "--load", tmp_path / "absent", "--hf", tmp_path / "hf") == 2
    assert "no run there" in capsys.readouterr().err
    _make_run(tmp_path / "half", two_experts, phases=1)
    assert _run_tool(monkeypatch, "--load", tmp_path / "half", "--hf", tmp_path / "hf") == 2
    assert "phase 2 has not begun" in capsys.readouterr().err
