"""Draws depend on what they are for alone, and have the distributions they should have."""

import itertools
import math

import pytest
import torch

from megatron_pdmd.distillation.randomness import Counter, Purpose

COUNTER = Counter(seed=3, phase=1, iteration=5, update=2)
SAMPLES = range(6)
SIGMAS = 5  # a true distribution fails a bound of 5 standard errors once in 1.7 million tests


def draws(counter: Counter, purpose: Purpose, samples) -> tuple[torch.Tensor, ...]:
    return (
        counter.uniform(purpose, samples),
        torch.tensor(counter.integers(purpose, 1000, samples)),
        counter.normal(purpose, (2, 3), samples),
    )


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[0], [1], [2], [3, 4], [5]]])
def test_numbers_of_a_sample_do_not_depend_on_its_neighbours(groups):
    whole = draws(COUNTER, Purpose.PROMPT, SAMPLES)
    parts = [draws(COUNTER, Purpose.PROMPT, group) for group in groups]
    for together, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(pieces))


def test_numbers_do_not_depend_on_order_or_on_torchs_own_generator():
    first = COUNTER.normal(Purpose.INITIAL_NOISE, (4,), [2, 0])
    torch.manual_seed(1)
    COUNTER.uniform(Purpose.INITIAL_NOISE, [0])
    assert torch.equal(first.flip(0), COUNTER.normal(Purpose.INITIAL_NOISE, (4,), [0, 2]))


@pytest.mark.parametrize("field", ["seed", "phase", "iteration", "update"])
def test_every_field_of_the_counter_changes_the_numbers(field):
    other = COUNTER.at(**{field: getattr(COUNTER, field) + 1})
    ours, theirs = (torch.cat([t.flatten().double() for t in draws(c, Purpose.PROMPT, [0])]) for c in (COUNTER, other))
    assert (ours != theirs).all()


def test_no_two_draws_of_a_grid_are_the_same():
    """Two fp32 numbers each, so that equal pairs by chance are out of the question."""
    grid = itertools.product(range(1, 3), range(6), range(-1, 5), Purpose, range(-1, 4))
    pairs = [
        tuple(Counter(3, phase, iteration, update).normal(purpose, (2,), [sample])[0].tolist())
        for phase, iteration, update, purpose, sample in grid
    ]
    assert len(set(pairs)) == len(pairs) == 2 * 6 * 6 * len(Purpose) * 5


def test_purposes_keep_their_numbers():
    """They are part of every run's identity."""
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "PROMPT": 0,
        "INITIAL_NOISE": 1,
        "DIFFUSION_TIME": 2,
        "DIFFUSION_NOISE": 3,
        "TRUNCATION": 4,
        "TEACHER_SIDE": 5,
    }


def test_uniform_numbers_of_different_streams_are_uniform():
    """Kolmogorov-Smirnov over streams: first numbers of hashed seeds must be as good as one stream's."""
    count = 1000
    u = COUNTER.uniform(Purpose.DIFFUSION_TIME, range(count)).double().sort().values
    assert u[0] >= 0 and u[-1] < 1
    ranks = torch.arange(count + 1) / count
    distance = max((u - ranks[:-1]).max().item(), (ranks[1:] - u).max().item())
    assert distance < 2.65 / math.sqrt(count)  # p = 2 exp(-2 * 2.65^2) = 1.6e-6


def test_normal_numbers_have_mean_0_and_variance_1_and_are_independent_of_their_neighbours():
    x = COUNTER.normal(Purpose.INITIAL_NOISE, (100,), range(200)).double()
    count = x.numel()
    assert x.mean().abs() < SIGMAS / math.sqrt(count)
    assert (x.var() - 1).abs() < SIGMAS * math.sqrt(2 / count)
    between_samples = (x[1:] * x[:-1]).mean()
    between_updates = (x * COUNTER.at(update=3).normal(Purpose.INITIAL_NOISE, (100,), range(200))).mean()
    assert between_samples.abs() < SIGMAS / math.sqrt(count - 100)
    assert between_updates.abs() < SIGMAS / math.sqrt(count)


def test_integers_are_uniform_over_counters():
    bound, count = 4, 1200
    seen = torch.tensor([COUNTER.at(iteration=i).integer(Purpose.TRUNCATION, bound) for i in range(count)])
    expected = count / bound
    chi_squared = ((torch.bincount(seen, minlength=bound) - expected) ** 2 / expected).sum()
    assert seen.min() == 0 and seen.max() == bound - 1
    assert chi_squared < 30.7  # 3 degrees of freedom, p = 1e-6
