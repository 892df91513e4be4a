"""Tensors in torch.distributed.checkpoint's format (Megatron's torch_dist), read without trusting what is read.

Its index, `.metadata`, is a pickle. It is read by an unpickler that knows the index's own classes and nothing else, and
every tensor by torch's weights-only loader, so a file can be damaged or foreign, but cannot run code.
"""

import io
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from megatron_pdmd.training.checkpoints.sharded_state import Shard

INDEX = ".metadata"

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_CLASSES_OF_AN_INDEX = frozenset(
    {
        *(
            (_METADATA_MODULE, name)
            for name in (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "TensorProperties",
                "ChunkStorageMetadata",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        *(("torch", name) for name in ("Size", "float64", "float32", "float16", "bfloat16", "int64")),
    }
)


def write_shards(folder: Path, shards: Mapping[str, Shard], group: dist.ProcessGroup) -> None:
    """Writes what the ranks of a group own of some tensors; every rank calls it.

    Args:
        folder: to be written to, empty.
        shards: this rank's parts by the tensors' names.
        group: the ranks.

    Raises:
        Exception: what the first rank that failed met, on every rank.
    """
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(dict(shards), storage_writer=_Writer(folder), planner=planner, process_group=group)
    except CheckpointException as failure:
        error, _ = failure.failures[min(failure.failures)]
        raise error from None


def read_index(folder: Path) -> Metadata:
    """What tensors a folder holds and where; their files are there in full length.

    Raises:
        ValueError: the index or a file is missing, damaged, not of this format, or too many.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"{folder}: {INDEX} is missing; resume from another checkpoint") from None
    except Exception as error:  # a damaged pickle raises nearly anything, of which only its own words help
        reason = f" ({error})" if isinstance(error, UnpicklingError) else ""
        raise ValueError(f"{path}: not an index of tensors{reason}; resume from another checkpoint") from None
    if not _is_index(index):
        raise ValueError(f"{path}: not an index of tensors; resume from another checkpoint")
    ends: dict[str, int] = {}
    for place in index.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise ValueError(f"{folder}: {name} is missing; resume from another checkpoint") from None
        if size < end:
            raise ValueError(
                f"{folder / name}: is truncated, {size} of {end} bytes are there; resume from another checkpoint"
            )
    # A rank that had nothing to write leaves an empty file.
    foreign = sorted(path.name for path in folder.glob("*.distcp") if path.name not in ends and path.stat().st_size)
    if foreign:
        raise ValueError(f"{folder}: {foreign[0]} is in no entry of its {INDEX}; move away what belongs elsewhere")
    return index


def read_shards(folder: Path, index: Metadata, shards: Mapping[str, Shard]) -> None:
    """Fills this rank's parts of some tensors, whatever parts they were written in; no rank waits for another.

    Args:
        folder: with the files.
        index: the folder's, from `read_index`.
        shards: by name; each is in the index with this shape.

    Raises:
        ValueError: a file is damaged.
    """
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = _Reader(folder)
    planner.set_up_planner(dict(shards), index, is_coordinator=False)
    reader.set_up_storage_reader(index, is_coordinator=False)
    try:
        with torch.no_grad():
            reader.read_data(planner.create_local_plan(), planner).wait()
    except Exception as error:  # a damaged archive raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{folder}: damaged ({reason}); resume from another checkpoint") from None


class _SavePlanner(DefaultSavePlanner):
    """Finds the boxes of a `Shard`, which the default looks for in tensors only."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _LoadPlanner(DefaultLoadPlanner):
    """The same for loading; the default would also take the shards apart, as dataclasses."""

    def set_up_planner(
        self, state_dict: dict[str, Shard], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _Writer(dcp.FileSystemWriter):
    """Leaves this machine's path out of the index."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


class _Reader(dcp.FileSystemReader):
    """Compares each tensor's checksum, which torch's loader does not."""

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        content = io.BytesIO(super()._slice_file(file, sinfo).read())
        with zipfile.ZipFile(content) as archive:
            if archive.testzip() is not None:
                raise ValueError("a tensor's checksum is wrong")
        content.seek(0)
        return content


class _IndexUnpickler(Unpickler):
    """Knows the classes that an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES_OF_AN_INDEX:
            raise UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _is_index(index: Any) -> bool:
    """Whether an unpickled object describes tensors and places in files of its own folder, completely."""
    try:
        return (
            type(index) is Metadata
            and all(_is_tensor(name, entry, index.storage_data) for name, entry in index.state_dict_metadata.items())
            and all(_is_place(place) for place in index.storage_data.values())
        )
    except (AttributeError, TypeError):
        return False


def _is_tensor(name: Any, entry: Any, places: Mapping[MetadataIndex, Any]) -> bool:
    return (
        type(name) is str
        and type(entry) is TensorStorageMetadata
        and sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size)
        and all(MetadataIndex(name, chunk.offsets) in places for chunk in entry.chunks)
    )


def _is_place(place: Any) -> bool:
    return (
        re.fullmatch(r"__\d+_\d+\.distcp", place.relative_path) is not None
        and type(place.offset) is type(place.length) is int
        and min(place.offset, place.length) >= 0
        and not place.transform_descriptors
    )
