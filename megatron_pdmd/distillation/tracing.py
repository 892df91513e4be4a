"""What a program will ask for, known without running a model: all stages of a pipeline trace the same programs.

Which passes a program makes depends on the counter alone, never on a latent's value. So it is run on latents of one
number, each pass answered at once, and what it asked for is noted.
"""

from collections.abc import Callable
from collections.abc import Generator as Coroutine
from dataclasses import dataclass, replace

import torch

from megatron_pdmd.distillation.roles import Backward, Pass, Role
from megatron_pdmd.distillation.step import Iteration, MicroBatch


@dataclass(frozen=True)
class TracedPass:
    """A model evaluation that a program asks for.

    Attributes:
        role, key: who answers, as in `Pass`.
        negative: it is conditioned on the negative prompt.
        gradient: a backward pass goes through it.
        latent_gradient: and on into its latents.
    """

    role: Role
    key: str | int
    negative: bool
    gradient: bool
    latent_gradient: bool


@dataclass(frozen=True)
class Trace:
    """What one micro-batch's program asks for; the same for all micro-batches.

    Attributes:
        groups: the passes of each request, in order.
        metrics: names of the numbers that it returns; none where it returns latents.
    """

    groups: tuple[tuple[TracedPass, ...], ...]
    metrics: tuple[str, ...]

    @property
    def passes(self) -> tuple[TracedPass, ...]:
        """All passes in order."""
        return tuple(one for group in self.groups for one in group)


def trace(begin: Callable[[Iteration, MicroBatch, torch.Tensor], Coroutine], iteration: Iteration) -> Trace:
    """Traces a program.

    Args:
        begin: makes it, from an iteration, a micro-batch and latents that may be its start.
        iteration: of the phase; the size of its latents and their device do not matter.
    """
    small = replace(iteration, latent_shape=(1, 1, 1, 1), device=torch.device("cpu"))
    prompt, negative = torch.zeros(1), torch.zeros(1)
    program = begin(small, MicroBatch([0], prompt, negative), torch.zeros(1, 1, 1, 1, 1))
    groups: list[tuple[TracedPass, ...]] = []
    ended, reply = False, None
    while True:
        try:
            request = program.send(reply)
        except StopIteration as finished:
            return Trace(tuple(groups), tuple(finished.value) if ended else ())
        assert not ended, "a backward pass ends a program"
        ended = isinstance(request, Backward)
        if not ended:
            groups.append(tuple(_traced(one, negative) for one in request))
        reply = None if ended else tuple(torch.zeros_like(one.x_t, requires_grad=one.gradient) for one in request)


def _traced(request: Pass, negative: torch.Tensor) -> TracedPass:
    return TracedPass(
        role=request.role,
        key=request.key,
        negative=request.conditions is negative,
        gradient=request.gradient,
        latent_gradient=request.gradient and request.x_t.requires_grad,
    )
