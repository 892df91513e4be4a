"""Iterations on a pipeline: the programs of all updates of one, scheduled as a whole over the stages."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megatron_pdmd.config import ParallelConfig
from megatron_pdmd.distillation.randomness import Counter
from megatron_pdmd.distillation.step import Iteration, MicroBatch
from megatron_pdmd.distillation.updates import Update
from megatron_pdmd.parallel.pipeline.channels import PipelineGroups
from megatron_pdmd.parallel.pipeline.execute import Executor
from megatron_pdmd.parallel.pipeline.passes import Graph, Outline, Task
from megatron_pdmd.parallel.pipeline.schedule import Kind, Schedule, plan
from megatron_pdmd.parallel.pipeline.simulate import Timeline, simulate
from megatron_pdmd.parallel.topology import Topology
from megatron_pdmd.training.logs.instruments import Instruments
from megatron_pdmd.training.pipelined.parts import StageNetworks, outlines_of, parts_of
from megatron_pdmd.training.pipelined.stage_work import Metrics, StageWork
from megatron_pdmd.training.pipelined.task_costs import TaskCosts


class PipelinedIterations:
    """Runs the iterations of a phase on this rank's stage.

    Args:
        config: names the schedule and how many micro-batches may be live.
        iteration: what they have in common.
        networks: this stage's.
        batches: the micro-batches of a counter, by position.
        count: micro-batches of an update on this rank.
        groups: the stages of this replica.
        topology: this rank's place.
        instruments: who measures.
        sizes: of a micro-batch: samples, and text tokens of each.

    Attributes:
        kind: of the schedule of the next iterations.
        peak_live: the most passes whose activations were kept here for a backward pass at the same time.
    """

    def __init__(
        self,
        config: ParallelConfig,
        iteration: Iteration,
        networks: StageNetworks,
        batches: Callable[[Counter, int], MicroBatch],
        count: int,
        groups: PipelineGroups,
        topology: Topology,
        instruments: Instruments,
        sizes: tuple[int, int],
    ):
        self.kind: Kind = config.pipeline_schedule
        self.peak_live = 0
        self._limit = config.pipeline_live_microbatches or None
        self._iteration, self._networks = iteration, networks
        self._batches, self._count, self._sizes = batches, count, sizes
        self._groups, self._topology, self._instruments = groups, topology, instruments
        self._costs = TaskCosts(topology)
        self._plan = functools.lru_cache(maxsize=128)(self._planned)

    def run(self, updates: Sequence[Update]) -> list[tuple[str, Metrics]]:
        """Makes updates in order; all of them on all stages together.

        Returns:
            Of each the name of the network that learned, and its numbers, the gradient's norm among them. Where one of
            them is not finite the weights have stayed as they were.
        """
        parts = parts_of(self._iteration, updates, self._networks)
        graph, schedule = self._plan(outlines_of(parts, self._networks), self.kind)
        work = StageWork(
            self._iteration,
            parts,
            self._networks,
            self._batches,
            self._count,
            self._groups,
            self._topology,
            self._instruments,
            self._sizes,
            schedule.stages[self._groups.stage],
        )

        @contextmanager
        def around(task: Task) -> Iterator[None]:
            with self._costs.measure(graph, task), work.around(task):
                yield

        executor = Executor(graph, schedule, self._groups, work, around)
        executor.run()
        self.peak_live = max(self.peak_live, executor.peak_live)
        if self._costs.end_iteration(graph):
            self._plan.cache_clear()
            if self._costs.are_final and self._topology.rank == 0:
                paper = self.timeline(updates, self.kind)
                stages = f"pipeline of {self._topology.pipeline} stages, {self.kind}"
                print(f"{stages}: {paper.busy:.0%} busy by the times measured, {paper.makespan:.3g} s an iteration")
        return [(parts[program].trains, metrics) for program, metrics in sorted(work.ended.items())]

    def timeline(self, updates: Sequence[Update], kind: Kind) -> Timeline:
        """An iteration on paper, with the costs that were measured so far."""
        graph, schedule = self._plan(
            outlines_of(parts_of(self._iteration, updates, self._networks), self._networks), kind
        )
        return simulate(schedule, graph, self._costs.costs)

    def _planned(self, outlines: tuple[Outline, ...], kind: Kind) -> tuple[Graph, Schedule]:
        return plan(outlines, self._topology.pipeline, self._count, self._costs.costs, kind, self._limit)
