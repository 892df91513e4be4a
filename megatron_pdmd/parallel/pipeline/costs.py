"""What tasks cost: seconds on each stage, seconds and bytes of messages, bytes kept from forward to backward."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_pdmd.parallel.pipeline.passes import Graph, Message, Task, Work

# Bytes of the messages, where none are known, in units of what one pass keeps for its backward on all stages. Latents
# are small beside the activations of a block, and these beside those of all blocks.
_MESSAGE_BYTES = {
    Message.SAMPLE: 0.001,
    Message.ACTIVATION: 0.02,
    Message.GRADIENT: 0.02,
    Message.LATENT_GRADIENT: 0.001,
}


@dataclass(frozen=True)
class NetworkCosts:
    """What one network's tasks cost on each stage; seconds, except for `kept`.

    Attributes:
        forward: of a pass without gradient.
        learning: of a forward pass with gradient.
        backward: with whatever it computes again.
        kept: bytes that a forward pass with gradient keeps for the backward pass.
        reduce, step: of an update.
    """

    forward: tuple[float, ...]
    learning: tuple[float, ...]
    backward: tuple[float, ...]
    kept: tuple[float, ...]
    reduce: tuple[float, ...]
    step: tuple[float, ...]


@dataclass(frozen=True)
class Costs:
    """What the tasks of an iteration cost.

    Attributes:
        default: of every network that `networks` does not name.
        networks: by name.
        advance: seconds of an `ADVANCE`.
        latency: seconds of a message between stages; 0 where not named.
        message_bytes: of a message; 0 where not named.
    """

    default: NetworkCosts
    networks: Mapping[str, NetworkCosts] = field(default_factory=dict)
    advance: float = 0.0
    latency: Mapping[Message, float] = field(default_factory=dict)
    message_bytes: Mapping[Message, float] = field(default_factory=lambda: dict(_MESSAGE_BYTES))

    @classmethod
    def uniform(cls, stages: int, forward: float = 1.0, backward: float = 2.0, recompute: bool = False) -> "Costs":
        """Stages that share every pass evenly, and nothing else costs time.

        Args:
            stages: how many.
            forward, backward: seconds of a pass on all stages together. A pass keeps one unit of bytes.
            recompute: the backward pass runs the forward pass again.
        """

        def share(total: float) -> tuple[float, ...]:
            return (total / stages,) * stages

        back = backward + forward * recompute
        return cls(NetworkCosts(share(forward), share(forward), share(back), share(1.0), share(0.0), share(0.0)))

    def of(self, network: str | None) -> NetworkCosts:
        """The costs of one network."""
        return self.networks.get(network, self.default)

    def seconds(self, graph: Graph) -> list[float]:
        """Seconds of every task, by its id."""
        return [self._seconds_of(graph, task) for task in graph.tasks]

    def _seconds_of(self, graph: Graph, task: Task) -> float:
        if task.work == Work.ADVANCE:
            return self.advance
        if task.work in (Work.REDUCE, Work.STEP):
            update = self.of(graph.outlines[task.program].trains)
            return (update.reduce if task.work == Work.REDUCE else update.step)[task.stage]
        network = self.of(graph.pass_of(task).network)
        if task.work == Work.BACKWARD:
            return network.backward[task.stage]
        return (network.learning if graph.learns(task) else network.forward)[task.stage]

    def delays(self, graph: Graph) -> list[tuple[float, ...]]:
        """Seconds that each edge of `graph.predecessors` takes: a message's latency, where it leaves its stage."""
        stages, latency = [task.stage for task in graph.tasks], self.latency
        return [
            tuple(latency.get(edge.message, 0.0) if stages[edge.task] != stages[index] else 0.0 for edge in edges)
            for index, edges in enumerate(graph.predecessors)
        ]

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> "Costs":
        """The inverse of `to_json`.

        Raises:
            ValueError: anything else; says what is wrong.
        """
        given = _fields(content, "the costs of a pipeline", Costs.__dataclass_fields__)
        return cls(
            _network_costs(given["default"]),
            {name: _network_costs(one) for name, one in _object(given["networks"], "`networks`").items()},
            _number(given["advance"], "`advance`"),
            _by_message(given["latency"], "`latency`"),
            _by_message(given["message_bytes"], "`message_bytes`"),
        )


def _object(content: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{name}: expected a JSON object, got {type(content).__name__}")
    return content


def _fields(content: Any, name: str, expected: Mapping[str, Any]) -> Mapping[str, Any]:
    if set(_object(content, name)) != set(expected):
        raise ValueError(f"{name}: expected the keys {', '.join(expected)}, got {', '.join(map(str, content))}")
    return content


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: expected a number that is finite and not negative, got {value!r}")
    return float(value)


def _by_message(content: Any, name: str) -> dict[Message, float]:
    for key in _object(content, name):
        if key not in list(Message):
            raise ValueError(f"{name}: {key!r} is no message; use {', '.join(Message)}")
    return {Message(key): _number(value, name) for key, value in content.items()}


def _network_costs(content: Any) -> NetworkCosts:
    given = _fields(content, "a network's costs", NetworkCosts.__dataclass_fields__)
    for name, values in given.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(given["forward"]):
            raise ValueError(f"`{name}` of a network's costs: expected a number for each stage, got {values!r}")
    return NetworkCosts(**{name: tuple(_number(one, f"`{name}`") for one in values) for name, values in given.items()})
