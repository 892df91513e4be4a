"""Philox4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) and Box-Muller normals from it.

key = (seed low, seed high), counter = (i low, i high, 0, 0) with i = element // 4; the four output words belong to the
elements 4i .. 4i + 3. A word w gives u = (2 (w >> 9) + 1) 2^-24, which fp32 holds exactly; the words (w0, w1) give
sqrt(-2 ln u0) cos(2 pi u1) and sqrt(-2 ln u0) sin(2 pi u1), the words (w2, w3) the next two. So a number depends on the
seed and the element's index alone.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four output words of a counter under a key.

    Args:
        counter: four int64 tensors of values below 2^32, of one shape or broadcastable.
        key: two of the kind.

    Returns:
        Four int64 tensors of values below 2^32.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(_ROUNDS):
        high0, low0 = _multiplied(c0, _MULTIPLIERS[0])
        high1, low1 = _multiplied(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seeds: Tensor, numel: int, offset: int = 0) -> Tensor:
    """32 random bits an element.

    Args:
        seeds: int64 [B].
        numel: elements a sample.
        offset: the first element's index, not negative.

    Returns:
        int64 [B, numel], each in [0, 2^32).
    """
    first, last = offset // 4, (offset + numel + 3) // 4
    index = torch.arange(first, last, dtype=torch.int64, device=seeds.device)
    zero = torch.zeros_like(index)
    key = (seeds[:, None] & _MASK, (seeds[:, None] >> 32) & _MASK)
    words = torch.stack(philox4x32((index & _MASK, index >> 32, zero, zero), key), dim=-1).flatten(1)
    return words.narrow(1, offset - 4 * first, numel)


def normal(seeds: Tensor, numel: int, offset: int = 0) -> Tensor:
    """Standard normal numbers, computed in fp64 and rounded to fp32: elements offset .. offset + numel - 1 of a stream.

    Args:
        seeds: int64 [B].
        numel: elements a sample.
        offset: the first element's index, not negative.

    Returns:
        fp32 [B, numel].
    """
    skipped = offset % 4
    words = random_words(seeds, skipped + numel + -(skipped + numel) % 4, offset - skipped)
    uniforms = (2 * (words >> 9) + 1).double() * 2.0**-24
    pairs = uniforms.unflatten(1, (-1, 2))
    radius, angle = (-2 * pairs[..., 0].log()).sqrt(), 2 * math.pi * pairs[..., 1]
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    return normals.narrow(1, skipped, numel).float()


def _multiplied(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * factor, both below 2^32; int64 holds neither the product nor its sign."""
    high = ((x >> 16) * factor + (((x & 0xFFFF) * factor) >> 16)) >> 16
    return high, (x * factor) & _MASK
