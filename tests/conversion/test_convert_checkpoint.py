"""Exports of a run's checkpoint: what diffusers draws from them is what the run's own networks draw."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_pdmd.arguments import to_yaml
from megatron_pdmd.config import Config, DataConfig, MethodConfig, ModelConfig
from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.models import from_hf
from megatron_pdmd.training.checkpoints.checkpointing import Checkpoint, CheckpointWriter, Manifest, Progress
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.run_folders.fingerprints import Fingerprints

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def _make_run(folder: Path, teacher: Path, generator: str = "lora", phases: int = 2) -> dict[str, torch.Tensor]:
    """A run folder whose experts differ from the teacher's; returns the first phase's state."""
    method = MethodConfig(timestep_shift=3.0, lora_rank=4, lora_alpha=2.0, generator=generator)
    config = Config(
        model=ModelConfig(teacher), method=method, data=DataConfig(Path("prompts.txt"), prompt_length=16, frames=2)
    )
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
    progress = Progress(iteration=3, phase=phases, phase_iteration=1 if phases > 1 else 3, consumed_samples=3 * 64)
    writer.save(Manifest(progress, seed=42), states)
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


UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


def test_lora_files_are_verified_whatever_the_teachers_scheduler_is_and_wherever_it_is(
    tmp_path: Path, two_experts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(two_experts, teacher)
    (teacher / "scheduler" / "scheduler_config.json").write_text(json.dumps(UNIPC))
    index = json.loads((teacher / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (teacher / "model_index.json").write_text(json.dumps(index))
    _make_run(tmp_path / "run", teacher)
    options = ("--load", tmp_path / "run", "--hf", tmp_path / "loras", "--weights", "lora", "--verify")
    assert _run_tool(monkeypatch, *options) == 0
    assert float(capsys.readouterr().out.rsplit(" ", 1)[1]) < 100 * torch.finfo(torch.float32).eps
    teacher.rename(tmp_path / "moved")
    assert _run_tool(monkeypatch, *options) == 2
    assert (
        capsys.readouterr().err == f"error: --teacher {teacher}: the run's teacher is not there; name its new place\n"
    )
    assert _run_tool(monkeypatch, *options, "--teacher", tmp_path / "moved") == 0
    assert float(capsys.readouterr().out.rsplit(" ", 1)[1]) < 100 * torch.finfo(torch.float32).eps
    assert json.loads((tmp_path / "loras" / "lora_files.json").read_text())["teacher"] == str(tmp_path / "moved")


def _never(*unused: object, **options: object) -> None:
    raise AssertionError("nothing large is loaded before all is checked")


def _occupied(run: Path, destination: Path) -> None:
    destination.mkdir()
    (destination / "thesis.txt").touch()


def _occupied_beside(run: Path, destination: Path) -> None:
    beside = destination.with_name(f".{destination.name}.old")
    beside.mkdir()
    (beside / "thesis.txt").touch()


def _no_recipe(run: Path, destination: Path) -> None:
    (run / "config.yaml").write_text("[1, 2")


def _phase_99(run: Path, destination: Path) -> None:
    path = next(run.glob("checkpoints/iter_*/metadata.json"))
    content = json.loads(path.read_text())
    content["progress"]["phase"] = 99
    path.write_text(json.dumps(content))


def _no_metadata(run: Path, destination: Path) -> None:
    next(run.glob("checkpoints/iter_*/metadata.json")).write_text('{"progress":')


def _three_phases(run: Path, destination: Path) -> None:
    recipe = run / "config.yaml"
    text = recipe.read_text()
    changed = re.sub(r"phase_steps:(\s+- \d+)+|phase_steps: .*", "phase_steps: [1, 1, 2]", text)
    assert changed != text
    recipe.write_text(changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_occupied, "not empty and not made by this program"),
        (_occupied_beside, "in the way"),
        (_no_recipe, "config.yaml"),
        (_phase_99, "phase"),
        (_no_metadata, "metadata.json"),
        (_three_phases, "phases"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(
    damage: Callable[[Path, Path], None],
    message: str,
    tmp_path: Path,
    one_expert: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _make_run(tmp_path / "run", one_expert)
    damage(tmp_path / "run", tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("megatron_pdmd.models.from_hf", _never)
    assert _run_tool(monkeypatch, "--load", tmp_path / "run", "--hf", tmp_path / "hf") == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_not_finite_are_not_exported(
    tmp_path: Path, one_expert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They cannot be in a checkpoint, which is refused where it is read; so they come up after that."""
    _make_run(tmp_path / "run", one_expert)
    read = Checkpoint.read

    def spoilt(self, state, shards):
        read(self, state, shards)
        next(iter(shards.values())).boxes[0].tensor.view(-1)[0] = float("nan")

    monkeypatch.setattr(Checkpoint, "read", spoilt)
    for weights in ("merged", "lora"):
        options = ("--load", tmp_path / "run", "--hf", tmp_path / "hf", "--weights", weights)
        assert _run_tool(monkeypatch, *options) == 2
        error = capsys.readouterr().err
        assert "holds NaN or infinity" in error and error.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_another_teacher_or_progress_that_cannot_be_is_not_exported(
    tmp_path: Path, one_expert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _make_run(tmp_path / "run", one_expert)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    inputs = Fingerprints.of(read_pipeline(one_expert), prompts)
    inputs.write(tmp_path / "run")
    options = ("--load", tmp_path / "run", "--hf", tmp_path / "hf")
    name = next(name for name in inputs.teacher if name.endswith(".safetensors"))
    replace(inputs, teacher=inputs.teacher | {name: "0"}).write(tmp_path / "run")
    assert _run_tool(monkeypatch, *options) == 2
    assert f"was trained with another {name} than {one_expert} has; give its teacher" in capsys.readouterr().err
    inputs.write(tmp_path / "run")
    manifest = next((tmp_path / "run").rglob("metadata.json"))
    good = manifest.read_text()
    for old, new in (('"phase": 2', '"phase": 99'), ('"consumed_samples": 192', '"consumed_samples": 191')):
        manifest.write_text(good.replace(old, new))
        assert good != manifest.read_text()
        assert _run_tool(monkeypatch, *options) == 2
        error = capsys.readouterr().err
        assert str(manifest) in error and error.count("\n") == 1
    assert not (tmp_path / "hf").exists()
    manifest.write_text(good)
    assert _run_tool(monkeypatch, *options) == 0
