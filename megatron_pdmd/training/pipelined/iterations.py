"""Iterations on a pipeline: the programs of all updates of one, scheduled as a whole over the stages."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_pdmd.config import ParallelConfig
from megatron_pdmd.distillation.updates import Update
from megatron_pdmd.parallel.pipeline.execute import Executor
from megatron_pdmd.parallel.pipeline.passes import Graph, Outline, Task
from megatron_pdmd.parallel.pipeline.schedule import Kind, Schedule, plan
from megatron_pdmd.parallel.pipeline.simulate import Timeline, simulate
from megatron_pdmd.training.pipelined.parts import StagePhase, outlines_of, parts_of
from megatron_pdmd.training.pipelined.stage_work import Metrics, StageWork
from megatron_pdmd.training.pipelined.task_costs import TaskCosts


class PipelinedIterations:
    """Runs the iterations of a phase on this rank's stage.

    Args:
        config: names the schedule and how many micro-batches may be live.
        phase: what they have in common.

    Attributes:
        kind: of the schedule of the next iterations.
        peak_live: the most passes whose activations were kept here for a backward pass at the same time.
    """

    def __init__(self, config: ParallelConfig, phase: StagePhase):
        self.kind: Kind = config.pipeline_schedule
        self.peak_live = 0
        self._phase = phase
        self._limit = config.pipeline_live_microbatches or None
        self._costs = TaskCosts(phase.topology)
        self._plan = functools.lru_cache(maxsize=128)(self._planned)

    def run(self, updates: Sequence[Update]) -> list[tuple[str, Metrics]]:
        """Makes updates in order; all of them on all stages together.

        Returns:
            Of each the name of the network that learned, and its numbers, the gradient's norm among them. Where one of
            them is not finite the weights have stayed as they were.
        """
        phase = self._phase
        parts = parts_of(phase.iteration, updates, phase.networks)
        graph, schedule = self._plan(outlines_of(parts, phase.networks), self.kind)
        work = StageWork(phase, parts, schedule.stages[phase.groups.stage])

        @contextmanager
        def around(task: Task) -> Iterator[None]:
            with self._costs.measure(graph, task), work.around(task):
                yield

        executor = Executor(graph, schedule, phase.groups, work, around)
        executor.run()
        self.peak_live = max(self.peak_live, executor.peak_live)
        if self._costs.end_iteration(graph):
            self._plan.cache_clear()
            if self._costs.are_final and phase.topology.rank == 0:
                paper = self.timeline(updates, self.kind)
                stages = f"pipeline of {phase.topology.pipeline} stages, {self.kind}"
                print(f"{stages}: {paper.busy:.0%} busy by the times measured, {paper.makespan:.3g} s an iteration")
        return [(parts[program].trains, metrics) for program, metrics in sorted(work.ended.items())]

    def timeline(self, updates: Sequence[Update], kind: Kind) -> Timeline:
        """An iteration on paper, with the costs that were measured so far."""
        parts = parts_of(self._phase.iteration, updates, self._phase.networks)
        graph, schedule = self._plan(outlines_of(parts, self._phase.networks), kind)
        return simulate(schedule, graph, self._costs.costs)

    def _planned(self, outlines: tuple[Outline, ...], kind: Kind) -> tuple[Graph, Schedule]:
        stages, microbatches = self._phase.topology.pipeline, self._phase.count
        return plan(outlines, stages, microbatches, self._costs.costs, kind, self._limit)
