"""Evaluations on fixed prompts and noise: what they find, and that training does not notice them."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_pdmd.config import CheckpointConfig, Config, EvaluationConfig, MethodConfig
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.diffusion import FlowMatchingSchedule, PhasePlan
from megatron_pdmd.distillation.randomness import Counter, Purpose
from megatron_pdmd.distillation.roles import Generator, Roles
from megatron_pdmd.distillation.score_matching import subinterval_target
from megatron_pdmd.distillation.step import NOISE_BINS, Iteration
from megatron_pdmd.parallel import Topology, initialize_topology
from megatron_pdmd.training.sampling import SAMPLING_PHASE, Sampler
from megatron_pdmd.training.validation import Validation

SHAPE, COUNT, STEPS = (1, 2, 4, 4), 3, 4
SCHEDULE = FlowMatchingSchedule(3.0)
EVALUATED = ("--eval-interval", "1")


class Affine:
    """flow = factor x_t + the prompt; each sample's is its own."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, x_t, t, conditions, adapter=None):
        return self.factor * x_t + conditions.mean((1, 2)).view(-1, 1, 1, 1, 1)


def sampler_of(topology: Topology, batch_size: int = 1, student: float = 0.5, fake: float = 0.5, steps=(4,)) -> Sampler:
    plan = PhasePlan.build(sum(steps), steps, SCHEDULE)
    teacher = {"single": Affine(0.5)}
    generators = {phase.index: Generator(Affine(student), None) for phase in plan.phases}
    text = torch.linspace(-1, 1, 5).view(5, 1, 1).expand(5, 2, 3)
    prompts = PromptEmbeddings(tuple("abcde"), (text.contiguous(),), torch.zeros(2, 3))
    counter = Counter(3, SAMPLING_PHASE, 0, 0)
    roles = Roles(teacher, {"single": Affine(fake)}, generators)
    return Sampler(roles, plan, SCHEDULE, prompts, SHAPE, counter, topology, batch_size)


def iteration_of(sampler: Sampler, method: MethodConfig, phase: int) -> Iteration:
    return Iteration(method, sampler.plan, sampler.plan.phases[phase - 1], SCHEDULE, SHAPE, torch.device("cpu"))


@pytest.fixture
def validation_of(tmp_path: Path) -> Callable[[MethodConfig], Validation]:
    """The function ``validation_of(method)``: evaluations of a run in a folder of its own."""
    evaluation = EvaluationConfig(eval_interval=1, eval_samples=COUNT, teacher_steps=STEPS)

    def make(method: MethodConfig) -> Validation:
        return Validation(Config(method=method, evaluation=evaluation, checkpoint=CheckpointConfig(save=tmp_path)))

    return make


@pytest.fixture
def method() -> MethodConfig:
    return MethodConfig(phase_steps=(4,), timestep_shift=3.0, guidance_scale=(1.0,))


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_samples_do_not_depend_on_batches_or_replicas(run_ranks):
    """Five prompts, the second twice, dealt one or two at a time to one replica or three."""

    def rank(batch_size: int) -> list[torch.Tensor | None]:
        sampler = sampler_of(initialize_topology(), batch_size)
        prompts = [0, 1, 2, 3, 4, 1]
        both = (sampler.student(prompts), sampler.teacher(prompts, 3, lambda expert: 2.0))
        assert all(len(own) == len(sampler.share(len(prompts))) for own in both)
        return [sampler.gather(own, len(prompts)) for own in both]

    (whole,) = run_ranks(rank, 1, 6)
    assert not torch.equal(whole[0][1], whole[0][5]), "the noise is the sample's, not the prompt's"
    for batch_size, world in ((1, 1), (2, 1), (1, 3), (2, 3), (4, 3)):
        first, *others = run_ranks(rank, world, batch_size)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, whole, strict=True))
        assert others == [[None, None]] * (world - 1)


def test_a_student_that_is_its_teacher_is_at_no_distance_and_at_the_floor(validation_of, topology, method):
    validation, sampler = validation_of(method), sampler_of(topology)
    first = validation.evaluate(sampler, iteration_of(sampler, method, 1), 1, draw=False)
    assert first["sample_distance"] < 1e-6 and math.isnan(first["sample_change"])
    for index in ("", *(f"_bin_{i}" for i in range(NOISE_BINS))):
        assert first[f"eval_fake_loss{index}"] == pytest.approx(first[f"fake_loss_floor{index}"], rel=1e-5)
    again = validation.evaluate(sampler, iteration_of(sampler, method, 1), 2, draw=False)
    assert again["sample_change"] == 0 and again["eval_fake_loss"] == first["eval_fake_loss"]


def test_distances_are_relative_to_the_teacher_and_to_the_last_evaluation(validation_of, topology, method):
    validation, students = validation_of(method), [sampler_of(topology, student=factor) for factor in (0.5, 0.6, 0.7)]
    iteration = iteration_of(students[0], method, 1)
    found = [validation.evaluate(sampler, iteration, number, draw=False) for number, sampler in enumerate(students)]
    teacher, *others = (sampler.student([0, 2, 4]) for sampler in students)
    before = teacher
    for numbers, samples in zip(found[1:], others, strict=True):
        for name, reference in (("sample_distance", teacher), ("sample_change", before)):
            ratios = [((x - y).norm() / y.norm()).item() for x, y in zip(samples, reference, strict=True)]
            assert numbers[name] == pytest.approx(sum(ratios) / COUNT, rel=1e-5)
        before = samples


@pytest.mark.parametrize("phase", [1, 2])
def test_losses_are_eq_13_at_fixed_times_and_noise(validation_of, phase, topology, method):
    """The fake score's on the student's samples at the phase's end, the teacher's on its own, noised to that end."""
    method = replace(method, phase_steps=(2, 2))
    sampler = sampler_of(topology, student=0.7, fake=-0.3, steps=(2, 2))
    sampler = replace(sampler, plan=replace(sampler.plan, phases=sampler.plan.phases[:phase]))
    iteration = iteration_of(sampler, method, phase)
    found = validation_of(method).evaluate(sampler, iteration, 1, draw=False)
    s, prompts, ids = torch.full((COUNT,), iteration.phase.end, dtype=torch.float64), [0, 2, 4], range(COUNT)
    clean = sampler.teacher(prompts, STEPS, lambda expert: 1.0).double()
    noise = sampler.counter.at(update=-1).normal(Purpose.DIFFUSION_NOISE, SHAPE, ids).double()
    own = SCHEDULE.diffuse(clean, noise, torch.zeros_like(s), s) if phase == 1 else clean
    samples = {
        "eval_fake_loss": (sampler.student(prompts).double(), Affine(-0.3)),
        "fake_loss_floor": (own, Affine(0.5)),
    }
    text = sampler.prompts.batch(prompts)
    for name, (x_s, network) in samples.items():
        for level in range(NOISE_BINS):
            t = iteration.times(torch.full((COUNT,), (level + 0.5) / NOISE_BINS)).double()
            eps = sampler.counter.at(update=level).normal(Purpose.DIFFUSION_NOISE, SHAPE, ids).double()
            x_t, target, weight = subinterval_target(x_s, eps, s, t, SCHEDULE)
            loss = (weight.view(-1, 1, 1, 1, 1) * (network(x_t, t, text) - target).square()).mean()
            assert found[f"{name}_bin_{level}"] == pytest.approx(loss.item(), rel=1e-4)
        assert found[name] == pytest.approx(sum(found[f"{name}_bin_{i}"] for i in range(NOISE_BINS)) / NOISE_BINS)


def test_training_does_not_notice_evaluations(launch, finished, tmp_path):
    run, plain = tmp_path / "run", finished("--ema-decay", "0.9")
    assert launch(run, "--ema-decay", "0.9", *EVALUATED) == 0
    metrics = [
        [{k: v for k, v in json.loads(line).items() if k != "milliseconds"} for line in text.splitlines()]
        for text in ((folder / "metrics.jsonl").read_text() for folder in (run, plain))
    ]
    assert metrics[0] == metrics[1]
    rows = rows_of(run)
    assert [(row["iteration"], row["phase"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert [row["iteration"] for row in rows if row["sample_change"] is None] == [1, 4]
    assert all(row["sample_distance"] > 0 and row["generator_movement"] > 0 for row in rows)
    floors = {row["phase"]: {r["fake_loss_floor"] for r in rows if r["phase"] == row["phase"]} for row in rows}
    assert len(floors[1]) == len(floors[2]) == 1 and floors[1] != floors[2]
    assert not (plain / "evaluations.jsonl").exists()


def test_a_resumed_run_goes_on_with_its_evaluations(launch, tmp_path):
    run = tmp_path / "run"
    assert launch(run, *EVALUATED, "--exit-interval", "2") == 3
    (run / "evaluations.jsonl").open("a").write(json.dumps({"iteration": 3, "phase": 1}) + "\n")
    assert launch(run, *EVALUATED) == 0
    assert [row["iteration"] for row in rows_of(run)] == [1, 2, 3, 4, 5, 6], "what was left out at the stop is made up"


def test_two_ranks_find_what_one_does(launch, run_ranks, tmp_path):
    more = [*EVALUATED, "--eval-samples", "3", "--train-iters", "1"]
    assert launch(tmp_path / "one", *more) == 0
    run_ranks(lambda: launch(tmp_path / "two", *more, "--micro-batch-size", "1"), 2)
    for one, two in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == (None if value is None else pytest.approx(value, rel=1e-3)), name


def test_evaluations_draw_sheets_of_prompts_of_their_own(launch, prompt_file, tmp_path, capsys):
    run, own = tmp_path / "run", tmp_path / "validation.txt"
    own.write_text("a six moves up\na nine moves left\n")
    more = ["--prompts", str(prompt_file), "--eval-prompts", str(own), "--eval-interval", "2"]
    assert launch(run, *more, sheets=True) == 0
    drawn = sorted(path.stem for path in (run / "samples").glob("*.png"))
    assert drawn == ["iter_0000002", "iter_0000003", "iter_0000004", "iter_0000006"]
    with pytest.raises(SystemExit) as stop:
        launch(tmp_path / "other", "--eval-prompts", str(tmp_path / "nowhere.txt"))
    assert stop.value.code == 2
    assert "--eval-prompts" in (told := capsys.readouterr().err) and "nowhere.txt: no such file" in told
