"""The three roles of one diffusion transformer: which network answers a pass, and with which adapter.

Under LoRA the generator of every phase is the teacher's own network with that phase's adapter switched on, so teacher
and generator share their weights; the fake score always has weights of its own. Networks arrive as callables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Role = Literal["teacher", "fake_score", "generator"]


class DiffusionModel(Protocol):
    """A flow model. `t` is in [0, 1], one number for each sample; the result has the shape of `x_t`."""

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, conditions: Any, adapter: str | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Pass:
    """One model evaluation that an iteration asks for.

    Attributes:
        role: who answers.
        key: which of the role's networks: the expert for teacher and fake score, the phase's index for the generator.
        x_t: noisy latents, fp32 [B, ...].
        t: times in [0, 1], [B].
        conditions: what the network is conditioned on, passed on as it is.
        gradient: whether a backward pass will follow.
    """

    role: Role
    key: str | int
    x_t: torch.Tensor
    t: torch.Tensor
    conditions: Any
    gradient: bool = False


@dataclass(frozen=True)
class Backward:
    """A backward pass that an iteration asks for: from `output`, with `gradient` at it (None for a scalar loss)."""

    output: torch.Tensor
    gradient: torch.Tensor | None = None

    def run(self, share: float = 1.0, *, retain_graph: bool = False) -> None:
        """Runs it as far as the graph reaches, with its gradient multiplied by `share`."""
        gradient = torch.ones_like(self.output) if self.gradient is None else self.gradient
        self.output.backward(share * gradient, retain_graph=retain_graph)


@dataclass(frozen=True)
class Generator:
    """The network of one phase's expert, and the adapter that makes it differ from the teacher's."""

    model: DiffusionModel
    adapter: str | None


@dataclass(frozen=True)
class Roles:
    """Who answers which pass.

    Attributes:
        teacher: network of each expert.
        fake_score: network of each expert; two experts may name one network.
        generator: expert of each phase trained so far, the current one included, by its 1-based index.
    """

    teacher: Mapping[str, DiffusionModel]
    fake_score: Mapping[str, DiffusionModel]
    generator: Mapping[int, Generator]

    def network(self, request: Pass) -> tuple[DiffusionModel, str | None]:
        """Who answers a pass, and the adapter that is switched on for it."""
        if request.role == "generator":
            expert = self.generator[request.key]
            return expert.model, expert.adapter
        return (self.teacher if request.role == "teacher" else self.fake_score)[request.key], None

    def run(self, request: Pass) -> torch.Tensor:
        """The flow that the asked network predicts, fp32, in the shape of `request.x_t`."""
        model, adapter = self.network(request)
        with torch.set_grad_enabled(request.gradient):
            return model(request.x_t, request.t, request.conditions, adapter=adapter).float()
