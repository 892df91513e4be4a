"""Distances between sets of samples, for the features of any network: Frechet distance and diversity."""

from collections.abc import Hashable, Sequence
from typing import Literal

import torch


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """The squared Frechet distance between the Gaussians fitted to two sets of features, as FID takes it.

    It is biased upwards by about (1 / N_a + 1 / N_b) times the features' variance: compare numbers of equal N, and with
    the distance between two sets of real samples.

    Args:
        features_a: [N_a, D], N_a >= 2.
        features_b: [N_b, D], N_b >= 2.

    Returns:
        The distance in squared units of the features, computed in fp64.

    Raises:
        ValueError: fewer than two samples, different widths, or values that are not finite.

    Source: https://arxiv.org/abs/1706.08500, Eq. 6.
    """
    for features in (features_a, features_b):
        _check_features(features)
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"features of different widths cannot be compared: {features_a.shape[1]}, {features_b.shape[1]}"
        )
    moments = [_moments(features) for features in (features_a, features_b)]
    return gaussian_frechet_distance(*moments[0], *moments[1])


def gaussian_frechet_distance(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, covariance_b: torch.Tensor
) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), in fp64.

    The last trace is the sum of the singular values of A^1/2 B^1/2, which needs no square root of an eigenvalue that
    rounding made negative, so rank-deficient covariances (fewer samples than features) are exact too.

    Args:
        mean_a: [D].
        covariance_a: [D, D], symmetric and positive semi-definite.
        mean_b: [D].
        covariance_b: [D, D].
    """
    roots = [_symmetric_square_root(covariance.double()) for covariance in (covariance_a, covariance_b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    traces = covariance_a.double().trace() + covariance_b.double().trace()
    distance = (mean_a.double() - mean_b.double()).square().sum() + traces - 2 * cross
    return max(0.0, distance.item())


def diversity(
    features: torch.Tensor, groups: Sequence[Hashable], distance: Literal["euclidean", "cosine"] = "euclidean"
) -> float:
    """Mean distance between two samples of the same prompt, averaged over prompts (section 3.1 of the paper).

    Args:
        features: [N, D].
        groups: what each sample was made from, its prompt say. Groups of one sample have no pair and do not count.
        distance: `euclidean`, or `cosine` for 1 - cosine similarity.

    Raises:
        ValueError: no group has two samples, or `groups` and `features` differ in length.
    """
    if len(groups) != len(features):
        raise ValueError(f"{len(features)} features need as many prompts, got {len(groups)}")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    rows = features.double()
    if distance == "cosine":
        # Between unit vectors, 1 - cosine is half the squared Euclidean distance.
        rows = torch.nn.functional.normalize(rows, dim=-1)
    means = []
    for indices in members.values():
        if len(indices) > 1:
            pairs = torch.pdist(rows[indices])
            means.append((pairs.square() / 2 if distance == "cosine" else pairs).mean())
    if not means:
        raise ValueError("diversity needs two samples of one prompt; generate at least two samples per prompt")
    return torch.stack(means).mean().item()


def _check_features(features: torch.Tensor) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"a Frechet distance needs features [N, D] of at least two samples, got {list(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError("features must be finite; look for NaN or infinity in the samples")


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = features.double()
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.T @ centred / (len(rows) - 1)


def _symmetric_square_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
