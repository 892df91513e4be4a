"""What a pipeline's tasks cost, measured in a phase's first iterations, the same on all ranks."""

from collections import Counter
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from megatron_pdmd.parallel.pipeline.costs import Costs, NetworkCosts
from megatron_pdmd.parallel.pipeline.passes import Graph, Task, Work
from megatron_pdmd.parallel.topology import Topology
from megatron_pdmd.training.logs.timers import Timers

MEASURED = 3  # iterations; the first, in which much is done for the first time, counts until the next ones are done

Kind = tuple[str, str]  # "forward", "learning", "backward", "reduce" or "step", and a network


class TaskCosts:
    """Times this rank's tasks, and says what they cost on every stage.

    Args:
        topology: this rank's place.

    Attributes:
        costs: as known so far; before anything was measured, stages share each pass evenly.
    """

    def __init__(self, topology: Topology):
        self._topology = topology
        self._iterations = 0
        self._sums: dict[Kind, torch.Tensor] = {}
        self._start()
        self.costs = Costs.uniform(topology.pipeline)

    @property
    def are_final(self) -> bool:
        """Whether nothing is measured any more."""
        return self._iterations >= MEASURED

    def measure(self, graph: Graph, task: Task) -> AbstractContextManager[None]:
        """Around what a task computes."""
        kind = kind_of(graph, task)
        if kind:
            self._counts[kind] += 1
        return self._timers("/".join(kind or ("advance", "")), 0)

    def end_iteration(self, graph: Graph) -> bool:
        """Takes up what was measured. Called on all ranks, with the same graph; whether `costs` are others now."""
        if self.are_final:
            return False
        if self._iterations == 1:
            self._sums = {}
        measured = self._timers.take()
        kinds = sorted({kind for task in graph.tasks if (kind := kind_of(graph, task))})
        table = torch.zeros(len(kinds), self._topology.pipeline, 2, dtype=torch.float64)
        for row, kind in enumerate(kinds):
            seconds = measured.get("/".join(kind), 0.0) / 1000
            table[row, self._topology.pipeline_rank] = torch.tensor([seconds, self._counts[kind]])
        table = table.to(self._topology.device)
        dist.all_reduce(table)
        dist.broadcast(table, 0)  # to the bit: ranks that planned other schedules would wait for each other
        for kind, own in zip(kinds, table.cpu(), strict=True):
            self._sums[kind] = self._sums.get(kind, 0) + own
        self._iterations += 1
        self._start()
        self.costs = costs_of({kind: tuple((s[:, 0] / s[:, 1]).tolist()) for kind, s in self._sums.items()})
        return True

    def _start(self) -> None:
        self._timers = Timers(-1 if self.are_final else 0, self._topology.device)
        self._counts: Counter[Kind] = Counter()


def kind_of(graph: Graph, task: Task) -> Kind | None:
    """Tasks of a kind cost the same on a stage; None for what costs next to nothing."""
    if task.work == Work.ADVANCE:
        return None
    if task.work in (Work.REDUCE, Work.STEP):
        return str(task.work), graph.outlines[task.program].trains
    return "learning" if graph.learns(task) else str(task.work), graph.pass_of(task).network


def costs_of(seconds: dict[Kind, tuple[float, ...]]) -> Costs:
    """Costs from the mean seconds of each kind on every stage.

    What was not measured of a network is as the mean of the others, or, of passes with gradient, as those without.
    """

    def mean(work: str) -> tuple[float, ...] | None:
        rows = [row for (name, _), row in seconds.items() if name == work]
        return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)) if rows else None

    def network(name: str | None) -> NetworkCosts:
        found = {work: seconds.get((work, name)) or mean(work) for work in ("forward", "learning", "backward")}
        forward = found["forward"] or found["learning"]
        none = (0.0,) * len(forward)
        return NetworkCosts(
            forward=forward,
            learning=found["learning"] or forward,
            backward=found["backward"] or tuple(2 * one for one in forward),
            kept=(1 / len(forward),) * len(forward),
            reduce=seconds.get(("reduce", name)) or none,
            step=seconds.get(("step", name)) or none,
        )

    return Costs(network(None), {name: network(name) for name in sorted({name for _, name in seconds})})
