"""What is measured while iterations run: their time by rank, update and pass, throughput and memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist

from megatron_pdmd.config import LoggingConfig
from megatron_pdmd.distillation.roles import Backward, Pass, Roles
from megatron_pdmd.parallel.topology import Topology
from megatron_pdmd.training.logs.pass_counter import PassCounter
from megatron_pdmd.training.logs.progress_bar import ProgressBar
from megatron_pdmd.training.logs.timers import Timers


class Instruments:
    """One rank's measurements since the last log entry, and its line on the terminal.

    They begin anew with each launch, for they say how this launch runs; means of losses go on from a checkpoint.

    Args:
        options: what to measure.
        topology: this rank's place.

    Attributes:
        bar: the line on the terminal.
    """

    def __init__(self, options: LoggingConfig, topology: Topology):
        self.bar = ProgressBar(topology.rank)
        self._topology = topology
        self._level = options.timing_log_level
        self._timers = Timers(self._level, topology.device)
        self._passes = PassCounter() if options.log_throughput else None
        self._role = ""
        self._iterations = 0
        self._seconds = 0.0
        self._aside = 0.0

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Around an iteration; what `between` does meanwhile, such as saving after one of its updates, is no part."""
        started, self._aside = time.perf_counter(), 0.0
        yield
        self._seconds += time.perf_counter() - started - self._aside
        self._iterations += 1
        self._timers.collect()

    @contextmanager
    def update(self, role: str) -> Iterator[None]:
        """Around an update of a role, `fake` or `generator`."""
        self._role = role
        with self._timers(f"{role}_update", 1):
            yield
        self.bar.advance()

    def part(self, name: str) -> AbstractContextManager[None]:
        """Around what an update ends with, `sync` or `optimizer`."""
        return self._timers(f"{self._role}_{name}", 1)

    def request(self, roles: Roles, request: Pass | Backward) -> AbstractContextManager[None]:
        """Around a pass or a backward pass."""
        name = f"{request.role}_pass" if isinstance(request, Pass) else f"{self._role}_backward"
        self.bar.say(f"{self._role} update: {name.replace('_', ' ')}")
        if isinstance(request, Pass):
            self.count(request, roles)
        return self._timers(name, 2)

    def count(self, request: Pass, roles: Roles) -> None:
        """Counts a pass for the throughput."""
        if self._passes:
            self._passes.add(request, roles)

    def task(self, name: str, level: int) -> AbstractContextManager[None]:
        """Around a pipeline stage's task."""
        self.bar.say(name.replace("_", " "))
        return self._timers(name, level)

    @contextmanager
    def between(self, name: str, iteration: int) -> Iterator[None]:
        """Around what is done between updates, saving or drawing; from level 1 on rank 0 tells how long it took."""
        self.bar.say(name)
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._aside += seconds
        if self._level and self._topology.rank == 0:
            print(f"iteration {iteration}: {name} took {seconds * 1000:.1f} ms", flush=True)

    def take(self) -> dict[str, float]:
        """What a log entry says of the iterations since the last one. Called on all ranks; begins anew.

        Returns:
            `milliseconds` of an iteration on this rank. From level 1 on, for the iteration and each timer, its
            `<timer>_milliseconds` an iteration on the slowest rank and, with several ranks, `<timer>_slowest_rank`.
            With `--log-throughput`, `tokens_per_second_per_gpu`, `tflops_per_gpu` and `peak_memory_gb` (10^9 bytes, of
            the rank that needs most).
        """
        count = max(self._iterations, 1)
        milliseconds = self._seconds * 1000 / count
        taken = {"milliseconds": milliseconds} | self._throughput()
        timers = {name: total / count for name, total in sorted(self._timers.take().items())}
        times = {"iteration": milliseconds} | timers if self._level else {}
        for name, ranks in zip(times, zip(*self._gathered(list(times.values())), strict=True), strict=True):
            taken[f"{name}_milliseconds"] = max(ranks)
            if len(ranks) > 1:
                taken[f"{name}_slowest_rank"] = ranks.index(max(ranks))
        self._iterations, self._seconds = 0, 0.0
        return taken

    def _throughput(self) -> dict[str, float]:
        if self._passes is None:
            return {}
        # The passes of a replica are shared by all of its ranks.
        gpu_seconds = max(self._seconds, 1e-9) * self._topology.world_size / self._topology.data
        passes, self._passes = self._passes, PassCounter()
        return {
            "tokens_per_second_per_gpu": passes.tokens / gpu_seconds,
            "tflops_per_gpu": passes.flops / gpu_seconds / 1e12,
            "peak_memory_gb": max(self._gathered([peak_memory(self._topology.device)]))[0] / 1e9,
        }

    def _gathered(self, values: list[float]) -> list[list[float]]:
        """The values of each rank."""
        if self._topology.world_size == 1 or not values:
            return [values]
        own = torch.tensor(values, dtype=torch.float64, device=self._topology.device)
        ranks = own.new_empty(self._topology.world_size * len(values))
        dist.all_gather_into_tensor(ranks, own)
        return ranks.view(-1, len(values)).tolist()


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that torch has had allocated, on the CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # kilobytes on Linux
