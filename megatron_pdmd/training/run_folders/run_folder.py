"""A run's folder: whose run it is, whether a launch may continue it, and that a failed start leaves no trace in it."""

import contextlib
import os
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from megatron_pdmd.arguments import load_recipe, to_yaml
from megatron_pdmd.config import Config
from megatron_pdmd.files.whole import check_writable, write_text
from megatron_pdmd.training.checkpoints.manifest import MANIFEST
from megatron_pdmd.training.run_folders.fingerprints import Fingerprints
from megatron_pdmd.training.run_folders.run_lock import LOCK, RunLock

RECIPE = "config.yaml"

# A resumed run may change these: they say how it is run, watched or prolonged, not what is computed.
FREE_SECTIONS = frozenset({"parallel", "checkpoint", "logging", "evaluation"})
FREE_FIELDS = frozenset(
    {"attention_backend", "kernel_backend", "recompute_granularity", "phase", "train_iters", "micro_batch_size"}
    | {"exit_duration_in_mins", "exit_interval", "exit_signal_handler", "max_skipped_updates"}
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


def check_run_folder(config: Config, inputs: Fingerprints | None = None) -> list[str]:
    """Refuses a folder that holds something else than this run, or where nothing can be written.

    Args:
        config: names `--save` and `--load`.
        inputs: digests of the run's teacher and prompts; without them their paths are compared.

    Returns:
        What to tell of it, in lines.

    Raises:
        ValueError: another run's configuration or inputs, a folder of other things, `--load` of a folder without a run,
            or nothing can be written there.
    """
    save, load = config.checkpoint.save, config.checkpoint.load
    check_writable(save, "--save")
    for above in (save.absolute(), *save.absolute().parents):
        if (above / MANIFEST).is_file() or (above.name == "checkpoints" and (above.parent / RECIPE).is_file()):
            raise ValueError(f"--save {save}: lies among the checkpoints of a run; name another folder")
    told = []
    if load is not None:
        if not os.path.isfile(load / RECIPE):  # false, too, where a path cannot be one
            raise ValueError(f"--load {load}: no run there ({RECIPE} is missing)")
        if not config.checkpoint.finetune:
            free = FREE_SECTIONS if config.checkpoint.load_optim else FREE_SECTIONS | {"optimizer"}
            told += _compare("--load", load, config, inputs, free)
    if (save / RECIPE).exists():
        told += _compare("--save", save, config, inputs, FREE_SECTIONS)
    elif save.exists() and any(save.iterdir()) and not (save / LOCK).exists():  # which a start that was killed leaves
        raise ValueError(f"--save {save}: not empty and not a run's folder; choose another")
    return told


def _compare(
    flag: str, folder: Path, config: Config, inputs: Fingerprints | None, free_sections: frozenset[str]
) -> list[str]:
    """Compares the run in a folder with this one: inputs by what they contain, where that is known of both.

    Returns:
        What to tell of it.

    Raises:
        ValueError: they differ, or the folder's files are damaged.
    """
    theirs, began_with = load_recipe(folder / RECIPE), Fingerprints.read(folder)
    told, differences = [], []
    if inputs and began_with:
        differences = inputs.differences(began_with)
        theirs = replace(
            theirs,
            model=replace(theirs.model, teacher=config.model.teacher),
            data=replace(theirs.data, prompts=config.data.prompts),
        )
    elif inputs:
        told = [f"{flag} {folder}: has no digests of its teacher and prompts; whether they changed is not known"]
    differences += differing_fields(config, theirs, free_sections)
    if differences:
        mend = "choose another folder or the run's own options"
        raise ValueError(f"{flag} {folder}: holds another run: {'; '.join(differences)}; {mend}")
    return told


def claim_run_folder(config: Config, inputs: Fingerprints | None = None) -> None:
    """Makes the folder this run's, by its resolved configuration. Call it on one rank, after `check_run_folder`.

    Args:
        config: of the run.
        inputs: digests of its teacher and prompts.
    """
    folder = config.checkpoint.save
    folder.mkdir(parents=True, exist_ok=True)
    if inputs:
        inputs.write(folder)
    write_text(folder / RECIPE, to_yaml(config))


class RunFolder:
    """A run's folder in the hands of one launch, from its start to its end; made on one rank.

    What a start that fails has made in it, and the folder itself, are gone when it is let go.

    Attributes:
        remark: what to tell of it, if anything.
    """

    def __init__(self, path: Path):
        """Makes the folder and locks it.

        Raises:
            ValueError: another launch has it.
        """
        self._path, self._lock = path, RunLock(path)
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        try:
            self.remark = self._lock.acquire()
        except BaseException:
            self._remove_made()
            raise
        self._found = None if (path / RECIPE).exists() else set(path.iterdir())

    def release(self) -> None:
        """Lets the folder go. Where no run has claimed it, what came into it since is removed."""
        unclaimed = not (self._path / RECIPE).exists()
        if unclaimed and self._found is not None:
            for path in set(self._path.iterdir()) - self._found:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        self._lock.release()
        if unclaimed:
            self._remove_made()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # one that is not empty stays, with all above it
            for folder in self._made:
                folder.rmdir()
