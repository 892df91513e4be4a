"""Philox's integers and the normals made from them: known answers, every backend alike, and normally distributed."""

import math

import pytest
import torch
from torch import Tensor

import pdmd_kernels
from pdmd_kernels.reference.philox import philox4x32

SEEDS = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1, 123456789012345])
RANGES = [(1, 0), (3, 1), (5, 3), (64, 0), (67, 2), (2048, 0), (4099, 2**34 + 3), (130, 2**62 + 1)]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_the_twin_knows_the_published_answers(word, expected):
    words = torch.tensor([word])
    assert tuple(int(w) for w in philox4x32((words,) * 4, (words,) * 2)) == expected


def test_counter_and_key_of_zeros_give_the_published_answer(backend):
    words = pdmd_kernels.random_words(torch.tensor([0]), 4)
    assert [f"{w:08x}" for w in words[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize(("numel", "offset"), RANGES)
def test_the_integers_are_those_of_the_twin(numel, offset, variant):
    ours = pdmd_kernels.random_words(SEEDS, numel, offset)
    assert torch.equal(ours, pdmd_kernels.reference.random_words(SEEDS, numel, offset))


def test_the_normals_are_within_2_ulp_of_the_exact_ones(variant):
    ours, exact = pdmd_kernels.normal(SEEDS, 300_001), pdmd_kernels.reference.normal(SEEDS, 300_001)
    assert (ordered(ours) - ordered(exact)).abs().max() <= 2


def test_the_normals_of_the_outermost_words_are_right(variant):
    """Seeds are searched for the extreme uniforms: the smallest and the largest u0 among many."""
    words = pdmd_kernels.random_words(SEEDS, 2_000_000)
    radii = words[:, 0::2]
    for extreme in (radii.argmin(1), radii.argmax(1)):
        for seed, pair in zip(SEEDS, extreme.tolist(), strict=True):
            ours = pdmd_kernels.normal(seed[None], 2, 2 * pair)
            exact = pdmd_kernels.reference.normal(seed[None], 2, 2 * pair)
            assert (ordered(ours) - ordered(exact)).abs().max() <= 2


def test_chunks_of_a_stream_are_the_stream(backend):
    whole = pdmd_kernels.normal(SEEDS, 5000)
    for offset, numel in ((0, 1), (1, 6), (7, 2041), (2048, 2952), (4999, 1)):
        assert torch.equal(pdmd_kernels.normal(SEEDS, numel, offset), whole[:, offset : offset + numel])


def test_seeded_noise_is_the_stream_of_its_seed(backend):
    x, one = torch.zeros(6, 3, 7, 101), torch.ones(6)
    ours = pdmd_kernels.subinterval_noise(x, SEEDS, one, one)
    assert torch.equal(ours.flatten(1), pdmd_kernels.normal(SEEDS, 3 * 7 * 101))


def test_the_normals_are_normal(backend):
    """Kolmogorov-Smirnov, the first four moments and the neighbours' correlation, each within five deviations."""
    n = 400_000
    x = pdmd_kernels.normal(torch.tensor([20260101]), n).double().flatten()
    cdf = (1 + torch.erf(x.sort().values / math.sqrt(2))) / 2
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps[:-1]).abs().max(), (steps[1:] - cdf).abs().max())
    assert distance < 1.95 / math.sqrt(n)  # exceeded by chance once in a thousand
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - mean) < 5 * math.sqrt(variance / n)
    for lag in (1, 2, 3, 4):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 / math.sqrt(n)


def ordered(x: Tensor) -> Tensor:
    """Integers that count the fp32 numbers in order, so that differences are ulps."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
