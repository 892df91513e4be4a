"""A pipeline on real ranks of this machine, for benchmark_pipeline.py: one process and one thread a stage."""

import gc
import itertools
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing

from megatron_pdmd.config import Config, MethodConfig, ParallelConfig, TrainingConfig
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.diffusion.noise_schedule import FlowMatchingSchedule
from megatron_pdmd.diffusion.phases import PhasePlan
from megatron_pdmd.distillation.step import Iteration
from megatron_pdmd.distillation.updates import updates_of
from megatron_pdmd.files.documents import read_json
from megatron_pdmd.files.whole import write_json
from megatron_pdmd.models import WanConfig, WanModel
from megatron_pdmd.parallel import destroy_topology, initialize_topology
from megatron_pdmd.parallel.pipeline.channels import PipelineGroups
from megatron_pdmd.parallel.pipeline.schedule import Kind
from megatron_pdmd.parallel.pipeline.stages import Stage, layer_split
from megatron_pdmd.training.networks import Networks
from megatron_pdmd.training.phase import PhaseTrainer
from megatron_pdmd.training.pipelined.task_costs import MEASURED

# Large enough that a stage's task takes tens of milliseconds, where a message takes less than one.
MODEL = WanConfig(num_attention_heads=8, attention_head_dim=64, ffn_dim=2048, num_layers=8, text_dim=256)
LATENTS, TEXT_TOKENS, PROMPTS = (16, 3, 16, 16), 64, 16
KINDS: tuple[Kind, ...] = ("sequential", "interleaved")


@dataclass(frozen=True)
class RunRow:
    """Both schedules on real ranks; medians over iterations of both that alternate.

    Attributes:
        stages, microbatches: how many.
        interleaved_ms, sequential_ms: of an iteration.
        ratio: median of the pairs' quotients.
        simulated_ratio: the same on paper, with the costs measured in the first iterations.
        interleaved_over_simulated, sequential_over_simulated: time measured over time on paper.
        peak_live: the most passes whose activations a stage kept at once, interleaved.
    """

    stages: int
    microbatches: int
    interleaved_ms: float
    sequential_ms: float
    ratio: float
    simulated_ratio: float
    interleaved_over_simulated: float
    sequential_over_simulated: float
    peak_live: int


def run_on_ranks(stages: int, microbatches: int, repeats: int) -> RunRow:
    """Times iterations of the last phase on `stages` processes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (stages, microbatches, repeats, Path(folder))
        multiprocessing.start_processes(_run_rank, arguments, nprocs=stages, start_method="fork")
        return RunRow(stages, microbatches, **read_json(Path(folder) / "row.json"))


def _run_rank(rank: int, stages: int, microbatches: int, repeats: int, folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what this process was forked from is not its own to take down
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(stages), LOCAL_RANK=str(rank))
    store = torch.distributed.FileStore(str(folder / "store"), stages)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=stages)
    trainer, config = _trainer(stages, microbatches)
    for index in range(MEASURED):
        trainer.run_iteration(index)
    trainer.pipeline.peak_live = 0
    times: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    paper = {}
    for kind in KINDS:  # planned here, outside of what is timed
        updates = updates_of(config.method, config.training.seed, trainer.index, MEASURED)
        paper[kind] = trainer.pipeline.timeline(updates, kind).makespan
    for _, kind in itertools.product(range(repeats), KINDS):
        trainer.pipeline.kind = kind
        torch.distributed.barrier()
        started = time.perf_counter()
        trainer.run_iteration(MEASURED)  # the same one again and again, so that all have the same passes
        times[kind].append(time.perf_counter() - started)
    peaks: list[int] = [0] * stages
    torch.distributed.all_gather_object(peaks, trainer.pipeline.peak_live)
    if rank == 0:
        write_json(folder / "row.json", _row(times, paper, max(peaks)))
    trainer.release()
    destroy_topology()


def _row(times: dict[Kind, list[float]], paper: dict[Kind, float], peak_live: int) -> dict[str, float]:
    median = {kind: statistics.median(own) for kind, own in times.items()}
    pairs = zip(times["interleaved"], times["sequential"], strict=True)
    return {
        "interleaved_ms": 1000 * median["interleaved"],
        "sequential_ms": 1000 * median["sequential"],
        "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
        "simulated_ratio": paper["interleaved"] / paper["sequential"],
        "interleaved_over_simulated": median["interleaved"] / paper["interleaved"],
        "sequential_over_simulated": median["sequential"] / paper["sequential"],
        "peak_live": peak_live,
    }


def _trainer(stages: int, microbatches: int) -> tuple[PhaseTrainer, Config]:
    """The trainer of the last phase, on random networks: speed does not depend on what they have learned."""
    topology = initialize_topology(pipeline=stages)
    config = Config(
        method=MethodConfig(lora_rank=16),
        training=TrainingConfig(micro_batch_size=1, global_batch_size=microbatches),
        parallel=replace(ParallelConfig(), pipeline_model_parallel_size=stages),
    )
    torch.manual_seed(0)
    stage = Stage.of(topology.pipeline_rank, layer_split(MODEL.num_layers, stages))
    networks = Networks({"single": WanModel(MODEL, stage=stage)}, config.method, config.training.seed)
    schedule = FlowMatchingSchedule(config.method.timestep_shift)
    plan = PhasePlan.build(config.method.num_steps, config.method.phase_steps, schedule, None)
    *earlier, phase = plan.phases
    for one in earlier:
        networks.add_expert(one.index, one.expert)
    iteration = Iteration(config.method, plan, phase, schedule, LATENTS, topology.device)
    networks.start_phase(phase.index, phase.expert, iteration.experts())
    text = torch.randn(PROMPTS + 1, TEXT_TOKENS, MODEL.text_dim, generator=torch.Generator().manual_seed(0))
    prompts = PromptEmbeddings(tuple(f"prompt {n}" for n in range(PROMPTS)), (text[1:],), text[0])
    groups = PipelineGroups.of(topology, config.parallel.distributed_timeout_minutes)
    return PhaseTrainer(config, iteration, networks, prompts, topology, stages=groups), config
