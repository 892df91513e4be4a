"""Our models and sampler against diffusers' pipeline, and the sampling tool."""

import json
import math
import runpy
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from transformers import UMT5Config, UMT5EncoderModel

from megatron_pdmd.conversion.export import TrainedExpert, export_pipeline
from megatron_pdmd.conversion.few_step_sampling import FewStepSampling
from megatron_pdmd.conversion.inference import SamplingPlan, load_expert, plan_sampling, sample_stage
from megatron_pdmd.conversion.inference_checks import check_memory, memory_told
from megatron_pdmd.conversion.lora_folder import export_loras
from megatron_pdmd.conversion.pipeline_folder import read_pipeline
from megatron_pdmd.conversion.verify import verify_export, visit_sigmas
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.models import from_hf

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
    export_pipeline(read_pipeline(two_experts), folder, experts, shift=3.0, prompt_length=32, latent_size=(2, 8, 12))
    return folder


def _draw(folder: Path, plan: SamplingPlan, noise: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
    x = noise
    for stage in plan.stages:
        x = sample_stage(load_expert(read_pipeline(folder), stage.expert, dtype=torch.float32), stage, x, *text)
    return x


def test_an_export_is_sampled_as_it_says_and_as_diffusers_does(student: Path) -> None:
    plan = plan_sampling(read_pipeline(student))
    assert plan.times == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    assert plan.experts == ("high_noise", "high_noise", "low_noise", "low_noise")
    assert plan.guidance == (1.0, 1.0) and not plan.is_guided
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


def _damage(folder: Path, name: str, **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("few_step_sampling.json", {"steps": [[1.0, 0.5]], "boundary_ratio": None}, "steps of 1 experts, .* has 2"),
        ("few_step_sampling.json", {"steps": [[1.0], [0.9, 0.75, 0.5]], "boundary_ratio": 0.95}, "other sides"),
        ("model_index.json", {"boundary_ratio": 0.7}, "other sides of boundary_ratio 0.7"),
    ],
)
def test_an_export_whose_parts_do_not_fit_is_refused(
    student: Path, tmp_path: Path, name: str, changes: dict, message: str
) -> None:
    shutil.copytree(student, tmp_path / "student")
    _damage(tmp_path / "student", name, **changes)
    with pytest.raises(ValueError, match=message):
        plan_sampling(read_pipeline(tmp_path / "student"))


@pytest.mark.parametrize("guidance", [(math.nan,), (1.0, math.inf), (1.0, 2.0, 3.0)])
def test_guidance_that_cannot_be(one_expert: Path, guidance: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="--guidance-scale"):
        plan_sampling(read_pipeline(one_expert), guidance_scale=guidance)


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


def _adapter(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator, adapter = torch.Generator().manual_seed(seed), {}
    for name, weight in weights.items():
        if name.startswith("blocks.") and weight.ndim == 2 and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            adapter[f"{module}.lora_A.weight"] = 0.2 * torch.randn(4, weight.shape[1], generator=generator)
            adapter[f"{module}.lora_B.weight"] = 0.2 * torch.randn(weight.shape[0], 4, generator=generator)
    return adapter


@pytest.mark.parametrize("lora_format", ["diffusers", "comfyui", "lightx2v"])
@pytest.mark.parametrize("fixture", ["one_expert", "two_experts"])
def test_lora_files_draw_what_the_merged_export_draws(
    fixture: str, lora_format: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = request.getfixturevalue(fixture)
    source = read_pipeline(teacher)
    names = (list(source.experts) * 2)[:2]
    adapters, merged, steps = {}, [], ((1.0, 0.9), (0.75, 0.5))
    for number, name in enumerate(names):
        weights = _weights(teacher, source.experts[name])
        adapter = _adapter(weights, number)
        adapters[f"phase_{number + 1}_{name}"] = adapter
        for module in {key.rsplit(".lora_", 1)[0] for key in adapter}:
            delta = adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + 0.5 * delta
        merged.append(TrainedExpert(steps[number], name, weights))
    export_pipeline(source, tmp_path / "merged", merged, shift=3.0, prompt_length=32, latent_size=(2, 8, 8))
    sampling = FewStepSampling(steps, 3.0, 0.825, prompt_length=32, latent_size=(2, 8, 8))
    bases = tuple(source.experts[name] for name in names)
    options = {"alpha": 2.0, "source": source, "bases": bases, "sampling": sampling, "lora_format": lora_format}
    export_loras(tmp_path / "loras", adapters, **options)
    (tmp_path / "prompts.txt").write_text("a 7 moving left\na 3 moving up\n")
    drawn = {}
    for name, given in {"merged": ["--hf", tmp_path / "merged"], "lora": ["--lora", tmp_path / "loras"]}.items():
        save = ("--prompts", tmp_path / "prompts.txt", "--save", tmp_path / name / "samples")
        assert _run_tool(monkeypatch, *given, *save, "--no-pictures") == 0
        drawn[name] = load_file(tmp_path / name / "samples" / "samples.safetensors")["latents"]
    assert drawn["lora"].shape == (2, 1, 2, 8, 8), "the size of training"
    apart = torch.linalg.vector_norm(drawn["lora"] - drawn["merged"]) / torch.linalg.vector_norm(drawn["merged"])
    assert apart < 100 * EPS
    with monkeypatch.context() as patch:
        patch.setattr("megatron_pdmd.conversion.inference.merge_low_rank", lambda model, matrices: None)
        save = ("--prompts", tmp_path / "prompts.txt", "--save", tmp_path / "teacher")
        assert _run_tool(monkeypatch, "--lora", tmp_path / "loras", *save, "--no-pictures") == 0
    without = load_file(tmp_path / "teacher" / "samples.safetensors")["latents"]
    assert torch.linalg.vector_norm(without - drawn["merged"]) / torch.linalg.vector_norm(without) > 1e-3


def test_one_expert_is_in_memory_at_a_time(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alive: list[weakref.ref] = []

    def watched(*arguments: object, **options: object) -> torch.nn.Module:
        assert not any(reference() is not None for reference in alive)
        model = from_hf(*arguments, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr("megatron_pdmd.conversion.inference.from_hf", watched)
    (tmp_path / "prompts.txt").write_text("a 7\na 3\n")
    options = ("--hf", student, "--prompts", tmp_path / "prompts.txt", "--save", tmp_path / "samples")
    assert _run_tool(monkeypatch, *options, "--no-pictures", "--batch-size", 1) == 0
    assert len(alive) == 2
    told = capsys.readouterr().out
    assert f"loading {student / 'transformer'} in torch.float32 on cpu" in told and "transformer_2 in" in told


def test_large_networks_have_defaults_of_their_own(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_tool: Callable[[str], ModuleType]
) -> None:
    tool = load_tool("generate")
    options = tool.GenerateOptions(prompts=tmp_path, save=tmp_path / "save", hf=student, device="cpu")
    request = tool.prepare(options)
    assert (request.dtype, request.batch_size, request.latent_shape) == (torch.float32, 16, (1, 2, 8, 12))
    monkeypatch.setattr(tool, "LARGE_MODEL", 10_000)
    request = tool.prepare(replace(options, frames=3))
    assert (request.dtype, request.batch_size, request.latent_shape) == (torch.bfloat16, 1, (1, 3, 8, 12))
    request = tool.prepare(replace(options, dtype="float32", batch_size=5))
    assert (request.dtype, request.batch_size) == (torch.float32, 5)


def _never(*unused: object, **options: object) -> None:
    raise AssertionError("nothing is loaded before all is checked")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", 2**63], "--seed"),
        (["--seed", -1], "--seed"),
        (["--frames", 10**9], "--frames 1000000000: must lie in"),
        (["--frames", 65], "--frames 65: the model knows up to 64"),
        (["--height", 10**9], "--height"),
        (["--width", 4 * 65], "--width 260: the model knows up to 256"),
        (["--height", 6], "--height 6: the model's patches are 4 wide"),
        (["--samples-per-prompt", 10**6, "--frames", 64, "--height", 256, "--width", 256], "GiB needed, cpu has"),
        (["--samples-per-prompt", 10**30], "--samples-per-prompt"),
        (["--max-length", 10**9], "--max-length"),
        (["--num-steps", 10**9], "--num-steps"),
        (["--num-steps", 0], "--num-steps"),
        (["--timestep-shift", "inf"], "--timestep-shift"),
        (["--timestep-shift", "nan"], "--timestep-shift"),
        (["--guidance-scale", "nan"], "--guidance-scale"),
        (["--batch-size", 0], "--batch-size"),
        (["--device", "cuda"], "--device cuda: there is no CUDA"),
        (["--lora", "none"], "--lora none: no such folder"),
        (["--load", "none"], "name either"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_loaded(
    flags: list[object],
    message: str,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megatron_pdmd.conversion.inference.from_hf", _never)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    embeddings = PromptEmbeddings(("a 7",), (torch.zeros(1, 32, 64),), torch.zeros(32, 64))
    embeddings.save(tmp_path / "prompts")
    _refused(monkeypatch, capsys, message, "--hf", student, "--prompts", tmp_path / "prompts", *flags)


def _refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], message: str, *flags: object) -> None:
    folder = Path(flags[flags.index("--prompts") + 1]).parent
    before = sorted(folder.rglob("*"))
    assert _run_tool(monkeypatch, *flags, "--save", folder / "samples") == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_embeddings_of_another_width_are_refused_before_anything_is_loaded(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_pdmd.conversion.inference.from_hf", _never)
    monkeypatch.setattr("megatron_pdmd.data.prompts.TextEncoder", _never)
    PromptEmbeddings(("a 7",), (torch.zeros(1, 32, 48),), torch.zeros(32, 48)).save(tmp_path / "prompts")
    message = "embeddings are 48 wide, the model reads 64"
    _refused(monkeypatch, capsys, message, "--hf", student, "--prompts", tmp_path / "prompts")
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=384, d_model=96, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(tmp_path / "other" / "text_encoder")
    shutil.copytree(student / "tokenizer", tmp_path / "other" / "tokenizer")
    (tmp_path / "prompts.txt").write_text("a 7\n")
    capsys.readouterr()  # of saving
    flags = ("--hf", student, "--prompts", tmp_path / "prompts.txt", "--text-encoder", tmp_path / "other")
    _refused(monkeypatch, capsys, "embeddings are 96 wide", *flags)


def test_samples_that_are_not_finite_are_not_saved(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a 7\n")
    flags = ("--hf", student, "--prompts", tmp_path / "prompts.txt", "--save", tmp_path / "samples")
    real = sample_stage

    def broken(*arguments: object) -> torch.Tensor:
        return real(*arguments) * float("nan")

    monkeypatch.setattr("megatron_pdmd.conversion.inference.sample_stage", broken)
    assert _run_tool(monkeypatch, *flags) == 2
    assert "its samples are not finite, so none is saved" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_memory_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"not enough memory .*; ask for less"), memory_told("ask for less"):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="shapes cannot"), memory_told("ask for less"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"the weights: 1048576.0 GiB needed, cpu has .*; ask for less"):
        check_memory(2**50, torch.device("cpu"), "the weights", "ask for less")


def test_folders_with_other_files_than_samples_are_kept(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a 7\n")
    flags = ("--hf", student, "--prompts", tmp_path / "prompts.txt", "--save", tmp_path / "samples")
    assert _run_tool(monkeypatch, *flags) == 0 == _run_tool(monkeypatch, *flags, "--seed", 1)
    (tmp_path / "samples" / "metrics.json").write_text("mine")
    capsys.readouterr()
    assert _run_tool(monkeypatch, *flags) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "samples" / "metrics.json").read_text() == "mine"
