"""What a schedule takes: the iteration's time, how busy the stages are, and what they hold, before anything has run."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_pdmd.parallel.pipeline.costs import Costs
from megatron_pdmd.parallel.pipeline.passes import Graph, Message, Task, Work
from megatron_pdmd.parallel.pipeline.schedule import Schedule
from megatron_pdmd.parallel.pipeline.timing import run_lists

Changes = list[tuple[float, bool, float]]  # seconds, whether it is a rise, by how much


@dataclass(frozen=True)
class Timeline:
    """A schedule run on paper.

    Attributes:
        graph, schedule: what ran.
        start, end: seconds of each task, by its id in the graph.
        makespan: seconds of the iteration.
        busy: useful work over all stages' time; what only runs again is not useful.
        peak_live: of each stage, the most forward passes with gradient that waited for their backward at once.
        peak_bytes: of each stage, the most that these kept, with the messages that it was sending and those that had
            not been taken up: both sides hold a message until its receiver begins.
        peak_latents: of all programs on the last stage, the most passes at once whose latents were made and whose first
            stage had not begun; those of passes that run again anew.
    """

    graph: Graph
    schedule: Schedule
    start: tuple[float, ...]
    end: tuple[float, ...]
    makespan: float
    busy: float
    peak_live: tuple[int, ...]
    peak_bytes: tuple[float, ...]
    peak_latents: int

    @property
    def bubble(self) -> float:
        """Share of the stages' time without useful work."""
        return 1 - self.busy

    def tasks(self, stage: int) -> Iterator[tuple[Task, float, float]]:
        """A stage's tasks in order, each with its beginning and end in seconds."""
        for task in self.schedule.stages[stage]:
            index = self.graph.ids[task]
            yield task, self.start[index], self.end[index]


def simulate(schedule: Schedule, graph: Graph, costs: Costs) -> Timeline:
    """Runs a schedule on paper as the executor does.

    A stage does its tasks strictly in order. A task begins when the one before has ended and the messages that it waits
    for have arrived; sending blocks nobody. So `REDUCE` blocks no one, while `STEP` waits for every stage's.

    Raises:
        ValueError: the schedule is incomplete or wrong (see `Schedule.check`), or gets stuck; names the tasks.
    """
    schedule.check(graph)
    seconds = costs.seconds(graph)
    start, end = run_lists(graph, schedule.ids(graph), seconds, costs.delays(graph))
    makespan = max(end, default=0.0)
    work = sum(one for task, one in zip(graph.tasks, seconds, strict=True) if not task.again)
    held, latents = _Held(graph, costs, start, end).changes()
    return Timeline(
        graph,
        schedule,
        tuple(start),
        tuple(end),
        makespan,
        work / (graph.stages * makespan) if makespan else 1.0,
        tuple(_peak_live(graph, own) for own in schedule.stages),
        tuple(_peak(changes) for changes in held),
        round(_peak(latents)),
    )


def bound(graph: Graph, costs: Costs) -> float:
    """Seconds that no schedule can beat: the work of the stage that has most, or the longest way through the graph.

    Args:
        graph: without reruns, where a schedule without them may stand against it.
        costs: of its tasks.
    """
    seconds = costs.seconds(graph)
    work = [0.0] * graph.stages
    ends: list[float] = []
    for task, one, edges, delays in zip(graph.tasks, seconds, graph.predecessors, costs.delays(graph), strict=True):
        work[task.stage] += one
        ends.append(max((ends[edge.task] + delay for edge, delay in zip(edges, delays, strict=True)), default=0) + one)
    return max(*work, *ends)


def _peak_live(graph: Graph, tasks: tuple[Task, ...]) -> int:
    """The most forward passes with gradient that wait for their backward, where a stage does its tasks in order."""
    live = highest = 0
    for task in tasks:
        live += graph.learns(task)
        highest = max(highest, live)
        live -= task.work == Work.BACKWARD
    return highest


def _peak(changes: Changes) -> float:
    """The highest level; at one instant falls count before rises."""
    level = highest = 0.0
    for _, _, change in sorted(changes):
        level += change
        highest = max(highest, level)
    return highest


class _Held:
    """What stages hold, and from when to when."""

    def __init__(self, graph: Graph, costs: Costs, start: list[float], end: list[float]):
        self.graph, self.costs, self.start, self.end = graph, costs, start, end

    def changes(self) -> tuple[list[Changes], Changes]:
        """Changes of bytes held, by stage, and of latents."""
        graph, start, end = self.graph, self.start, self.end
        held: list[Changes] = [[] for _ in range(graph.stages)]
        latents: Changes = []
        for index, task in enumerate(graph.tasks):
            if graph.learns(task):
                backward = Task(task.stage, Work.BACKWARD, task.program, task.microbatch, task.place)
                until = end[graph.ids[backward]]
                kept = self.costs.of(graph.pass_of(task).network).kept[task.stage]
                _hold(held[task.stage], start[index], until, kept)
            for edge in graph.predecessors[index]:
                if edge.message is None:
                    continue
                sender = graph.tasks[edge.task].stage
                if edge.message == Message.SAMPLE:
                    _hold(latents, end[edge.task], start[index], 1)
                if sender != task.stage:
                    size = self.costs.message_bytes.get(edge.message, 0.0)
                    for stage in (sender, task.stage):
                        _hold(held[stage], end[edge.task], start[index], size)
        return held, latents


def _hold(changes: Changes, since: float, until: float, amount: float) -> None:
    changes += [(since, True, amount), (until, False, -amount)]
