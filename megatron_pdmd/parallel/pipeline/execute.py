"""Runs one stage's tasks of an iteration: receives what each needs, keeps what its backward needs, sends what it made.

A stage runs its list in order and waits for nothing but the messages of the task at hand; it never waits for a message
of its own to be received. So a schedule in which every task comes after what it needs cannot come to a halt.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from megatron_pdmd.parallel.pipeline.channels import CARRIED, Inbox, Outbox, PipelineGroups, Tensors
from megatron_pdmd.parallel.pipeline.passes import Graph, Message, ModelPass, Task, Work
from megatron_pdmd.parallel.pipeline.schedule import Schedule

Name = tuple[int, ...]  # of a message or of what is kept: (program, microbatch, place, again)


class Duties(Protocol):
    """What the tasks of an iteration mean for the networks of this rank."""

    def advance(self, task: Task, flows: Tensors) -> Sequence[tuple[Tensor, Tensor]]:
        """Runs a program to its next request: latents and times of the passes asked for; none at the program's end,
        when the gradient of each flow that has one is in its `grad`."""

    def forward(self, task: Task, given: Tensors) -> Tensors:
        """This stage's layers, from latents and times on the first stage and hidden states elsewhere, to hidden states
        or, on the last stage, the flow, fp32."""

    def backward(self, task: Task) -> AbstractContextManager[None]:
        """Around a backward pass."""

    def reduce(self, task: Task) -> None:
        """The gradients of an update are complete."""

    def await_norm(self, task: Task) -> None:
        """Waits for the norm of an update's gradients on all stages."""

    def step(self, task: Task) -> None:
        """Ends an update."""

    def carried(self, task: Task) -> int:
        """How many of a pass's hidden states, from the first, have a gradient."""

    def empty(self, message: Message, program: int, microbatch: int, place: int) -> Tensors:
        """Memory for a message."""


class Executor:
    """One rank's part of one iteration.

    Args:
        graph: of the iteration.
        schedule: of all stages.
        groups: the stages of this rank's replica.
        duties: what the tasks do.
        around: each task runs inside of what this gives for it once it has all it needs; for who measures.

    Attributes:
        peak_live: passes whose activations were kept for a backward pass at the same time, at the most.
    """

    def __init__(
        self,
        graph: Graph,
        schedule: Schedule,
        groups: PipelineGroups,
        duties: Duties,
        around: Callable[[Task], AbstractContextManager[None]],
    ):
        self._graph, self._schedule = graph, schedule
        self._groups, self._duties, self._around = groups, duties, around
        self._tasks = schedule.stages[groups.stage]
        self._is_first, self._is_last = groups.stage == 0, groups.stage == len(groups.ranks) - 1
        self._inboxes = {message: self._inbox(message) for message in CARRIED}
        self._outboxes = {message: self._outbox(message) for message in CARRIED}
        self._kept: dict[Name, tuple[Tensors, Tensors]] = {}
        self._latents: dict[Name, Tensors] = {}
        self._flows: dict[Name, Tensor] = {}
        self._asked: dict[Name, Tensor] = {}
        self.peak_live = 0

    def run(self) -> None:
        """Runs the tasks in order, and returns when all that they sent has gone."""
        run = {
            Work.ADVANCE: self._advance,
            Work.FORWARD: self._forward,
            Work.BACKWARD: self._backward,
            Work.REDUCE: self._reduce,
            Work.STEP: self._step,
        }
        for task in self._tasks:
            run[task.work](task)
        for outbox in self._outboxes.values():
            if outbox:
                outbox.finish()

    def _advance(self, task: Task) -> None:
        """On the last stage: the flows of a program's last request for the latents of its next."""
        before = self._places(task.program, task.place - 1)
        flows = tuple(self._flows[_name(task, place)] for place in before)
        with self._around(task), torch.enable_grad():
            asked = self._duties.advance(task, flows)
        for place, (x_t, t) in zip(self._places(task.program, task.place), asked, strict=True):
            if self._pass(task.program, place).latent_gradient:
                self._asked[_name(task, place)] = x_t
            self._outboxes[Message.SAMPLE].put((x_t.detach(), t))
        for place in before:
            if not self._pass(task.program, place).gradient:
                del self._flows[_name(task, place)]

    def _forward(self, task: Task) -> None:
        one, name = self._pass(task.program, task.place), _name(task, task.place)
        learns = self._graph.learns(task)
        given = self._given(task, learns)
        with self._around(task), torch.set_grad_enabled(learns):
            result = self._duties.forward(task, given)
        if learns:
            self._kept[name] = given, result
            self.peak_live = max(self.peak_live, len(self._kept))
        if not self._is_last:
            self._outboxes[Message.ACTIVATION].put(tuple(tensor.detach() for tensor in result))
        elif not task.again:
            (flow,) = result
            self._flows[name] = flow.detach().requires_grad_(one.gradient)

    def _given(self, task: Task, learns: bool) -> Tensors:
        """What a stage's layers begin with, as leaves of the graph that a backward pass will walk through."""
        one, name = self._pass(task.program, task.place), _name(task, task.place)
        if not self._is_first:
            given = self._inboxes[Message.ACTIVATION].take((*name, task.again))
            count = self._duties.carried(task)
        else:
            given = self._latents.pop(name) if task.again else self._inboxes[Message.SAMPLE].take((*name, False))
            count = int(one.latent_gradient)
            if one.gradient and not learns:
                self._latents[name] = given
        if learns:
            for tensor in given[:count]:
                tensor.requires_grad_()
        return given

    def _backward(self, task: Task) -> None:
        name = _name(task, task.place)
        if self._is_last:
            gradients = (self._flow_gradient(task),)
        else:
            gradients = self._inboxes[Message.GRADIENT].take((*name, False))
        given, result = self._kept.pop(name)
        with self._around(task), self._duties.backward(task):
            torch.autograd.backward(result[: len(gradients)], gradients)
        if not self._is_first:
            self._outboxes[Message.GRADIENT].put(tuple(one.grad for one in given[: self._duties.carried(task)]))
        elif self._pass(task.program, task.place).latent_gradient:
            self._outboxes[Message.LATENT_GRADIENT].put((given[0].grad,))

    def _flow_gradient(self, task: Task) -> Tensor:
        """The gradient at a pass's flow, when that of the latents which the flow led to is known.

        Those latents lie on the way to the sample, along which the gradient has come already; what is added here came
        through the pass that they were given to.
        """
        for place in range(task.place + 1, len(self._graph.outlines[task.program].passes)):
            if (name := _name(task, place)) in self._asked:
                (gradient,) = self._inboxes[Message.LATENT_GRADIENT].take((*name, False))
                self._asked.pop(name).backward(gradient, retain_graph=True)
        return self._flows.pop(_name(task, task.place)).grad

    def _reduce(self, task: Task) -> None:
        with self._around(task):
            self._duties.reduce(task)

    def _step(self, task: Task) -> None:
        self._duties.await_norm(task)
        with self._around(task):
            self._duties.step(task)

    def _inbox(self, message: Message) -> Inbox | None:
        """Where messages of a kind arrive here, if they do."""
        for stage, tasks in enumerate(self._schedule.stages):
            way = self._groups.way(message, stage)
            if way and way[1] == self._groups.stage:
                order = [name for task in tasks for kind, name in self._sent_by(task) if kind == message]

                def empty(name: Name) -> Tensors:
                    return self._duties.empty(message, *name[:3])

                return Inbox(self._groups.by_message[message], self._groups.ranks[stage], order, empty)
        return None

    def _outbox(self, message: Message) -> Outbox | None:
        way = self._groups.way(message, self._groups.stage)
        return Outbox(self._groups.by_message[message], self._groups.ranks[way[1]]) if way else None

    def _sent_by(self, task: Task) -> Iterator[tuple[Message, Name]]:
        """The messages of a task, in the order in which they are sent."""
        last = len(self._groups.ranks) - 1
        if task.work == Work.ADVANCE:
            for place in self._places(task.program, task.place):
                yield Message.SAMPLE, (*_name(task, place), False)
        elif task.work == Work.FORWARD and task.stage < last:
            yield Message.ACTIVATION, (*_name(task, task.place), task.again)
        elif task.work == Work.BACKWARD and task.stage:
            yield Message.GRADIENT, (*_name(task, task.place), False)
        elif task.work == Work.BACKWARD and self._pass(task.program, task.place).latent_gradient:
            yield Message.LATENT_GRADIENT, (*_name(task, task.place), False)

    def _pass(self, program: int, place: int) -> ModelPass:
        return self._graph.outlines[program].passes[place]

    def _places(self, program: int, group: int) -> range:
        """Places of the passes of a program's request; none before the first and after the last."""
        groups = self._graph.outlines[program].groups
        before = sum(len(passes) for passes in groups[: max(group, 0)])
        return range(before, before + len(groups[group])) if 0 <= group < len(groups) else range(0)


def _name(task: Task, place: int) -> Name:
    return task.program, task.microbatch, place
