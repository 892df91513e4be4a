"""Frechet distance against closed forms and an independent formula; diversity against distances written out."""

import pytest
import torch

from megatron_pdmd.evaluation.metrics import diversity, frechet_distance, gaussian_frechet_distance

EPS = torch.finfo(torch.float64).eps


def random_covariance(width: int, seed: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(width, rank or 2 * width, generator=generator, dtype=torch.float64)
    return factor @ factor.T


def rounding(*covariances: torch.Tensor) -> float:
    """What fp64 may lose: one eps of the traces for each of the D singular values."""
    return len(covariances[0]) * EPS * sum(covariance.trace().item() for covariance in covariances)


def samples_with_moments(mean: torch.Tensor, covariance: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """[count, D] whose sample mean and unbiased sample covariance are exactly those given."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    white = torch.linalg.qr(raw - raw.mean(0)).Q * (count - 1) ** 0.5
    return mean + white @ torch.linalg.cholesky(covariance).T


def test_commuting_covariances_have_a_closed_form():
    basis = torch.linalg.qr(random_covariance(16, seed=0)).Q
    a, b = (torch.rand(2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 9).unbind()
    covariances = [basis @ torch.diag(values) @ basis.T for values in (a, b)]
    mean = torch.arange(16, dtype=torch.float64)
    measured = gaussian_frechet_distance(mean, covariances[0], mean + 1, covariances[1])
    expected = 16 + (a.sqrt() - b.sqrt()).square().sum().item()
    assert abs(measured - expected) <= rounding(*covariances)


def test_two_by_two_covariances_that_do_not_commute_have_a_closed_form():
    a, b = random_covariance(2, seed=2), random_covariance(2, seed=3)
    zero = torch.zeros(2, dtype=torch.float64)
    cross = ((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * cross).item()
    assert abs(gaussian_frechet_distance(zero, a, zero, b) - expected) <= rounding(a, b)


def test_agrees_with_the_eigenvalues_of_the_unsymmetric_product():
    a, b = random_covariance(12, seed=4), random_covariance(12, seed=5)
    zero = torch.zeros(12, dtype=torch.float64)
    cross = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = (a.trace() + b.trace() - 2 * cross).item()
    assert abs(gaussian_frechet_distance(zero, a, zero, b) - expected) <= rounding(a, b)


def test_features_with_known_moments():
    a, b = random_covariance(6, seed=6), random_covariance(6, seed=7)
    mean_a, mean_b = torch.zeros(6, dtype=torch.float64), torch.full((6,), 3.0, dtype=torch.float64)
    features = samples_with_moments(mean_a, a, 50, seed=8), samples_with_moments(mean_b, b, 70, seed=9)
    expected = gaussian_frechet_distance(mean_a, a, mean_b, b)
    assert abs(frechet_distance(*features) - expected) <= 70 * rounding(a, b)


def test_equal_sets_are_at_distance_zero_even_with_fewer_samples_than_features():
    features = torch.randn(10, 32, generator=torch.Generator().manual_seed(10))
    assert frechet_distance(features, features.flip(0)) <= rounding(32 * torch.eye(32), 32 * torch.eye(32))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "at least two samples"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "different widths"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), "finite"),
    ],
)
def test_features_that_cannot_be_compared(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_diversity_averages_pairs_within_prompts_then_prompts():
    features = torch.tensor([[0.0, 0.0], [10.0, 0.0], [3.0, 4.0], [10.0, 2.0], [0.0, 0.0], [99.0, 99.0]])
    prompts = ["a", "b", "a", "b", "a", "alone"]
    assert diversity(features, prompts) == pytest.approx(((5 + 0 + 5) / 3 + 2) / 2)


def test_cosine_diversity_ignores_lengths():
    features = torch.tensor([[1.0, 0.0], [0.0, 7.0], [2.0, 2.0]])
    cosines = (0, 0.5**0.5, 0.5**0.5)
    assert diversity(features, ["a"] * 3, distance="cosine") == pytest.approx(1 - sum(cosines) / 3)


def test_identical_samples_have_no_diversity():
    features = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, dim=0)
    assert diversity(features, [i // 4 for i in range(12)]) == 0


def test_diversity_without_pairs_is_refused():
    with pytest.raises(ValueError, match="two samples"):
        diversity(torch.zeros(3, 2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="as many prompts"):
        diversity(torch.zeros(3, 2), ["a", "b"])
