"""A run's folder: whose run it is, and whether a launch may continue it."""

from dataclasses import fields, is_dataclass
from typing import Any

from megatron_pdmd.arguments import load_recipe, to_yaml
from megatron_pdmd.config import Config
from megatron_pdmd.data.run_prompts import FOLDER as PROMPTS_FOLDER

# A resumed run may change these: they say how it is run, watched or prolonged, not what is computed.
FREE_SECTIONS = frozenset({"parallel", "checkpoint", "logging", "evaluation"})
FREE_FIELDS = frozenset(
    {"attention_backend", "kernel_backend", "recompute_granularity", "phase", "train_iters", "micro_batch_size"}
    | {"exit_duration_in_mins", "exit_interval", "exit_signal_handler"}
)


def differing_fields(ours: Any, theirs: Any, free_sections: frozenset[str] = FREE_SECTIONS) -> list[str]:
    """What two configurations compute differently, as `--flag ours, theirs in the run`."""
    found = []
    for field in fields(ours):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        if is_dataclass(one):
            found += [] if field.name in free_sections else differing_fields(one, other)
        elif field.name not in FREE_FIELDS and one != other:
            found.append(f"--{field.name.replace('_', '-')} is {_shown(one)} here, {_shown(other)} there")
    return found


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_run_folder(config: Config) -> None:
    """Refuses a folder that holds something else than this run.

    Raises:
        ValueError: another run's configuration, a folder of other things, or `--load` of a folder without a run.
    """
    save, load = config.checkpoint.save, config.checkpoint.load
    if save.exists() and not save.is_dir():
        raise ValueError(f"--save {save}: is a file; name a folder")
    for flag, folder in (("--load", load), ("--save", save)):
        if folder is None:
            continue
        recipe = folder / "config.yaml"
        if recipe.exists():
            if flag == "--load" and config.checkpoint.finetune:
                continue
            free = FREE_SECTIONS if flag == "--save" or config.checkpoint.load_optim else FREE_SECTIONS | {"optimizer"}
            differences = differing_fields(config, load_recipe(recipe), free)
            if differences:
                mend = "choose another folder or the run's own options"
                raise ValueError(f"{flag} {folder}: holds another run: {'; '.join(differences)}; {mend}")
        elif flag == "--load":
            raise ValueError(f"--load {folder}: no run there (config.yaml is missing)")
        elif folder.exists() and any(path.name != PROMPTS_FOLDER for path in folder.iterdir()):
            raise ValueError(f"--save {folder}: not empty and not a run's folder; choose another")


def claim_run_folder(config: Config) -> None:
    """Creates the folder and writes the resolved configuration. Call it on one rank, after `check_run_folder`."""
    config.checkpoint.save.mkdir(parents=True, exist_ok=True)
    (config.checkpoint.save / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
