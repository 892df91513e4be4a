"""Safetensors on disk: headers read and checked without the weights, and sharded files written as they stream by."""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

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


def write_model(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    stem: str = DIFFUSERS_STEM,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
) -> dict[str, tuple[int, ...]]:
    """Writes a model as one file, or as shards with an index where it is larger than one.

    Args:
        folder: an existing folder.
        tensors: names and tensors; taken one by one, and held only until their shard is full.
        stem: file name without its ending.
        dtype: what floating-point tensors are cast to; None keeps theirs.
        max_shard_size: bytes.

    Returns:
        The shape of every tensor written.
    """
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    pending: dict[str, torch.Tensor] = {}
    pending_size = total_size = 0

    def flush() -> None:
        path = folder / f"{stem}.part{len(shards) + 1}"
        save_file(pending, path, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, len(shards)))
        shards.append(path)
        pending.clear()

    for name, tensor in tensors:
        assert name not in shapes, f"{name} comes twice"
        tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        size = tensor.numel() * tensor.element_size()
        if pending and pending_size + size > max_shard_size:
            flush()
            pending_size = 0
        # A view's storage is written whole, and two names may share one: each tensor gets memory of its own.
        owns_storage = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == size
        pending[name] = tensor if owns_storage else tensor.contiguous().clone()
        shapes[name] = tuple(tensor.shape)
        pending_size += size
        total_size += size
    flush()
    names = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    if len(shards) == 1:
        shards[0].rename(folder / f"{stem}.safetensors")
        return shapes
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    index = {
        "metadata": {"total_size": total_size},
        "weight_map": {tensor: names[shard] for tensor, shard in sorted(weight_map.items())},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return shapes


def model_size(header: dict[str, StoredTensor], dtype: torch.dtype | None) -> int:
    """Bytes that a model takes on disk in `dtype` (None: as it is stored)."""
    if dtype is None:
        return sum(tensor.size for tensor in header.values())
    return sum(math.prod(tensor.shape) for tensor in header.values()) * dtype.itemsize
