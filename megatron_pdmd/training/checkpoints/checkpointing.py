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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from megatron_pdmd.errors import require_space
from megatron_pdmd.files.whole import synchronise, write_text
from megatron_pdmd.parallel.agreement import together
from megatron_pdmd.parallel.patience import new_patient_group
from megatron_pdmd.parallel.pipeline.relay import Relay
from megatron_pdmd.parallel.topology import current_topology, existing_topology
from megatron_pdmd.training.checkpoints.manifest import CheckpointError, Manifest, Progress, checkpoint_name
from megatron_pdmd.training.checkpoints.sharded_state import Shard, with_prefix
from megatron_pdmd.training.checkpoints.torch_dist import read_index, read_shards, write_shards
from megatron_pdmd.training.not_finite import NotFiniteError, first_of_ranks, first_shard_not_finite

TRACKER = "latest_checkpointed_iteration.txt"
_REPLACED = ".replaced"
_FOLDER = re.compile("iter_[0-9]{7,18}", re.ASCII)

States = Mapping[str, Mapping[str, Shard]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest and index have been read and whose files are all there.

    Attributes:
        folder: where it is.
        manifest: what it knows besides its tensors.
        index: its tensors.
        remark: what to tell of how it was found, if anything.
    """

    folder: Path
    manifest: Manifest
    index: Metadata
    remark: str = ""

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

        What the pipeline's stages hold of the state is all of it together.

        Raises:
            CheckpointError: the state is not in this checkpoint, differs in a name or a shape (then nothing was read),
                or is damaged, or not finite.
        """
        stages = Relay.of(existing_topology()).words_of_all({name: shard.shape for name, shard in shards.items()})
        needed = {name: shape for stage in stages for name, shape in stage.items()}
        with together():
            self._check(state, needed)
            self._read(state, shards)

    def check_readable(self, state: str) -> None:
        """Refuses a state whose tensors are damaged or not finite, and keeps none. Ranks share the work; all call it.

        Raises:
            CheckpointError: see `read`.
        """
        tensors = sorted(self.shapes(state).items())[dist.get_rank() :: dist.get_world_size()]
        with together():
            for name, shape in tensors:
                dtype = self.index.state_dict_metadata[f"{state}.{name}"].properties.dtype
                self._read(state, {name: Shard.of(torch.empty(shape, dtype=dtype))})

    def _read(self, state: str, shards: Mapping[str, Shard]) -> None:
        try:
            read_shards(self.folder, self.index, with_prefix(state, shards))
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if name := first_shard_not_finite(shards):
            raise CheckpointError(f"{self.folder}: {state}: '{name}' is not finite; go on from another checkpoint")

    def _check(self, state: str, needed: Mapping[str, tuple[int, ...]]) -> None:
        saved = self.shapes(state)
        mend = "it was saved by another configuration"
        if not saved and needed:
            raise CheckpointError(f"{self.folder}: has no {state}; {mend}")
        if saved.keys() != needed.keys():
            name = sorted(saved.keys() ^ needed.keys())[0]
            raise CheckpointError(f"{self.folder}: {state}: '{name}' is on one side only; {mend}")
        for name, shape in needed.items():
            if saved[name] != shape:
                shapes = f"{list(saved[name])} saved, {list(shape)} needed"
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
            NotFiniteError: a number is not finite; nothing was written.
            Exception: what writing this checkpoint met, or, asynchronously, the one before.
        """
        self.wait()
        shards = {name: shard for state, own in states.items() for name, shard in with_prefix(state, own).items()}
        if found := first_of_ranks(first_shard_not_finite(shards), self._group):
            raise NotFiniteError(f"iteration {manifest.progress.iteration}: not saved, for {found} is not finite")
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
        manifest.write(partial)
        synchronise(partial)
        if finished.exists():  # an iteration that was open was saved before, after fewer of its updates
            finished.rename(finished.with_suffix(_REPLACED))
        partial.rename(finished)
        write_text(self._folder / TRACKER, f"{manifest.progress.iteration}\n")
        synchronise(self._folder)
        for replaced in self._folder.glob(f"iter_*{_REPLACED}"):
            shutil.rmtree(replaced)
        if self._keep_last:
            saved = [path for path in saved_folders(self._folder) if _number(path) <= manifest.progress.iteration]
            for old in saved[self._keep_last :]:
                shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint that the tracker names, or None where there is none yet.

    Where the tracker is missing or damaged it is the newest whole one, and its `remark` says so. Where the one that it
    names is not whole, none is taken in its stead: that would repeat training which the user believes to have.

    Raises:
        ValueError: a manifest or a file is missing, damaged or of another version.
    """
    tracker = folder / TRACKER
    text = tracker.read_bytes()[:40].decode(errors="replace").strip() if tracker.is_file() else None
    if text is None or not re.fullmatch("[0-9]{1,18}", text, re.ASCII):
        return _found_again(folder, "missing" if text is None else f"damaged ({text!r} is no iteration)")
    named = folder / checkpoint_name(int(text))
    replaced = named.with_suffix(_REPLACED)
    if replaced.exists() and not named.exists():  # a crash came between two renames
        named = replaced
    try:
        return _read(named)
    except ValueError as error:
        older = next((found for found in _whole_ones(folder) if found.progress.iteration < int(text)), None)
        if older is None:
            raise
        number = older.progress.iteration
        mend = f"{older.folder.name} is whole: write {number} into {tracker} to go on from there"
        raise CheckpointError(f"{str(error).rpartition(';')[0]}; {mend}") from None


def saved_folders(folder: Path) -> list[Path]:
    """Folders of a run's checkpoints, whole or not, the newest first."""
    found = [path for path in folder.glob("iter_*") if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=_number, reverse=True)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iter_").removesuffix(_REPLACED))


def _read(checkpoint: Path) -> Checkpoint:
    """Reads the manifest and the index.

    Raises:
        ValueError: one is missing or damaged, or a file of tensors is.
    """
    return Checkpoint(checkpoint, Manifest.read(checkpoint), read_index(checkpoint))


def _whole_ones(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints of a run that can be used, the newest first."""
    replaced = [path for path in folder.glob(f"iter_*{_REPLACED}") if _FOLDER.fullmatch(path.with_suffix("").name)]
    alone = [path for path in replaced if not path.with_suffix("").exists()]
    for path in sorted([*saved_folders(folder), *alone], key=_number, reverse=True):
        try:
            yield _read(path)
        except ValueError:
            continue


def _found_again(folder: Path, state: str) -> Checkpoint | None:
    """The newest whole checkpoint of a folder whose tracker is missing or damaged; None where there are none at all.

    Raises:
        CheckpointError: there are folders of checkpoints, of which none is whole.
    """
    newest, found = next(iter(saved_folders(folder)), None), next(_whole_ones(folder), None)
    if found is None and (newest is not None or state != "missing"):
        raise CheckpointError(
            f"{folder / TRACKER}: is {state}, and no checkpoint beside it is whole; move {folder} away to begin anew"
        )
    if found is None:
        return None
    remark = f"{folder / TRACKER} is {state}: the newest whole checkpoint is {found.folder.name}"
    if newest is not None and newest != found.folder:
        remark += f" ({newest.name} is not whole)"
    return replace(found, remark=remark)


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
