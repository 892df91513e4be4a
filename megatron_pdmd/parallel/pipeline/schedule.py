"""Schedules: what each stage does, in order.

`sequential` runs one pipeline after another, a pass each, as a trainer does that calls megatron-core's schedules for
every model in turn. `interleaved` schedules all passes of all micro-batches together. Both are plain lists of tasks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from megatron_pdmd.parallel.pipeline.costs import Costs
from megatron_pdmd.parallel.pipeline.list_scheduling import Placement, Problem, justified, searched
from megatron_pdmd.parallel.pipeline.passes import (
    Graph,
    Outline,
    Task,
    Work,
    build_graph,
    gradient_places,
    profits_from_rerun,
)
from megatron_pdmd.parallel.pipeline.timing import run_lists

LIMIT_FLAG = "--pipeline-live-microbatches"
WINDOW = 4  # activations of passes under way from a stage to the next, the one being made among them
TRIES = 16  # of `searched`
EFFORT = 120_000  # tasks that a search may place; of a very large iteration there are fewer tries

# What the longest way to the end is measured in, as factors on the seconds of: backward passes; those of the last
# program, after which nothing fills a stage's gaps; passes without gradient whose weights no step has moved; those of
# the last program. As they are, and with emphasis on what greedy scheduling puts off too long.
EMPHASES = ((1, 1, 1, 1), (1, 2, 1, 1), (1, 3, 2, 2), (1, 1, 2, 2), (1, 3, 1, 2), (2, 3, 2, 2), (3, 3, 1, 2))

Kind = Literal["interleaved", "sequential"]


@dataclass(frozen=True)
class Schedule:
    """What each stage does, in order.

    Attributes:
        stages: a list of tasks for each.
    """

    stages: tuple[tuple[Task, ...], ...]

    @classmethod
    def of_ids(cls, graph: Graph, lists: Sequence[Sequence[int]]) -> "Schedule":
        """The schedule of tasks given by their ids."""
        return cls(tuple(tuple(graph.tasks[index] for index in own) for own in lists))

    def ids(self, graph: Graph) -> list[list[int]]:
        """The ids of each stage's tasks."""
        return [[graph.ids[task] for task in own] for own in self.stages]

    def __str__(self) -> str:
        lines = []
        for stage, own in enumerate(self.stages):
            lines += [f"stage {stage}:", *(f"  {str(task).removesuffix(f' on stage {stage}')}" for task in own)]
        return "\n".join(lines)

    def check(self, graph: Graph) -> None:
        """Makes sure that the lists are a way to run a graph.

        Raises:
            ValueError: a task is not the graph's, on a wrong stage, twice, or missing; or stages that run their lists
                in order would wait for each other. Names the task.
        """
        if len(self.stages) != graph.stages:
            raise ValueError(f"a pipeline schedule of {len(self.stages)} stages for a graph of {graph.stages}")
        seen: set[Task] = set()
        for stage, own in enumerate(self.stages):
            for task in own:
                if task not in graph.ids:
                    raise ValueError(f"a pipeline schedule has what the iteration has not: {task}")
                if task.stage != stage:
                    raise ValueError(f"a pipeline schedule has a task in the list of stage {stage}: {task}")
                if task in seen:
                    raise ValueError(f"a pipeline schedule has a task twice: {task}")
                seen.add(task)
        for task in graph.tasks:
            if task not in seen:
                raise ValueError(f"a pipeline schedule lacks a task: {task}")
        nothing = [0.0] * len(graph.tasks)
        run_lists(graph, self.ids(graph), nothing, [[0.0] * len(edges) for edges in graph.predecessors])

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it: of each task work, program, micro-batch, place, and whether it runs again."""
        return {
            "stages": [
                [[str(one.work), one.program, one.microbatch, one.place, one.again] for one in own]
                for own in self.stages
            ]
        }

    @classmethod
    def from_json(cls, content: Any) -> "Schedule":
        """The inverse of `to_json`.

        Raises:
            ValueError: anything else; says what is wrong. It does not know the graph: see `check`.
        """
        if not isinstance(content, dict) or set(content) != {"stages"} or not isinstance(content["stages"], list):
            raise ValueError("a pipeline schedule is a JSON object with one key, `stages`, that has a list")
        for own in content["stages"]:
            if not isinstance(own, list):
                raise ValueError(f"a pipeline schedule: expected a list of tasks for each stage, got {own!r:.80}")
        return cls(
            tuple(tuple(_task_from_json(stage, one) for one in own) for stage, own in enumerate(content["stages"]))
        )


def _task_from_json(stage: int, content: Any) -> Task:
    if isinstance(content, list) and len(content) == 5:
        work, *numbers, again = content
        if work in list(Work) and isinstance(again, bool) and all(type(n) is int and n >= 0 for n in numbers):
            return Task(stage, Work(work), *numbers, again)
    raise ValueError(
        "a pipeline schedule: expected [work, program, micro-batch, place, whether it runs again] for each task of "
        f"stage {stage}, got {content!r:.80}"
    )


def smallest_limit(graph: Graph) -> int:
    """Micro-batches whose forward passes with gradient must be held at once, at least.

    One is enough, unless a program's chain of several is held and not run again: the gradients of its last pass are
    added up first, and until then all others wait.
    """
    held = [
        len(gradient_places(outline)) * graph.microbatches
        for outline, reruns in zip(graph.outlines, graph.reruns, strict=True)
        if not reruns and len(gradient_places(outline)) > 1
    ]
    return max(held, default=1)


def live_limit(graph: Graph, limit: int | None = None) -> int:
    """The limit on forward passes with gradient that wait for their backward; by default what 1F1B holds.

    Raises:
        ValueError: no schedule of this graph keeps it.
    """
    chosen = min(graph.stages, graph.microbatches) if limit is None else limit
    smallest = smallest_limit(graph)
    if chosen < smallest:
        raise ValueError(f"{LIMIT_FLAG} {chosen}: no schedule of this iteration holds so few; use {smallest} or more")
    return chosen


def plan(
    outlines: Sequence[Outline],
    stages: int,
    microbatches: int,
    costs: Costs,
    kind: Kind = "interleaved",
    limit: int | None = None,
) -> tuple[Graph, Schedule]:
    """The graph and the schedule of an iteration.

    Interleaved, the generator's activations are held from its forward pass until the scores are known, or it runs again
    as it must in the sequential schedule: whichever ends earlier, and never later than that one.

    Args:
        outlines, stages, microbatches: see `build_graph`.
        costs: of the tasks.
        kind: of the schedule.
        limit: see `live_limit`.

    Raises:
        ValueError: no schedule keeps the limit.
    """
    again = build_graph(outlines, stages, microbatches, rerun=True)
    if kind == "sequential":
        return again, sequential(again, limit)
    graphs = [again]
    if any(again.reruns):
        held = build_graph(outlines, stages, microbatches)
        if live_limit(again, limit) >= smallest_limit(held):
            graphs = [held, again]
    searches = [_Search(graph, costs, live_limit(graph, limit)) for graph in graphs]
    shortest = min(searches, key=attrgetter("makespan"))
    return shortest.graph, shortest.improved()


def interleaved(graph: Graph, costs: Costs, limit: int | None = None) -> Schedule:
    """The shortest of several schedules, the sequential one among them; the same wherever it is computed.

    They come from list scheduling by several ideas of what is urgent (see `list_scheduling.py` and `EMPHASES`), and
    from small changes to the best. Rollouts, and the teacher's passes on them, depend on no weight that the iteration
    moves: they fill what the chain of fake updates leaves idle.

    Args:
        graph: what to schedule.
        costs: of its tasks.
        limit: see `live_limit`.

    Raises:
        ValueError: no schedule keeps the limit.
    """
    return _Search(graph, costs, live_limit(graph, limit)).improved()


class _Search:
    """The search for a short schedule of one graph.

    Attributes:
        graph: what is scheduled.
        makespan: seconds of the best schedule so far.
    """

    def __init__(self, graph: Graph, costs: Costs, limit: int):
        self.graph = graph
        self._problem = Problem.of(graph, costs, limit)
        one_by_one = sequential(graph, limit).ids(graph)
        start, end = run_lists(graph, one_by_one, self._problem.seconds, costs.delays(graph))
        self._best = Placement(one_by_one, start, max(end, default=0.0))
        for urgency in self._urgencies():
            placed = justified(self._problem, urgency, WINDOW)
            self._best = min(self._best, placed, key=attrgetter("makespan"))

    @property
    def makespan(self) -> float:
        return self._best.makespan

    def improved(self) -> Schedule:
        """The best schedule after a search around the one that is known."""
        last = len(self.graph.outlines) - 1
        names: dict[tuple[Work, int, int], int] = {}
        kinds = [names.setdefault((task.work, task.program, task.place), len(names) + 1) for task in self.graph.tasks]
        of_last = [kind * (task.program == last) for kind, task in zip(kinds, self.graph.tasks, strict=True)]
        tries = min(TRIES, EFFORT // max(1, len(kinds)))
        self._best = searched(self._problem, self._best, (kinds, of_last), WINDOW, tries)
        return Schedule.of_ids(self.graph, self._best.order)

    def _urgencies(self) -> Iterator[list[float]]:
        """Ideas of what is urgent: the least number is."""
        parts = [self._part(task) for task in self.graph.tasks]
        count = max(1, EFFORT // (3 * len(parts)))
        for emphasis in EMPHASES[:count]:
            seconds = [
                one * emphasis[part] if part is not None else one
                for one, part in zip(self._problem.seconds, parts, strict=True)
            ]
            yield [-one for one in self._problem.time_after(seconds)]

    def _part(self, task: Task) -> int | None:
        """The position in an emphasis that is a task's."""
        of_last = task.program == len(self.graph.outlines) - 1
        if task.work == Work.BACKWARD:
            return 0 + of_last
        if task.work != Work.FORWARD or self.graph.pass_of(task).gradient:
            return None
        edges = self.graph.predecessors[self.graph.ids[task]]
        return None if any(self.graph.tasks[edge.task].work == Work.STEP for edge in edges) else 2 + of_last


def sequential(graph: Graph, limit: int | None = None) -> Schedule:
    """One pipeline after another.

    Program by program and pass by pass: all micro-batches go through the stages, and a program advances when the last
    one has come out. The pass that an update learns from is a pipeline of 1F1B, in which stage s of P holds P - s
    micro-batches, or the limit. Where a program's gradient needs other passes first, as the generator's does, its
    forward passes are this pipeline's second; in a graph without reruns as many micro-batches as the limit
    allows go through the whole program at a time.

    Raises:
        ValueError: no schedule keeps the limit.
    """
    limit = live_limit(graph, limit)
    lists: list[list[Task]] = [[] for _ in range(graph.stages)]
    for program, outline in enumerate(graph.outlines):
        count = len(gradient_places(outline))
        held = profits_from_rerun(outline) and not graph.reruns[program]
        wave = max(1, limit // count) if held else graph.microbatches
        for first in range(0, graph.microbatches, wave):
            _one_by_one(graph, program, range(first, min(first + wave, graph.microbatches)), limit, lists)
        if outline.trains is not None:
            for work in (Work.REDUCE, Work.STEP):
                for stage, own in enumerate(lists):
                    own.append(Task(stage, work, program))
    return Schedule(tuple(map(tuple, lists)))


def _one_by_one(graph: Graph, program: int, microbatches: range, limit: int, lists: list[list[Task]]) -> None:
    """Appends a program's passes on some of its micro-batches."""
    outline, reruns = graph.outlines[program], graph.reruns[program]
    held = profits_from_rerun(outline) and not reruns
    learning = gradient_places(outline)
    last, end = lists[-1], len(outline.groups)
    together = bool(learning) and not reruns and not held  # the gradient is known when its own pass comes out
    place = 0
    for group, passes in enumerate(outline.groups):
        last += [Task(graph.stages - 1, Work.ADVANCE, program, one, group) for one in microbatches]
        for _ in passes:
            if not (together and place in learning):
                for stage, own in enumerate(lists):
                    own += [Task(stage, Work.FORWARD, program, one, place) for one in microbatches]
            place += 1
    if not together:
        last += [Task(graph.stages - 1, Work.ADVANCE, program, one, end) for one in microbatches]
    for learned in reversed(learning):
        for stage, own in enumerate(lists):
            backward = [Task(stage, Work.BACKWARD, program, one, learned) for one in microbatches]
            if held:
                own += backward
                continue
            forward = [[Task(stage, Work.FORWARD, program, one, learned, reruns)] for one in microbatches]
            if together and own is last:
                for one, tasks in zip(microbatches, forward, strict=True):
                    tasks.append(Task(stage, Work.ADVANCE, program, one, end))
            own += _one_forward_one_backward(forward, backward, min(graph.stages - stage, limit))


def _one_forward_one_backward(forward: list[list[Task]], backward: list[Task], holds: int) -> Iterator[Task]:
    """A stage's part of a 1F1B pipeline that holds so many micro-batches."""
    for position in range(len(forward) + holds - 1):
        if position < len(forward):
            yield from forward[position]
        if position >= holds - 1:
            yield backward[position - holds + 1]
