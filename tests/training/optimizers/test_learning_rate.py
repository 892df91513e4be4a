"""Learning rates over a phase: Megatron's schedules, logged, used, and the same after a stop."""

import json
import math
from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_pdmd.config import OptimizerConfig
from megatron_pdmd.training.optimizers.learning_rate import LearningRateSchedule
from megatron_pdmd.training.optimizers.optimizer import RoleOptimizer

STYLES = ("constant", "linear", "cosine", "inverse-square-root")
# 6 iterations in two phases of 3; see conftest.
RATES = ("--lr-decay-style", "linear", "--min-lr", "0.004", "--fake-lr-warmup-iters", "2")
RATES = (*RATES, "--fake-lr-warmup-init", "0.002", "--fake-lr-decay-style", "cosine", "--fake-lr-decay-iters", "4")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_are_those_of_megatrons_scheduler_stepped_once_an_iteration(style, warmup):
    group = {"params": []}
    stepped = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), init_lr=1e-5 if warmup else 3e-4, max_lr=3e-4, min_lr=2e-5,
        lr_warmup_steps=warmup, lr_decay_steps=15, lr_decay_style=style,
        start_wd=0.01, end_wd=0.01, wd_incr_steps=0, wd_incr_style="constant",
    )  # fmt: skip
    options = OptimizerConfig(
        lr=3e-4, lr_decay_style=style, lr_warmup_iters=warmup, lr_warmup_init=1e-5, lr_decay_iters=15, min_lr=2e-5
    )
    schedule = LearningRateSchedule.of("generator", options, iterations=1000)
    for iteration in range(20):
        assert schedule.at(iteration) == group["lr"]
        stepped.step(1)


def test_rates_are_their_closed_forms():
    options = {"warmup_init": 0.1, "warmup_iters": 2, "decay_iters": 10, "min_lr": 0.5}
    rates = {style: LearningRateSchedule(1.0, style=style, **options) for style in STYLES}
    for schedule in rates.values():
        assert [schedule.at(i) for i in range(3)] == pytest.approx([0.1, 0.55, 1.0])
    assert rates["constant"].at(100) == 1.0
    assert rates["linear"].at(6) == pytest.approx(0.75)
    assert rates["cosine"].at(4) == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 4)))
    assert rates["inverse-square-root"].at(5) == pytest.approx(math.sqrt(2 / 5))
    assert [schedule.at(11) for schedule in rates.values()] == [1.0, 0.5, 0.5, 0.5]


def test_each_role_has_its_own_and_decays_over_the_phase_unless_told_otherwise():
    options = OptimizerConfig(lr=1.0, fake_lr=2.0, fake_lr_decay_style="linear")
    assert [LearningRateSchedule.of("generator", options, 8).at(i) for i in (0, 4, 8)] == [1.0, 1.0, 1.0]
    assert [LearningRateSchedule.of("fake_score", options, 8).at(i) for i in (0, 4, 8)] == [2.0, 1.0, 0.0]
    assert LearningRateSchedule.of("fake_score", options, 16).at(4) == 1.5


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_steps_with_the_rates_it_logs_and_begins_anew_in_each_phase(launch, tmp_path, monkeypatch):
    used, step = [], RoleOptimizer.step

    def recording(self, norm):
        used.append({group["lr"] for group in self._optimizer.param_groups})
        step(self, norm)

    monkeypatch.setattr(RoleOptimizer, "step", recording)
    assert launch(tmp_path / "run", *RATES) == 0
    generator = [0.01, 0.008, 0.006] * 2
    fake = [0.002, 0.006, 0.01] * 2
    rows = rows_of(tmp_path / "run")
    assert [row["learning_rate"] for row in rows] == pytest.approx(generator)
    assert [row["fake_learning_rate"] for row in rows] == pytest.approx(fake)
    expected = [{rate} for row in rows for rate in (*[row["fake_learning_rate"]] * 2, row["learning_rate"])]
    assert used == expected


def test_rates_go_on_after_a_stop(launch, tmp_path):
    assert launch(tmp_path / "whole", *RATES) == 0
    assert launch(tmp_path / "run", *RATES, "--exit-interval", "1") == 3
    assert launch(tmp_path / "run", *RATES, "--exit-interval", "4") == 3
    assert launch(tmp_path / "run", *RATES) == 0
    whole, parts = rows_of(tmp_path / "whole"), rows_of(tmp_path / "run")
    for row in (*whole, *parts):
        del row["milliseconds"]
    assert whole == parts
