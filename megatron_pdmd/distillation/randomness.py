"""Random numbers from a counter: each draw is a function of what it is for, never of what was drawn before.

So a sample meets the same noise on any layout of ranks and any micro-batch size, a resumed run continues to the bit,
and any update can be replayed alone. Normal numbers come from Philox under a hashed key (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"), so that a kernel can draw them where it needs them.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from pdmd_kernels import normal


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of every run's identity: append, never renumber."""

    PROMPT = 0
    INITIAL_NOISE = 1
    DIFFUSION_TIME = 2
    DIFFUSION_NOISE = 3
    TRUNCATION = 4
    TEACHER_SIDE = 5


WHOLE_BATCH = -1  # in place of a sample's index, for draws that one global batch shares


@dataclass(frozen=True)
class Counter:
    """Where in a run a draw is made.

    Attributes:
        seed: the run's seed.
        phase: 1-based phase.
        iteration: 0-based iteration within the phase.
        update: 0-based fake update within the iteration, or -1 for the generator's update.
    """

    seed: int
    phase: int
    iteration: int
    update: int

    def at(self, **changes: int) -> "Counter":
        """This counter with some of its fields replaced."""
        return replace(self, **changes)

    def seeds(self, purpose: Purpose, samples: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """The key of each sample's stream of normal numbers, int64 [B]; what `pdmd_kernels` draws noise from.

        Args:
            purpose: what the noise is for.
            samples: index of each sample in the global batch.
            device: where the noise is to be drawn; nothing waits for it.
        """
        keys = torch.tensor([self._key(purpose, sample) - 2**63 for sample in samples], dtype=torch.int64)
        return keys.to(device, non_blocking=True)

    def uniform(self, purpose: Purpose, samples: Sequence[int] = (WHOLE_BATCH,)) -> torch.Tensor:
        """One fp32 number in [0, 1) for each sample, [B]."""
        return torch.tensor([(self._key(purpose, sample) >> 40) * 2.0**-24 for sample in samples])

    def integer(self, purpose: Purpose, bound: int) -> int:
        """One whole number in [0, bound) for the global batch."""
        return self.integers(purpose, bound, (WHOLE_BATCH,))[0]

    def integers(self, purpose: Purpose, bound: int, samples: Sequence[int]) -> list[int]:
        """A whole number in [0, bound) for each sample."""
        return [self._key(purpose, sample) * bound >> 64 for sample in samples]

    def normal(
        self, purpose: Purpose, shape: Sequence[int], samples: Sequence[int], device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Standard normal numbers for each sample, fp32 [B, *shape], drawn on a device; the same on each to 2 ulp."""
        return normal(self.seeds(purpose, samples, device), math.prod(shape)).view(-1, *shape)

    def _key(self, purpose: Purpose, sample: int) -> int:
        """64 bits that depend on every field of the counter, the purpose and the sample."""
        words = (self.seed, self.phase, self.iteration, self.update, int(purpose), sample)
        return int.from_bytes(hashlib.blake2b(struct.pack("<6q", *words), digest_size=8).digest(), "little")
