"""Safetensors as they lie on disk: headers and indices read and judged without the weights, and tensors read whole.

Source of the format: https://github.com/huggingface/safetensors#format
"""

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_pdmd.files.documents import parse_json, read_json_object
from megatron_pdmd.files.finite import first_not_finite
from megatron_pdmd.limits import shown

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
READ_AT_LAUNCH = 2**30  # bytes whose values are judged before a run starts; more would keep a user waiting
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_LARGEST_SIDE = 2**63 - 1
_MOST_DIMENSIONS = 64
# Bytes of a number. F4 and F6, which fill no whole bytes, are no weights of a model known here.
_ITEM_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header alone: 8 bytes of length, JSON, then the data.

    Raises:
        ValueError: missing, no safetensors file, of another length than its header says, or a header whose shapes,
            dtypes and places do not fit each other.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path}: {'not a file' if path.exists() else 'no such file'}; is the download complete?")
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"{path}: is truncated or no safetensors file; download or export it again")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not text.startswith(b"{"):  # safetensors' own rule, which leaves UTF-16 out too
        raise ValueError(f"{path}: has no valid safetensors header; download or export it again")
    entries = parse_json(text, f"{path}: its header")
    try:
        return _judged(entries, size - 8 - length)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; download or export it again") from None


def _judged(entries: dict[str, Any], data_size: int) -> dict[str, StoredTensor]:
    """The tensors of a header, which must fill the data without holes and without sharing any of it."""
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has no valid safetensors header (its __metadata__ are not texts)")
    spans = []
    tensors = {}
    for name, entry in entries.items():
        tensors[name], span = _stored(name, entry)
        spans.append((*span, name))
    end = 0
    for begin, following, name in sorted(spans):
        if begin != end:
            raise ValueError(f"tensor {shown(repr(name))} starts at byte {begin} of the data, not at {end}")
        end = following
    if end != data_size:
        raise ValueError(f"is truncated or damaged: {data_size} bytes of data, its header says {end}")
    return tensors


def _stored(name: str, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    """A tensor and where it begins and ends."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"has no valid safetensors header (at tensor {shown(repr(name))})")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
        raise ValueError(f"tensor {shown(repr(name))} has numbers of an unknown kind, {shown(repr(dtype))}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"tensor {shown(repr(name))} has no valid shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {shown(repr(name))} has no valid data_offsets")
    size = offsets[1] - offsets[0]
    if math.prod(shape) * _ITEM_SIZES[dtype] != size:
        raise ValueError(f"tensor {shown(repr(name))} is {dtype} {shown(shape)} in {size} bytes, which does not fit")
    return StoredTensor(dtype, tuple(shape), size), (offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _LARGEST_SIDE for value in values)


def read_model_headers(folder: Path, stem: str) -> dict[Path, dict[str, StoredTensor]]:
    """The tensors of each of a model's safetensors files, one file or several with an index, all of them judged.

    Args:
        folder: a model's folder.
        stem: file name without its ending, `diffusion_pytorch_model` or `model`.

    Raises:
        ValueError: no weights, an index that names files outside the folder, an index and files that do not say the
            same, or a file that `read_header` refuses.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise ValueError(f"{folder}: neither {single.name} nor {index.name} is there; is the download complete?")
        return {single: read_header(single)}
    weight_map = read_weight_map(index)
    headers = {folder / name: read_header(folder / name) for name in sorted(set(weight_map.values()))}
    held: dict[str, str] = {}
    for path, header in headers.items():
        for tensor in header:
            if tensor in held:
                raise ValueError(
                    f"{path}: tensor {shown(repr(tensor))} is also in {held[tensor]}; get the folder again"
                )
            held[tensor] = path.name
    for tensor in weight_map | held:
        if weight_map.get(tensor) != held.get(tensor):
            where = [f"in {name}" if name else "nowhere" for name in (weight_map.get(tensor), held.get(tensor))]
            raise ValueError(
                f"{index}: tensor {shown(repr(tensor))} is {where[0]} by the index, but {where[1]};"
                " get the folder again"
            )
    return headers


def read_model_header(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """The tensors of a model in one or several safetensors files; see `read_model_headers`."""
    return {name: tensor for header in read_model_headers(folder, stem).values() for name, tensor in header.items()}


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of its file, a plain one that lies in the index's own folder.

    Raises:
        ValueError: no index, or one that names something else.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map of tensor names to file names; get the index again")
    for name in weight_map.values():
        # Compared as text: the files of a Hugging Face cache are links that lead out of the folder.
        plain = isinstance(name, str) and name.isprintable() and name == Path(name).name
        if not plain or not name.endswith(".safetensors") or len(name.encode()) > 255:
            raise ValueError(
                f"{index}: weight_map names {shown(repr(name))}, which is no safetensors file in this folder; refused"
            )
    return weight_map


def require_tensors(folder: Path, found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a model's weights that are not, by name and shape, those that its config.json describes.

    Args:
        folder: the model's, for the error's line.
        found: what the headers say.
        expected: name -> shape.

    Raises:
        ValueError: names what is missing, too much, of another shape or no floating-point number.
    """
    for problem, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            listed = ", ".join(shown(repr(name)) for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"{folder}: {len(names)} {problem} tensors ({listed}); do weights and config.json belong together?"
            )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{folder}: {name} is {list(found[name].shape)}, the config asks for {list(shape)};"
                " do they belong together?"
            )
        if found[name].dtype not in _FLOATING:
            raise ValueError(f"{folder}: {name} is {found[name].dtype}; expected floating-point numbers")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory, so that one costs none until it is read.

    Raises:
        ValueError: see `read_header`.
    """
    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); download or make it again") from None


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str | Path) -> None:
    """Refuses NaN and infinity; see `first_not_finite`.

    Args:
        tensors: names and values.
        where: names their file or folder in errors.

    Raises:
        ValueError: names the first tensor that holds such a value.
    """
    if name := first_not_finite(tensors):
        raise ValueError(f"{where}: tensor {shown(repr(name))} holds values that are not finite; get or make it again")


def require_finite_model(folder: Path, stem: str) -> None:
    """Refuses a model with values that are not finite, if it is small; a large one is judged as it is loaded.

    Args:
        folder: the model's.
        stem: as in `read_model_headers`.

    Raises:
        ValueError: names the file and the tensor.
    """
    headers = read_model_headers(folder, stem)
    if sum(tensor.size for header in headers.values() for tensor in header.values()) <= READ_AT_LAUNCH:
        for path in headers:
            require_finite(read_tensors(path).items(), path)
