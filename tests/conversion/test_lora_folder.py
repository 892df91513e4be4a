"""Folders of LoRA files: what they say of themselves is true, and nothing that is not is believed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_pdmd.conversion.few_step_sampling import FewStepSampling
from megatron_pdmd.conversion.inference import plan_sampling
from megatron_pdmd.conversion.lora_folder import export_loras, read_lora_folder
from megatron_pdmd.conversion.pipeline_folder import read_pipeline

SAMPLING = FewStepSampling(((1.0, 0.9), (0.75, 0.5)), 3.0, 0.825, 1.0, 32, (2, 8, 12))


def _adapter(rank: int = 4) -> dict[str, torch.Tensor]:
    name = "blocks.0.attn1.to_q"
    return {f"{name}.lora_A.weight": torch.randn(rank, 128), f"{name}.lora_B.weight": torch.randn(128, rank)}


def _export(
    folder: Path, teacher: Path, bases: tuple[str, ...] = ("transformer", "transformer_2"), **options: Any
) -> None:
    adapters = options.pop("adapters", None) or {f"phase_{number}": _adapter() for number in (1, 2)}
    options = {"alpha": 2.0, "source": read_pipeline(teacher), "bases": bases, "sampling": SAMPLING, **options}
    export_loras(folder, adapters, **options)


def test_a_folder_says_what_it_is(tmp_path: Path, two_experts: Path) -> None:
    _export(tmp_path / "loras", two_experts, lora_format="comfyui")
    assert sorted(path.name for path in (tmp_path / "loras").iterdir()) == [
        "README.md",
        "lora_files.json",
        "phase_1.safetensors",
        "phase_2.safetensors",
    ]
    folder = read_lora_folder(tmp_path / "loras")
    assert folder.sampling == SAMPLING
    assert (folder.lora_format, folder.teacher, folder.bases) == (
        "comfyui",
        two_experts,
        ("transformer", "transformer_2"),
    )
    plan = plan_sampling(read_pipeline(two_experts), lora=folder)
    assert plan.times == (1.0, 0.9, 0.75, 0.5, 0.0)
    assert [(stage.expert, stage.times, stage.guidance) for stage in plan.stages] == [
        ("phase_1", (1.0, 0.9, 0.75), 1.0),
        ("phase_2", (0.75, 0.5, 0.0), 1.0),
    ]
    assert plan_sampling(read_pipeline(two_experts), lora=folder, num_steps=2).experts == ("phase_1", "phase_2")


@pytest.mark.parametrize(
    ("fixture", "bases"),
    [
        ("two_experts", ("transformer", "transformer_2")),
        ("two_experts", ("transformer_2",)),
        ("one_expert", ("transformer", "transformer")),
        ("one_expert", ("transformer",)),
    ],
)
def test_the_readmes_program_runs_in_diffusers(
    fixture: str, bases: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    teacher = request.getfixturevalue(fixture)
    sampling = SAMPLING if len(bases) == 2 else FewStepSampling(((1.0, 0.5),), 3.0, latent_size=(2, 8, 12))
    adapters = {f"phase_{number}": _adapter() for number in range(1, len(bases) + 1)}
    _export(tmp_path / "loras", teacher, bases, adapters=adapters, sampling=sampling)
    card = (tmp_path / "loras" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names: dict = {}
    code = code.replace("this/folder", str(tmp_path / "loras")).replace('"the/teacher"', f'"{teacher}", vae=None')
    exec(code.replace("torch.bfloat16", "torch.float32"), names)
    assert names["video"].shape == (1, 2, 8, 12)
    pipeline = names["pipeline"]
    sigmas = [t for levels in sampling.steps for t in levels]
    torch.testing.assert_close(pipeline.scheduler.sigmas, torch.tensor([*sigmas, 0.0]), rtol=1e-6, atol=0)
    assert pipeline.config.boundary_ratio == sampling.boundary_ratio
    experts = [pipeline.transformer, pipeline.transformer_2][: len(bases)]
    for number, (expert, base) in enumerate(zip(experts, bases, strict=True), start=1):
        linear = expert.blocks[0].attn1.to_q
        stored = load_file(teacher / base / "diffusion_pytorch_model.safetensors")["blocks.0.attn1.to_q.weight"]
        assert torch.equal(linear.base_layer.weight, stored)
        assert torch.equal(
            linear.lora_A[f"expert_{number}"].weight, adapters[f"phase_{number}"]["blocks.0.attn1.to_q.lora_A.weight"]
        )
        assert list(linear.lora_A) == [f"expert_{number}"]


def test_only_our_own_folders_are_replaced(tmp_path: Path, two_experts: Path) -> None:
    folder = tmp_path / "loras"
    _export(
        folder, two_experts, ("transformer",), adapters={"single": _adapter()}, sampling=FewStepSampling(((1.0,),), 3.0)
    )
    _export(folder, two_experts)
    assert not (folder / "single.safetensors").exists() and (folder / "phase_2.safetensors").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="name a new folder"):
        _export(tmp_path / "notes", two_experts)


def test_nothing_is_exported_that_is_not_finite(tmp_path: Path, two_experts: Path) -> None:
    adapters = {"phase_1": _adapter(), "phase_2": _adapter()}
    adapters["phase_2"]["blocks.0.attn1.to_q.lora_B.weight"][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"phase_2.safetensors: tensor '.*to_q.lora_B.weight' holds NaN or infinity"):
        _export(tmp_path / "loras", two_experts, adapters=adapters)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "format"),
        ({"lora_format": "kohya"}, "lora_format"),
        ({"lora_format": ["diffusers"]}, "lora_format"),
        *(
            ({"files": files}, "files")
            for files in (None, [], ["../a.safetensors"] * 2, [1, 2], ["phase_1.safetensors"] * 2, ["a.bin", "b.bin"])
        ),
        ({"files": ["phase_1.safetensors"]}, "different lengths"),
        ({"files": ["phase_1.safetensors", "phase_3.safetensors"]}, "phase_3"),
        ({"teacher_transformers": ["transformer", "vae"]}, "teacher_transformers"),
        ({"teacher_transformers": [["transformer"], None]}, "teacher_transformers"),
        ({"teacher_transformers": ["transformer"]}, "different lengths"),
        ({"teacher": 3}, "teacher"),
        ({"teacher": "a\0b"}, "teacher"),
        ({"steps": [[1.0], "a"]}, "steps"),
        ({"steps": [[1.0]], "boundary_ratio": None}, "different lengths"),
        ({"timestep_shift": True}, "timestep_shift"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(change: dict, message: str, tmp_path: Path, two_experts: Path) -> None:
    _export(tmp_path / "loras", two_experts)
    manifest = tmp_path / "loras" / "lora_files.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(ValueError, match=message) as raised:
        read_lora_folder(tmp_path / "loras")
    assert str(tmp_path / "loras") in str(raised.value) and "\n" not in str(raised.value)
