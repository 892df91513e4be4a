"""Everything about a run that can be refused before a network is built: flags, folders, prompts, the plan of phases.

`python -m megatron_pdmd.preflight [flags]` checks and exits, 0 or 2. The launch script runs it once before torchrun.
"""

import json
import sys
from dataclasses import dataclass

from megatron_pdmd.arguments import parse_arguments, to_yaml
from megatron_pdmd.config import Config, EvaluationConfig
from megatron_pdmd.conversion.pipeline_folder import PipelineFolder, read_pipeline
from megatron_pdmd.data.prompts import load_prompts, read_prompts
from megatron_pdmd.diffusion.noise_schedule import FlowMatchingSchedule
from megatron_pdmd.diffusion.phases import PhasePlan, deployment_boundary, noise_interval
from megatron_pdmd.errors import user_errors
from megatron_pdmd.evaluation.clip_classifier import load_classifier
from megatron_pdmd.evaluation.heldout_digits import load_heldout_digits
from megatron_pdmd.training.run_folder import check_run_folder


@dataclass(frozen=True)
class Plan:
    """A run whose inputs have been read and found to fit each other."""

    config: Config
    source: PipelineFolder
    schedule: FlowMatchingSchedule
    phases: PhasePlan
    latent_shape: tuple[int, ...]


def prepare(arguments: list[str]) -> Plan:
    """Parses the flags and checks them against the files they name; prints the config and exits if so asked.

    Raises:
        ValueError: one line that names the flag or file, what was wrong and what to do.
    """
    config, print_config = parse_arguments(arguments)
    if print_config:
        print(to_yaml(config), end="")
        sys.exit(0)
    source = read_pipeline(config.model.teacher)
    method = config.method
    schedule = FlowMatchingSchedule(method.timestep_shift)
    phases = PhasePlan.build(method.num_steps, method.phase_steps, schedule, source.boundary_ratio)
    for phase in phases.phases:
        noise_interval(phase, method.noise_interval, phases.boundary, fixed_t=method.fixed_timestep)
    if config.checkpoint.export:
        deployment_boundary(phases)
    data = config.data
    if data.prompts.is_dir():
        load_prompts(data.prompts, max_length=data.prompt_length, negative_prompt=data.negative_prompt)
    else:
        read_prompts(data.prompts)
        if not source.has_text_encoder:
            raise ValueError(
                f"--prompts {data.prompts}: is text, and {source.path} has no text encoder; "
                "encode it with tools/encode_prompts.py"
            )
    _check_task_folder(config.evaluation)
    if config.evaluation.task == "moving_digits":
        load_classifier(config.evaluation.task_folder / "classifier.safetensors")
        load_heldout_digits(config.evaluation.task_folder / "heldout_digits.png")
    check_run_folder(config)
    return Plan(config, source, schedule, phases, _latent_shape(config, source))


def _latent_shape(config: Config, source: PipelineFolder) -> tuple[int, ...]:
    """[C, F, H, W] of a sample.

    Raises:
        ValueError: a side that the teacher's patches do not divide.
    """
    path = source.path / next(iter(source.experts.values())) / "config.json"
    model = json.loads(path.read_text(encoding="utf-8"))
    try:
        channels, patch_size = model["out_channels"], model["patch_size"]
    except KeyError as missing:
        raise ValueError(f"{path}: has no {missing}; name a Hugging Face pipeline folder of a Wan model") from None
    sides = (config.data.frames, config.data.height, config.data.width)
    for flag, side, patch in zip(("--frames", "--height", "--width"), sides, patch_size, strict=True):
        if side % patch:
            raise ValueError(f"{flag} {side}: the teacher's patches are {patch} wide; give a multiple of it")
    return (channels, *sides)


def _check_task_folder(evaluation: EvaluationConfig) -> None:
    """The measurement comes after hours of training; what it needs must be there before.

    Raises:
        ValueError: a file of the task is missing.
    """
    if evaluation.task == "none":
        return
    for path in (evaluation.classifier, evaluation.heldout_digits):
        if not path.is_file():
            raise ValueError(f"--task-folder {path.parent}: has no {path.name}; name the folder of the task")


def main() -> None:
    with user_errors():
        prepare(sys.argv[1:])


if __name__ == "__main__":
    main()
