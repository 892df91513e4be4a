"""Everything about a run that can be refused before a network is built: flags, folders, prompts, the plan of phases.

`python -m megatron_pdmd.preflight [flags]` checks and exits, 0 or 2. The launcher runs it once before it starts
ranks: `--available-ranks RANKS NODES`, before all flags, makes it print how many ranks of each node the run can use.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_pdmd.arguments import parse_arguments, to_yaml
from megatron_pdmd.config import Config, DataConfig, EvaluationConfig
from megatron_pdmd.conversion.export import is_export
from megatron_pdmd.conversion.pipeline_folder import PipelineFolder, read_pipeline
from megatron_pdmd.conversion.vae import check_vae
from megatron_pdmd.data.prompts import load_prompts, read_prompts
from megatron_pdmd.data.text_encoder import check_text_encoder
from megatron_pdmd.diffusion.noise_schedule import FlowMatchingSchedule
from megatron_pdmd.diffusion.phases import PhasePlan, deployment_boundary, noise_interval
from megatron_pdmd.errors import require_space, user_errors
from megatron_pdmd.evaluation.clip_classifier import load_classifier
from megatron_pdmd.evaluation.heldout_digits import load_heldout_digits
from megatron_pdmd.evaluation.moving_digits_report import check_measurable
from megatron_pdmd.files.safetensors_files import DIFFUSERS_STEM, TRANSFORMERS_STEM, require_finite_model
from megatron_pdmd.files.whole import check_destination
from megatron_pdmd.models.layers.attention import attention_backend
from megatron_pdmd.models.wan import check_layout
from megatron_pdmd.options import convert
from megatron_pdmd.parallel.pipeline.stages import layer_split
from megatron_pdmd.parallel.topology import check_sizes
from megatron_pdmd.training.checkpoints.start import find_start
from megatron_pdmd.training.logs.wandb_log import check_wandb
from megatron_pdmd.training.phase import fitting_ranks
from megatron_pdmd.training.run_folders.disk_space import least_bytes
from megatron_pdmd.training.run_folders.fingerprints import Fingerprints
from megatron_pdmd.training.run_folders.run_folder import check_run_folder
from megatron_pdmd.training.run_folders.run_lock import check_unlocked
from pdmd_kernels import available_backends


@dataclass(frozen=True)
class Plan:
    """A run whose inputs have been read and found to fit each other.

    Attributes:
        config: of the run.
        source: the teacher.
        schedule: alpha_t and sigma_t.
        phases: the generator's steps.
        latent_shape: [C, F, H, W] of a sample.
        inputs: digests of the teacher and the prompts.
        remarks: what to tell of them, in lines.
    """

    config: Config
    source: PipelineFolder
    schedule: FlowMatchingSchedule
    phases: PhasePlan
    latent_shape: tuple[int, ...]
    inputs: Fingerprints
    remarks: tuple[str, ...] = ()


def prepare(arguments: list[str]) -> Plan:
    """Parses the flags and checks them against the files they name; prints the config and exits if so asked.

    Raises:
        ValueError: one line that names the flag or file, what was wrong and what to do.
    """
    config, launch = parse_arguments(arguments)
    if launch.print_config:
        print(to_yaml(config), end="")
        sys.exit(0)
    return check(config)


def check(config: Config, *, writes: bool = True) -> Plan:
    """Checks options against the files they name.

    Args:
        config: of the run.
        writes: whether it needs the disk; a rehearsal does not.

    Raises:
        ValueError: as `prepare`.
    """
    source = read_pipeline(config.model.teacher)
    method = config.method
    schedule = FlowMatchingSchedule(method.timestep_shift)
    phases = PhasePlan.build(method.num_steps, method.phase_steps, schedule, source.boundary_ratio)
    for phase in phases.phases:
        noise_interval(phase, method.noise_interval, phases.boundary, fixed_t=method.fixed_timestep)
    if config.checkpoint.export:
        deployment_boundary(phases)
        check_destination(config.checkpoint.save / "hf", "--save", is_export)
    latent_shape = _latent_shape(config, source)
    texts = _check_prompts(config.data.prompts, config.data, source)
    if config.evaluation.eval_prompts:
        _check_prompts(config.evaluation.eval_prompts, config.data, source, "--eval-prompts")
    if source.has_vae and config.logging.sample_prompts:
        _check_vae(source)
    for subfolder in source.experts.values():
        require_finite_model(source.path / subfolder, DIFFUSERS_STEM)
    check_wandb(config.logging)
    check_device(config)
    _check_task_folder(config.evaluation)
    if config.evaluation.task == "moving_digits":
        load_classifier(config.evaluation.task_folder / "classifier.safetensors")
        load_heldout_digits(config.evaluation.task_folder / "heldout_digits.png")
        check_measurable(texts, latent_shape, config.evaluation.clips)
    inputs = Fingerprints.of(source, config.data.prompts)
    remarks = check_run_folder(config, inputs)
    check_unlocked(config.checkpoint.save)
    find_start(config)
    if writes:
        require_space(config.checkpoint.save, least_bytes(config, source, phases, schedule), "--save")
    return Plan(config, source, schedule, phases, latent_shape, inputs, tuple(remarks))


def _check_prompts(path: Path, data: DataConfig, source: PipelineFolder, flag: str = "--prompts") -> Sequence[str]:
    """The prompts' texts.

    Raises:
        ValueError: they are broken, encoded for other lengths or another teacher, or text that nothing here can encode.
    """
    wanted = next(iter(source.configs.values())).text_dim
    if path.is_dir():
        loaded = load_prompts(path, max_length=data.prompt_length, negative_prompt=data.negative_prompt, flag=flag)
        width, mend = loaded.negative.shape[1], "encode them with the teacher's own text encoder"
        texts: Sequence[str] = loaded.prompts
    else:
        texts = read_prompts(path, flag)
        if not source.has_text_encoder:
            raise ValueError(
                f"{flag} {path}: is text, and {source.path} has no text encoder; encode it with tools/encode_prompts.py"
            )
        require_finite_model(source.path / "text_encoder", TRANSFORMERS_STEM)
        width, mend = check_text_encoder(source.path, data.prompt_length), "is the text encoder the teacher's own?"
    if width != wanted:
        raise ValueError(f"{flag} {path}: embeddings are {width} wide, the teacher reads {wanted}; {mend}")
    return texts


def _latent_shape(config: Config, source: PipelineFolder) -> tuple[int, ...]:
    """[C, F, H, W] of a sample.

    Raises:
        ValueError: a teacher that needs more than text, a side that its patches do not divide or that is longer than it
            knows, or ranks that its heads do not divide over or its layers do not fit.
    """
    ranks, data = config.parallel, config.data
    tensor, context = ranks.tensor_model_parallel_size, ranks.context_parallel_size
    stages = ranks.pipeline_model_parallel_size
    check_sizes(tensor, stages, context, ranks.sequence_parallel)
    sides = (data.frames, data.height, data.width)
    for expert, model in source.configs.items():
        if model.in_channels != model.out_channels:
            raise ValueError(
                f"--teacher {source.path}: {source.experts[expert]} reads {model.in_channels} channels and writes"
                f" {model.out_channels}, as image-to-video models do; training takes text-to-video models only"
            )
        check_layout(model, tensor, context, ranks.context_parallel_method)
        layer_split(model.num_layers, stages, ranks.pipeline_layer_split)
        for flag, side, patch in zip(("--frames", "--height", "--width"), sides, model.patch_size, strict=True):
            if side % patch:
                raise ValueError(f"{flag} {side}: the teacher's patches are {patch} wide; give a multiple of it")
            if side > patch * model.rope_max_seq_len:
                longest = patch * model.rope_max_seq_len
                raise ValueError(f"{flag} {side}: the teacher knows positions up to {longest}; give no more")
    return (model.out_channels, *sides)


def _check_vae(source: PipelineFolder) -> None:
    """Sheets are decoded after hours; that the VAE fits must be known before.

    Raises:
        ValueError: it cannot be loaded, or decodes other latents.
    """
    own = check_vae(source)
    for model in source.configs.values():
        if own != model.out_channels:
            raise ValueError(
                f"--teacher {source.path}: its VAE decodes {own} channels, its transformers write {model.out_channels};"
                " do they belong together?"
            )
    require_finite_model(source.path / "vae", DIFFUSERS_STEM)


def check_device(config: Config) -> None:
    """Refuses what this machine cannot run.

    Raises:
        ValueError: names the flag of a backend whose device or package is not there.
    """
    device, model = "cuda" if torch.cuda.is_available() else "cpu", config.model
    there = ("auto", *available_backends(device))
    if model.kernel_backend not in there:
        choice = " or ".join(there)
        raise ValueError(f"--kernel-backend {model.kernel_backend}: not there for {device} tensors; choose {choice}")
    attention_backend(model.attention_backend)
    if model.attention_backend == "flash" and device == "cpu":
        raise ValueError("--attention-backend flash: needs a CUDA device and there is none; choose sdpa")
    if model.attention_backend == "flash" and not config.training.bf16:
        raise ValueError("--attention-backend flash: takes no fp32; add --bf16, or choose sdpa")
    if config.parallel.distributed_backend == "nccl" and device == "cpu":
        raise ValueError("--distributed-backend nccl: needs a CUDA device and there is none; choose gloo")


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
    flags, places = sys.argv[1:], None
    with user_errors():
        if flags[:1] == ["--available-ranks"]:
            places, flags = [convert(text, int, flags[0]) for text in flags[1:3]], flags[3:]
        config = prepare(flags).config
    if places is not None:
        available, nodes = places
        ranks = fitting_ranks(config, available, nodes)
        if ranks < available:
            told = f"--global-batch-size {config.training.global_batch_size} does not divide over"
            print(f"{told} {available} ranks a node: starting {ranks}", file=sys.stderr)
        print(ranks)


if __name__ == "__main__":
    main()
