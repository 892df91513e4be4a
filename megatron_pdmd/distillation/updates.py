"""The updates of one iteration in their order, and what those that share a start of the phase have in common."""

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_pdmd.config import MethodConfig
from megatron_pdmd.distillation.randomness import Counter
from megatron_pdmd.distillation.step import GENERATOR_UPDATE, Iteration, MicroBatch, Program


@dataclass(frozen=True)
class Update:
    """One optimizer update of an iteration.

    Attributes:
        kind: whose: the fake score's or the generator's.
        counter: where its own draws are made.
        shared: the counter of its group's first update, where prompts and initial noise are drawn.
        start: 0-based group whose latents at the phase's start it begins with; None where it makes its own.
    """

    kind: Literal["fake", "generator"]
    counter: Counter
    shared: Counter
    start: int | None = None

    def program(self, iteration: Iteration, batch: MicroBatch, start: torch.Tensor | None = None) -> Program:
        """What one micro-batch's part of it runs.

        Args:
            iteration: of the phase.
            batch: with the prompts that `shared` draws.
            start: the group's latents at the phase's start, [B, C, F, H, W]: what `Iteration.phase_start` returns of
                `shared` and this batch. None only where `self.start` is.
        """
        run = iteration.fake_update if self.kind == "fake" else iteration.generator_update
        return run(self.counter, batch, start)


def updates_of(method: MethodConfig, seed: int, phase: int, index: int) -> tuple[Update, ...]:
    """The updates of an iteration: those of the fake score, then the generator's.

    In phases after the first, `phase_start_reuse` of them in a row are a group, which begins with one rollout of the
    frozen phases. Who belongs to which follows from the position alone, so an iteration can be entered at any update.

    Args:
        method: the options of the method.
        seed: the run's.
        phase: 1-based phase.
        index: 0-based iteration within the phase.
    """
    fakes = method.fake_updates + (method.fake_warmup if index == 0 else 0)
    counters = [Counter(seed, phase, index, update) for update in (*range(fakes), GENERATOR_UPDATE)]
    kinds = ["fake"] * fakes + ["generator"]
    reuse = method.phase_start_reuse
    if reuse == 1 or phase == 1:
        return tuple(Update(kind, own, own) for kind, own in zip(kinds, counters, strict=True))
    groups = [position // reuse for position in range(fakes + 1)]
    return tuple(
        Update(kind, own, counters[group * reuse], group)
        for kind, own, group in zip(kinds, counters, groups, strict=True)
    )
