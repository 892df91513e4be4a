"""Checkpoints in Megatron's layout: `iter_0000100/` folders and `latest_checkpointed_iteration.txt`, as safetensors.

A checkpoint is one file of tensors for each role's state, and `metadata.json`, the versioned manifest, written last.
It is written under another name and renamed, so a crash leaves the last good one; nothing in it is ever unpickled.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_pdmd.conversion.weight_files import read_header
from megatron_pdmd.errors import require_space

FORMAT_VERSION = 1
TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "metadata.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        iteration: generator updates done in the whole run.
        phase: 1-based phase that the next iteration belongs to (or the last one, when it is done).
        phase_iteration: generator updates done in that phase.
        consumed_samples: samples that generator updates have used.
        skipped_updates: updates left out because a loss or a gradient norm was not finite.
        train_seconds: wall time of training in all launches: iterations, sample sheets, checkpoints.
    """

    iteration: int = 0
    phase: int = 1
    phase_iteration: int = 0
    consumed_samples: int = 0
    skipped_updates: int = 0
    train_seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest has been read and whose files are all there."""

    folder: Path
    progress: Progress
    files: tuple[str, ...]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one file of the checkpoint.

        Raises:
            ValueError: the file is not part of this checkpoint, or damaged.
        """
        path = self.folder / f"{name}.safetensors"
        if name not in self.files:
            raise ValueError(f"{self.folder}: has no {path.name}; it was saved by another configuration")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged or truncated ({error}); resume from another checkpoint") from None


def checkpoint_name(iteration: int) -> str:
    """Megatron's folder name of an iteration."""
    return f"iter_{iteration:07d}"


def save_checkpoint(
    folder: Path, progress: Progress, states: Mapping[str, Mapping[str, torch.Tensor]], keep_last: int = 0
) -> Path:
    """Writes one checkpoint and points the tracker at it. Call it on one rank.

    Args:
        folder: the run's checkpoints folder.
        progress: written to the manifest.
        states: tensors of each file, by the file's name without suffix.
        keep_last: older checkpoints beyond so many are removed, later ones never; 0 keeps all.

    Returns:
        The finished checkpoint's folder.

    Raises:
        ValueError: no room on the disk; nothing was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(t.numel() * t.element_size() for state in states.values() for t in state.values())
    require_space(folder, needed, "--save")
    finished = folder / checkpoint_name(progress.iteration)
    partial = finished.with_suffix(".partial")
    for unfinished in folder.glob("iter_*.partial"):
        shutil.rmtree(unfinished)
    partial.mkdir()
    for name, state in states.items():
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, partial / f"{name}.safetensors"
        )
    manifest = {"format_version": FORMAT_VERSION, "progress": asdict(progress), "files": sorted(states)}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _sync(*partial.iterdir(), partial)
    if finished.exists():
        shutil.rmtree(finished)
    partial.rename(finished)
    tracker = folder / f"{TRACKER}.partial"
    tracker.write_text(f"{progress.iteration}\n")
    _sync(tracker)
    tracker.replace(folder / TRACKER)
    _sync(folder)
    if keep_last:
        saved = sorted(path for path in folder.glob("iter_" + "[0-9]" * 7) if path.name <= finished.name)
        for old in saved[:-keep_last]:
            shutil.rmtree(old)
    return finished


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint that the tracker names, or None where there is none yet.

    Raises:
        ValueError: the tracker, the manifest or a file is missing, damaged or of another version.
    """
    tracker = folder / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(errors="replace").strip()
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"{tracker}: expected an iteration number, got '{text[:40]}'")
    checkpoint = folder / checkpoint_name(int(text))
    progress, files = _read_manifest(checkpoint)
    for name in files:
        if Path(name).name != name or not (checkpoint / f"{name}.safetensors").is_file():
            raise ValueError(f"{checkpoint}: {name}.safetensors is missing; resume from another checkpoint")
        read_header(checkpoint / f"{name}.safetensors")
    return Checkpoint(checkpoint, progress, files)


def _read_manifest(checkpoint: Path) -> tuple[Progress, tuple[str, ...]]:
    path = checkpoint / MANIFEST
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{checkpoint}: named by {TRACKER} but incomplete; point the tracker at another one") from None
    except ValueError:
        content = None
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise ValueError(f"{checkpoint}: format version {version}; this program reads version {FORMAT_VERSION}")
    progress, files = (content.get("progress"), content.get("files")) if version == FORMAT_VERSION else (None, None)
    types = {field.name: field.type for field in fields(Progress)}
    if not (
        isinstance(progress, dict)
        and {name: type(value) for name, value in progress.items()} == types
        and isinstance(files, list)
        and all(isinstance(name, str) for name in files)
    ):
        raise ValueError(f"{path}: not a checkpoint's manifest; resume from another checkpoint")
    return Progress(**progress), tuple(files)
