"""Safetensors on disk: headers read and checked without the weights, and files planned before they are written."""

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_pdmd.files import synchronise, write_json
from megatron_pdmd.models.lora import WholeTensor

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header alone: 8 bytes of length, JSON, then the data.

    Source: https://github.com/huggingface/safetensors#format

    Raises:
        ValueError: missing, no safetensors file, or shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"{path}: is truncated or no safetensors file; download or export it again")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored(entry) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{path}: has no valid safetensors header; download or export it again") from None
    if 8 + length + end != size:
        raise ValueError(f"{path}: is truncated: {size} bytes, its header says {8 + length + end}; get it again")
    return tensors


def _stored(entry: dict) -> StoredTensor:
    begin, end = entry["data_offsets"]
    return StoredTensor(entry["dtype"], tuple(entry["shape"]), end - begin)


def read_model_header(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """The tensors of a model in one or several safetensors files, all of them checked.

    Args:
        folder: a model's folder.
        stem: file name without its ending, `diffusion_pytorch_model` or `model`.

    Raises:
        ValueError: no weights, an index that names files outside the folder or tensors that its files lack, or a file
            that `read_header` refuses.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise ValueError(f"{folder}: no {single.name} and no {index.name} in it")
        return read_header(single)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: is not a safetensors index with a weight_map") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise ValueError(f"{index}: names a file outside its folder, {name!r}; do not use this folder")
    headers = {name: read_header(folder / name) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise ValueError(f"{index}: says that {name} holds '{tensor}', but it does not")
    return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}


@dataclass(frozen=True)
class WeightFile:
    """A file to be written.

    Attributes:
        path: where.
        tensors: what goes into it, in memory or to be gathered.
        dtype: what floating-point tensors are cast to; None keeps theirs.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor | WholeTensor]
    dtype: torch.dtype | None = None

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(_stored_size(tensor, self.dtype) for tensor in self.tensors.values())

    def write(self, writes: bool = True) -> None:
        """Gathers the tensors, one after the other, and writes them.

        Args:
            writes: whether this rank is the one that writes. The others of its tensor-parallel group help to gather.

        Raises:
            ValueError: on the rank that writes, a tensor is not finite; then nothing is written.
        """
        held, where = {}, f"{self.path.parent.name}/{self.path.name}"
        for name, tensor in self.tensors.items():
            whole = tensor.gather() if isinstance(tensor, WholeTensor) else tensor
            if writes:
                held[name] = _in_own_memory(whole, self.dtype)
        if writes:
            check_exportable(held, where)
            save_file(held, self.path, metadata={"format": "pt"})
            synchronise(self.path)


def check_exportable(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuses to export what no sampler could use.

    Args:
        tensors: what goes into a file.
        where: names the file in the error.

    Raises:
        ValueError: names the first tensor that holds NaN or infinity.
    """
    if name := first_not_finite(tensors):
        raise ValueError(
            f"{where}: tensor '{name}' holds NaN or infinity, so nothing is exported; "
            "train on from an earlier checkpoint with a lower learning rate"
        )


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity, if one does."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def plan_files(
    folder: Path,
    tensors: Mapping[str, torch.Tensor | WholeTensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
) -> list[WeightFile]:
    """The files of a model: one, or several where it is larger than one may be. Nothing is gathered yet.

    Args:
        folder: for the files.
        tensors: the model's, in the order in which they fill the files.
        dtype: what floating-point tensors are cast to; None keeps theirs.
        max_shard_size: bytes of one file; a larger tensor has one for itself.
    """
    shares: list[dict[str, torch.Tensor | WholeTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        own = _stored_size(tensor, dtype)
        if shares[-1] and size + own > max_shard_size:
            shares.append({})
            size = 0
        shares[-1][name] = tensor
        size += own
    count = len(shares)
    endings = [f"-{number:05d}-of-{count:05d}" for number in range(1, count + 1)] if count > 1 else [""]
    paths = [folder / f"{DIFFUSERS_STEM}{ending}.safetensors" for ending in endings]
    return [WeightFile(path, share, dtype) for path, share in zip(paths, shares, strict=True)]


def write_index(files: Sequence[WeightFile]) -> None:
    """Says beside a model's files which tensor is in which of them; a single file needs no index."""
    if len(files) == 1:
        return
    weight_map = {name: file.path.name for file in files for name in file.tensors}
    index = {
        "metadata": {"total_size": sum(file.size for file in files)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(files[0].path.parent / f"{DIFFUSERS_STEM}.safetensors.index.json", index)


def write_model(folder: Path, tensors: Iterable[tuple[str, torch.Tensor | WholeTensor]], **options: Any) -> None:
    """Writes a model, its names and tensors, into an existing folder; the options are those of `plan_files`."""
    files = plan_files(folder, dict(tensors), **options)
    for file in files:
        file.write()
    write_index(files)


def _stored_size(tensor: torch.Tensor | WholeTensor, dtype: torch.dtype | None) -> int:
    stored = dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype
    return math.prod(tensor.shape) * stored.itemsize


def _in_own_memory(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor on the CPU: a view's storage is written whole, and two names may share one, so each gets its own."""
    tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
    owns_storage = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if owns_storage else tensor.contiguous().clone()
