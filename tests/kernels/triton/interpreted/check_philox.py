"""The counter-based noise: integers to the bit, normals to 2 ulp, the same from any offset."""

import pytest
import torch
from kernel_checks import run
from torch import Tensor

from pdmd_kernels.reference import primitives

SEEDS = (0, -1, 2**62 + 12345, -(2**63), 7)


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Fp32 numbers between two, of like sign."""
    assert torch.equal(a.signbit(), b.signbit())
    return (a.view(torch.int32).long() - b.view(torch.int32).long()).abs()


def test_seed_zero_gives_the_published_words() -> None:
    words = run("random_words", torch.tensor([0]), 4)
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@pytest.mark.parametrize(("numel", "offset"), [(1, 0), (17, 0), (1024, 0), (1025, 0), (5, 3), (2000, 2**34 + 5)])
def test_words_and_normals_are_those_of_the_twin(numel: int, offset: int) -> None:
    seeds = torch.tensor(SEEDS)
    assert torch.equal(run("random_words", seeds, numel, offset), primitives.random_words(seeds, numel, offset))
    assert ulps(run("normal", seeds, numel, offset), primitives.normal(seeds, numel, offset)).max() <= 2


def test_normals_of_many_words_are_within_two_ulp() -> None:
    seeds = torch.tensor([11])
    assert ulps(run("normal", seeds, 50_000), primitives.normal(seeds, 50_000)).max() <= 2


def test_a_stream_in_pieces_is_the_stream() -> None:
    seeds = torch.tensor(SEEDS)
    pieces = [run("normal", seeds, numel, offset) for numel, offset in ((7, 0), (10, 7), (3, 17))]
    assert torch.equal(torch.cat(pieces, 1), run("normal", seeds, 20))


def test_no_seeds_or_no_elements_give_an_empty_tensor() -> None:
    assert run("normal", torch.empty(0, dtype=torch.int64), 5).shape == (0, 5)
    assert run("normal", torch.tensor(SEEDS), 0).shape == (5, 0)
