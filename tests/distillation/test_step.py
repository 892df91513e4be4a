"""What an iteration asks of the models, and the gradients it sends back, with models small enough for closed forms."""

import contextlib
import math
from collections import Counter as Tally
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_pdmd.config import MethodConfig
from megatron_pdmd.diffusion import FlowMatchingSchedule, PhasePlan, expert_at
from megatron_pdmd.diffusion.noise_schedule import timestep_cdf
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.distillation.roles import Backward, Generator, Pass, Roles
from megatron_pdmd.distillation.step import (
    GENERATOR_UPDATE,
    NOISE_BINS,
    Iteration,
    MicroBatch,
    is_binned,
    quotients,
    walk,
)

SHAPE = (1, 2, 2, 2)
TIMES = (1.0, 0.9, 0.75, 0.5)  # of four steps at shift 3
FACTORS = {"teacher": 0.5, "fake_score": -0.3, "generator_1": 0.7, "generator_2": -0.4}
COUNTER = Counter(seed=11, phase=2, iteration=0, update=GENERATOR_UPDATE)


@dataclass
class Call:
    """One evaluation of a model."""

    name: str
    adapter: str | None
    x_t: torch.Tensor
    t: torch.Tensor
    conditions: torch.Tensor
    learns: bool


class Linear(torch.nn.Module):
    """flow = factor x_t + conditions; notes every call."""

    def __init__(self, name: str, calls: list[Call]):
        super().__init__()
        self.name = name
        self.calls = calls
        self.factor = torch.nn.Parameter(torch.tensor(FACTORS.get(name, FACTORS[name.split("/")[0]])))

    def forward(self, x_t, t, conditions, adapter=None):
        self.calls.append(Call(self.name, adapter, x_t.detach(), t, conditions, torch.is_grad_enabled()))
        return self.factor * x_t + conditions


class Setting:
    """An iteration of one phase with linear models for all roles."""

    def __init__(self, phase: int, boundary: float | None = None, **method):
        self.method = replace(MethodConfig(timestep_shift=3.0, guidance_scale=(4.0,)), **method)
        self.schedule = FlowMatchingSchedule(self.method.timestep_shift)
        plan = PhasePlan.build(self.method.num_steps, self.method.phase_steps, self.schedule, boundary)
        self.iteration = Iteration(self.method, plan, plan.phases[phase - 1], self.schedule, SHAPE, torch.device("cpu"))
        self.calls: list[Call] = []
        experts = ("single",) if boundary is None else ("high_noise", "low_noise")
        self.teacher = {name: Linear(f"teacher/{name}", self.calls) for name in experts}
        self.fake_score = {name: Linear(f"fake_score/{name}", self.calls) for name in experts}
        self.generators = {k: self._generator(k) for k in range(1, phase + 1)}
        self.roles = Roles(
            self.teacher, self.fake_score, {k: Generator(g, f"phase_{k}") for k, g in self.generators.items()}
        )

    def _generator(self, phase: int) -> Linear:
        model = Linear(f"generator_{1 + (phase - 1) % 2}", self.calls)
        model.name = f"generator/{phase}"
        return model

    def batch(self, samples=(0, 1)) -> MicroBatch:
        """Sample i has the prompt 0.1 i, and -0.2 as negative prompt; the generator and the fake score see prompts."""
        prompts = torch.tensor([0.1 * i for i in samples]).view(-1, 1, 1, 1, 1)
        return MicroBatch(samples, prompts, torch.full_like(prompts, -0.2))

    def run(self, update: str, counter: Counter = COUNTER, samples=(0, 1), share: float = 1.0) -> list[Call]:
        """The calls of one update; gradients stay on the factors."""
        self.calls.clear()
        walk(getattr(self.iteration, update)(counter, self.batch(samples)), self.roles, share)
        return list(self.calls)

    def rollout(self, calls: list[Call]) -> list[tuple[str, float]]:
        return [(call.name, round(call.t[0].item(), 6)) for call in calls if call.name.startswith("generator")]


def shown(calls: list[Call]) -> list[str]:
    return [call.name + ("*" if call.learns else "") for call in calls]


def truncations(setting: Setting, update: str, count: int) -> Tally:
    """How often the phase's steps ran so often, over iterations."""
    own = f"generator/{setting.iteration.phase.index}"
    counters = (COUNTER.at(iteration=i) for i in range(count))
    return Tally(sum(call.name == own for call in setting.run(update, counter, samples=(0,))) for counter in counters)


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("update", ["fake_update", "generator_update"])
def test_rollouts_walk_through_the_phases_and_stop_after_j_steps_of_the_last(phase, update):
    setting, seen = Setting(phase), set()
    before = [("generator/1", t) for t in TIMES[:2]] if phase == 2 else []
    own = [(f"generator/{phase}", t) for t in (TIMES[:2] if phase == 1 else TIMES[2:])]
    for iteration in range(8):
        rollout = tuple(setting.rollout(setting.run(update, COUNTER.at(iteration=iteration))))
        assert rollout in {tuple(before + own[:1]), tuple(before + own)}
        seen.add(rollout)
    assert len(seen) == 2


@pytest.mark.parametrize("phase", [1, 2])
def test_passes_of_a_fake_update(phase):
    setting = Setting(phase)
    calls = setting.run("fake_update")
    passes = shown(calls)
    assert passes[-1] == "fake_score/single*"
    assert all(name.startswith("generator/") and not name.endswith("*") for name in passes[:-1])
    assert torch.equal(calls[-1].conditions, setting.batch().conditions)
    assert setting.fake_score["single"].factor.grad is not None
    others = [*setting.teacher.values(), *setting.generators.values()]
    assert all(model.factor.grad is None for model in others)


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("truncation", ["sgts", "none"])
def test_passes_of_a_generator_update(phase, truncation):
    setting = Setting(phase, gradient_truncation=truncation)
    for iteration in range(4):
        calls = setting.run("generator_update", COUNTER.at(iteration=iteration))
        rollout, judged = shown(calls)[:-3], calls[-3:]
        assert shown(judged) == ["teacher/single", "teacher/single", "fake_score/single"]
        learning = [name.endswith("*") for name in rollout]
        if truncation == "sgts":
            assert learning == [False] * (len(rollout) - 1) + [True]
        else:
            assert learning == [False] * (2 * phase - 2) + [True, True]
        batch = setting.batch()
        for call, conditions in zip(judged, (batch.conditions, batch.negative, batch.conditions), strict=True):
            assert torch.equal(call.conditions, conditions)
            assert torch.equal(call.x_t, judged[0].x_t) and torch.equal(call.t, judged[0].t)
    assert {call.adapter for call in calls if call.name.startswith("generator")} == {
        f"phase_{k}" for k in range(1, phase + 1)
    }
    frozen = [*setting.teacher.values(), *setting.fake_score.values()]
    frozen += [model for k, model in setting.generators.items() if k < phase]
    assert all(model.factor.grad is None for model in frozen)
    assert setting.generators[phase].factor.grad != 0


@pytest.mark.parametrize("update", ["fake_update", "generator_update"])
def test_j_is_uniform_over_the_phases_steps(update):
    count = 150
    for steps in ((4,), (1, 3)):
        seen = truncations(Setting(len(steps), phase_steps=steps), update, count)
        expected = count / steps[-1]
        chi_squared = sum((seen[j] - expected) ** 2 / expected for j in range(1, steps[-1] + 1))
        assert set(seen) == set(range(1, steps[-1] + 1))
        assert chi_squared < 30.7  # at most 3 degrees of freedom: p < 1e-6


def test_j_is_one_draw_for_the_global_batch_and_the_fakes_own():
    setting = Setting(1, phase_steps=(4,))
    agreeing = 0
    for iteration in range(40):
        counter = COUNTER.at(iteration=iteration)
        rollouts = [setting.rollout(setting.run("generator_update", counter, samples=[s])) for s in range(3)]
        assert rollouts[0] == rollouts[1] == rollouts[2]
        fake = setting.rollout(setting.run("fake_update", counter.at(update=0), samples=[0]))
        agreeing += fake == rollouts[0]
    assert 0 < agreeing < 40


@pytest.mark.parametrize(
    ("truncation", "fake_rollout", "generator_steps", "fake_steps"),
    [
        ("sgts", "same", {1, 2}, {1, 2}),
        ("sgts", "full", {1, 2}, {2}),
        ("none", "same", {2}, {2}),
        ("none", "full", {2}, {2}),
    ],
)
def test_the_fake_score_learns_from_what_the_generator_update_samples_or_from_full_rollouts(
    truncation, fake_rollout, generator_steps, fake_steps
):
    setting = Setting(2, gradient_truncation=truncation, fake_rollout=fake_rollout)
    assert set(truncations(setting, "generator_update", 20)) == generator_steps
    assert set(truncations(setting, "fake_update", 20)) == fake_steps


def by_hand(setting: Setting, calls: list[Call], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """x_t and the generator's gradient for the linear models, written out.

    With SGTS x_s = x + (s - t) flow(x) from the last step's input x. Without it phase 2 is two steps, each of which
    multiplies x by 1 + dt phi and adds dt c, so d x_s / d phi follows from the product rule.
    """
    phase, iteration = setting.iteration.phase, setting.iteration
    phi = torch.tensor(FACTORS[f"generator_{phase.index}"], dtype=torch.float32).to(dtype)
    own = [call for call in calls if call.name == f"generator/{phase.index}"]
    prompts = own[0].conditions.to(dtype)
    ends = torch.tensor([*phase.steps[1 : len(own)], phase.end]).double()
    steps = [(end - call.t[0].double()).to(dtype) for call, end in zip(own, ends, strict=True)]
    inputs = [call.x_t.to(dtype) for call in own]
    outputs = [x + dt * (phi * x + prompts) for x, dt in zip(inputs, steps, strict=True)]
    slope = steps[-1] * inputs[-1]
    if setting.method.gradient_truncation == "none":
        slope = slope + (1 + steps[-1] * phi) * steps[0] * inputs[0]
    samples = range(len(prompts))
    eps = COUNTER.normal(Purpose.DIFFUSION_NOISE, iteration.latent_shape, samples).to(dtype)
    t = calls[-1].t.to(dtype).view(-1, 1, 1, 1, 1)
    s = torch.tensor(phase.end, dtype=torch.float32).to(dtype)
    alpha_ts = (1 - t) / (1 - s)
    x_t = alpha_ts * outputs[-1] + (t**2 - (alpha_ts * s) ** 2).sqrt() * eps
    teacher, fake = (torch.tensor(FACTORS[role], dtype=torch.float32).to(dtype) for role in ("teacher", "fake_score"))
    conditional, unconditional = teacher * x_t + prompts, teacher * x_t - torch.tensor(0.2).to(dtype)
    guided = unconditional + 4 * (conditional - unconditional)
    gradient = (1 - t) * alpha_ts / t * (guided - (fake * x_t + prompts))
    return {"x_t": x_t, "gradient": (gradient * slope).sum() / gradient.numel()}


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("truncation", ["sgts", "none"])
def test_the_generators_gradient_is_that_of_gradient_times_x_s(phase, truncation, assert_as_accurate_as_torch):
    setting = Setting(phase, gradient_truncation=truncation)
    calls = setting.run("generator_update", samples=range(3))
    plain, exact = (by_hand(setting, calls, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_accurate_as_torch(calls[-1].x_t, plain["x_t"], exact["x_t"])
    torch.testing.assert_close(setting.generators[phase].factor.grad, exact["gradient"].float())


@pytest.mark.parametrize("phase", [1, 2])
def test_sgts_jumps_from_its_last_step_to_the_phases_end(phase):
    """The fake score sees x_t made of an x_s at s, whichever step was the last."""
    setting, starts = Setting(phase), set()
    s = torch.tensor(setting.iteration.phase.end)
    for iteration in range(8):
        counter = COUNTER.at(iteration=iteration)
        last, fake = setting.run("fake_update", counter)[-2:]
        x_s = last.x_t + (s - last.t[0]) * (FACTORS[f"generator_{phase}"] * last.x_t + last.conditions)
        eps = counter.normal(Purpose.DIFFUSION_NOISE, SHAPE, range(2))
        torch.testing.assert_close(fake.x_t, setting.schedule.diffuse(x_s, eps, s.expand(2), fake.t))
        starts.add(round(last.t[0].item(), 6))
    assert starts == set(TIMES[2 * phase - 2 : 2 * phase])


@pytest.mark.parametrize("update", ["fake_update", "generator_update"])
@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0], [1], [2], [3]]])
def test_micro_batches_give_the_gradient_of_the_whole_batch(update, groups):
    whole, parts = (Setting(2, boundary=0.75, dmd_weighting="mean_abs") for _ in range(2))
    for iteration in range(8):
        counter = COUNTER.at(iteration=iteration)
        whole.run(update, counter, samples=range(4))
        for group in groups:
            parts.run(update, counter, samples=group, share=1 / len(groups))
    learned = 0
    for one, other in ((whole.generators, parts.generators), (whole.fake_score, parts.fake_score)):
        for key in one:
            if one[key].factor.grad is not None:
                torch.testing.assert_close(other[key].factor.grad, one[key].factor.grad)
                learned += 1
    assert learned == (1 if update == "generator_update" else 2)


def test_one_expert_answers_for_the_whole_batch_and_owns_its_times():
    """The times of all updates together are T's."""
    setting, count = Setting(2, boundary=0.75), 200
    times = []
    for iteration in range(count):
        counter = COUNTER.at(iteration=iteration)
        calls = setting.run("generator_update", counter, samples=range(2))[-3:]
        assert {call.name.split("/")[1] for call in calls} == {setting.iteration.expert(counter)}
        assert {expert_at(t, 0.75) for t in calls[0].t.tolist()} == {setting.iteration.expert(counter)}
        times.append(calls[0].t[0].item())
    assert kolmogorov_distance(setting, sorted(times)) < 2.65 / math.sqrt(count)  # p = 1.6e-6


@pytest.mark.parametrize("boundary", [0.75, 0.6])
def test_an_expert_answers_with_the_probability_of_its_side(boundary):
    setting, count = Setting(2, boundary=boundary), 1000
    low, high = setting.iteration.interval()
    above = 1 - timestep_cdf(boundary, low, high, setting.schedule, margin=setting.method.timestep_margin)
    sides = Tally(setting.iteration.expert(COUNTER.at(iteration=i)) for i in range(count))
    assert abs(sides["high_noise"] - count * above) < 5 * math.sqrt(count * above * (1 - above))


def kolmogorov_distance(setting: Setting, times: list[float]) -> float:
    """Between drawn times and T(t; low, high)."""
    low, high = setting.iteration.interval()
    margin, distribution = setting.method.timestep_margin, setting.method.timestep_distribution
    exact = [timestep_cdf(t, low, high, setting.schedule, distribution=distribution, margin=margin) for t in times]
    count = len(times)
    return max(max(p - i / count, (i + 1) / count - p) for i, p in enumerate(exact))


def test_a_phase_of_the_high_noise_expert_needs_that_expert_alone():
    setting = Setting(1, boundary=0.8)
    assert setting.iteration.interval() == (0.8, 1.0)
    assert setting.iteration.experts() == ("high_noise",)
    for iteration in range(20):
        calls = setting.run("generator_update", COUNTER.at(iteration=iteration))[-3:]
        assert {call.name.split("/")[1] for call in calls} == {"high_noise"}
        assert all((call.t >= 0.8).all() for call in calls)


@pytest.mark.parametrize(
    ("mode", "phase", "boundary", "expected", "experts"),
    [
        ("nested", 1, None, (0.75, 1.0), ("single",)),
        ("nested", 2, None, (0.0, 1.0), ("single",)),
        ("nested", 2, 0.75, (0.0, 1.0), ("high_noise", "low_noise")),
        ("disjoint", 1, 0.75, (0.75, 1.0), ("high_noise",)),
        ("disjoint", 2, 0.75, (0.0, 0.75), ("low_noise",)),
        ("fixed", 1, 0.75, (0.882, 0.882), ("high_noise",)),
        ("fixed", 2, 0.75, (0.882, 0.882), ("high_noise",)),
    ],
)
def test_noise_intervals(mode, phase, boundary, expected, experts):
    setting = Setting(phase, boundary=boundary, noise_interval=mode)
    assert setting.iteration.interval() == pytest.approx(expected)
    assert setting.iteration.experts() == experts
    times = [setting.run("fake_update", COUNTER.at(iteration=i))[-1].t for i in range(60)]
    drawn = setting.schedule.unshifted(torch.cat(times).double())
    low, high = setting.schedule.unshifted(torch.tensor(expected, dtype=torch.float64))
    margin = setting.method.timestep_margin if low < high else 0.0
    rounding = 4 * torch.finfo(torch.float32).eps
    assert (drawn >= low + margin - rounding).all() and (drawn <= high - margin + rounding).all()
    assert drawn.max() - drawn.min() >= 0.7 * (high - low - 2 * margin)


@pytest.mark.parametrize(
    ("scale", "negatives"),
    [((1.0,), {"high_noise": 0, "low_noise": 0}), ((1.0, 4.0), {"high_noise": 1, "low_noise": 0})],
)
def test_guidance_of_scale_1_costs_no_pass_and_scales_stand_low_noise_first(scale, negatives):
    setting, seen = Setting(2, boundary=0.75, guidance_scale=scale), set()
    for iteration in range(12):
        calls = setting.run("generator_update", COUNTER.at(iteration=iteration))
        teacher = [call for call in calls if call.name.startswith("teacher")]
        expert = teacher[0].name.split("/")[1]
        seen.add(expert)
        assert len(teacher) == 1 + negatives[expert]
    assert seen == {"high_noise", "low_noise"}


@pytest.mark.parametrize(
    ("method", "ends", "learning"),
    [
        (MethodConfig(phase_steps=(4,), gradient_truncation="none"), (0.0,), {4}),
        (MethodConfig(phase_steps=(4,), gradient_truncation="sgts"), (0.0,), {1}),
        (MethodConfig(phase_steps=(1, 1, 1, 1)), (0.9, 0.75, 0.5, 0.0), {1}),
        (MethodConfig(phase_steps=(2, 2)), (0.75, 0.0), {1}),
    ],
    ids=["few-step DMD", "DMD with SGTS", "Phased DMD", "Phased DMD with SGTS"],
)
def test_the_four_methods_of_figure_1_are_settings_of_one_iteration(method, ends, learning):
    for phase, end in enumerate(ends, start=1):
        setting = Setting(phase, phase_steps=method.phase_steps, gradient_truncation=method.gradient_truncation)
        assert setting.iteration.phase.end == pytest.approx(end)
        depths = set()
        for iteration in range(6):
            calls = setting.run("generator_update", COUNTER.at(iteration=iteration))
            depths.add(sum(call.learns for call in calls))
            assert all((call.t >= end).all() for call in calls[-3:])
        assert depths == learning


@pytest.mark.parametrize("objective", ["flow", "x0", "biased"])
def test_every_objective_reaches_the_fake_score(objective):
    setting = Setting(1, objective=objective)
    setting.run("fake_update")
    assert setting.fake_score["single"].factor.grad.abs() > 0


def test_flows_are_fp32_whatever_the_model_computes_in():
    class Half(torch.nn.Module):
        def forward(self, x_t, t, conditions, adapter=None):
            return x_t.bfloat16()

    roles = Roles({"single": Half()}, {}, {})
    request = Pass("teacher", "single", torch.randn(2, *SHAPE), torch.full((2,), 0.5), None)
    assert roles.run(request).dtype == torch.float32


@pytest.mark.parametrize("update", ["fake_update", "generator_update"])
def test_noise_is_drawn_on_the_device_of_the_latents(update, noise_devices):
    """A backend for that device alone must be enough, and nothing big may cross over; meta stands for any device."""
    setting = Setting(1)
    iteration = replace(setting.iteration, device=torch.device("meta"))
    passes = getattr(iteration, update)(COUNTER, setting.batch())
    request, seen = next(passes), 0
    with contextlib.suppress(StopIteration):
        while True:
            asked = () if isinstance(request, Backward) else request
            assert all(one.x_t.device.type == one.t.device.type == "meta" for one in asked)
            seen += len(asked)
            request = passes.send(tuple(torch.empty_like(one.x_t) for one in asked))
    assert noise_devices == ["meta"] and seen >= 2


def gap_by_noise(setting: Setting, counter: Counter, groups: list[list[int]]) -> dict[str, float]:
    """What micro-batches of a generator update tell, averaged as their numbers are averaged over ranks."""
    told = [
        walk(setting.iteration.generator_update(counter, setting.batch(group)), setting.roles, 1 / len(groups))
        for group in groups
    ]
    return quotients({name: sum(one[name].item() for one in told) / len(told) for name in told[0]})


@pytest.mark.parametrize("boundary", [None, 0.75])
@pytest.mark.parametrize("groups", [[range(8)], [[0, 1], [2, 3], [4, 5], [6, 7]]], ids=["whole", "micro-batches"])
def test_the_score_gap_is_told_by_level_of_noise(boundary, groups):
    """Each sample's gap counts in the bin of its time's quantile, whatever the micro-batches; empty bins are NaN."""
    setting, seen = Setting(2, boundary=boundary, dmd_weighting="mean_abs"), set()
    low, high = setting.iteration.interval()
    for iteration in range(6):
        counter = COUNTER.at(iteration=iteration)
        found = gap_by_noise(setting, counter, groups)
        expected = {index: [] for index in range(NOISE_BINS)}
        for sample in range(8):
            gap = gap_by_noise(setting, counter, [[sample]])["score_gap"]
            time = setting.calls[-1].t.item()
            quantile = timestep_cdf(time, low, high, setting.schedule, margin=setting.method.timestep_margin)
            expected[int(quantile * NOISE_BINS)].append(gap)
        assert found.keys() == {"dmd_gradient", "score_gap"} | {f"score_gap_bin_{index}" for index in expected}
        for index, gaps in expected.items():
            value = found[f"score_gap_bin_{index}"]
            assert math.isnan(value) if not gaps else value == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
            seen.add((index, bool(gaps)))
    assert {index for index, full in seen if full} == set(range(NOISE_BINS)) and not all(full for _, full in seen)


def test_numbers_of_single_bins_are_known_by_name():
    assert is_binned("score_gap_bin_3") and not is_binned("score_gap") and not is_binned("bin_width")
