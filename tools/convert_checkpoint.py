"""Turns a run's checkpoint into Hugging Face folders or LoRA files.

python tools/convert_checkpoint.py export --load runs/quickstart --hf exports/student --verify
python tools/convert_checkpoint.py export --load runs/quickstart --hf exports/loras --weights lora --lora-format comfyui
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from megatron_pdmd.arguments import load_recipe
from megatron_pdmd.config import Config
from megatron_pdmd.conversion.lora_files import LoraFormat, export_loras
from megatron_pdmd.conversion.pipeline_folder import PipelineFolder, read_pipeline
from megatron_pdmd.conversion.verify import ExpertLora, verify_export
from megatron_pdmd.diffusion.noise_schedule import FlowMatchingSchedule
from megatron_pdmd.diffusion.phases import Phase, PhasePlan, deployment_boundary
from megatron_pdmd.diffusion.sampler import sample
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.models import from_hf
from megatron_pdmd.models.lora import adapter_state_dict
from megatron_pdmd.training.checkpointing import latest_checkpoint
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.outcome import export_run

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
        run = load_run(options.load)
        if options.weights == "merged":
            export_run(run.config, run.source, run.plan, run.networks, options.hf)
            folder, loras = options.hf, []
        else:
            folder, loras = run.source.path, export_adapters(run, options.hf, options.lora_format)
        print(f"exported {len(run.plan.phases)} experts to {options.hf}")
        difference = compare(run, folder, loras) if options.verify else 0.0
    if options.verify:
        print(f"relative difference to diffusers: {difference:.2e}")
    if difference > LARGEST_DIFFERENCE[run.dtype]:
        sys.exit(f"diffusers draws other samples than the run: more than {LARGEST_DIFFERENCE[run.dtype]} apart")


def load_run(folder: Path) -> Run:
    """The experts of a run's latest checkpoint, on top of its teacher.

    Raises:
        ValueError: no run, no checkpoint, a phase that has not begun, or a teacher that has moved.
    """
    recipe = folder / "config.yaml"
    if not recipe.is_file():
        raise ValueError(f"--load {folder}: no run there (config.yaml is missing)")
    config = load_recipe(recipe)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"--load {folder}: has no checkpoint yet")
    method, source = config.method, read_pipeline(config.model.teacher)
    schedule = FlowMatchingSchedule(method.timestep_shift)
    plan = PhasePlan.build(method.num_steps, method.phase_steps, schedule, source.boundary_ratio)
    for phase in plan.phases:
        if _state(phase) not in checkpoint.states:
            raise ValueError(
                f"--load {folder}: phase {phase.index} has not begun by its last checkpoint; train it first"
            )
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    used = dict.fromkeys(phase.expert for phase in plan.phases)
    teacher = {expert: from_hf(source.path, source.experts[expert], dtype=dtype) for expert in used}
    networks = Networks(teacher, method, config.training.seed)
    for phase in plan.phases:
        networks.add_expert(phase.index, phase.expert)
        checkpoint.read(_state(phase), networks.expert_state(phase.index))
    return Run(config, source, schedule, plan, networks, dtype)


def export_adapters(run: Run, destination: Path, lora_format: LoraFormat) -> list[ExpertLora]:
    """A LoRA file for each phase.

    Raises:
        ValueError: the run trained full copies.
    """
    if run.config.method.generator != "lora":
        raise ValueError("--weights lora: the run was trained with --generator full; export --weights merged")
    adapters = {}
    for phase in run.plan.phases:
        trained = run.networks.delivered(phase.index)
        adapters[f"phase_{phase.index}_{phase.expert}"] = adapter_state_dict(trained.model, trained.adapter)
    sampling = {
        "teacher_transformers": [run.source.experts[phase.expert] for phase in run.plan.phases],
        "steps": [list(phase.steps) for phase in run.plan.phases],
        "timestep_shift": run.config.method.timestep_shift,
        "guidance_scale": 1.0,
        "prompt_length": run.config.data.prompt_length,
    }
    alpha = run.config.method.lora_alpha
    files = export_loras(destination, adapters, alpha=alpha, lora_format=lora_format, sampling=sampling)
    bases = sampling["teacher_transformers"]
    return [ExpertLora(base, path) for base, path in zip(bases, files.values(), strict=True)]


def compare(run: Run, folder: Path, loras: list[ExpertLora]) -> float:
    """The relative difference between diffusers' samples of what was exported and the run's own, on two small clips."""
    model = run.networks.delivered(1).model.config
    if model.in_channels != model.out_channels:
        raise ValueError("--verify: the teacher takes an image, and only text-to-video pipelines can be compared")
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
    )


def _state(phase: Phase) -> str:
    return f"generator_phase_{phase.index}"


if __name__ == "__main__":
    main()
