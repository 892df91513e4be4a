"""Turns a run's checkpoint into Hugging Face folders or LoRA files.

python tools/convert_checkpoint.py export --load runs/quickstart --hf exports/student --verify
python tools/convert_checkpoint.py export --load runs/quickstart --hf exports/loras --weights lora --lora-format comfyui
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from megatron_pdmd.arguments import load_recipe, validate
from megatron_pdmd.config import Config
from megatron_pdmd.conversion.export import is_export
from megatron_pdmd.conversion.few_step_sampling import FewStepSampling
from megatron_pdmd.conversion.lora_files import LoraFormat
from megatron_pdmd.conversion.lora_folder import export_loras, is_lora_folder
from megatron_pdmd.conversion.pipeline_folder import PipelineFolder, read_pipeline
from megatron_pdmd.conversion.verify import ExpertLora, verify_export
from megatron_pdmd.diffusion.noise_schedule import FlowMatchingSchedule
from megatron_pdmd.diffusion.phases import Phase, PhasePlan, deployment_boundary
from megatron_pdmd.diffusion.sampler import sample
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.files.whole import check_destination
from megatron_pdmd.models import from_hf
from megatron_pdmd.models.lora import adapter_state_dict
from megatron_pdmd.models.wan import WanConfig
from megatron_pdmd.training.checkpoints.checkpointing import latest_checkpoint
from megatron_pdmd.training.checkpoints.start import check_progress
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.outcome import export_run
from megatron_pdmd.training.run_folders.fingerprints import check_teacher

# Largest difference that rounding explains: diffusers rounds bfloat16 latents after every step, and we do not.
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ConvertOptions:
    """What is read and what is written."""

    # What to do.
    action: tyro.conf.Positional[Literal["export"]]
    # Folder of a training run.
    load: Path
    # Folder for the result.
    hf: Path
    # The teacher's folder, where it is no longer at the place that the run knows.
    teacher: Path | None = None
    # merged: a pipeline folder with adapters merged into the weights; lora: a LoRA file for each expert.
    weights: Literal["merged", "lora"] = "merged"
    # Whose key names the LoRA files have; see megatron_pdmd/conversion/lora_files.py.
    lora_format: LoraFormat = "diffusers"
    # Sample the result in diffusers and compare with our own sampler.
    verify: bool = False


@dataclass(frozen=True)
class Run:
    """A run's trained experts and how they are sampled."""

    config: Config
    source: PipelineFolder
    schedule: FlowMatchingSchedule
    plan: PhasePlan
    networks: Networks
    dtype: torch.dtype


def main() -> None:
    with user_errors():
        options = parse_options(ConvertOptions, __doc__)
        run = load_run(options)
        if options.weights == "merged":
            export_run(run.config, run.source, run.plan, run.networks, options.hf)
            folder, loras = options.hf, []
        else:
            folder, loras = run.source.path, export_adapters(run, options.hf, options.lora_format)
        print(f"exported {len(run.plan.phases)} experts to {options.hf}", flush=True)
        difference = compare(run, folder, loras) if options.verify else 0.0
    if options.verify:
        print(f"relative difference to diffusers: {difference:.2e}")
    if not difference <= LARGEST_DIFFERENCE[run.dtype]:
        sys.exit(f"diffusers draws other samples than the run: more than {LARGEST_DIFFERENCE[run.dtype]} apart")


def load_run(options: ConvertOptions) -> Run:
    """The experts of a run's latest checkpoint, on top of its teacher.

    Raises:
        ValueError: no run, no checkpoint, a phase that has not begun, a teacher that has moved, or options that do not
            fit the run; before anything large is read.
    """
    check_destination(options.hf, "--hf", is_export if options.weights == "merged" else is_lora_folder)
    config = run_config(options)
    checkpoint = latest_checkpoint(options.load / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"--load {options.load}: has no checkpoint yet")
    method, source = config.method, run_teacher(config)
    schedule = FlowMatchingSchedule(method.timestep_shift)
    plan = PhasePlan.build(method.num_steps, method.phase_steps, schedule, source.boundary_ratio)
    check_options(options, config, source, plan)
    check_progress(checkpoint, config)
    check_teacher(options.load, source)
    for phase in plan.phases:
        if _state(phase) not in checkpoint.states:
            raise ValueError(
                f"--load {options.load}: phase {phase.index} has not begun by its last checkpoint; train it first"
            )
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    used = dict.fromkeys(phase.expert for phase in plan.phases)
    teacher = {}
    for expert in used:
        print(f"loading the teacher's {source.experts[expert]} of {source.path}", flush=True)
        teacher[expert] = from_hf(source.path, source.experts[expert], dtype=dtype)
    networks = Networks(teacher, method, config.training.seed)
    for phase in plan.phases:
        networks.add_expert(phase.index, phase.expert)
        checkpoint.read(_state(phase), networks.expert_state(phase.index))
    print(f"read {checkpoint.folder}{f' ({checkpoint.remark})' if checkpoint.remark else ''}", flush=True)
    return Run(config, source, schedule, plan, networks, dtype)


def run_config(options: ConvertOptions) -> Config:
    """The run's options, with `--teacher` in them.

    Raises:
        ValueError: no run there, or its config.yaml is damaged.
    """
    recipe = options.load / "config.yaml"
    if not recipe.is_file():
        raise ValueError(f"--load {options.load}: no run there (config.yaml is missing)")
    config = load_recipe(recipe)
    if options.teacher is not None:
        config = replace(config, model=replace(config.model, teacher=options.teacher))
    try:
        validate(config)
    except ValueError as error:
        raise ValueError(f"{recipe}: {error}") from None
    return config


def run_teacher(config: Config) -> PipelineFolder:
    """The teacher that a run names.

    Raises:
        ValueError: it is not there, or is no pipeline folder.
    """
    if not config.model.teacher.is_dir():
        raise ValueError(f"--teacher {config.model.teacher}: the run's teacher is not there; name its new place")
    return read_pipeline(config.model.teacher)


def check_options(options: ConvertOptions, config: Config, source: PipelineFolder, plan: PhasePlan) -> None:
    """Refuses what would fail after the export's work.

    Raises:
        ValueError: full copies as LoRA files, more experts than diffusers holds, or samples of image-to-video.
    """
    if options.weights == "lora" and config.method.generator != "lora":
        raise ValueError("--weights lora: the run was trained with --generator full; export --weights merged")
    if options.weights == "merged" or options.verify:
        deployment_boundary(plan)
    if options.verify:
        model = WanConfig.read(source.path / source.experts[plan.phases[0].expert] / "config.json")
        if model.in_channels != model.out_channels:
            raise ValueError("--verify: the teacher takes an image, and only text-to-video pipelines can be compared")


def export_adapters(run: Run, destination: Path, lora_format: LoraFormat) -> list[ExpertLora]:
    """A LoRA file for each phase."""
    adapters = {}
    for phase in run.plan.phases:
        trained = run.networks.delivered(phase.index)
        adapters[f"phase_{phase.index}_{phase.expert}"] = adapter_state_dict(trained.model, trained.adapter)
    data, phases = run.config.data, run.plan.phases
    sampling = FewStepSampling(
        tuple(phase.steps for phase in phases),
        run.config.method.timestep_shift,
        deployment_boundary(run.plan) if len(phases) <= 2 else None,
        prompt_length=data.prompt_length,
        latent_size=(data.frames, data.height, data.width),
    )
    bases = tuple(run.source.experts[phase.expert] for phase in phases)
    files = export_loras(
        destination,
        adapters,
        alpha=run.config.method.lora_alpha,
        source=run.source,
        bases=bases,
        sampling=sampling,
        lora_format=lora_format,
    )
    return [ExpertLora(base, path) for base, path in zip(bases, files.values(), strict=True)]


def compare(run: Run, folder: Path, loras: list[ExpertLora]) -> float:
    """The relative difference between diffusers' samples of what was exported and the run's own, on two small clips."""
    model = run.networks.delivered(1).model.config
    counter = Counter(run.config.training.seed, phase=0, iteration=0, update=0)
    frames = min(3, run.config.data.frames)
    shape = (model.in_channels, frames, 4 * model.patch_size[1], 4 * model.patch_size[2])
    noise = counter.normal(Purpose.INITIAL_NOISE, shape, range(2))
    text = counter.normal(Purpose.PROMPT, (run.config.data.prompt_length, model.text_dim), range(2)).to(run.dtype)

    def flow(x: torch.Tensor, t: torch.Tensor, phase: Phase) -> torch.Tensor:
        trained = run.networks.delivered(phase.index)
        return trained.model(x, t, text, adapter=trained.adapter).float()

    with torch.no_grad():
        ours = sample(flow, noise, run.plan.phases, run.schedule)
    return verify_export(
        folder,
        text,
        noise,
        run.plan.times[:-1],
        ours,
        dtype=run.dtype,
        loras=loras,
        boundary_ratio=deployment_boundary(run.plan),
        shift=run.schedule.shift if loras else None,  # a merged export has a scheduler of its own
    )


def _state(phase: Phase) -> str:
    return f"generator_phase_{phase.index}"


if __name__ == "__main__":
    main()
