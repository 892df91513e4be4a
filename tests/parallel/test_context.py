"""Splitting sequences and choosing the method, without ranks; with ranks see distributed/test_layouts.py."""

import pytest
import torch

from megatron_pdmd.parallel.context import SequenceSplit, context_method


@pytest.mark.parametrize(
    ("asked", "context", "tensor", "method"),
    [("auto", 4, 2, "ulysses"), ("auto", 3, 1, "ring"), ("auto", 8, 2, "ring"), ("ring", 4, 1, "ring")],
)
def test_ulysses_where_the_heads_divide(asked, context, tensor, method):
    assert context_method(asked, context, tensor, heads=8) == method


def test_heads_that_do_not_divide_name_the_sizes_that_would():
    with pytest.raises(ValueError, match=r"40 heads .* use a context size of 1 or 5, or ring"):
        context_method("ulysses", 2, 8, heads=40)


def test_a_table_is_padded_and_dealt_to_the_context_ranks():
    table = torch.arange(1.0, 8.0).view(7, 1)
    parts = [SequenceSplit(None, 4, rank, context=2).context_part(table) for rank in range(4)]
    first, second = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[5.0], [6.0], [7.0], [0.0]])
    assert all(torch.equal(part, first) for part in parts[:2]) and all(torch.equal(part, second) for part in parts[2:])


def test_a_single_rank_keeps_what_it_has():
    split, x = SequenceSplit(), torch.randn(2, 5, 3)
    assert split.split(x) is x and split.join(x, 5) is x and split.padded(5) == 5
