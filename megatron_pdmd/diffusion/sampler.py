"""pipeline(G_1 .. G_k): deterministic Euler steps through the phases, and stochastic gradient truncation (section 2.2).

Latents stay in fp32 or fp64; a model that wants another dtype casts its own input.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import pdmd_kernels
from megatron_pdmd.diffusion.noise_schedule import NoiseSchedule
from megatron_pdmd.diffusion.phases import Phase

FlowOfTime = Callable[[Tensor, Tensor], Tensor]
FlowOfStep = Callable[[Tensor, Tensor, Phase], Tensor]


@dataclass(frozen=True)
class Move:
    """One evaluation of a phase's expert at t and the Euler step from t to t_next."""

    phase: Phase
    t: float
    t_next: float


def euler_step(x: Tensor, flow: Tensor, t: Tensor, t_next: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x at t_next if the flow at t were right: alpha' x0 + sigma' eps with the x0 and eps that x and the flow imply.

    For alpha + sigma = 1 this is x + (t_next - t) flow; in general it is DDIM (Song et al. 2021, Eq. 12, eta = 0).

    Args:
        x: latents at t [B, ...], fp32 or fp64.
        flow: the model's eps - x0 at (x, t), of the shape of x, in any dtype.
        t: [B].
        t_next: [B].
        schedule: alpha and sigma.

    Returns:
        [B, ...] in the dtype of x.
    """
    assert x.dtype in (torch.float32, torch.float64), "latents in 16 bits lose the small steps"
    alpha, sigma = schedule.alpha(t_next), schedule.sigma(t_next)
    total = schedule.alpha(t) + schedule.sigma(t)
    return pdmd_kernels.euler_step(x, flow, (alpha + sigma) / total, schedule.determinant(t, t_next) / total)


def moves_of(phases: Sequence[Phase], truncate_at: int | None = None) -> tuple[Move, ...]:
    """The moves of the pipeline through the given phases.

    Args:
        phases: phases 1 to k.
        truncate_at: j of stochastic gradient truncation, from 1 to the last phase's number of steps. The last phase
            then stops at its j-th evaluation and jumps from there straight to its end s.
    """
    moves = [Move(phase, t, t_next) for phase in phases for t, t_next in pairwise((*phase.steps, phase.end))]
    if truncate_at is None:
        return tuple(moves)
    last = phases[-1]
    assert 1 <= truncate_at <= len(last.steps), f"phase {last.index} has no step {truncate_at}"
    kept = len(moves) - len(last.steps) + truncate_at - 1
    return (*moves[:kept], Move(last, last.steps[truncate_at - 1], last.end))


def make_move(flow_of_step: FlowOfStep, x: Tensor, move: Move, schedule: NoiseSchedule) -> Tensor:
    """Evaluates the expert at x and takes the Euler step."""
    return _evaluate_and_step(lambda x, t: flow_of_step(x, t, move.phase), x, move.t, move.t_next, schedule)


def sample(
    flow_of_step: FlowOfStep,
    x: Tensor,
    phases: Sequence[Phase],
    schedule: NoiseSchedule,
    *,
    truncate_at: int | None = None,
) -> Tensor:
    """x_{t_k} from noise, through phases 1 to k.

    Unless the caller switched gradients off, they run through the last phase: all its steps, or with truncate_at only
    the evaluation that jumps. Everything before is made without a graph.

    Args:
        flow_of_step: the generator, (x [B, ...], t [B], phase) -> flow [B, ...].
        x: standard normal noise [B, ...], fp32 or fp64.
        phases: phases 1 to k.
        schedule: alpha and sigma.
        truncate_at: see `moves_of`.

    Returns:
        Samples at the last phase's end [B, ...] in the dtype of x.
    """
    moves = moves_of(phases, truncate_at)
    recording = torch.is_grad_enabled()
    for move in moves:
        trained = move.phase == phases[-1] if truncate_at is None else move is moves[-1]
        with torch.set_grad_enabled(recording and trained):
            x = make_move(flow_of_step, x, move, schedule)
    return x


def euler_path(
    flow_of_time: FlowOfTime, x: Tensor, times: Sequence[float], schedule: NoiseSchedule
) -> Iterator[Tensor]:
    """Yields x at each of the given times after the first, by one Euler step from time to time.

    Args:
        flow_of_time: a teacher, (x [B, ...], t [B]) -> flow [B, ...].
        x: latents at times[0] [B, ...], fp32 or fp64.
        times: noise levels, usually falling from 1 to 0.
        schedule: alpha and sigma.
    """
    for t, t_next in pairwise(times):
        x = _evaluate_and_step(flow_of_time, x, t, t_next, schedule)
        yield x


def sample_along(flow_of_time: FlowOfTime, x: Tensor, times: Sequence[float], schedule: NoiseSchedule) -> Tensor:
    """The last x of `euler_path`: a teacher's sample at times[-1]."""
    for latest in euler_path(flow_of_time, x, times, schedule):
        x = latest
    return x


def _evaluate_and_step(flow_of_time: FlowOfTime, x: Tensor, t: float, t_next: float, schedule: NoiseSchedule) -> Tensor:
    """One evaluation and one step; the model gets t in the dtype of x, the coefficients are computed in fp64."""
    now, later = (torch.full(x.shape[:1], time, dtype=torch.float64, device=x.device) for time in (t, t_next))
    return euler_step(x, flow_of_time(x, now.to(x.dtype)), now, later, schedule)
