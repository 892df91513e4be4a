"""alpha_t and sigma_t, the transition from s to t, the timestep shift, and the distribution T(t; low, high).

Times are tensors in [0, 1], 0 being data, in fp32 or fp64; results follow the input's dtype.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pdmd_kernels import diffuse

TimestepDistribution = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class NoiseSchedule(ABC):
    """A Gaussian diffusion p(x_t | x0) = N(alpha_t x0, sigma_t^2 I) with falling SNR (Eq. 1).

    Attributes:
        shift: factor by which the timestep shift multiplies the noise-to-signal ratio sigma / alpha
            (Esser et al. 2024, Eq. 23); 1 leaves times as they are, more spends more steps on noise.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"the timestep shift is {self.shift}; give --timestep-shift a positive number")

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the data at t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The standard deviation of the noise at t."""

    @abstractmethod
    def alpha_derivative(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def sigma_derivative(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def determinant(self, s: Tensor, t: Tensor) -> Tensor:
        """alpha_s sigma_t - sigma_s alpha_t in a form that does not cancel as t nears s; positive for t > s."""

    @abstractmethod
    def shifted(self, u: Tensor) -> Tensor:
        """The time t at which sigma / alpha is `shift` times what it is at u; monotone, keeps 0 and 1."""

    @abstractmethod
    def unshifted(self, t: Tensor) -> Tensor:
        """The inverse of `shifted`."""

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2; infinite at 0."""
        return (self.alpha(t) / self.sigma(t)).square()

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_{t|s}, sigma_{t|s}) of p(x_t | x_s) = N(alpha_{t|s} x_s, sigma_{t|s}^2 I) (Eq. 2), for s <= t, s < 1.

        sigma_t^2 - alpha_{t|s}^2 sigma_s^2 is factored into a difference and a sum, so that near t = s it keeps the
        relative precision of t - s; it is NaN for t < s.
        """
        assert s.dtype in (torch.float32, torch.float64) and t.dtype in (torch.float32, torch.float64), "narrow times"
        alpha_s, alpha_t = self.alpha(s), self.alpha(t)
        total = alpha_s * self.sigma(t) + self.sigma(s) * alpha_t
        return alpha_t / alpha_s, (self.determinant(s, t) * total).sqrt() / alpha_s

    def diffuse(self, x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_{t|s} x_s + sigma_{t|s} eps (Eq. 2).

        Args:
            x_s: samples at noise level s [B, ...].
            eps: standard normal noise of the shape of x_s, or int64 seeds [B] to draw it from.
            s: [B].
            t: [B], at least s.
        """
        return diffuse(x_s, eps, *self.transition(s, t))


class FlowMatchingSchedule(NoiseSchedule):
    """alpha = 1 - t, sigma = t: rectified flow, the schedule of Wan and Qwen-Image."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.0)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def determinant(self, s: Tensor, t: Tensor) -> Tensor:
        return t - s

    def shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def unshifted(self, t: Tensor) -> Tensor:
        return t / (self.shift - (self.shift - 1) * t)


class VariancePreservingSchedule(NoiseSchedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the cosine schedule, where alpha + sigma is not 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * (math.pi / 2))  # the cosine, but exactly 0 at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def determinant(self, s: Tensor, t: Tensor) -> Tensor:
        return torch.sin((t - s) * (math.pi / 2))

    def shifted(self, u: Tensor) -> Tensor:
        return torch.atan2(self.shift * self.sigma(u), self.alpha(u)) * (2 / math.pi)

    def unshifted(self, t: Tensor) -> Tensor:
        return torch.atan2(self.sigma(t), self.shift * self.alpha(t)) * (2 / math.pi)


def sample_timesteps(
    u: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    schedule: NoiseSchedule,
    *,
    distribution: TimestepDistribution = "uniform",
    margin: float = 0.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """t ~ T(t; low, high) by inverse CDF from the caller's uniform numbers.

    T is a distribution over unshifted times. The interval is taken there by the inverse shift, narrowed by the margin
    at both ends, T truncated to it, and the result shifted; rejecting or clamping would distort T near the ends.

    Args:
        u: uniform numbers in [0, 1) [B], fp32 or fp64.
        low: lower end in t, a number or [B].
        high: upper end in t, a number or [B]; equal to low it fixes t.
        schedule: gives the shift.
        distribution: uniform, or logit-normal (Esser et al. 2024, Eq. 19).
        margin: distance kept from both ends, in unshifted time.
        mean: of logit(T), for the logit-normal.
        std: of logit(T), for the logit-normal.

    Returns:
        t in [low, high], [B] in the dtype of u.

    Raises:
        ValueError: the interval given in numbers is reversed, outside [0, 1], or used up by the margin.
    """
    assert u.dtype in (torch.float32, torch.float64), "times are drawn in fp32 or fp64"
    low_t, high_t, low_u, high_u = _interval(low, high, schedule, margin, u.device)
    first, last = (_cdf(end, distribution, mean, std) for end in (low_u, high_u))
    time = _inverse_cdf(first + u.double() * (last - first), distribution, mean, std)
    # The clamps undo only the rounding of the inverse functions: t below s would make sigma_{t|s} NaN.
    time = torch.minimum(torch.maximum(time, low_u), high_u)
    return torch.minimum(torch.maximum(schedule.shifted(time), low_t), high_t).to(u.dtype)


def timestep_cdf(
    t: float,
    low: float,
    high: float,
    schedule: NoiseSchedule,
    *,
    distribution: TimestepDistribution = "uniform",
    margin: float = 0.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> float:
    """The probability that `sample_timesteps` with the same arguments draws less than t; 0 <= result <= 1.

    For an interval of one point it is 1 above that point and 0 elsewhere.
    """
    _, _, low_u, high_u = _interval(low, high, schedule, margin, torch.device("cpu"))
    time = schedule.unshifted(torch.tensor(t, dtype=torch.float64))
    if low_u == high_u:
        return float(time > low_u)
    first, last, here = (_cdf(end, distribution, mean, std) for end in (low_u, high_u, time))
    return ((here - first) / (last - first)).clamp(0, 1).item()


def _interval(
    low: float | Tensor, high: float | Tensor, schedule: NoiseSchedule, margin: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ends in t, and in unshifted time less the margin, in fp64.

    Numbers are checked on the CPU, where neither a device has to be waited for nor a fake tensor lacks a value.
    """
    low_t, high_t = (torch.as_tensor(end, dtype=torch.float64) for end in (low, high))
    low_u, high_u = schedule.unshifted(low_t), schedule.unshifted(high_t)
    if not (isinstance(low, Tensor) or isinstance(high, Tensor)):
        _check_interval(low, high, float(high_u - low_u), margin)
    kept = torch.clamp((high_u - low_u) / 2, max=margin)
    return low_t.to(device), high_t.to(device), (low_u + kept).to(device), (high_u - kept).to(device)


def _cdf(time: Tensor, distribution: TimestepDistribution, mean: float, std: float) -> Tensor:
    if distribution == "uniform":
        return time
    if distribution == "logit_normal":
        return torch.special.ndtr((torch.logit(time) - mean) / std)
    raise ValueError(f"unknown timestep distribution {distribution!r}; choose uniform or logit_normal")


def _inverse_cdf(probability: Tensor, distribution: TimestepDistribution, mean: float, std: float) -> Tensor:
    if distribution == "uniform":
        return probability
    return torch.sigmoid(mean + std * torch.special.ndtri(probability))


def _check_interval(low: float, high: float, width: float, margin: float) -> None:
    if not 0 <= low <= high <= 1:
        raise ValueError(f"t cannot be drawn from ({low}, {high}); the noise interval must lie within 0 and 1")
    if margin < 0 or 0 < width <= 2 * margin:
        raise ValueError(
            f"--timestep-margin {margin} leaves nothing of the noise interval ({low}, {high}), which is {width:.4g} "
            "wide before the shift; give a margin from 0 to less than half of that"
        )
