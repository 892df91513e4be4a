"""The log line, metrics.jsonl and TensorBoard."""

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_pdmd.training.logs.metrics_log import MetricsLog


def entry(iteration: int, **changes) -> dict[str, float | int]:
    return {
        "iteration": iteration,
        "phase": 2,
        "consumed_samples": 16 * iteration,
        "milliseconds": 12.34,
        "learning_rate": 5e-5,
        "fake_learning_rate": 4e-7,
        "global_batch_size": 16,
        "skipped_updates": 1,
        "fake_loss": 0.25,
        "generator_grad_norm": 1.5,
    } | changes


def test_the_line_is_megatrons(tmp_path, capsys):
    log = MetricsLog(tmp_path, total=180, first=0, tensorboard=False)
    log.write(entry(7))
    line = capsys.readouterr().out
    head, *parts = line.strip().split(" | ")
    assert head.endswith("] iteration        7/     180")
    assert parts == [
        "phase: 2",
        "consumed samples:          112",
        "elapsed time per iteration (ms): 12.3",
        "learning rate: 5.000000E-05",
        "fake learning rate: 4.000000E-07",
        "global batch size:    16",
        "fake loss: 2.500000E-01",
        "generator grad norm: 1.500000E+00",
        "number of skipped updates:   1 |",
    ]
    assert not (tmp_path / "tensorboard").exists()


def test_throughput_stands_after_the_time_and_timers_on_a_line_of_their_own(tmp_path, capsys):
    log = MetricsLog(tmp_path, total=180, first=0, tensorboard=False)
    throughput = {"tflops_per_gpu": 412.3456, "tokens_per_second_per_gpu": 1234.56, "peak_memory_gb": 71.25}
    timers = {"iteration_milliseconds": 13.0, "iteration_slowest_rank": 3, "teacher_pass_milliseconds": 4.26}
    log.write(entry(7, **throughput, **timers))
    line, times = capsys.readouterr().out.splitlines()
    assert line.split(" | ")[3:7] == [
        "elapsed time per iteration (ms): 12.3",
        "throughput per GPU (TFLOP/s/GPU): 412.3",
        "tokens per second per GPU: 1234.6",
        "peak memory (GB): 71.25",
    ]
    assert times == " times of the slowest rank (ms): iteration: 13.0 (rank 3) | teacher pass: 4.3 |"


def test_entries_are_appended_as_strict_json(tmp_path):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for iteration, loss in enumerate((0.1, math.nan, math.inf), start=1):
        MetricsLog(tmp_path, total=3, first=iteration - 1, tensorboard=False).write(entry(iteration, fake_loss=loss))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert [row["fake_loss"] for row in rows] == [0.1, None, None]
    assert rows[0] == entry(1, fake_loss=0.1)


def test_a_resumed_run_overwrites_what_tensorboard_had_of_later_iterations(tmp_path):
    for first, iterations, loss in ((0, (1, 2, 3), 1.0), (1, (2, 3), 2.0)):
        log = MetricsLog(tmp_path, total=3, first=first, tensorboard=True)
        for iteration in iterations:
            log.write(entry(iteration, fake_loss=loss))
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("fake_loss")] == [(1, 1.0), (2, 2.0), (3, 2.0)]
    assert events.Scalars("generator_grad_norm")[0].value == pytest.approx(1.5)


def test_evaluations_have_a_file_and_a_line_of_their_own(tmp_path, capsys):
    log = MetricsLog(tmp_path, total=20, first=0, tensorboard=True)
    found = {"sample_distance": 0.5, "sample_change": math.nan, "eval_fake_loss_bin_0": 0.25}
    log.write_evaluation({"iteration": 10, "phase": 1} | found)
    log.close()
    (row,) = map(json.loads, (tmp_path / "evaluations.jsonl").read_text().splitlines())
    assert row == {"iteration": 10, "phase": 1} | found | {"sample_change": None}
    assert not (tmp_path / "metrics.jsonl").exists()
    line = capsys.readouterr().out
    assert "evaluation after iteration 10 | phase: 1 | sample distance: 5.000000E-01 |" in line and "bin" not in line
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("eval_fake_loss_bin_0")
    assert (event.step, event.value) == (10, 0.25)
