"""The data of the 2-D toy, a ring of tight modes in unequal pairs: exact flow, exact density, metrics of samples."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatron_pdmd.diffusion import NoiseSchedule

PAIR_WEIGHTS = (5.0, 1.0, 3.0, 1.0, 4.0, 2.0, 3.0, 1.0)  # counter-clockwise, before normalisation
FIRST_OF_PAIR = 2.0  # weight of a pair's first mode over its second
RADIUS = math.sqrt(2)  # so that each coordinate has a variance of about 1
HALF_GAP = 0.14  # radians from a pair's middle to its modes
MODE_STD = 0.05  # of a mode, per coordinate
ON_MODE = 3.0  # a sample within so many standard deviations of a mode's centre is on it: 98.9 % of the true samples


@dataclass(frozen=True)
class Ring:
    """A mixture of K round Gaussians in the plane.

    Attributes:
        centers: [K, 2].
        weights: [K], sums to 1.
        std: standard deviation of every mode, per coordinate.
    """

    centers: Tensor
    weights: Tensor
    std: float

    @classmethod
    def of_pairs(cls) -> "Ring":
        """Eight pairs of modes evenly on a circle, in fp32; modes 2 i and 2 i + 1 are the pair i."""
        pairs = len(PAIR_WEIGHTS)
        middle = torch.arange(pairs, dtype=torch.float64) * (2 * math.pi / pairs)
        angle = torch.stack([middle - HALF_GAP, middle + HALF_GAP], dim=1).flatten()
        weights = torch.outer(torch.tensor(PAIR_WEIGHTS), torch.tensor([FIRST_OF_PAIR, 1.0])).flatten()
        centers = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
        return cls(centers.float(), weights / weights.sum(), MODE_STD)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent samples [count, 2]."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return self.centers[mode] + self.std * torch.randn(count, 2, generator=generator)

    def flow(self, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The exact teacher E[eps - x0 | x_t] at any t in [0, 1].

        x_t is a mixture too, of N(alpha c_k, v I) with v = alpha^2 std^2 + sigma^2; given its mode k, eps and x0 are
        linear in x_t - alpha c_k.

        Args:
            x_t: [B, 2].
            t: [B].
            schedule: alpha and sigma.

        Returns:
            [B, 2].
        """
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        variance = (alpha * self.std).square() + sigma.square()
        posterior = self._log_joint(x_t, alpha, variance).softmax(dim=1)
        center = posterior @ self.centers
        return (sigma - alpha * self.std**2) / variance * (x_t - alpha * center) - center

    def density(self, x_t: Tensor, t: float, schedule: NoiseSchedule) -> Tensor:
        """p(x_t) at points [B, 2], per unit of area: [B]."""
        time = torch.full((1, 1), t, dtype=x_t.dtype)
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        variance = (alpha * self.std).square() + sigma.square()
        return self._log_joint(x_t, alpha, variance).logsumexp(dim=1).exp() / (2 * math.pi * variance[:, 0])

    def nearest_mode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest mode of each sample of [B, 2], and the distance to its centre: [B], [B]."""
        distance, mode = torch.cdist(x, self.centers).min(dim=1)
        return mode, distance

    def shares(self, x: Tensor) -> Tensor:
        """The share of samples that each mode is nearest to, [K]."""
        mode, _ = self.nearest_mode(x)
        return torch.bincount(mode, minlength=len(self.weights)) / len(x)

    def _log_joint(self, x_t: Tensor, alpha: Tensor, variance: Tensor) -> Tensor:
        """log p(k) + log p(x_t | k), less the normalisation that all k share: [B, K]."""
        distance = (x_t[:, None] - alpha[:, :, None] * self.centers).square().sum(dim=2)
        return self.weights.log() - distance / (2 * variance)


@dataclass(frozen=True)
class Metrics:
    """How far samples are from the ring.

    Attributes:
        energy_distance: 2 E|x - y| - E|x - x'| - E|y - y'| to true samples y, unbiased, so about 0 at best.
        mode_kl: KL of the modes' shares among the samples from their weights, in nats; finite where modes are lost.
        on_modes: share of the samples within three standard deviations of a mode's centre.
    """

    energy_distance: float
    mode_kl: float
    on_modes: float


def measure(x: Tensor, true: Tensor, ring: Ring) -> Metrics:
    """Metrics of samples [N, 2], given true samples [M, 2]."""
    shares = ring.shares(x)
    _, distance = ring.nearest_mode(x)
    energy = 2 * torch.cdist(x, true).mean() - _mean_distance(x) - _mean_distance(true)
    return Metrics(
        energy_distance=energy.item(),
        mode_kl=torch.special.xlogy(shares, shares / ring.weights).sum().item(),
        on_modes=(distance < ON_MODE * ring.std).float().mean().item(),
    )


METRICS = tuple(asdict(Metrics(0, 0, 0)))


def _mean_distance(x: Tensor) -> Tensor:
    """Mean distance of two different samples."""
    return torch.pdist(x).mean()
