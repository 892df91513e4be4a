"""Ranges and slices of tensors as boxes: together they are the tensor, each element once."""

import itertools
import math

import pytest
import torch

from megatron_pdmd.training.checkpoints.sharded_state import (
    Place,
    Shard,
    empty_shard,
    flat_range_boxes,
    parameter_shard,
)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 4), (4, 1, 3, 2), (1, 1, 5)])
def test_the_boxes_of_a_range_are_its_elements_in_order(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
        boxes = list(flat_range_boxes(shape, start, stop))
        found = []
        for offsets, sizes in boxes:
            index = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            found += numbers[index].flatten().tolist()
        assert found == list(range(start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_an_empty_range_has_no_boxes():
    assert list(flat_range_boxes((2, 3), 4, 4)) == []


def shards_of_all(whole: torch.Tensor, dim: int | None, tensor: int, copies: int, *, flat: bool) -> list[Shard]:
    """What each rank holds of a tensor that `tensor` ranks split along `dim`, each with `copies` data ranks."""
    shards = []
    for tensor_rank, copy in itertools.product(range(tensor), range(copies)):
        part = whole if dim is None else whole.chunk(tensor, dim)[tensor_rank]
        parameter = torch.nn.Parameter(part.contiguous())
        if dim is not None:
            parameter.tensor_model_parallel, parameter.partition_dim = True, dim
        place = Place(tensor, tensor_rank, copies, copy)
        share = math.ceil(parameter.numel() / copies)
        start = copy * share
        value = parameter.detach().flatten()[start : start + share]
        if not flat:
            shards.append(parameter_shard("weight", parameter, place=place))
        elif value.numel():
            shards.append(parameter_shard("weight", parameter, value, place=place, start=start))
        else:
            shards.append(empty_shard(parameter, torch.float32, place))
    return shards


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_what_the_ranks_write_is_the_whole_tensor_once(dim, copies, flat):
    whole = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    joined, times = torch.zeros_like(whole), torch.zeros_like(whole)
    for shard in shards_of_all(whole, dim, 2, copies, flat=flat):
        assert shard.shape == (4, 6, 5) and shard.dtype == torch.float32
        for box in shard.staged().boxes:
            index = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.tensor.shape, strict=True))
            joined[index] += box.tensor
            times[index] += 1
    assert torch.equal(joined, whole) and torch.equal(times, torch.ones_like(whole))


def test_the_boxes_are_the_live_memory_and_a_staged_copy_is_not():
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    shard = parameter_shard("weight", parameter, parameter.detach().flatten()[2:9], place=Place(), start=2)
    staged = shard.staged()
    with torch.no_grad():
        for box in shard.boxes:
            box.tensor.fill_(1)
    assert parameter.detach().flatten().tolist() == [0, 0, *[1] * 7, 0, 0, 0]
    assert not any(box.tensor.any() for box in staged.boxes)
    assert sum(box.tensor.numel() for box in staged.boxes) == 7 and shard.written_bytes == 28


def test_equal_copies_are_written_by_different_ranks_for_different_tensors():
    parameter = torch.nn.Parameter(torch.zeros(2))
    writers = [
        [
            parameter_shard(f"blocks.{k}.bias", parameter, place=Place(2, t, 2, c)).written
            for t in (0, 1)
            for c in (0, 1)
        ]
        for k in range(40)
    ]
    assert all(sum(one) == 1 for one in writers)
    assert all(sum(column) > 4 for column in zip(*writers, strict=True))
