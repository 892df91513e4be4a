"""The programs of one iteration, and what a schedule must know of them."""

from collections.abc import Generator as Coroutine
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_pdmd.distillation.randomness import Counter
from megatron_pdmd.distillation.roles import Roles
from megatron_pdmd.distillation.step import Iteration, MicroBatch
from megatron_pdmd.distillation.tracing import Trace, TracedPass, trace
from megatron_pdmd.distillation.updates import Update
from megatron_pdmd.parallel.pipeline.passes import ModelPass, Outline
from megatron_pdmd.training.trained_network import TrainedNetwork


@dataclass(frozen=True)
class Part:
    """A program of an iteration: an update, or a start of the phase that several updates share.

    Attributes:
        shared: the counter that draws its prompts.
        trace: what it asks for.
        update: None for a start.
        trains: name of the network that learns; None for a start.
        start: position of the part that it begins with, if any.
    """

    shared: Counter
    trace: Trace
    update: Update | None = None
    trains: str | None = None
    start: int | None = None

    def begin(self, iteration: Iteration, batch: MicroBatch, start: Tensor | None) -> Coroutine[Any, Any, Any]:
        """The program of one micro-batch."""
        if self.update is None:
            return iteration.phase_start(self.shared, batch)
        return self.update.program(iteration, batch, start)


@dataclass(frozen=True)
class StageNetworks:
    """This stage's part of the networks, by the names that schedules know them by.

    Attributes:
        roles: who answers a pass.
        trained: what learns in this phase: `generator` and `fake_score_<expert>`.
        fake_score: name of each expert's fake score; experts may share one.
        phase: the phase that is trained.
    """

    roles: Roles
    trained: Mapping[str, TrainedNetwork]
    fake_score: Mapping[str, str]
    phase: int

    def name(self, one: TracedPass) -> str:
        """Of the weights that answer a pass; equal names change together."""
        if one.role == "fake_score":
            return self.fake_score[one.key]
        if one.role == "generator":
            return "generator" if one.key == self.phase else f"generator_{one.key}"
        return f"teacher_{one.key}"


def parts_of(iteration: Iteration, updates: Sequence[Update], networks: StageNetworks) -> list[Part]:
    """The programs of an iteration's updates in order, each start before the updates that share it."""
    parts: list[Part] = []
    starts: dict[int, int] = {}
    for update in updates:
        if update.start is not None and update.start not in starts:
            starts[update.start] = len(parts)
            shared = update.shared

            def begin(small: Iteration, batch: MicroBatch, latents: Tensor, shared: Counter = shared) -> Coroutine:
                return small.phase_start(shared, batch)

            parts.append(Part(shared, trace(begin, iteration)))
        start = None if update.start is None else starts[update.start]
        expert = iteration.expert(update.counter)
        trains = "generator" if update.kind == "generator" else networks.fake_score[expert]

        def follow(
            small: Iteration, batch: MicroBatch, latents: Tensor, update: Update = update, start: int | None = start
        ) -> Coroutine:
            return update.program(small, batch, None if start is None else latents)

        parts.append(Part(update.shared, trace(follow, iteration), update, trains, start))
    return parts


def outlines_of(parts: Sequence[Part], networks: StageNetworks) -> tuple[Outline, ...]:
    """What a schedule must know of the programs."""
    return tuple(
        Outline(
            name=f"{part.update.kind if part.update else 'start'} {position}",
            groups=tuple(
                tuple(ModelPass(networks.name(one), one.gradient, one.latent_gradient) for one in group)
                for group in part.trace.groups
            ),
            trains=part.trains,
            start=part.start,
        )
        for position, part in enumerate(parts)
    )
