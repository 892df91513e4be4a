"""Updates that share a start of the phase: which passes run, what is shared, what is fresh, how it is distributed."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_pdmd.config import MethodConfig
from megatron_pdmd.diffusion import FlowMatchingSchedule, PhasePlan
from megatron_pdmd.diffusion.sampler import euler_step
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.distillation.roles import Pass
from megatron_pdmd.distillation.step import GENERATOR_UPDATE, Iteration, MicroBatch, walk
from megatron_pdmd.distillation.updates import Update, updates_of

SEED, PHASE, FAKES = 5, 2, 5
SCHEDULE = FlowMatchingSchedule(3.0)
FACTORS = {"teacher": 0.5, "fake_score": -0.3, 1: 0.7, 2: -0.4, 3: 0.6}


class LinearRoles:
    """flow = factor x_t + conditions, for all networks; notes what they are asked."""

    def __init__(self):
        self.asked: list[Pass] = []

    def run(self, request: Pass) -> torch.Tensor:
        self.asked.append(request)
        factor = torch.tensor(FACTORS[request.key if request.role == "generator" else request.role])
        return factor.requires_grad_(request.gradient) * request.x_t + request.conditions


@dataclass
class Ran:
    """An update and the passes it asked for itself, without those of a start it was given."""

    update: Update
    passes: list[Pass]

    def generator(self, phase: int) -> list[Pass]:
        return [one for one in self.passes if (one.role, one.key) == ("generator", phase)]


def method_of(reuse: int, **more) -> MethodConfig:
    return replace(MethodConfig(phase_start_reuse=reuse, fake_updates=FAKES, timestep_shift=3.0), **more)


def iteration_of(method: MethodConfig, phase: int = PHASE, shape: tuple[int, ...] = (1, 2, 2, 2)) -> Iteration:
    plan = PhasePlan.build(method.num_steps, method.phase_steps, SCHEDULE, None)
    return Iteration(method, plan, plan.phases[phase - 1], SCHEDULE, shape, torch.device("cpu"))


def batch_of(update: Update, samples) -> MicroBatch:
    """Prompts that `shared` draws."""
    prompts = 0.1 * torch.tensor(update.shared.integers(Purpose.PROMPT, 50, samples)).view(-1, 1, 1, 1, 1)
    return MicroBatch(samples, prompts, torch.zeros_like(prompts))


def run(iteration: Iteration, samples=range(3), index: int = 1, first: int = 0) -> tuple[list[Ran], list[Pass]]:
    """The updates of an iteration from position `first` on, and the passes of the starts they share."""
    starts, frozen, found = {}, [], []
    for update in updates_of(iteration.method, SEED, iteration.phase.index, index)[first:]:
        batch, roles = batch_of(update, samples), LinearRoles()
        if update.start is not None and update.start not in starts:
            starts[update.start] = walk(iteration.phase_start(update.shared, batch), roles)
            frozen, roles = frozen + roles.asked, LinearRoles()
        walk(update.program(iteration, batch, starts.get(update.start)), roles)
        found.append(Ran(update, roles.asked))
    return found, frozen


def assert_same_passes(ours: list[Pass], theirs: list[Pass]) -> None:
    """To the bit."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one.role, one.key, one.gradient) == (other.role, other.key, other.gradient)
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("x_t", "t", "conditions"))


def positions(method: MethodConfig, phase: int, index: int) -> list[tuple[int, int, int | None]]:
    """Of each update its counter's, its shared counter's `update`, and its start."""
    found = updates_of(method, SEED, phase, index)
    assert [one.kind for one in found] == ["fake"] * (len(found) - 1) + ["generator"]
    assert {replace(one, update=0) for both in found for one in (both.counter, both.shared)} == {
        Counter(SEED, phase, index, 0)
    }
    return [(one.counter.update, one.shared.update, one.start) for one in found]


G = GENERATOR_UPDATE


@pytest.mark.parametrize(
    ("reuse", "expected"),
    [
        (1, [(0, 0, None), (1, 1, None), (2, 2, None), (3, 3, None), (4, 4, None), (G, G, None)]),
        (2, [(0, 0, 0), (1, 0, 0), (2, 2, 1), (3, 2, 1), (4, 4, 2), (G, 4, 2)]),
        (3, [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 3, 1), (4, 3, 1), (G, 3, 1)]),
        (5, [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (G, G, 1)]),
        (6, [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (G, 0, 0)]),
        (99, [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (G, 0, 0)]),
    ],
)
def test_groups_are_updates_in_a_row_and_their_counter_is_the_firsts(reuse, expected):
    assert positions(method_of(reuse), 2, 1) == expected
    assert positions(method_of(reuse), 1, 1) == [(own, own, None) for own, _, _ in expected]


def test_the_updates_of_a_warm_up_are_counted_with_the_others():
    found = positions(method_of(3, fake_updates=2, fake_warmup=2), 2, 0)
    assert found == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 3, 1), (G, 3, 1)]
    assert positions(method_of(3, fake_updates=2, fake_warmup=2), 2, 1) == [(0, 0, 0), (1, 0, 0), (G, 0, 0)]


@pytest.mark.parametrize(("phase", "reuse"), [(1, 1), (1, 6), (2, 1), (3, 1)])
def test_without_reuse_and_in_the_first_phase_each_update_is_on_its_own(phase, reuse):
    """It is what the programs make of the update's own counter, to the bit."""
    iteration = iteration_of(method_of(reuse, phase_steps=(1, 1, 2)), phase)
    found, frozen = run(iteration)
    assert frozen == []
    for position, ran in enumerate(found):
        counter = Counter(SEED, phase, 1, position if position < FAKES else GENERATOR_UPDATE)
        update = iteration.fake_update if position < FAKES else iteration.generator_update
        roles = LinearRoles()
        walk(update(counter, batch_of(Update("fake", counter, counter), range(3))), roles)
        assert_same_passes(ran.passes, roles.asked)


@pytest.mark.parametrize(("reuse", "starts"), [(1, 6), (2, 3), (3, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize(("phase", "steps_before"), [(2, 1), (3, 3)])
def test_frozen_phases_run_once_a_group_and_all_else_as_often_as_without(reuse, starts, phase, steps_before):
    steps = (1, 2, 1)
    found, frozen = run(iteration_of(method_of(reuse, phase_steps=steps), phase))
    alone, _ = run(iteration_of(method_of(1, phase_steps=steps), phase))
    inline = [one for ran in found for one in ran.passes if one.role == "generator" and one.key < phase]
    assert len(frozen) + len(inline) == starts * steps_before
    assert not any(one.gradient for one in frozen)
    for ran, other in zip(found, alone, strict=True):
        kinds = [
            [(one.role, one.key, one.gradient) for one in passes if one.role != "generator" or one.key == phase]
            for passes in (ran.passes, other.passes)
        ]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize("reuse", [2, 3, 6])
def test_a_group_shares_prompts_and_the_phases_start_and_draws_all_else_afresh(reuse):
    """Diffusion times, its noise and the truncation are those of the update's own counter, to the bit."""
    iteration = iteration_of(method_of(reuse))
    found, _ = run(iteration)
    alone, _ = run(iteration_of(method_of(1)))
    entered = [ran.generator(PHASE)[0] for ran in found]
    for ran, start in zip(found, entered, strict=True):
        same = [other.update.start == ran.update.start for other in found]
        assert [torch.equal(start.x_t, other.x_t) for other in entered] == same
        assert all(torch.equal(one.conditions, start.conditions) for one in (ran.passes[0], ran.passes[-1]))
    times = [ran.passes[-1].t for ran in found]
    assert not any(torch.equal(one, other) for n, one in enumerate(times) for other in times[:n])
    for ran, other in zip(found, alone, strict=True):
        assert torch.equal(ran.passes[-1].t, other.passes[-1].t)
        assert len(ran.generator(PHASE)) == len(other.generator(PHASE))
        last, judged = ran.generator(PHASE)[-1], ran.passes[-1]
        s = torch.full_like(judged.t, iteration.phase.end)
        x_s = euler_step(last.x_t, LinearRoles().run(last).detach(), last.t, s, SCHEDULE)
        noise = ran.update.counter.seeds(Purpose.DIFFUSION_NOISE, range(3))
        assert torch.equal(judged.x_t, SCHEDULE.diffuse(x_s, noise, s, judged.t))
        if ran.update.counter == ran.update.shared:
            assert_same_passes(ran.passes, [one for one in other.passes if one.key != 1])
    assert len({len(ran.generator(PHASE)) for ran in found}) == 2


@pytest.mark.parametrize("reuse", [2, 3, 4, 6])
def test_an_iteration_can_be_entered_at_any_update(reuse):
    iteration = iteration_of(method_of(reuse))
    whole, _ = run(iteration)
    for first in range(1, FAKES + 1):
        rest, _ = run(iteration, first=first)
        for ran, other in zip(rest, whole[first:], strict=True):
            assert_same_passes(ran.passes, other.passes)


def test_a_sample_has_the_same_start_in_any_micro_batch():
    iteration = iteration_of(method_of(3))
    update = updates_of(iteration.method, SEED, PHASE, 1)[1]

    def start(samples) -> torch.Tensor:
        return walk(iteration.phase_start(update.shared, batch_of(update, samples)), LinearRoles())

    parts = torch.cat([start(samples) for samples in ([0], [1, 2], [3])])
    assert torch.equal(parts, start(range(4)))


def judged_samples(reuse: int, count: int) -> torch.Tensor:
    """x_t that the fake score sees in each update of an iteration, of samples of one number: [updates, count]."""
    found, _ = run(iteration_of(method_of(reuse, fake_rollout="full"), shape=(1, 1, 1, 1)), range(count))
    return torch.stack([ran.passes[-1].x_t.flatten() for ran in found[:FAKES]]).double()


def kolmogorov_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Between two samples of a distribution."""
    values = torch.cat((one, other)).sort().values
    shares = [torch.searchsorted(part.sort().values, values, right=True) / len(part) for part in (one, other)]
    return (shares[0] - shares[1]).abs().max().item()


def test_reuse_correlates_the_updates_of_an_iteration_and_leaves_the_distribution_of_each():
    """Bounds of p < 1e-6 each: two-sample Kolmogorov-Smirnov, and five standard errors of a correlation of zero.

    Samples a fifth too large would be noticed.
    """
    count = 4096
    alone, shared = (judged_samples(reuse, count) for reuse in (1, 6))
    assert torch.equal(alone[0], shared[0])
    for update in range(1, FAKES):
        assert kolmogorov_distance(alone[update], shared[update]) < math.sqrt(math.log(2e6) / count)
    between = ~torch.eye(FAKES, dtype=torch.bool)
    assert alone.corrcoef()[between].abs().max() < 5 / math.sqrt(count)
    assert shared.corrcoef()[between].min() > 5 / math.sqrt(count)
    assert kolmogorov_distance(alone[1], 1.2 * shared[1]) > math.sqrt(math.log(2e6) / count)
