"""How many bytes of tensors a device holds, followed storage by storage and told by moment."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Moment:
    """What was held during a part of a run.

    Attributes:
        name: of the part.
        peak_bytes: the most that was held at once, in any of its calls.
        held_bytes: what was held when its last call ended.
        calls: how often it ran.
    """

    name: str
    peak_bytes: int = 0
    held_bytes: int = 0
    calls: int = 0


@dataclass
class DeviceMemory:
    """Bytes of the storages that tensors on CUDA devices have, real or fake.

    What a device holds besides (the CUDA context, buffers of NCCL and cuBLAS, an allocator's fragments) is not seen.

    Attributes:
        held_bytes: now.
        peak_bytes: the most so far.
        moments: by name, in the order in which they first began.
    """

    held_bytes: int = 0
    peak_bytes: int = 0
    moments: dict[str, Moment] = field(default_factory=dict)
    _storages: dict[int, weakref.ref] = field(default_factory=dict)
    _open: list[Moment] = field(default_factory=list)

    def note(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor on the device from now on until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def free(unused: weakref.ref) -> None:
            del self._storages[key]
            self.held_bytes -= size

        self._storages[key] = weakref.ref(storage, free)
        self.held_bytes += size
        self.need(0)

    def need(self, extra: int) -> None:
        """Counts bytes as held and freed again at once, beside what is held."""
        peak = self.held_bytes + extra
        self.peak_bytes = max(self.peak_bytes, peak)
        for moment in self._open:
            moment.peak_bytes = max(moment.peak_bytes, peak)

    @contextmanager
    def moment(self, name: str) -> Iterator[None]:
        """Tells what the block holds; moments may lie in one another."""
        with self.measured(self.moments.setdefault(name, Moment(name))):
            yield

    @contextmanager
    def measured(self, moment: Moment | None = None) -> Iterator[Moment]:
        """The same for a moment that is told to nobody else."""
        moment = Moment("") if moment is None else moment
        moment.calls += 1
        self._open.append(moment)
        self.need(0)
        try:
            yield moment
        finally:
            self._open = [other for other in self._open if other is not moment]
            moment.held_bytes = self.held_bytes
