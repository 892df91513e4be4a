"""What a log entry says of time, throughput and memory."""

import itertools
import json
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_pdmd.config import Config, LoggingConfig, MethodConfig, TrainingConfig
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.diffusion.noise_schedule import FlowMatchingSchedule
from megatron_pdmd.diffusion.phases import PhasePlan
from megatron_pdmd.distillation.step import Iteration
from megatron_pdmd.parallel import initialize_topology
from megatron_pdmd.training.logs import instruments as module
from megatron_pdmd.training.logs.announcements import layout_line
from megatron_pdmd.training.logs.instruments import Instruments, peak_memory
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.phase import PhaseTrainer

LATENTS = (1, 2, 4, 4)
METHODS = {
    "lora, sgts": MethodConfig(fake_updates=2, lora_rank=4),
    "lora, none": MethodConfig(fake_updates=2, lora_rank=4, gradient_truncation="none"),
    "full, none, x0": MethodConfig(fake_updates=1, generator="full", gradient_truncation="none", objective="x0"),
    "shared starts": MethodConfig(fake_updates=2, lora_rank=4, phase_start_reuse=2),
    "one fake network": MethodConfig(fake_updates=2, lora_rank=2, fake_experts="single", guidance_scale=(1.0, 2.0)),
}


def phase_trainer(teachers, topology, method: MethodConfig, phase_index: int) -> tuple[PhaseTrainer, Instruments]:
    training = TrainingConfig(train_iters=(4,), micro_batch_size=1, global_batch_size=2)
    config = Config(method=method, training=training, logging=LoggingConfig(log_throughput=True))
    schedule = FlowMatchingSchedule(shift=3.0)
    plan = PhasePlan.build(4, (2, 2), schedule, 0.75)
    networks = Networks(teachers, method, seed=1)
    for phase in plan.phases[: phase_index - 1]:
        networks.add_expert(phase.index, phase.expert)
    phase = plan.phases[phase_index - 1]
    iteration = Iteration(method, plan, phase, schedule, LATENTS, topology.device)
    networks.start_phase(phase.index, phase.expert, iteration.experts())
    prompts = PromptEmbeddings(("a", "b"), (torch.randn(2, 8, 16),), torch.zeros(8, 16))
    instruments = Instruments(config.logging, topology)
    return PhaseTrainer(config, iteration, networks, prompts, topology, instruments), instruments


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_flops_of_iterations_are_those_that_torch_counts(method, phase, teachers, topology, count_flops):
    """Exactly, over three iterations whose rollouts have different lengths; attention composed of matrix products."""
    trainer, instruments = phase_trainer(teachers, topology, method, phase)
    for index in range(3):
        before = instruments._passes.flops
        with sdpa_kernel(SDPBackend.MATH), count_flops() as counter:
            trainer.run_iteration(index)
        assert instruments._passes.flops - before == counter.get_total_flops()


def test_throughput_is_what_was_run_over_the_time_of_the_interval(teachers, topology, monkeypatch):
    trainer, instruments = phase_trainer(teachers, topology, METHODS["lora, none"], 1)
    clock = itertools.count(step=1.5)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    for index in range(2):
        with instruments.iteration():
            trainer.run_iteration(index)
    flops, tokens = instruments._passes.flops, instruments._passes.tokens
    # In each iteration and for each of 2 samples: 3 rollouts of 2 steps, 2 fake passes, teacher twice, fake score once.
    assert tokens == 2 * 2 * (3 * 2 + 2 + 3) * 8
    taken = instruments.take()
    assert taken["milliseconds"] == 1500
    assert taken["tokens_per_second_per_gpu"] == tokens / 3
    assert taken["tflops_per_gpu"] == pytest.approx(flops / 3e12)
    assert 0.05 < taken["peak_memory_gb"] < 100
    assert instruments.take()["tflops_per_gpu"] == 0


def test_without_flags_an_entry_has_the_time_alone(topology):
    instruments = Instruments(LoggingConfig(), topology)
    with instruments.iteration():
        time.sleep(0.01)
    taken = instruments.take()
    assert taken.keys() == {"milliseconds"} and 10 <= taken["milliseconds"] < 1000


@pytest.mark.parametrize(("level", "timed"), [(1, 7), (2, 12)])
def test_a_run_times_its_updates_and_passes_by_level(level, timed, launch, tmp_path, capsys):
    assert launch(tmp_path / "run", "--timing-log-level", str(level), "--exit-interval", "2", sheets=True) == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = ("update", "sync", "optimizer")
    updates = ["iteration", *(f"{role}_{part}" for role in ("fake", "generator") for part in parts)]
    passes = ["teacher_pass", "fake_score_pass", "generator_pass", "fake_backward", "generator_backward"]
    for row in rows:
        times = {name.removesuffix("_milliseconds"): row[name] for name in row if name.endswith("_milliseconds")}
        assert sorted(times) == sorted((updates + passes)[:timed]) and min(times.values()) > 0
        both = times["fake_update"] + times["generator_update"]
        assert both < row["milliseconds"] < both * 1.5 + 20
        if level == 2:
            assert sum(times[name] for name in passes) < both
    told = capsys.readouterr().out
    assert "times of the slowest rank (ms): " in told and "iteration 2: save took " in told


def test_a_run_says_what_it_reaches(launch, tmp_path, capsys):
    assert launch(tmp_path / "run", "--log-throughput", "--exit-interval", "1") == 3
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["tflops_per_gpu"] > 0 and row["tokens_per_second_per_gpu"] > 0 and row["peak_memory_gb"] > 0
    assert "throughput per GPU (TFLOP/s/GPU): " in capsys.readouterr().out


def test_of_several_ranks_the_slowest_is_named_and_a_replica_shares_its_flops(run_ranks):
    def on_a_rank():
        topology = initialize_topology(context=2, pipeline=2)
        instruments = Instruments(LoggingConfig(log_throughput=True, timing_log_level=1), topology)
        instruments._passes.flops, instruments._passes.tokens = 4 * 10**12, 800
        with instruments.iteration(), instruments.update("fake"):
            time.sleep((0.02, 0.02, 0.2, 0.02)[topology.rank])
        instruments._seconds = instruments._seconds if topology.rank == 2 else 0.02
        seconds = instruments._seconds
        return seconds, instruments.take(), layout_line(topology)

    taken = run_ranks(on_a_rank, 4)
    slow = taken[2][0] * 1000
    for seconds, entry, line in taken:
        assert entry["milliseconds"] == seconds * 1000
        assert (entry["iteration_slowest_rank"], entry["fake_update_slowest_rank"]) == (2, 2)
        assert entry["iteration_milliseconds"] == slow >= entry["fake_update_milliseconds"] >= 200
        assert entry["tflops_per_gpu"] == pytest.approx(1 / seconds)
        assert entry["tokens_per_second_per_gpu"] == pytest.approx(200 / seconds)
        assert line == "4 ranks on cpu over gloo: tensor 1 x context 2 x data 1 x pipeline 2"
    assert len({entry["peak_memory_gb"] for _, entry, _ in taken}) == 1


def test_peak_memory_is_torchs_on_a_gpu_and_the_processs_on_the_cpu(monkeypatch):
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(2**26, dtype=torch.uint8)
    assert peak_memory(torch.device("cpu")) >= max(before, held.numel())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 + device.index)
    assert peak_memory(torch.device("cuda", 1)) == 8
