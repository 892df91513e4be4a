"""Our models and sampler against diffusers' pipeline, and the sampling tool."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from megatron_pdmd.conversion.export import TrainedExpert, export_pipeline
from megatron_pdmd.conversion.inference import SamplingPlan, load_experts, plan_sampling, sample_latents
from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.conversion.verify import verify_export, visit_sigmas

ROOT = Path(__file__).parents[2]
EPS = torch.finfo(torch.float32).eps


def _weights(folder: Path, subfolder: str) -> dict[str, torch.Tensor]:
    return load_file(folder / subfolder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def student(two_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    experts = [
        TrainedExpert((1.0, 0.9), "high_noise", _weights(two_experts, "transformer_2")),
        TrainedExpert((0.75, 0.5), "low_noise", _weights(two_experts, "transformer")),
    ]
    folder = tmp_path_factory.mktemp("exports") / "student"
    export_pipeline(read_pipeline(two_experts), folder, experts, shift=3.0, prompt_length=32)
    return folder


def _draw(folder: Path, plan: SamplingPlan, noise: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
    return sample_latents(load_experts(read_pipeline(folder), plan, dtype=torch.float32), plan, noise, *text)


def test_an_export_is_sampled_as_it_says_and_as_diffusers_does(student: Path) -> None:
    plan = plan_sampling(read_pipeline(student))
    assert plan.times == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    assert plan.experts == ("high_noise", "high_noise", "low_noise", "low_noise")
    assert plan.guidance == (1.0, 1.0)
    noise, text = torch.randn(2, 1, 3, 8, 16), torch.randn(2, 32, 64)
    assert verify_export(student, text, noise, plan.times[:-1], _draw(student, plan, noise, text)) < 100 * EPS


def test_a_guided_teacher_is_sampled_as_diffusers_does(two_experts: Path) -> None:
    plan = plan_sampling(read_pipeline(two_experts), num_steps=5, guidance_scale=(2.0, 3.0))
    assert (plan.guidance_of("low_noise"), plan.guidance_of("high_noise")) == (2.0, 3.0)
    assert plan.experts == ("high_noise",) * 3 + ("low_noise",) * 2
    noise, text, negative = torch.randn(1, 1, 2, 8, 8), torch.randn(1, 32, 64), torch.randn(1, 32, 64)
    pipeline = WanPipeline.from_pretrained(two_experts, vae=None)
    visit_sigmas(pipeline.scheduler, plan.times[:-1])
    theirs = pipeline(
        prompt_embeds=text, negative_prompt_embeds=negative, latents=noise, height=64, width=64, num_frames=5,
        num_inference_steps=5, guidance_scale=3.0, guidance_scale_2=2.0, output_type="latent",
    ).frames  # fmt: skip
    ours = _draw(two_experts, plan, noise, text, negative)
    assert torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs) < 200 * EPS


def test_plans_of_teachers(one_expert: Path, two_experts: Path) -> None:
    plan = plan_sampling(read_pipeline(one_expert))
    assert (len(plan.times), set(plan.experts), plan.guidance) == (41, {"single"}, (4.0, 4.0))
    moved = plan_sampling(read_pipeline(two_experts), phase_steps=(1, 3), timestep_shift=1.0)
    assert moved.times == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert moved.experts == ("high_noise", "low_noise", "low_noise", "low_noise")
    with pytest.raises(ValueError, match="--phase-steps names 2 phases"):
        plan_sampling(read_pipeline(one_expert), phase_steps=(2, 2))
    with pytest.raises(ValueError, match="--num-steps"):
        plan_sampling(read_pipeline(two_experts), num_steps=5, phase_steps=(2, 2))


def _run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the tool in this process and returns its exit code."""
    path = ROOT / "tools" / "generate.py"
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_tool_writes_samples_that_depend_on_seed_and_number_alone(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a 7 moving left\na 3 moving up\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "hf").symlink_to(student)
    shape = ("--frames", 2, "--height", 8, "--width", 8, "--samples-per-prompt", 2)
    drawn = {}
    for name, source, batch in (("one", ("--hf", student), 3), ("two", ("--load", run), 4)):
        options = (*source, "--prompts", prompts, "--save", tmp_path / name, "--batch-size", batch, "--seed", 5)
        assert _run_tool(monkeypatch, *options, *shape) == 0
        drawn[name] = load_file(tmp_path / name / "samples.safetensors")["latents"]
    torch.testing.assert_close(drawn["one"], drawn["two"])
    assert drawn["one"].shape == (4, 1, 2, 8, 8)
    assert not torch.equal(drawn["one"][0], drawn["one"][1])
    texts = (tmp_path / "one" / "prompts.txt").read_text().splitlines()
    assert texts == ["a 7 moving left"] * 2 + ["a 3 moving up"] * 2
    assert (tmp_path / "one" / "sheet.png").stat().st_size > 0
    assert (tmp_path / "one" / "samples.gif").stat().st_size > 0
    capsys.readouterr()
    options = ("--load", tmp_path / "one", "--prompts", prompts, "--save", tmp_path / "three")
    assert _run_tool(monkeypatch, *options) == 2
    assert capsys.readouterr().err == (
        f"error: --load {tmp_path / 'one'}: no hf/ in it; export the run with tools/convert_checkpoint.py first\n"
    )
