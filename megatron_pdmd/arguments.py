"""Config to and from Megatron-style flags and YAML recipes; refuses what cannot work, naming the flag to change."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from megatron_pdmd.config import CommandLine, Config, FlatCommandLine, LaunchConfig
from megatron_pdmd.errors import parse_options
from megatron_pdmd.files.documents import read_yaml
from megatron_pdmd.limits import check_limits, shown
from megatron_pdmd.options import convert, nearest

PROJECT = Path(__file__).resolve().parents[1]


def load_recipe(path: Path) -> Config:
    """Reads a YAML recipe; what it leaves out keeps the default, and an empty one is the defaults.

    Raises:
        ValueError: not readable, not YAML, an unknown section or key (the nearest known one is named), a wrong type.
    """
    content = read_yaml(path)
    if content is None:
        return Config()
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected sections such as 'training:', got {type(content).__name__}")
    return _from_mapping(Config, content, str(path))


def _from_mapping(cls: type, content: dict[Any, Any], where: str) -> Any:
    hints, values = get_type_hints(cls, include_extras=True), {}
    for key, value in content.items():
        if key not in hints:
            raise ValueError(f"{where}: unknown key '{shown(key)}'{nearest(str(key), list(hints))}")
        at = f"{where}: {key}"
        if not dataclasses.is_dataclass(hints[key]):
            values[key] = convert(value, hints[key], at)
        elif isinstance(value, dict):
            values[key] = _from_mapping(hints[key], value, at)
        else:
            raise ValueError(f"{at}: expected keys below it, got {'nothing' if value is None else shown(repr(value))}")
    return cls(**values)


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
    recipe = _recipe_of(arguments)
    default = CommandLine(**{section.name: getattr(recipe, section.name) for section in dataclasses.fields(recipe)})
    line = parse_options(
        FlatCommandLine, "Phased DMD: distils a diffusion transformer phase by phase.", arguments, default
    )
    config = Config(**{section.name: getattr(line, section.name) for section in dataclasses.fields(Config)})
    check_limits(line.launch)
    validate(config)
    _check_launch(line.launch)
    return config, line.launch


def _recipe_of(arguments: Sequence[str]) -> Config:
    """The last `--config`, whose values are the defaults of all other flags."""
    recipe, rest = Config(), iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--config":
            value = value if equals else next(rest, "")
            if not value:
                raise ValueError("--config: name a YAML file")
            try:
                recipe = from_here(load_recipe(Path(value)), Path(value))
            except ValueError as error:
                raise ValueError(f"--config {error}") from None
    return recipe


def from_here(recipe: Config, path: Path) -> Config:
    """A recipe whose paths can be used where the user stands.

    Relative paths are taken from there, in flags and recipes alike, but for the project's own recipes: theirs are taken
    from the project's folder, so that each works wherever it is named.

    Args:
        recipe: what `path` holds.
        path: the file.
    """
    own = path.absolute().resolve().parent == PROJECT / "examples" / "recipes"
    if not own or Path.cwd() == PROJECT:
        return recipe

    def moved(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            parts = {field.name: moved(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **parts)
        return PROJECT / value if isinstance(value, Path) else value

    return moved(recipe)


def _check_launch(launch: LaunchConfig) -> None:
    for flag, given in (("--dry-run-rank", launch.dry_run_rank), ("--json", launch.json)):
        if given and not launch.dry_run:
            raise ValueError(f"{flag}: belongs to --dry-run, which is not given; add --dry-run RANKS, or drop the flag")
    if launch.dry_run and not 0 <= launch.dry_run_rank < launch.dry_run:
        raise ValueError(f"--dry-run-rank {launch.dry_run_rank}: must lie in [0, {launch.dry_run})")


def validate(config: Config) -> None:
    """Refuses what cannot work before anything is allocated; what needs the teacher's folder is checked with it.

    Raises:
        ValueError: one line that names the flag, what was wrong and what to do.
    """
    check_limits(config)
    _check_phases(config)
    _check_average(config)
    _check_learning_rates(config)
    _check_combinations(config)
    if config.model.teacher is None:
        raise ValueError("--teacher: name the teacher's Hugging Face pipeline folder")
    if config.data.prompts is None:
        raise ValueError("--prompts: name a text file of prompts or a folder of encoded ones")
    if config.evaluation.task != "none" and config.evaluation.task_folder is None:
        raise ValueError(f"--task {config.evaluation.task}: --task-folder must name its classifier's folder")


def _check_phases(config: Config) -> None:
    method, training = config.method, config.training
    phases = len(method.phase_steps)
    if sum(method.phase_steps) != method.num_steps:
        steps = shown(",".join(map(str, method.phase_steps)))
        raise ValueError(
            f"--phase-steps {steps}: {phases} positive numbers must add up to --num-steps {method.num_steps}"
        )
    if method.phase > phases:
        raise ValueError(f"--phase {method.phase}: --phase-steps names {phases} phases")
    if len(training.train_iters) not in (1, phases):
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
        if warmup and warmup >= (decay or shortest):
            until = f"{flag}lr-decay-iters {decay}" if decay else f"a phase's --train-iters {shortest}"
            raise ValueError(f"{flag}lr-warmup-iters {warmup}: must be less than {until}")
    if config.method.fake_warmup and optimizer.fake_lr_warmup_iters and not optimizer.fake_lr_warmup_init:
        raise ValueError(
            f"--fake-lr-warmup-iters {optimizer.fake_lr_warmup_iters}: the rate of the first iteration, with all "
            "updates of --fake-warmup, would be 0; give --fake-lr-warmup-init, or drop one of them"
        )


def _check_average(config: Config) -> None:
    if config.method.ema_decay and config.method.generator == "full" and config.training.bf16:
        raise ValueError(
            "--ema-decay with --generator full and --bf16: bf16 is too coarse for an average; drop one of them"
        )
