"""Config to and from Megatron-style flags and YAML recipes; refuses what cannot work, naming the flag to change."""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_pdmd.config import CommandLine, Config, FlatCommandLine, LaunchConfig
from megatron_pdmd.errors import parse_options


def load_recipe(path: Path) -> Config:
    """Reads a YAML recipe; what it leaves out keeps the default.

    Raises:
        ValueError: not readable, not YAML, an unknown section or key (the nearest known one is named), a wrong type.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ValueError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"--config {path}: expected sections such as 'training:', got {type(content).__name__}")
    return _from_mapping(Config, content, str(path))


def _from_mapping(cls: type, content: Mapping[str, Any], where: str) -> Any:
    hints, values = get_type_hints(cls), {}
    for key, value in content.items():
        if key not in hints:
            raise ValueError(f"{where}: unknown key '{key}'{_nearest(str(key), list(hints))}")
        at = f"{where}: {key}"
        if not dataclasses.is_dataclass(hints[key]):
            values[key] = _convert(value, hints[key], at)
        elif isinstance(value, Mapping):
            values[key] = _from_mapping(hints[key], value, at)
        else:
            raise ValueError(f"{at}: expected keys below it, got {value!r}")
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The YAML value as the field's type."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        if value is None:
            return None
        return _convert(value, next(option for option in options if option is not type(None)), where)
    if origin is tuple:
        parts = value if isinstance(value, list) else str(value).split(",")
        return tuple(_convert(part, options[0], where) for part in parts)
    if options:  # a Literal
        if value not in options:
            raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(str, options))}")
        return value
    if hint is bool and not isinstance(value, bool):
        raise ValueError(f"{where}: expected true or false, got {value!r}")
    refused = isinstance(value, bool) and hint is not bool
    try:
        converted = hint(value)
        refused = refused or (hint is int and converted != float(value))
    except (TypeError, ValueError, OverflowError):
        refused = True
    if refused:
        names = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
        raise ValueError(f"{where}: expected {names[hint]}, got {value!r}")
    return converted


def to_plain(config: Config) -> dict[str, Any]:
    """The whole config in lists, texts and numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """The whole config as a recipe that `load_recipe` reads back."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def parse_arguments(arguments: Sequence[str]) -> tuple[Config, LaunchConfig]:
    """`--config FILE` first, then the flags over it.

    Returns:
        The validated config, and what the launch is to do with it.

    Raises:
        ValueError: an unknown flag (the nearest known one is named), a bad value, options that cannot work together.
    """
    _refuse_unknown(arguments)
    recipe = _recipe_of(arguments)
    default = CommandLine(**{section.name: getattr(recipe, section.name) for section in dataclasses.fields(recipe)})
    line = parse_options(
        FlatCommandLine, "Phased DMD: distils a diffusion transformer phase by phase.", arguments, default
    )
    config = Config(**{section.name: getattr(line, section.name) for section in dataclasses.fields(Config)})
    validate(config)
    _check_launch(line.launch)
    return config, line.launch


def _recipe_of(arguments: Sequence[str]) -> Config:
    """The last `--config`, whose values are the defaults of all other flags."""
    recipe, rest = Config(), iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name == "--config":
            value = value or next(rest, "")
            if not value:
                raise ValueError("--config: name a YAML file")
            recipe = load_recipe(Path(value))
    return recipe


def _check_launch(launch: LaunchConfig) -> None:
    if launch.dry_run < 0:
        raise ValueError(f"--dry-run {launch.dry_run}: give the number of ranks to rehearse for")
    for flag, given in (("--dry-run-rank", launch.dry_run_rank), ("--json", launch.json)):
        if given and not launch.dry_run:
            raise ValueError(f"{flag}: belongs to --dry-run, which is not given; add --dry-run RANKS, or drop the flag")
    if launch.dry_run and not 0 <= launch.dry_run_rank < launch.dry_run:
        raise ValueError(f"--dry-run-rank {launch.dry_run_rank}: must lie in [0, {launch.dry_run})")


def _flags() -> list[str]:
    sections = [hint for hint in get_type_hints(CommandLine).values()]
    return ["--" + field.name.replace("_", "-") for section in sections for field in dataclasses.fields(section)]


def _refuse_unknown(flags: Sequence[str]) -> None:
    known = _flags()
    known += ["--no-" + flag[2:] for flag in known] + ["--help"]
    for argument in flags:
        name = argument.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise ValueError(f"unknown flag '{name}'{_nearest(name, known)}")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "; see --help"


def validate(config: Config) -> None:
    """Refuses what cannot work before anything is allocated; what needs the teacher's folder is checked with it.

    Raises:
        ValueError: one line that names the flag, what was wrong and what to do.
    """
    _check_signs(config)
    _check_phases(config)
    _check_ranges(config)
    _check_learning_rates(config)
    _check_combinations(config)
    if config.model.teacher is None:
        raise ValueError("--teacher: name the teacher's Hugging Face pipeline folder")
    if config.data.prompts is None:
        raise ValueError("--prompts: name a text file of prompts or a folder of encoded ones")
    if config.evaluation.task != "none" and config.evaluation.task_folder is None:
        raise ValueError(f"--task {config.evaluation.task}: --task-folder must name its classifier's folder")


def _check_signs(config: Config) -> None:
    method, training, optimizer = config.method, config.training, config.optimizer
    positive = {
        "--num-steps": method.num_steps,
        "--fake-updates": method.fake_updates,
        "--lora-rank": method.lora_rank,
        "--lora-alpha": method.lora_alpha,
        "--timestep-shift": method.timestep_shift,
        "--clamp-max": method.clamp_max,
        "--micro-batch-size": training.micro_batch_size,
        "--global-batch-size": training.global_batch_size,
        "--lr": optimizer.lr,
        "--fake-lr": optimizer.fake_lr,
        "--log-interval": config.logging.log_interval,
        "--prompt-length": config.data.prompt_length,
        "--frames": config.data.frames,
        "--height": config.data.height,
        "--width": config.data.width,
        "--eval-samples": config.evaluation.eval_samples,
        "--clips": config.evaluation.clips,
        "--teacher-steps": config.evaluation.teacher_steps,
        "--batch-size": config.evaluation.batch_size,
        "--distributed-timeout-minutes": config.parallel.distributed_timeout_minutes,
    }
    for flag, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{flag} {value}: must be greater than 0")
    not_negative = {
        "--fake-warmup": method.fake_warmup,
        "--phase": method.phase,
        "--save-interval": config.checkpoint.save_interval,
        "--save-interval-minutes": config.checkpoint.save_interval_minutes,
        "--keep-last": config.checkpoint.keep_last,
        "--seed": training.seed,
        "--exit-interval": training.exit_interval,
        "--max-skipped-updates": training.max_skipped_updates,
        "--exit-duration-in-mins": training.exit_duration_in_mins,
        "--sample-interval": config.logging.sample_interval,
        "--sample-prompts": config.logging.sample_prompts,
        "--eval-interval": config.evaluation.eval_interval,
        "--adam-eps": optimizer.adam_eps,
        "--weight-decay": optimizer.weight_decay,
        "--clip-grad": optimizer.clip_grad,
    }
    for flag, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{flag} {value}: must not be negative")


def _check_phases(config: Config) -> None:
    method, training = config.method, config.training
    phases = len(method.phase_steps)
    if any(steps < 1 for steps in method.phase_steps) or sum(method.phase_steps) != method.num_steps:
        steps = ",".join(map(str, method.phase_steps))
        raise ValueError(
            f"--phase-steps {steps}: {phases} positive numbers must add up to --num-steps {method.num_steps}"
        )
    if method.phase > phases:
        raise ValueError(f"--phase {method.phase}: --phase-steps names {phases} phases")
    if len(training.train_iters) not in (1, phases) or min(training.train_iters) < 1:
        raise ValueError(f"--train-iters: give one positive number, or one for each of the {phases} phases")
    if len(method.guidance_scale) not in (1, 2):
        raise ValueError("--guidance-scale: give one number, or two as low-noise,high-noise")


def _check_combinations(config: Config) -> None:
    parallel, checkpoint = config.parallel, config.checkpoint
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        raise ValueError(
            "--overlap-param-gather: only --use-distributed-optimizer gathers weights; add it, or drop the flag"
        )
    logging = config.logging
    for flag, given in (("--wandb-exp-name", logging.wandb_exp_name), ("--wandb-save-dir", logging.wandb_save_dir)):
        if given and not logging.wandb_project:
            raise ValueError(f"{flag} {given}: nothing goes to wandb without --wandb-project; add it, or drop the flag")
    for flag, given in (("--finetune", checkpoint.finetune), ("--no-load-optim", not checkpoint.load_optim)):
        if given and checkpoint.load is None:
            raise ValueError(f"{flag}: says what to take from --load, which is not given; name a run's folder there")


def _check_learning_rates(config: Config) -> None:
    """Refuses what megatron-core's schedule would only meet when a phase begins."""
    optimizer, shortest = config.optimizer, min(config.training.train_iters)
    for prefix in ("", "fake_"):
        names = ("lr", "min_lr", "lr_warmup_init", "lr_warmup_iters", "lr_decay_iters")
        lr, lowest, first, warmup, decay = (getattr(optimizer, prefix + name) for name in names)
        flag = f"--{prefix.replace('_', '-')}"
        for name, value in (("min-lr", lowest), ("lr-warmup-init", first)):
            if not 0 <= value <= lr:
                raise ValueError(f"{flag}{name} {value}: must lie between 0 and {flag}lr {lr}")
        for name, value in (("lr-warmup-iters", warmup), ("lr-decay-iters", decay)):
            if value < 0:
                raise ValueError(f"{flag}{name} {value}: must not be negative")
        if warmup and warmup >= (decay or shortest):
            until = f"{flag}lr-decay-iters {decay}" if decay else f"a phase's --train-iters {shortest}"
            raise ValueError(f"{flag}lr-warmup-iters {warmup}: must be less than {until}")
    if config.method.fake_warmup and optimizer.fake_lr_warmup_iters and not optimizer.fake_lr_warmup_init:
        raise ValueError(
            f"--fake-lr-warmup-iters {optimizer.fake_lr_warmup_iters}: the rate of the first iteration, with all "
            "updates of --fake-warmup, would be 0; give --fake-lr-warmup-init, or drop one of them"
        )


def _check_ranges(config: Config) -> None:
    method, training, optimizer = config.method, config.training, config.optimizer
    if not 0 <= method.ema_decay < 1:
        raise ValueError(f"--ema-decay {method.ema_decay}: must lie in [0, 1)")
    if method.ema_decay and method.generator == "full" and training.bf16:
        raise ValueError(
            "--ema-decay with --generator full and --bf16: bf16 is too coarse for an average; drop one of them"
        )
    if not 0 < method.fixed_timestep < 1:
        raise ValueError(f"--fixed-timestep {method.fixed_timestep}: must lie in (0, 1)")
    if not 0 <= method.timestep_margin < 0.5:
        raise ValueError(f"--timestep-margin {method.timestep_margin}: must lie in [0, 0.5)")
    if not (0 <= optimizer.adam_beta1 < 1 and 0 <= optimizer.adam_beta2 < 1):
        raise ValueError("--adam-beta1, --adam-beta2: must lie in [0, 1)")
