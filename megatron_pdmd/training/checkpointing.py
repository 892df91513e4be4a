"""Checkpoints in Megatron's layout: `iter_0000100/` folders and `latest_checkpointed_iteration.txt`.

A checkpoint holds every role's weights and optimizer state as tensors in torch_dist format, which any layout of ranks
reads, and `metadata.json`, the versioned manifest with everything else, written last. A bf16 weight with an fp32 master
is held as that master. It is written under another name and renamed, so a crash leaves the last good one.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from megatron_pdmd.errors import require_space
from megatron_pdmd.parallel.agreement import together
from megatron_pdmd.parallel.patience import new_patient_group
from megatron_pdmd.parallel.topology import current_topology
from megatron_pdmd.training.interval import Sums
from megatron_pdmd.training.sharded_state import Shard, with_prefix
from megatron_pdmd.training.torch_dist import read_index, read_shards, write_shards

FORMAT_VERSION = 3
TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "metadata.json"
_REPLACED = ".replaced"

States = Mapping[str, Mapping[str, Shard]]


class CheckpointError(ValueError):
    """A checkpoint cannot be used."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        iteration: generator updates done in the whole run.
        phase: 1-based phase that the next iteration belongs to (or the last one, when it is done).
        phase_iteration: generator updates done in that phase.
        consumed_samples: samples that generator updates have used; where the run is in its data.
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
class Manifest:
    """What a checkpoint knows besides its tensors. With `Progress`, the seed is the whole state of the random counter.

    Attributes:
        progress: how far the run was.
        optimizer_steps: updates that each optimizer has made.
        seed: of the random counter.
        models: the network's shape for each of the teacher's experts, by the config's fields.
        layout: ranks along each axis that wrote it; for the reader's information.
        open_updates: what was to be logged of each fake update that was done of an unfinished iteration.
        log_interval_sums: what the next log entry's means have summed up; see `training.interval`.
    """

    progress: Progress
    optimizer_steps: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    layout: dict[str, int] = field(default_factory=dict)
    open_updates: list[dict[str, float]] = field(default_factory=list)
    log_interval_sums: Sums = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest and index have been read and whose files are all there.

    Attributes:
        folder: where it is.
        manifest: what it knows besides its tensors.
        index: its tensors.
    """

    folder: Path
    manifest: Manifest
    index: Metadata

    @property
    def progress(self) -> Progress:
        """How far the run was."""
        return self.manifest.progress

    @property
    def states(self) -> frozenset[str]:
        """Names of the states it holds: `generator_phase_1`, `fake_score_low_noise_optimizer` ..."""
        return frozenset(name.partition(".")[0] for name in self.index.state_dict_metadata)

    def shapes(self, state: str) -> dict[str, tuple[int, ...]]:
        """Names and whole shapes of a state's tensors."""
        found = self.index.state_dict_metadata.items()
        return {name.partition(".")[2]: tuple(e.size) for name, e in found if name.partition(".")[0] == state}

    def read(self, state: str, shards: Mapping[str, Shard]) -> None:
        """Fills this rank's parts of one state. All ranks call it, and all fail if one does.

        Raises:
            CheckpointError: the state is not in this checkpoint, differs in a name or a shape (then nothing was read),
                or is damaged.
        """
        with together():
            self._check(state, shards)
            try:
                read_shards(self.folder, self.index, with_prefix(state, shards))
            except ValueError as error:
                raise CheckpointError(str(error)) from None

    def _check(self, state: str, shards: Mapping[str, Shard]) -> None:
        saved = self.shapes(state)
        mend = "it was saved by another configuration"
        if not saved and shards:
            raise CheckpointError(f"{self.folder}: has no {state}; {mend}")
        if saved.keys() != shards.keys():
            name = sorted(saved.keys() ^ shards.keys())[0]
            raise CheckpointError(f"{self.folder}: {state}: '{name}' is on one side only; {mend}")
        for name, shard in shards.items():
            if saved[name] != shard.shape:
                shapes = f"{list(saved[name])} saved, {list(shard.shape)} needed"
                raise CheckpointError(f"{self.folder}: {state}: '{name}' differs in shape ({shapes}); {mend}")


class CheckpointWriter:
    """Writes a run's checkpoints; made and called on all ranks.

    Args:
        folder: the run's checkpoints folder.
        keep_last: older checkpoints beyond so many are removed, later ones never; 0 keeps all.
        asynchronous: `save` copies to CPU memory and returns; a thread writes. One checkpoint at most is on its way.
    """

    def __init__(self, folder: Path, *, keep_last: int = 0, asynchronous: bool = False):
        self._folder = folder
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        # Its own, so that a thread may talk in it while training talks in the others.
        self._group = new_patient_group()
        self._device = current_topology().device
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, manifest: Manifest, states: States) -> None:
        """Writes one checkpoint and points the tracker at it, now or in the background.

        Args:
            manifest: written as it is.
            states: this rank's parts of each state's tensors.

        Raises:
            NoSpaceError: no room on the disk; nothing was written.
            Exception: what writing this checkpoint met, or, asynchronously, the one before.
        """
        self.wait()
        shards = {name: shard for state, own in states.items() for name, shard in with_prefix(state, own).items()}
        self._make_room(manifest.progress, sum(shard.written_bytes for shard in shards.values()))
        if not self._asynchronous:
            self._write(manifest, shards)
            return
        staged = {name: shard.staged() for name, shard in shards.items() if shard.written}
        self._thread = threading.Thread(target=self._write_in_background, args=(manifest, staged), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when no checkpoint is on its way.

        Raises:
            Exception: what writing it met.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits, and frees the process group."""
        try:
            self.wait()
            dist.barrier(self._group)  # a rank that left before the others had met it would look like one that died
        finally:
            dist.destroy_process_group(self._group)

    def _make_room(self, progress: Progress, own_bytes: int) -> None:
        """Checks the disk of each node and makes the folder to write to."""
        sizes: list[int] = [0] * dist.get_world_size(self._group)
        dist.all_gather_object(sizes, own_bytes, group=self._group)
        with together(self._group):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                require_space(self._folder, sum(sizes), "--save")
        with together(self._group):
            if dist.get_rank(self._group) == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                replaced = [old for old in self._folder.glob(f"iter_*{_REPLACED}") if old.with_suffix("").exists()]
                for leftover in [*self._folder.glob("iter_*.partial"), *replaced]:
                    shutil.rmtree(leftover)
                self._partial(progress).mkdir()

    def _partial(self, progress: Progress) -> Path:
        return self._folder / f"{checkpoint_name(progress.iteration)}.partial"

    def _write_in_background(self, manifest: Manifest, shards: Mapping[str, Shard]) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread is on the node's first, for all ranks
            self._write(manifest, shards)
        except BaseException as error:  # told to the main thread by `wait`
            self._error = error

    def _write(self, manifest: Manifest, shards: Mapping[str, Shard]) -> None:
        partial = self._partial(manifest.progress)
        write_shards(partial, shards, self._group)
        with together(self._group):
            if dist.get_rank(self._group) == 0:
                self._finish(partial, manifest)

    def _finish(self, partial: Path, manifest: Manifest) -> None:
        """Makes a folder whose tensors are written the run's last checkpoint, and removes old ones."""
        finished = partial.with_suffix("")
        content = {"format_version": FORMAT_VERSION, "ckpt_format": "torch_dist"} | asdict(manifest)
        (partial / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
        _sync(partial / MANIFEST, partial)
        if finished.exists():  # an iteration that was open was saved before, after fewer of its updates
            finished.rename(finished.with_suffix(_REPLACED))
        partial.rename(finished)
        tracker = self._folder / f"{TRACKER}.partial"
        tracker.write_text(f"{manifest.progress.iteration}\n")
        _sync(tracker)
        tracker.replace(self._folder / TRACKER)
        _sync(self._folder)
        for replaced in self._folder.glob(f"iter_*{_REPLACED}"):
            shutil.rmtree(replaced)
        if self._keep_last:
            saved = sorted(path for path in self._folder.glob("iter_" + "[0-9]" * 7) if path.name <= finished.name)
            for old in saved[: -self._keep_last]:
                shutil.rmtree(old)


def checkpoint_name(iteration: int) -> str:
    """Megatron's folder name of an iteration."""
    return f"iter_{iteration:07d}"


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
    replaced = checkpoint.with_suffix(_REPLACED)
    if replaced.exists() and not checkpoint.exists():  # a crash came between two renames
        checkpoint = replaced
    manifest = _read_manifest(checkpoint)
    return Checkpoint(checkpoint, manifest, read_index(checkpoint))


def check_models(checkpoint: Checkpoint, models: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a checkpoint of another network.

    Args:
        checkpoint: to be continued.
        models: the network's shape for each of the teacher's experts, as in the manifest.

    Raises:
        CheckpointError: names what differs.
    """
    saved, here = checkpoint.manifest.models, json.loads(json.dumps(models))
    if saved.keys() != here.keys():
        experts = f"experts {', '.join(sorted(saved))}, this teacher {', '.join(sorted(here))}"
        raise CheckpointError(f"{checkpoint.folder}: was saved of a teacher with {experts}; give that --teacher")
    for expert, shape in here.items():
        for name in sorted(shape.keys() | saved[expert].keys()):
            one, other = shape.get(name), saved[expert].get(name)
            if one != other:
                raise CheckpointError(
                    f"{checkpoint.folder}: was saved of another model: {name} of {expert} is {other} there, {one} in "
                    "--teacher; give that teacher"
                )


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_manifest(checkpoint: Path) -> Manifest:
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
    if version != FORMAT_VERSION or not _is_manifest(content):
        raise ValueError(f"{path}: not a checkpoint's manifest; resume from another checkpoint")
    names = ("optimizer_steps", "seed", "models", "layout", "open_updates", "log_interval_sums")
    return Manifest(progress=Progress(**content["progress"]), **{name: content[name] for name in names})


def _is_manifest(content: dict[str, Any]) -> bool:
    progress, types = content.get("progress"), {one.name: one.type for one in fields(Progress)}
    names = ("optimizer_steps", "models", "layout", "open_updates", "log_interval_sums")
    steps, models, layout, updates, sums = (content.get(name) for name in names)
    return (
        isinstance(progress, dict)
        and {name: type(value) for name, value in progress.items()} == types
        and type(content.get("seed")) is int
        and isinstance(steps, dict)
        and all(type(count) is int and count >= 0 for count in steps.values())
        and isinstance(models, dict)
        and all(isinstance(shape, dict) for shape in models.values())
        and isinstance(layout, dict)
        and isinstance(updates, list)
        and all(isinstance(update, dict) for update in updates)
        and all(type(number) in (int, float) for update in updates for number in update.values())
        and isinstance(sums, dict)
        and all(isinstance(pair, list) and [type(x) for x in pair] == [float, float] for pair in sums.values())
    )
