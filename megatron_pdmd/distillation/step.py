"""One iteration of Phased DMD: fake updates, then one generator update, as programs of passes.

A program is a Python generator. It yields the model evaluations (`Pass`) that it needs next, those that do not need
each other together, is sent the flow that each gave, and yields a backward pass (`Backward`) at its end; it returns
the numbers to log. So this file says what an iteration is, and whoever drives the programs says when and where each
pass runs: `walk` runs one program in order on one rank.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Generator as Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_pdmd.config import MethodConfig
from megatron_pdmd.diffusion.noise_schedule import NoiseSchedule, sample_timesteps, timestep_cdf
from megatron_pdmd.diffusion.phases import Expert, Phase, PhasePlan, expert_at, noise_interval
from megatron_pdmd.diffusion.prediction import from_flow
from megatron_pdmd.diffusion.sampler import Move, euler_step, moves_of
from megatron_pdmd.distillation.distribution_matching import dmd_gradient, guided_flow
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.distillation.roles import Backward, Pass, Roles
from megatron_pdmd.distillation.score_matching import score_matching_loss

Metrics = dict[str, torch.Tensor]
Request = tuple[Pass, ...] | Backward
Reply = tuple[torch.Tensor, ...] | None
Program = Coroutine[Request, Reply, Metrics]
Rollout = Coroutine[Request, Reply, torch.Tensor]
Result = TypeVar("Result")

GENERATOR_UPDATE = -1  # the counter's `update` of an iteration's generator update

NOISE_BINS = 4  # parts of T(t; s, 1) of equal probability, by which a metric is told; the first has the least noise
_SUM, _COUNT = "/sum", "/count"


@dataclass(frozen=True)
class MicroBatch:
    """What one program works on.

    Attributes:
        samples: index of each sample in the global batch.
        conditions: the samples' prompts, as the models take them.
        negative: the negative prompt for as many samples.
    """

    samples: Sequence[int]
    conditions: Any
    negative: Any


@dataclass(frozen=True)
class Iteration:
    """What the iterations of one phase have in common.

    Attributes:
        method: the options of the method.
        plan: all phases, and the boundary of a two-expert teacher.
        phase: the phase being trained.
        schedule: alpha_t and sigma_t.
        latent_shape: shape of a sample, [C, F, H, W].
        device: where latents live.
    """

    method: MethodConfig
    plan: PhasePlan
    phase: Phase
    schedule: NoiseSchedule
    latent_shape: tuple[int, ...]
    device: torch.device

    def phase_start(self, counter: Counter, batch: MicroBatch) -> Rollout:
        """pipeline(G_1 .. G_{k-1}): latents at the phase's start, fp32 [B, C, F, H, W], by the frozen phases alone."""
        x = counter.normal(Purpose.INITIAL_NOISE, self.latent_shape, batch.samples, self.device)
        for move in moves_of(self.plan.phases[: self.phase.index - 1]):
            x = yield from self._moved(x, move, batch, gradient=False)
        return x

    def fake_update(self, counter: Counter, batch: MicroBatch, start: torch.Tensor | None = None) -> Program:
        """The fake score learns the generator's present distribution p(x_s): Eq. 4, 13 or 15.

        Args:
            counter: where the update's draws are made.
            batch: what it works on.
            start: the batch's latents at the phase's start, [B, C, F, H, W]; None runs `phase_start`.
        """
        method = self.method
        truncation = self._truncation(
            counter, full=method.fake_rollout == "full" or method.gradient_truncation == "none"
        )
        x_s = yield from self._rollout(counter, batch, start, truncation, gradient=False)
        u, noise, expert = self._diffusion(counter, batch)
        t = self.times(u)
        x_t = self.schedule.diffuse(x_s, noise, torch.full_like(t, self.phase.end), t)
        (flow,) = yield (Pass("fake_score", expert, x_t, t, batch.conditions, gradient=True),)
        loss = self.fake_loss(flow, x_s, x_t, noise, t)
        yield Backward(loss)
        return {"fake_loss": loss.detach()}

    def generator_update(self, counter: Counter, batch: MicroBatch, start: torch.Tensor | None = None) -> Program:
        """The generator descends the KL divergence at the phase's end s: Eq. 9 to 11; arguments as `fake_update`'s."""
        method = self.method
        truncation = self._truncation(counter, full=method.gradient_truncation == "none")
        x_s = yield from self._rollout(counter, batch, start, truncation, gradient=True)
        u, noise, expert = self._diffusion(counter, batch)
        t = self.times(u)
        s, sample = torch.full_like(t, self.phase.end), x_s.detach()
        x_t = self.schedule.diffuse(sample, noise, s, t)
        scale = guidance_scale(method, expert)
        guided = [Pass("teacher", expert, x_t, t, batch.negative)] if scale != 1 else []
        teacher_flow, *negative, fake_flow = yield (
            Pass("teacher", expert, x_t, t, batch.conditions),
            *guided,
            Pass("fake_score", expert, x_t, t, batch.conditions),
        )
        unconditional = negative[0] if negative else None
        gradient = dmd_gradient(
            teacher_flow,
            fake_flow,
            s,
            t,
            self.schedule,
            weighting=method.dmd_weighting,
            x_s=sample,
            x_t=x_t,
            unconditional=unconditional,
            guidance=scale,
        )
        yield Backward(x_s, gradient / gradient.numel())
        if unconditional is not None:
            teacher_flow = guided_flow(teacher_flow, unconditional, scale)
        gap = (teacher_flow - fake_flow).flatten(1).norm(dim=1) / teacher_flow.flatten(1).norm(dim=1)
        return {"dmd_gradient": gradient.abs().mean(), "score_gap": gap.mean()} | by_noise("score_gap", gap, u)

    def fake_loss(
        self, flow: torch.Tensor, x_s: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The fake score's loss of a flow predicted at (x_t, t): Eq. 4, 13 or 15, a scalar in fp32.

        Args:
            flow: [B, ...].
            x_s: samples at the phase's end.
            x_t: the same, diffused to t.
            noise: int64 seeds [B] of the noise that did it.
            t: [B].
        """
        method, s = self.method, torch.full_like(t, self.phase.end)
        output = from_flow(flow, x_t, t, self.schedule, "x0") if method.objective == "x0" else flow
        return score_matching_loss(
            output, x_s, noise, s, t, self.schedule, objective=method.objective, clamp_max=method.clamp_max
        )

    def _truncation(self, counter: Counter, full: bool) -> int:
        """j of SGTS, one draw a global batch: how many of the phase's steps run, the last one jumping to its end."""
        steps = len(self.phase.steps)
        return steps if full else 1 + counter.integer(Purpose.TRUNCATION, steps)

    def _rollout(
        self, counter: Counter, batch: MicroBatch, start: torch.Tensor | None, truncation: int, gradient: bool
    ) -> Rollout:
        """x_s = pipeline(G_1 .. G_k), [B, C, F, H, W] fp32; with `gradient`, through the phase's last step run.

        Without truncation (`--gradient-truncation none`) the gradient runs through all the phase's steps.
        """
        x = (yield from self.phase_start(counter, batch)) if start is None else start
        through_all = self.method.gradient_truncation == "none"
        moves = moves_of((self.phase,), truncation)
        for move in moves:
            x = yield from self._moved(x, move, batch, gradient=gradient and (through_all or move is moves[-1]))
        return x

    def _moved(self, x: torch.Tensor, move: Move, batch: MicroBatch, gradient: bool) -> Rollout:
        """x after one evaluation of a phase's expert and the Euler step."""
        t = torch.full((len(batch.samples),), move.t, device=self.device)
        (flow,) = yield (Pass("generator", move.phase.index, x, t, batch.conditions, gradient=gradient),)
        return euler_step(x, flow, t, torch.full_like(t, move.t_next), self.schedule)

    def interval(self) -> tuple[float, float]:
        """The noise interval from which this phase draws t."""
        method = self.method
        return noise_interval(self.phase, method.noise_interval, self.plan.boundary, fixed_t=method.fixed_timestep)

    def experts(self) -> tuple[Expert, ...]:
        """The teacher's experts that own a part of the interval, the noisier first."""
        low, high = self.interval()
        boundary = self.plan.boundary
        if boundary is not None and low < boundary < high:
            return ("high_noise", "low_noise")
        return (expert_at((low + high) / 2, boundary),)

    def _boundary_quantile(self) -> float:
        """Share of T(t; s, 1) that lies below the teacher's boundary."""
        low, high = self.interval()
        return timestep_cdf(self.plan.boundary, low, high, self.schedule, **self._distribution())

    def _distribution(self) -> dict[str, Any]:
        return {"distribution": self.method.timestep_distribution, "margin": self.method.timestep_margin}

    def expert(self, counter: Counter) -> Expert:
        """The teacher's expert that owns every t of an update: one draw for the global batch, with T's probability."""
        return self.expert_of(counter.uniform(Purpose.TEACHER_SIDE).item())

    def expert_of(self, u: float) -> Expert:
        """The teacher's expert that owns the time at a quantile u of T(t; s, 1)."""
        experts = self.experts()
        return experts[0] if len(experts) == 1 or u >= self._boundary_quantile() else experts[1]

    def times(self, u: torch.Tensor) -> torch.Tensor:
        """The times at quantiles u [B] of T(t; s, 1), which are on the CPU: [B] on the latents' device."""
        return sample_timesteps(u, *self.interval(), self.schedule, **self._distribution()).to(self.device)

    def _diffusion(self, counter: Counter, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Expert]:
        """Quantiles u of t ~ T(t; s, 1) on the update's side of the boundary, [B] on the CPU; the noise's seeds [B];
        that side's expert."""
        noise = counter.seeds(Purpose.DIFFUSION_NOISE, batch.samples, self.device)
        u, expert = counter.uniform(Purpose.DIFFUSION_TIME, batch.samples), self.expert(counter)
        if len(self.experts()) == 2:
            below = self._boundary_quantile()
            u = below + (1 - below) * u if expert == "high_noise" else below * u
        return u, noise, expert


def by_noise(name: str, values: torch.Tensor, u: torch.Tensor) -> Metrics:
    """A metric by level of noise: the sum of the values in each bin, and their number, each as a mean over the batch.

    Sums and counts, whose quotient is wanted, are averaged over micro-batches and ranks like every other number.

    Args:
        name: of the metric.
        values: of each sample, [B].
        u: quantile of each sample's time, [B] on the CPU: the bins are known without waiting for the device.
    """
    bins = (u * NOISE_BINS).long().clamp(max=NOISE_BINS - 1)
    belongs = torch.nn.functional.one_hot(bins, NOISE_BINS).float()
    counts = belongs.mean(0).to(values.device)
    sums = (values.unsqueeze(1) * belongs.to(values.device)).mean(0)
    found = {}
    for index in range(NOISE_BINS):
        found |= {f"{name}_bin_{index}{_SUM}": sums[index], f"{name}_bin_{index}{_COUNT}": counts[index]}
    return found


def quotients(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers to tell: each sum of `by_noise`, averaged over an update, over its count; NaN where a bin has no sample.

    All other numbers stay. So a NaN here says nothing of the update: judge that by what goes in.
    """
    found = {}
    for name, value in values.items():
        bin_name = name.removesuffix(_SUM)
        if name.endswith(_SUM):
            count = values[bin_name + _COUNT]
            found[bin_name] = value / count if count else math.nan
        elif not name.endswith(_COUNT):
            found[name] = value
    return found


def is_binned(name: str) -> bool:
    """Whether a number is of one bin of noise, and may be NaN for want of a sample there."""
    return re.search(r"_bin_\d+$", name) is not None


def guidance_scale(method: MethodConfig, expert: str) -> float:
    """The teacher's guidance scale of an expert: one number for all, or (low noise, high noise)."""
    return method.guidance_scale[-1 if expert == "high_noise" else 0]


def walk(
    program: Coroutine[Request, Reply, Result],
    roles: Roles,
    share: float = 1.0,
    around: Callable[[Pass | Backward], AbstractContextManager[None]] = lambda request: nullcontext(),
) -> Result:
    """Runs a program's passes in order on this rank and returns what it returns.

    Args:
        program: one micro-batch's part of an update, or its start of the phase.
        roles: who answers its passes.
        share: what the micro-batch counts in the update's mean; its gradients are multiplied by it.
        around: each request is answered inside of what this gives for it; for who measures.
    """
    reply = None
    while True:
        try:
            request = program.send(reply)
        except StopIteration as finished:
            return finished.value
        if isinstance(request, Backward):
            with around(request):
                request.run(share)
            reply = None
        else:
            reply = tuple(_answered(one, roles, around) for one in request)


def _answered(request: Pass, roles: Roles, around: Callable[[Pass], AbstractContextManager[None]]) -> torch.Tensor:
    with around(request):
        return roles.run(request)
