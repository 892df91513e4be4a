"""List scheduling: whenever a stage is idle it begins the most urgent of the tasks that could start there.

What is urgent comes from the longest way to the iteration's end, and then from the schedule itself: `justified` pushes
every task as late as it can go, which frees the early places, and then as early as it can go. `searched` does so again
and again with small changes. Nothing depends on clocks or hashes: all ranks find the same schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from operator import attrgetter
from random import Random

from megatron_pdmd.parallel.pipeline.costs import Costs
from megatron_pdmd.parallel.pipeline.passes import Graph, Work

Waits = list[list[tuple[int, float]]]  # of each task, ids at the other ends of its edges, and their seconds


@dataclass(frozen=True)
class Problem:
    """A graph with its costs as plain lists by task id.

    Attributes:
        stages: how many there are.
        stage_of, seconds: of each task.
        forwards: whether a task's activation waits at the next stage until its next task begins.
        before, after: who a task waits for and who waits for it, memory included.
    """

    stages: int
    stage_of: list[int]
    seconds: list[float]
    forwards: list[bool]
    before: Waits
    after: Waits

    @classmethod
    def of(cls, graph: Graph, costs: Costs, limit: int) -> "Problem":
        """The problem of a graph in which at most `limit` forward passes with gradient wait for their backward.

        The first stage holds the most, so the limit is kept there; it becomes edges. Forward passes with gradient begin
        in one order, the order of their backward passes, and the k-th waits for the end of backward pass k - limit.
        So no schedule breaks the limit, however long its tasks really take, and none can get stuck: the earliest
        pass that waits for its backward waits for passes without gradient and for earlier updates alone.
        """
        before = [
            [(edge.task, delay) for edge, delay in zip(edges, delays, strict=True)]
            for edges, delays in zip(graph.predecessors, costs.delays(graph), strict=True)
        ]
        begun, ended = _learning_order(graph)
        for position in range(1, len(begun)):
            before[begun[position]].append((begun[position - 1], 0.0))
        for position in range(limit, len(begun)):
            before[begun[position]].append((ended[position - limit], 0.0))
        forwards = [task.work == Work.FORWARD for task in graph.tasks]
        stage_of = [task.stage for task in graph.tasks]
        return cls(graph.stages, stage_of, costs.seconds(graph), forwards, before, _turned(before))

    @cached_property
    def topological(self) -> list[int]:
        """All tasks, each after what it waits for."""
        left = [len(edges) for edges in self.before]
        order = [task for task, count in enumerate(left) if not count]
        for task in order:
            for other, _ in self.after[task]:
                left[other] -= 1
                if not left[other]:
                    order.append(other)
        assert len(order) == len(left), "the limit was judged before"
        return order

    def time_after(self, seconds: Sequence[float]) -> list[float]:
        """The longest way from each task's beginning to the iteration's end, if tasks took so many seconds."""
        found = [0.0] * len(seconds)
        for task in reversed(self.topological):
            longest = max((found[other] + delay for other, delay in self.after[task]), default=0.0)
            found[task] = longest + seconds[task]
        return found


@dataclass(frozen=True)
class Placement:
    """When tasks run.

    Attributes:
        order: ids of each stage's tasks in the order in which they begin.
        start: seconds, by id.
        makespan: seconds until the last one ends.
    """

    order: list[list[int]]
    start: list[float]
    makespan: float


def _learning_order(graph: Graph) -> tuple[list[int], list[int]]:
    """Ids of the first stage's forward passes with gradient, and of backward passes, in the order of the limit."""
    begun, ended = [], []
    for index, task in enumerate(graph.tasks):
        if task.stage == 0:
            backwards = (task.program, -task.place, task.microbatch, index)
            if task.work == Work.BACKWARD:
                ended.append(backwards)
            elif graph.learns(task):
                again = graph.reruns[task.program]
                begun.append(backwards if again else (task.program, task.place, task.microbatch, index))
    return [one[-1] for one in sorted(begun)], [one[-1] for one in sorted(ended)]


def _turned(waits: Waits) -> Waits:
    found: Waits = [[] for _ in waits]
    for task, edges in enumerate(waits):
        for other, delay in edges:
            found[other].append((task, delay))
    return found


def list_schedule(problem: Problem, urgency: Sequence[float], window: int = 0, turned: bool = False) -> Placement:
    """Begins, whenever a stage is idle, the ready task with the least urgency number; the lower id of equals.

    Args:
        problem: what to schedule.
        urgency: by id.
        window: of a pass's activations, how many may be made or on their way from a stage to the next and not begun
            there; 0 for any number. A stage whose window is full goes on with other work. The last stage's is never
            full, so it always drains the one before, and so on.
        turned: from the iteration's end to its beginning; times are then seconds before the end. Without window.
    """
    return _Run(problem, urgency, window, turned).run()


class _Run:
    """One run through the events of a schedule in the order of their time."""

    def __init__(self, problem: Problem, urgency: Sequence[float], window: int, turned: bool):
        self.problem, self.urgency, self.window = problem, urgency, window
        before, self.after = (problem.after, problem.before) if turned else (problem.before, problem.after)
        self.left = [len(edges) for edges in before]
        self.earliest = [0.0] * len(before)
        self.start = [0.0] * len(before)
        stages = range(problem.stages)
        self.ready: list[list[tuple[float, int]]] = [[] for _ in stages]
        self.order: list[list[int]] = [[] for _ in stages]
        self.idle = [True] * problem.stages
        self.under_way = [0] * problem.stages  # activations from a stage to the next
        self.events: list[tuple[float, int, bool]] = []  # time, task, whether it ends (or becomes ready)
        self.changed: set[int] = set(stages)  # stages that may be able to begin something

    def run(self) -> Placement:
        for task, count in enumerate(self.left):
            if not count:
                self._make_ready(task)
        now = 0.0
        self._begin_what_can(now)
        while self.events:
            now = self.events[0][0]
            while self.events and self.events[0][0] == now:
                _, task, ends = heappop(self.events)
                if ends:
                    self._end(task, now)
                else:
                    self._make_ready(task)
            self._begin_what_can(now)
        assert sum(map(len, self.order)) == len(self.left)
        return Placement(self.order, self.start, now)

    def _make_ready(self, task: int) -> None:
        stage = self.problem.stage_of[task]
        heappush(self.ready[stage], (self.urgency[task], task))
        self.changed.add(stage)

    def _end(self, task: int, now: float) -> None:
        stage = self.problem.stage_of[task]
        self.idle[stage] = True
        self.changed.add(stage)
        left, earliest = self.left, self.earliest
        for other, delay in self.after[task]:
            left[other] -= 1
            if now + delay > earliest[other]:
                earliest[other] = now + delay
            if not left[other]:
                if earliest[other] <= now:
                    self._make_ready(other)
                else:
                    heappush(self.events, (earliest[other], other, False))

    def _begin_what_can(self, now: float) -> None:
        while self.changed:
            for stage in sorted(self.changed):
                self.changed.discard(stage)
                if self.idle[stage] and self.ready[stage]:
                    task = self._most_urgent(stage)
                    if task is not None:
                        self._begin(task, stage, now)

    def _begin(self, task: int, stage: int, now: float) -> None:
        self.idle[stage] = False
        self.start[task] = now
        self.order[stage].append(task)
        heappush(self.events, (now + self.problem.seconds[task], task, True))
        if self.window and self.problem.forwards[task]:
            self.under_way[stage] += 1
            if stage:
                self.under_way[stage - 1] -= 1
                self.changed.add(stage - 1)

    def _most_urgent(self, stage: int) -> int | None:
        ready = self.ready[stage]
        if not self.window or stage == self.problem.stages - 1 or self.under_way[stage] < self.window:
            return heappop(ready)[1]
        held_back = []
        while ready and self.problem.forwards[ready[0][1]]:
            held_back.append(heappop(ready))
        task = heappop(ready)[1] if ready else None
        for one in held_back:
            heappush(ready, one)
        return task


def latest_starts(problem: Problem, placed: Placement) -> list[float]:
    """How late each task could begin: a schedule from the end, the tasks that end last in `placed` first."""
    ends = [-(start + seconds) for start, seconds in zip(placed.start, problem.seconds, strict=True)]
    late = list_schedule(problem, ends, turned=True)
    return [late.makespan - start - seconds for start, seconds in zip(late.start, problem.seconds, strict=True)]


def justified(problem: Problem, urgency: Sequence[float], window: int) -> Placement:
    """The better of two list schedules; how late each task could begin in the first is the urgency of the second.

    This is double justification (Valls, Ballestin and Quintanilla 2005).
    """
    first = list_schedule(problem, urgency, window)
    second = list_schedule(problem, latest_starts(problem, first), window)
    return min(first, second, key=attrgetter("makespan"))


def searched(problem: Problem, placed: Placement, kinds: Sequence[Sequence[int]], window: int, tries: int) -> Placement:
    """The best of further schedules around one, each from the best so far, the same ones every time.

    Each try delays the kinds of tasks by up to eight tasks' time, drawn at random, and schedules by how late tasks
    could begin then. What is as good as the best is gone on from too, so that the search leaves plateaus.

    Args:
        problem: what to schedule.
        placed: where to begin.
        kinds: ways to tell tasks apart, taken in turn: each gives the kind of every task, and 0 for those that stay.
        window: see `list_schedule`.
        tries: how many.
    """
    draw = Random(0)
    unit = sum(problem.seconds) / len(problem.seconds)
    best, late = placed, latest_starts(problem, placed)
    for attempt in range(tries):
        told_apart = kinds[attempt % len(kinds)]
        most = unit * draw.choice((1, 2, 4, 8))
        delay = [0.0, *(most * draw.random() for _ in range(max(told_apart)))]
        urgency = [start + delay[kind] for start, kind in zip(late, told_apart, strict=True)]
        found = list_schedule(problem, urgency, window)
        if found.makespan <= best.makespan:
            best, late = found, latest_starts(problem, found)
    return best
