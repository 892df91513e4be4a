"""A model's safetensors files, planned before they are written."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_pdmd.files.finite import first_not_finite
from megatron_pdmd.files.safetensors_files import DIFFUSERS_STEM
from megatron_pdmd.files.whole import synchronise, write_json
from megatron_pdmd.models.lora import WholeTensor


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
    if name := first_not_finite(tensors.items()):
        raise ValueError(
            f"{where}: tensor '{name}' holds NaN or infinity, so nothing is exported; "
            "train on from an earlier checkpoint with a lower learning rate"
        )


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
