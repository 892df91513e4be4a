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
        if self.held_bytes > self.peak_bytes:
            self.peak_bytes = self.held_bytes
        for moment in self._open:
            moment.peak_bytes = max(moment.peak_bytes, self.held_bytes)

    @contextmanager
    def moment(self, name: str) -> Iterator[None]:
        """Tells what the block holds; moments may lie in one another."""
        moment = self.moments.setdefault(name, Moment(name))
        moment.calls += 1
        moment.peak_bytes = max(moment.peak_bytes, self.held_bytes)
        self._open.append(moment)
        try:
            yield
        finally:
            self._open.remove(moment)
            moment.held_bytes = self.held_bytes
