"""What a stage's tasks do with this rank's networks: run layers, drive programs, end updates."""

import functools
from collections.abc import Generator as Coroutine
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pdmd.distillation.roles import Pass
from megatron_pdmd.distillation.tracing import TracedPass
from megatron_pdmd.models.conditions import Conditions
from megatron_pdmd.models.wan.model import Hidden
from megatron_pdmd.parallel.pipeline.channels import Tensors
from megatron_pdmd.parallel.pipeline.passes import Message, Task, Work
from megatron_pdmd.training.pipelined.parts import Part, StagePhase
from megatron_pdmd.training.trained_network import means_of, not_finite

Metrics = dict[str, float]


class StageWork:
    """What the tasks of one iteration do on this rank; `parallel.pipeline.execute.Duties`.

    Args:
        phase: what all iterations have in common.
        parts: the iteration's programs.
        tasks: this stage's, in order.

    Attributes:
        ended: the numbers of each update that has ended, by the position of its program.
    """

    def __init__(self, phase: StagePhase, parts: Sequence[Part], tasks: Sequence[Task]):
        self._phase, self._parts, self._networks = phase, parts, phase.networks
        self._topology, self._device = phase.topology, phase.topology.device
        self._batch = functools.lru_cache(maxsize=2 * phase.count)(
            lambda part, index: phase.micro_batch(parts[part].shared, index)
        )
        self._is_first, self._is_last = phase.groups.stage == 0, phase.groups.stage == len(phase.groups.ranks) - 1
        # Of each program the backward task after which its gradients are complete here.
        self._completing = {task.program: task for task in tasks if task.work == Work.BACKWARD}
        self._running: dict[tuple[int, int], Coroutine[Any, Any, Any]] = {}
        self._starts: dict[tuple[int, int], Tensor] = {}
        self._results: dict[int, dict[int, dict[str, Tensor]]] = {}
        self._sums: dict[int, tuple[Tensor, Tensor, list[dist.Work]]] = {}
        self.ended: dict[int, Metrics] = {}
        for name in {part.trains for part in parts} - {None}:
            self._networks.trained[name].optimizer.zero_grad()

    def advance(self, task: Task, flows: Tensors) -> Sequence[tuple[Tensor, Tensor]]:
        """See `Duties`."""
        part, key = self._parts[task.program], (task.program, task.microbatch)
        if task.place == 0:
            start = None if part.start is None else self._starts[part.start, task.microbatch]
            self._running[key] = part.begin(self._phase.iteration, self._batch(*key), start)
        try:
            request = self._running[key].send(flows or None)
            if task.place < len(part.trace.groups):
                return [(one.x_t, one.t) for one in request]
            chained = any(one.latent_gradient for one in part.trace.passes)
            request.run(1 / self._phase.count, retain_graph=chained)
            self._running[key].send(None)
        except StopIteration as finished:
            del self._running[key]
            if part.update is None:
                self._starts[key] = finished.value
            else:
                self._results.setdefault(task.program, {})[task.microbatch] = finished.value
            return ()
        raise AssertionError("a program goes on after its backward pass")

    def forward(self, task: Task, given: Tensors) -> Tensors:
        """See `Duties`."""
        one = self._traced(task)
        model, adapter = self._networks.roles.network(one)
        if (name := self._networks.name(one)) in self._networks.trained:
            self._networks.trained[name].optimizer.finish_param_gather()
        sizes = self._phase.latent_sizes
        if not self._is_first:
            made = model.run_stage(given, sizes, adapter)
        else:
            batch = self._batch(task.program, task.microbatch)
            conditions = batch.negative if one.negative else batch.conditions
            if not task.again:
                request = Pass(one.role, one.key, *given, conditions, one.gradient)
                self._phase.instruments.count(request, self._networks.roles)
            made = model.run_stage((*given, Conditions.of(conditions)), sizes, adapter)
        return (made.float(),) if self._is_last else made

    @contextmanager
    def backward(self, task: Task) -> Iterator[None]:
        """See `Duties`."""
        network = self._networks.trained[self._parts[task.program].trains]
        with network.backward(last=task == self._completing[task.program]):
            yield

    def reduce(self, task: Task) -> None:
        """See `Duties`. The numbers of the update go with the norm: whether it is skipped is decided by both."""
        part, results = self._parts[task.program], self._results.pop(task.program, {})
        optimizer = self._networks.trained[part.trains].optimizer
        squared, norm_sum = optimizer.start_gradient_norm()
        values = torch.zeros(len(part.trace.metrics), device=self._device)
        if self._is_last:
            values = means_of([results[index] for index in range(self._phase.count)], self._topology)
        group = self._topology.groups.pp
        told = dist.broadcast(values, self._phase.groups.ranks[-1], group=group, async_op=True)
        self._sums[task.program] = squared, values, [*norm_sum, told]

    def await_norm(self, task: Task) -> None:
        """See `Duties`."""
        for work in self._sums[task.program][2]:
            work.wait()

    def step(self, task: Task) -> None:
        """See `Duties`."""
        part = self._parts[task.program]
        network = self._networks.trained[part.trains]
        squared, values, _ = self._sums.pop(task.program)
        norm = squared.sqrt()
        metrics = dict(zip(part.trace.metrics, values.tolist(), strict=True))
        metrics |= {f"{part.update.kind}_grad_norm": norm.item()}
        if not not_finite(metrics):
            network.optimizer.step(norm)
        network.optimizer.zero_grad()
        self.ended[task.program] = metrics
        self._phase.instruments.bar.advance()

    def carried(self, task: Task) -> int:
        """See `Duties`. Of frozen embeddings nothing but the tokens has a gradient."""
        _, adapter = self._networks.roles.network(self._traced(task))
        return 1 if adapter else len(Hidden._fields)

    def empty(self, message: Message, program: int, microbatch: int, place: int) -> Tensors:
        """See `Duties`."""
        phase, device = self._phase, self._device
        shape = (phase.samples, *phase.iteration.latent_shape)
        if message == Message.SAMPLE:
            return torch.empty(shape, device=device), torch.empty(phase.samples, device=device)
        if message == Message.LATENT_GRADIENT:
            return (torch.empty(shape, device=device),)
        one = self._parts[program].trace.passes[place]
        model, adapter = self._networks.roles.network(one)
        hidden = model.empty_hidden(phase.samples, phase.latent_sizes, phase.text_tokens, device)
        return hidden[:1] if message == Message.GRADIENT and adapter else hidden

    def around(self, task: Task) -> AbstractContextManager[None]:
        """For who measures: the timer of a task."""
        kind = self._parts[task.program].update
        role = kind.kind if kind else "start"
        names = {
            Work.FORWARD: lambda: f"{self._traced(task).role}_pass",
            Work.BACKWARD: lambda: f"{role}_backward",
            Work.REDUCE: lambda: f"{role}_sync",
            Work.STEP: lambda: f"{role}_optimizer",
            Work.ADVANCE: lambda: f"{role}_advance",
        }
        level = 1 if task.work in (Work.REDUCE, Work.STEP) else 2
        return self._phase.instruments.task(names[task.work](), level)

    def _traced(self, task: Task) -> TracedPass:
        return self._parts[task.program].trace.passes[task.place]
