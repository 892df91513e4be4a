"""The programs of one iteration, and what a schedule must know of them."""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Generator as Coroutine
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_pdmd.distillation.randomness import Counter
from megatron_pdmd.distillation.roles import Roles
from megatron_pdmd.distillation.step import Iteration, MicroBatch
from megatron_pdmd.distillation.tracing import Trace, TracedPass, trace
from megatron_pdmd.distillation.updates import Update
from megatron_pdmd.parallel.pipeline.channels import PipelineGroups
from megatron_pdmd.parallel.pipeline.passes import ModelPass, Outline
from megatron_pdmd.parallel.topology import Topology
from megatron_pdmd.training.logs.instruments import Instruments
from megatron_pdmd.training.trained_network import TrainedNetwork


@dataclass(frozen=True)
class Part:
    """A program of an iteration: an update, or a start of the phase that several updates share.

    Attributes:
        shared: the counter that draws its prompts.
        update: None for a start.
        trains: name of the network that learns; None for a start.
        start: position of the part that it begins with, if any.
        trace: what it asks for.
    """

    shared: Counter
    update: Update | None
    trains: str | None
    start: int | None
    trace: Trace

    @classmethod
    def of(
        cls,
        iteration: Iteration,
        shared: Counter,
        update: Update | None = None,
        trains: str | None = None,
        start: int | None = None,
    ) -> "Part":
        """A program and its trace."""

        def begin(small: Iteration, batch: MicroBatch, latents: Tensor) -> Coroutine[Any, Any, Any]:
            return _begin(small, shared, update, batch, None if start is None else latents)

        return cls(shared, update, trains, start, trace(begin, iteration))

    def begin(self, iteration: Iteration, batch: MicroBatch, start: Tensor | None) -> Coroutine[Any, Any, Any]:
        """The program of one micro-batch, on the latents that it begins with, if any."""
        return _begin(iteration, self.shared, self.update, batch, start)


def _begin(
    iteration: Iteration, shared: Counter, update: Update | None, batch: MicroBatch, start: Tensor | None
) -> Coroutine[Any, Any, Any]:
    return update.program(iteration, batch, start) if update else iteration.phase_start(shared, batch)


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

    def trained_by(self, kind: str, expert: str) -> str:
        """Of the network that learns in an update of a kind, on the teacher's expert of its times."""
        return "generator" if kind == "generator" else self.fake_score[expert]


@dataclass(frozen=True)
class StagePhase:
    """What all iterations of a phase have in common on this rank.

    Attributes:
        iteration: of the phase.
        networks: this stage's.
        micro_batch: the micro-batch of a counter at a position.
        count: micro-batches of an update on this rank.
        samples, text_tokens: of a micro-batch, and of each of its prompts.
        groups: the stages of this replica.
        topology: this rank's place.
        instruments: who measures.
    """

    iteration: Iteration
    networks: StageNetworks
    micro_batch: Callable[[Counter, int], MicroBatch]
    count: int
    samples: int
    text_tokens: int
    groups: PipelineGroups
    topology: Topology
    instruments: Instruments

    @property
    def latent_sizes(self) -> tuple[int, ...]:
        """Frames, rows and columns of a sample."""
        return self.iteration.latent_shape[1:]


def parts_of(iteration: Iteration, updates: Sequence[Update], networks: StageNetworks) -> list[Part]:
    """The programs of an iteration's updates in order, each start before the updates that share it."""
    parts: list[Part] = []
    starts: dict[int, int] = {}
    for update in updates:
        if update.start is not None and update.start not in starts:
            starts[update.start] = len(parts)
            parts.append(Part.of(iteration, update.shared))
        start = None if update.start is None else starts[update.start]
        trains = networks.trained_by(update.kind, iteration.expert(update.counter))
        parts.append(Part.of(iteration, update.shared, update, trains, start))
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
