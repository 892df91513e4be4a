"""This rank's part of a tensor in the whole tensor's coordinates, so that any other layout of ranks can read it.

A part is a set of boxes. A parameter that is whole or split along one dim is one box; the distributed optimizer's share
of it, a range of its flattened elements, is at most 2 n - 1 boxes in n dims. Of equal copies on several ranks one rank
writes each, chosen by the tensor's name, so that the ranks share the work.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_pdmd.models.layers.tensor_parallel import partition_dim
from megatron_pdmd.parallel.topology import existing_topology


@dataclass(frozen=True)
class Box:
    """A block of a whole tensor.

    Attributes:
        offsets: where it begins in the whole tensor.
        tensor: its elements; the live memory, which loading fills.
    """

    offsets: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class Shard:
    """What this rank holds of a tensor; torch.distributed.checkpoint saves and loads it as it is.

    Attributes:
        shape: of the whole tensor.
        dtype: of the tensor.
        boxes: this rank's parts, which do not overlap; none where it holds nothing of it.
        written: whether this rank writes them; of equal copies, one rank's are.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    written: bool = True

    @classmethod
    def of(cls, tensor: Tensor) -> "Shard":
        """A tensor that this rank holds whole."""
        return cls(tuple(tensor.shape), tensor.dtype, (Box((0,) * tensor.ndim, tensor.detach()),))

    @property
    def written_bytes(self) -> int:
        """Bytes that this rank writes."""
        return sum(box.tensor.numel() * box.tensor.element_size() for box in self.boxes) if self.written else 0

    def staged(self) -> "Shard":
        """What is to be written of it, in CPU memory of its own; a device's part is there when this returns."""
        boxes = self.boxes if self.written else ()
        # To pageable memory and blocking, so the stream that computes the tensor is waited for.
        return replace(self, boxes=tuple(Box(box.offsets, box.tensor.to("cpu", copy=True)) for box in boxes))

    def __create_write_items__(self, name: str, shard: "Shard") -> list[WriteItem]:
        if not self.written:
            return []
        properties, size = TensorProperties(dtype=self.dtype), torch.Size(self.shape)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.tensor.shape)) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(box.tensor for box in self.boxes if torch.Size(box.offsets) == index.offset)


@dataclass(frozen=True)
class Place:
    """Where this rank stands among those that hold a parameter, which are all of one pipeline stage.

    Attributes:
        tensor, tensor_rank: ranks that split it where it is split, and this one among them.
        copies, copy: data- and context-parallel ranks that hold the same, and this one among them.
    """

    tensor: int = 1
    tensor_rank: int = 0
    copies: int = 1
    copy: int = 0

    @classmethod
    def current(cls) -> "Place":
        """That of the current topology; a single rank where there is none."""
        topology = existing_topology()
        if topology is None:
            return cls()
        copy = topology.data_rank * topology.context + topology.context_rank
        return cls(topology.tensor, topology.tensor_rank, topology.data * topology.context, copy)


def parameter_shard(
    name: str, parameter: Tensor, value: Tensor | None = None, *, place: Place | None = None, start: int | None = None
) -> Shard:
    """A parameter, or something of its shape, as this rank holds it.

    Args:
        name: by which equal copies agree on who writes.
        parameter: this rank's parameter; its marks tell how tensor parallelism splits it.
        value: the tensor in question, of the parameter's shape or flat; by default the parameter itself.
        place: this rank's; the current one where not given.
        start: the first element of a flat `value` in the flattened parameter. Each data rank then holds another range;
            without it all hold the same.
    """
    place = place or Place.current()
    value = parameter if value is None else value
    dim = partition_dim(parameter)
    shape, corner = list(parameter.shape), [0] * parameter.ndim
    if dim is not None:
        shape[dim] *= place.tensor
        corner[dim] = place.tensor_rank * parameter.shape[dim]
    copies, copy = (1, 0) if start is not None else (place.copies, place.copy)
    if dim is None:
        copies, copy = copies * place.tensor, copy * place.tensor + place.tensor_rank
    flat, first = value.detach().view(-1), start or 0
    boxes, taken = [], 0
    for offsets, sizes in flat_range_boxes(tuple(parameter.shape), first, first + flat.numel()):
        count = math.prod(sizes)
        where = tuple(a + b for a, b in zip(corner, offsets, strict=True))
        boxes.append(Box(where, flat[taken : taken + count].view(sizes)))
        taken += count
    written = zlib.crc32(name.encode()) % copies == copy
    return Shard(tuple(shape), value.dtype, tuple(boxes), written)


def empty_shard(parameter: Tensor, dtype: torch.dtype, place: Place | None = None) -> Shard:
    """A tensor of the parameter's shape of which this rank holds nothing."""
    shape, dim = list(parameter.shape), partition_dim(parameter)
    if dim is not None:
        shape[dim] *= (place or Place.current()).tensor
    return Shard(tuple(shape), dtype, (), written=False)


def flat_range_boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes that a range of a tensor's flattened elements is, in order.

    Args:
        shape: of the tensor.
        start, stop: the range; elements of each box are consecutive in it.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if head:
        end = tail if first == last else row
        yield from (((first, *o), (1, *s)) for o, s in flat_range_boxes(shape[1:], head, end))
        first += 1
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if tail and first <= last:
        yield from (((last, *o), (1, *s)) for o, s in flat_range_boxes(shape[1:], 0, tail))


def with_prefix(prefix: str, shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """The same under longer names."""
    return {f"{prefix}.{name}": shard for name, shard in shards.items()}
