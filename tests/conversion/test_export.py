"""Exported folders: diffusers loads them, and draws the very samples that the same weights draw by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from megatron_pdmd.conversion.export import TrainedExpert, export_pipeline
from megatron_pdmd.conversion.few_step_sampling import SAMPLING_FILE, FewStepSampling, read_sampling
from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.conversion.verify import load_in_diffusers, sample_with_diffusers, verify_export
from megatron_pdmd.models.lora import WholeTensor

SIGMAS = (1.0, 0.9, 0.75, 0.5)  # four steps at shift 3


def _trained(folder: Path, subfolder: str, seed: int) -> dict[str, torch.Tensor]:
    """The folder's weights, moved a little."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(folder / subfolder / "diffusion_pytorch_model.safetensors")
    return {name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


def _experts(folder: Path) -> list[TrainedExpert]:
    source = read_pipeline(folder)
    bases = list(source.experts) * 2
    return [
        TrainedExpert(steps, base, _trained(folder, source.experts[base], seed))
        for seed, (steps, base) in enumerate(zip((SIGMAS[:2], SIGMAS[2:]), bases, strict=False))
    ]


def _euler(experts: list[TrainedExpert], config: dict, noise: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The samples by plain Euler steps through diffusers' transformer."""
    x = noise
    levels = [(t, expert) for expert in experts for t in expert.steps]
    for (t, expert), t_next in zip(levels, (*SIGMAS[1:], 0.0), strict=True):
        model = WanTransformer3DModel.from_config(config).eval()
        model.load_state_dict(expert.tensors)
        with torch.no_grad():
            flow = model(x, torch.full(x.shape[:1], 1000 * t), text, return_dict=False)[0]
        x = x + (t_next - t) * flow
    return x


@pytest.mark.parametrize("fixture", ["one_expert", "two_experts"])
@pytest.mark.parametrize("max_shard_size", [100_000, 10**9])
def test_diffusers_draws_the_same(
    fixture: str, max_shard_size: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    teacher = request.getfixturevalue(fixture)
    experts = _experts(teacher)
    # Tensors in memory and those that are gathered when they are written are written alike.
    whole = {name: WholeTensor(tuple(t.shape), t.dtype, t.clone) for name, t in experts[1].tensors.items()}
    streamed = [experts[0], TrainedExpert(experts[1].steps, experts[1].base, whole)]
    export_pipeline(read_pipeline(teacher), tmp_path / "student", streamed, shift=3.0, max_shard_size=max_shard_size)
    written = read_pipeline(tmp_path / "student")
    assert written.experts == {"high_noise": "transformer", "low_noise": "transformer_2"}
    assert written.boundary_ratio == pytest.approx(0.825)
    assert written.shift == 3.0
    noise, text = torch.randn(2, 1, 3, 8, 16), torch.randn(2, 32, 64)
    config = json.loads((teacher / "transformer" / "config.json").read_text())
    by_hand = _euler(experts, config, noise, text)
    # The same fp32 arithmetic but for the rounding of the scheduler's levels.
    assert verify_export(written.path, text, noise, SIGMAS, by_hand) < 100 * torch.finfo(torch.float32).eps
    swapped = _euler([TrainedExpert(SIGMAS[:2], "", experts[1].tensors), experts[1]], config, noise, text)
    assert verify_export(written.path, text, noise, SIGMAS, swapped) > 1e-3


def test_whole_pipeline_loads_and_the_card_tells_the_truth(tmp_path: Path, two_experts: Path) -> None:
    destination = tmp_path / "student"
    experts = _experts(two_experts)
    export_pipeline(
        read_pipeline(two_experts), destination, experts,
        shift=3.0, dtype=torch.bfloat16, prompt_length=32, latent_size=(2, 8, 12),
    )  # fmt: skip
    card = (destination / "README.md").read_text()
    assert "trained with 2 x 8 x 12 latents (frames, height, width), which are 5 x 64 x 96 pixels" in card
    code = card.split("```python\n")[1].split("```")[0].replace("this/folder", str(destination))
    names: dict = {}
    exec(code.replace("from_pretrained(", "from_pretrained(vae=None, pretrained_model_name_or_path="), names)
    assert names["video"].shape == (1, 2, 8, 12), "the first sample's latents, of the size that was trained"
    pipeline = names["pipeline"]
    assert isinstance(pipeline, WanPipeline)
    pipeline.scheduler.set_timesteps(4)
    torch.testing.assert_close(pipeline.scheduler.sigmas, torch.tensor([*SIGMAS, 0.0]), rtol=1e-6, atol=0)
    assert pipeline.transformer.dtype == torch.bfloat16
    noise = torch.randn(1, 1, 2, 8, 8)
    drawn = pipeline(
        "a 7", latents=noise, height=64, width=64, num_frames=5, num_inference_steps=4, guidance_scale=1.0,
        max_sequence_length=32, output_type="latent",
    ).frames  # fmt: skip
    with torch.no_grad():
        embeddings, _ = pipeline.encode_prompt("a 7", do_classifier_free_guidance=False, max_sequence_length=32)
    ours = sample_with_diffusers(load_in_diffusers(destination, torch.bfloat16), embeddings, noise, SIGMAS)
    assert torch.equal(drawn, ours)
    sampling = read_sampling(destination)
    assert sampling == FewStepSampling(((1.0, 0.9), (0.75, 0.5)), 3.0, 0.825, 1.0, 32, (2, 8, 12))


def test_one_phase_of_a_two_expert_teacher_is_one_transformer(tmp_path: Path, two_experts: Path) -> None:
    expert = TrainedExpert(SIGMAS, "low_noise", _trained(two_experts, "transformer_2", 0))
    export_pipeline(read_pipeline(two_experts), tmp_path / "student", [expert], shift=3.0)
    written = read_pipeline(tmp_path / "student")
    assert written.experts == {"single": "transformer"}
    assert not (written.path / "transformer_2").exists()


@pytest.mark.parametrize("boundary", [0.75, 0.9, 0.5, 1.0])
def test_boundary_must_lie_strictly_between_the_steps(tmp_path: Path, two_experts: Path, boundary: float) -> None:
    with pytest.raises(ValueError, match=r"strictly between 0\.7500 and 0\.9000"):
        export_pipeline(
            read_pipeline(two_experts), tmp_path / "s", _experts(two_experts), shift=3.0, boundary_ratio=boundary
        )
    assert not any(tmp_path.iterdir())


def test_weights_must_fit_and_a_failure_leaves_nothing(tmp_path: Path, two_experts: Path) -> None:
    experts = _experts(two_experts)
    experts[1].tensors.pop("proj_out.weight")
    with pytest.raises(ValueError, match=r"transformer_2: 1 tensors do not fit .*proj_out.weight"):
        export_pipeline(read_pipeline(two_experts), tmp_path / "student", experts, shift=3.0)
    assert not any(tmp_path.iterdir())


def test_only_our_own_folders_are_replaced(tmp_path: Path, two_experts: Path) -> None:
    source, experts = read_pipeline(two_experts), _experts(two_experts)
    destination = tmp_path / "student"
    destination.mkdir()
    export_pipeline(source, destination, experts, shift=3.0)
    (destination / "transformer" / "stale.safetensors").touch()
    export_pipeline(source, destination, experts, shift=3.0)
    assert not (destination / "transformer" / "stale.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    teacher = tmp_path / "teacher"
    shutil.copytree(two_experts, teacher)
    with pytest.raises(ValueError, match="not made by this program"):
        export_pipeline(source, teacher, experts, shift=3.0)


def test_full_disk_is_told_before_writing(tmp_path: Path, two_experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"no space on disk: 0\.0. GiB needed, 0\.00 GiB free"):
        export_pipeline(read_pipeline(two_experts), tmp_path / "student", _experts(two_experts), shift=3.0)
    assert not any(tmp_path.iterdir())


def test_code_and_pickles_are_not_copied(tmp_path: Path, two_experts: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(two_experts, teacher)
    for name in ("modeling.py", "pytorch_model.bin"):
        (teacher / "text_encoder" / name).touch()
    (teacher / "LICENSE.txt").write_text("terms")
    destination = tmp_path / "student"
    export_pipeline(read_pipeline(teacher), destination, _experts(teacher), shift=3.0)
    assert sorted(path.name for path in (destination / "text_encoder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert (destination / "LICENSE.txt").read_text() == "terms"


WHOLE = {"format": "megatron-pdmd-few-step", "steps": [[1.0, 0.9], [0.75]], "timestep_shift": 3, "guidance_scale": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format"),
        *(
            ({"steps": steps}, "steps")
            for steps in ([], [[]], [[1.0], []], [[2.0]], [[1.0, 0.0]], [[1.0, 1.0]], [[1.0, 0.5, 0.7]], [[True]],
                          [["1"]], [1.0], "1", None, [[1.0], [None]], [[0.9]],
                          [[1.0, *(0.9 - i / 10000 for i in range(2000))]])
        ),
        *(({"timestep_shift": shift}, "timestep_shift") for shift in (0, -1, True, "3", None, [3], 1e300, 10**400)),
        *(({"guidance_scale": scale}, "guidance_scale") for scale in ("1", None, False, [1], 10**400)),
        *(({"boundary_ratio": boundary}, "boundary_ratio") for boundary in (0, 1, 0.95, 0.75, True, "0.8", [0.8])),
        *(({"prompt_length": length}, "prompt_length") for length in (0, -1, True, 1.5, "32", 10**12)),
        *(({"frames": side, "height": 8, "width": 8}, "frames, height") for side in (0, None, "2", True, 10**9)),
    ],
)  # fmt: skip
def test_damaged_sampling_description_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    assert read_sampling(tmp_path) is None
    path = tmp_path / SAMPLING_FILE
    path.write_text(json.dumps(WHOLE))
    read_sampling(tmp_path)
    path.write_text(json.dumps({**WHOLE, **change}))
    with pytest.raises(ValueError, match=f"{path}: {message}.*; export"):
        read_sampling(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"steps": NaN}', "[" * 100_000, "\xff\xfe"])
def test_sampling_description_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / SAMPLING_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=SAMPLING_FILE):
        read_sampling(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_exported_that_is_not_finite(tmp_path: Path, two_experts: Path, value: float) -> None:
    experts = _experts(two_experts)
    experts[1].tensors["proj_out.weight"][3, 5] = value
    with pytest.raises(ValueError, match=r"transformer_2/diffusion.*'proj_out.weight' holds NaN or infinity"):
        export_pipeline(read_pipeline(two_experts), tmp_path / "student", experts, shift=3.0)
    assert not any(tmp_path.iterdir())


def test_weights_that_overflow_in_the_exported_dtype_are_not_exported(tmp_path: Path, one_expert: Path) -> None:
    expert = TrainedExpert(SIGMAS, "single", _trained(one_expert, "transformer", 0))
    expert.tensors["proj_out.bias"][0] = 1e6
    with pytest.raises(ValueError, match=r"'proj_out.bias' holds NaN or infinity"):
        export_pipeline(read_pipeline(one_expert), tmp_path / "s", [expert], shift=3.0, dtype=torch.float16)


@pytest.mark.parametrize("name", [".student.old", ".student.partial"])
def test_folders_of_the_user_beside_the_export_are_kept(tmp_path: Path, one_expert: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    expert = TrainedExpert(SIGMAS, "single", _trained(one_expert, "transformer", 0))
    with pytest.raises(ValueError, match="is in the way"):
        export_pipeline(read_pipeline(one_expert), tmp_path / "student", [expert], shift=3.0)
    assert (tmp_path / name / "thesis.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [name]
