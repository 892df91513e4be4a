"""Random numbers from a counter: each draw is a function of what it is for, never of what was drawn before.

So a sample meets the same noise on any layout of ranks and any micro-batch size, a resumed run continues to the bit,
and any update can be replayed alone.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch


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

    def generator(self, purpose: Purpose, sample: int = WHOLE_BATCH) -> torch.Generator:
        """A CPU generator that stands at this draw's own stream.

        torch's CPU generator takes 32 bits of its seed, so of n streams about n^2 / 2^33 pairs are the same.
        """
        words = (self.seed, self.phase, self.iteration, self.update, int(purpose), sample)
        digest = hashlib.blake2b(struct.pack("<6q", *words), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def uniform(self, purpose: Purpose, samples: Sequence[int] = (WHOLE_BATCH,)) -> torch.Tensor:
        """One fp32 number in [0, 1) for each sample, [B]."""
        return torch.cat([torch.rand(1, generator=self.generator(purpose, sample)) for sample in samples])

    def integer(self, purpose: Purpose, bound: int) -> int:
        """One whole number in [0, bound) for the global batch."""
        return int(torch.randint(bound, (), generator=self.generator(purpose)))

    def integers(self, purpose: Purpose, bound: int, samples: Sequence[int]) -> list[int]:
        """A whole number in [0, bound) for each sample."""
        return [int(torch.randint(bound, (), generator=self.generator(purpose, sample))) for sample in samples]

    def normal(self, purpose: Purpose, shape: Sequence[int], samples: Sequence[int]) -> torch.Tensor:
        """Standard normal numbers for each sample, fp32 [B, *shape]."""
        return torch.stack([torch.randn(*shape, generator=self.generator(purpose, sample)) for sample in samples])
