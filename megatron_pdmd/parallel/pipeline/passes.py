"""The graph of one iteration: what each stage has to do for each micro-batch, and what must be done before it.

An iteration is a list of programs; `Outline` is what a schedule must know of one. Programs run on the last stage,
where flows appear. The passes they ask for run through all stages. `build_graph` says what must wait for what.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class Work(StrEnum):
    """What a task does.

    - `ADVANCE`: the last stage hands a program the flows of the group of passes before and runs it to its next request,
      whose latents travel to the first stage; at the program's end, whose gradient is then known at its flows.
    - `FORWARD`: a stage's layers of one pass.
    - `BACKWARD`: the same, backward.
    - `REDUCE`: the gradients of an update are complete on a stage: summed over its replicas, their norm on its way to
      the other stages.
    - `STEP`: the norm of all stages is there: the optimizer moves the stage's weights, or, on all stages, none do.
    """

    ADVANCE = "advance"
    FORWARD = "forward"
    BACKWARD = "backward"
    REDUCE = "reduce"
    STEP = "step"


@dataclass(frozen=True)
class ModelPass:
    """One model evaluation of a program.

    Attributes:
        network: whose weights answer; equal names are weights that change together.
        gradient: a backward pass follows.
        latent_gradient: that one goes on into the latents, for a pass with gradient made them.
    """

    network: str
    gradient: bool = False
    latent_gradient: bool = False


@dataclass(frozen=True)
class Outline:
    """What a schedule must know of a program; all micro-batches of an update have the same.

    Attributes:
        name: of the update, for people.
        groups: the passes between two requests, which do not need each other but all of the group before.
        trains: the network whose optimizer steps when all micro-batches have made their backward passes; None where
            the program is a part of others and has none.
        start: position in the iteration of the program whose result this one begins with.
    """

    name: str
    groups: tuple[tuple[ModelPass, ...], ...]
    trains: str | None = None
    start: int | None = None

    @property
    def passes(self) -> tuple[ModelPass, ...]:
        """All passes in order."""
        return tuple(one for group in self.groups for one in group)


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """One stage's part of the work on one micro-batch.

    Attributes:
        stage: who does it.
        work: what it is.
        program: position of the program in the iteration.
        microbatch: 0-based; 0 for `REDUCE` and `STEP`, which concern all.
        place: position of the pass in the program, over all groups; of `ADVANCE` the group that it begins, or the
            number of groups where it ends the program.
        again: a pass that ran without gradient runs again, with it; its flow is known.
    """

    stage: int
    work: Work
    program: int
    microbatch: int = 0
    place: int = 0
    again: bool = False

    def __str__(self) -> str:
        """For people: `forward again of program 5, pass 1, micro-batch 2 on stage 0`."""
        told = f"{self.work}{' again' * self.again} of program {self.program}"
        if self.work in (Work.FORWARD, Work.BACKWARD):
            told += f", pass {self.place}, micro-batch {self.microbatch}"
        elif self.work == Work.ADVANCE:
            told += f", group {self.place}, micro-batch {self.microbatch}"
        return f"{told} on stage {self.stage}"


class Message(StrEnum):
    """What an edge of the graph carries from a task to the one that waits for it.

    - `SAMPLE`: the latents and times of a pass, from the last stage, where its program runs, to the first.
    - `ACTIVATION`: what a stage's layers make of a pass, to the next stage; from the last one the flow, to the program.
    - `GRADIENT`: the gradient of that, the way back; from the program's end the gradient at its flow.
    - `LATENT_GRADIENT`: the gradient of a pass's latents, from the first stage to the last, where it goes on into the
      flow of the pass that made them.
    - `NORM`: a stage's part of the gradient's norm, to every stage.
    """

    SAMPLE = "sample"
    ACTIVATION = "activation"
    GRADIENT = "gradient"
    LATENT_GRADIENT = "latent_gradient"
    NORM = "norm"


@dataclass(frozen=True)
class Edge:
    """What a task waits for, or who waits for it.

    Attributes:
        task: id of the task at the other end.
        message: what the edge carries; None where it is order alone, or weights, which stay on their stage. It travels
            if its ends stand on different stages.
    """

    task: int
    message: Message | None = None


@dataclass(frozen=True)
class Graph:
    """All tasks of an iteration and what each waits for.

    Attributes:
        outlines: the programs.
        stages, microbatches: how many there are.
        reruns: of each program, whether its gradient passes run without gradient first and again with it.
        tasks: by id, which is the task's position here; each stands after all that it waits for.
        predecessors: of each task, the edges to what it waits for.
    """

    outlines: tuple[Outline, ...]
    stages: int
    microbatches: int
    reruns: tuple[bool, ...]
    tasks: tuple[Task, ...]
    predecessors: tuple[tuple[Edge, ...], ...]

    @cached_property
    def ids(self) -> dict[Task, int]:
        """The id of each task."""
        return {task: index for index, task in enumerate(self.tasks)}

    @cached_property
    def successors(self) -> tuple[tuple[Edge, ...], ...]:
        """Of each task, the edges to what waits for it."""
        found: list[list[Edge]] = [[] for _ in self.tasks]
        for index, edges in enumerate(self.predecessors):
            for edge in edges:
                found[edge.task].append(Edge(index, edge.message))
        return tuple(map(tuple, found))

    def pass_of(self, task: Task) -> ModelPass:
        """The pass of a `FORWARD` or `BACKWARD`."""
        return self.outlines[task.program].passes[task.place]

    def learns(self, task: Task) -> bool:
        """Whether a task is a forward pass with gradient, which keeps its activations until it went backward."""
        if task.work != Work.FORWARD:
            return False
        return self.pass_of(task).gradient and task.again == self.reruns[task.program]


def gradient_places(outline: Outline) -> tuple[int, ...]:
    """Places of a program's passes with gradient."""
    return tuple(place for place, one in enumerate(outline.passes) if one.gradient)


def profits_from_rerun(outline: Outline) -> bool:
    """Whether a program's activations would wait for other passes between forward and backward.

    They do not where a single pass with gradient is in the last group: its flow is all that its gradient needs.
    """
    places = gradient_places(outline)
    if not places:
        return False
    return len(places) > 1 or places[0] < len(outline.passes) - len(outline.groups[-1])


def build_graph(outlines: Sequence[Outline], stages: int, microbatches: int, rerun: bool = False) -> Graph:
    """The graph of one iteration.

    A micro-batch's way through a program with G groups of passes, on P stages:

    1. `ADVANCE(group 0)` on the last stage makes the first latents. Those of each pass of the group travel to the first
       stage (`SAMPLE`), and the pass runs `FORWARD` there and on each stage after it (`ACTIVATION`).
    2. `ADVANCE(group g + 1)` waits for all passes of group g on the last stage, and so on. `ADVANCE(group G)` ends the
       program: the gradient at its flows is known.
    3. `BACKWARD` of its last pass with gradient runs from the last stage to the first (`GRADIENT`). If the latents of
       that pass were made by passes with gradient, their gradient travels from the first stage to the last
       (`LATENT_GRADIENT`), where the pass before begins its own `BACKWARD`.

    Then, on every stage: when all micro-batches have gone backward, `REDUCE` sends the stage's part of the gradient's
    norm everywhere (`NORM`), and `STEP` waits for all parts. All stages reduce their updates in one order. Weights make
    the other edges, each within a stage: a pass on a network waits for the last `STEP` before it that moves this
    network, and a `STEP` for all passes that still need the weights as they were. A program that begins with another's
    result waits for its end.

    A stage adds gradients up in one order: a program's last pass for micro-batches 0, 1, ..., then the pass before. So
    numbers depend on no schedule.

    Args:
        outlines: the programs in the order of the iteration.
        stages: P.
        microbatches: of every program.
        rerun: where other passes stand between a forward pass with gradient and its backward pass (see
            `profits_from_rerun`: the generator's update, chains), it runs without gradient first, keeping nothing,
            and `again` with gradient when the program has ended. Other programs are not changed.
    """
    return _Builder(tuple(outlines), stages, microbatches, rerun).build()


class _Builder:
    """Collects the tasks program by program, each after what it waits for."""

    def __init__(self, outlines: tuple[Outline, ...], stages: int, microbatches: int, rerun: bool):
        assert stages > 0 and microbatches > 0
        self.outlines, self.stages, self.microbatches = outlines, range(stages), range(microbatches)
        self.reruns = tuple(rerun and profits_from_rerun(outline) for outline in outlines)
        self.tasks: list[Task] = []
        self.edges: list[tuple[Edge, ...]] = []
        self.ids: dict[tuple, int] = {}
        self.last_reduce: dict[int, int] = {}  # stage -> its task
        self.last_step: dict[str, int] = {}  # network -> the program that trained it last
        self.uses: dict[str, list[int]] = {}  # network -> tasks that need its weights as they are

    def build(self) -> Graph:
        for program, outline in enumerate(self.outlines):
            learning = {one.network for one in outline.passes if one.gradient}
            assert learning == ({outline.trains} - {None}), "an update has gradients of the network that it trains"
            for microbatch in self.microbatches:
                self._forward(program, outline, microbatch)
            self._backward(program, outline)
            if outline.trains is not None:
                self._update(program, outline.trains)
        return Graph(
            self.outlines,
            len(self.stages),
            len(self.microbatches),
            self.reruns,
            tuple(self.tasks),
            tuple(self.edges),
        )

    def _add(self, task: Task, waits_for: list[Edge]) -> int:
        index = len(self.tasks)
        self.tasks.append(task)
        self.edges.append(tuple(waits_for))
        self.ids[task.work, task.program, task.place, task.microbatch, task.stage, task.again] = index
        return index

    def _id(self, work: Work, program: int, place: int, microbatch: int, stage: int, again: bool = False) -> int:
        return self.ids[work, program, place, microbatch, stage, again]

    def _forward(self, program: int, outline: Outline, microbatch: int) -> None:
        last = self.stages[-1]
        waits_for = []
        if outline.start is not None:
            end = len(self.outlines[outline.start].groups)
            waits_for = [Edge(self._id(Work.ADVANCE, outline.start, end, microbatch, last))]
        place = 0
        for group, passes in enumerate(outline.groups):
            advance = self._add(Task(last, Work.ADVANCE, program, microbatch, group), waits_for)
            waits_for = [Edge(advance)]
            for one in passes:
                flow = self._pass(program, place, microbatch, advance, one.network)
                waits_for.append(Edge(flow, Message.ACTIVATION))
                place += 1
        self._add(Task(last, Work.ADVANCE, program, microbatch, len(outline.groups)), waits_for)

    def _pass(self, program: int, place: int, microbatch: int, advance: int, network: str, again: bool = False) -> int:
        """A forward pass through all stages; returns its task on the last."""
        edge = Edge(advance, Message.SAMPLE)
        for stage in self.stages:
            waits_for = [edge]
            if network in self.last_step:
                waits_for.append(Edge(self._id(Work.STEP, self.last_step[network], 0, 0, stage)))
            index = self._add(Task(stage, Work.FORWARD, program, microbatch, place, again), waits_for)
            self.uses.setdefault(network, []).append(index)
            edge = Edge(index, Message.ACTIVATION)
        return edge.task

    def _backward(self, program: int, outline: Outline) -> None:
        """Backward passes of all micro-batches, in the order in which their gradients are added up."""
        before: dict[int, int] = {}  # stage -> its backward task before
        places, end = gradient_places(outline), len(outline.groups)
        group_of = [group for group, passes in enumerate(outline.groups) for _ in passes]
        for place in reversed(places):
            later = [one for one in places if group_of[one] > group_of[place]]
            senders = [
                one for one in later if group_of[one] == group_of[later[0]] and outline.passes[one].latent_gradient
            ]
            for microbatch in self.microbatches:
                ended = self._id(Work.ADVANCE, program, end, microbatch, self.stages[-1])
                edges = [Edge(ended, Message.GRADIENT)]
                again = self.reruns[program]
                if again:
                    self._pass(program, place, microbatch, ended, outline.passes[place].network, again)
                for one in senders:
                    made = self._id(Work.BACKWARD, program, one, microbatch, 0)
                    edges.append(Edge(made, Message.LATENT_GRADIENT))
                for stage in reversed(self.stages):
                    edges.append(Edge(self._id(Work.FORWARD, program, place, microbatch, stage, again)))
                    if stage in before:
                        edges.append(Edge(before[stage]))
                    index = self._add(Task(stage, Work.BACKWARD, program, microbatch, place), edges)
                    self.uses[outline.passes[place].network].append(index)
                    before[stage] = index
                    edges = [Edge(index, Message.GRADIENT)]

    def _update(self, program: int, network: str) -> None:
        uses = self.uses.pop(network)
        place, microbatch = gradient_places(self.outlines[program])[0], self.microbatches[-1]
        reduces = []
        for stage in self.stages:
            complete = self._id(Work.BACKWARD, program, place, microbatch, stage)
            waits_for = [Edge(complete)] + ([Edge(self.last_reduce[stage])] if stage in self.last_reduce else [])
            self.last_reduce[stage] = self._add(Task(stage, Work.REDUCE, program), waits_for)
            reduces.append(self.last_reduce[stage])
        for stage in self.stages:
            waits_for = [Edge(one) for one in uses if self.tasks[one].stage == stage]
            waits_for += [Edge(one, Message.NORM) for one in reduces]
            self._add(Task(stage, Work.STEP, program), waits_for)
        self.last_step[network] = program
