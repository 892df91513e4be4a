"""Where an iteration's time goes: named timers by level, which cost nothing when they are off.

What a GPU runs is measured between two CUDA events, which are read later, so that nothing waits for it; on the CPU the
clock is enough.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Timers:
    """Sums of named spans since they were last taken.

    Args:
        level: `--timing-log-level`; spans above it are not measured.
        device: whose work is measured.
    """

    def __init__(self, level: int, device: torch.device):
        self._level = level
        self._span: Callable[[str], AbstractContextManager[None]]
        self._span = self._device_span if device.type == "cuda" else self._host_span
        self._milliseconds: dict[str, float] = defaultdict(float)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._off = nullcontext()

    def __call__(self, name: str, level: int) -> AbstractContextManager[None]:
        """Times what the device does in the block."""
        return self._span(name) if level <= self._level else self._off

    def take(self) -> dict[str, float]:
        """Milliseconds of each name since the last call, summed over its spans; waits for those still running."""
        if self._pending:
            self._pending[-1][2].synchronize()
            self.collect()
        taken, self._milliseconds = dict(self._milliseconds), defaultdict(float)
        return taken

    def collect(self) -> None:
        """Adds up the spans that a GPU has finished, without waiting, so that their events can be freed."""
        while self._pending and self._pending[0][2].query():
            name, start, end = self._pending.popleft()
            self._milliseconds[name] += start.elapsed_time(end)

    @contextmanager
    def _host_span(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._milliseconds[name] += (time.perf_counter() - start) * 1000

    @contextmanager
    def _device_span(self, name: str) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._pending.append((name, start, end))
