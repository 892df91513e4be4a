"""Philox4x32-10 (https://doi.org/10.1145/2063384.2063405) and Box-Muller normals from it.

key = (seed low, seed high), counter = (i low, i high, 0, 0) with i = element // 4; the words (w0, w1, w2, w3) belong to
the elements 4i .. 4i + 3. A word w gives u = (2 (w >> 9) + 1) 2^-24; (w0, w1) give sqrt(-2 ln u0) cos(2 pi u1) and
sqrt(-2 ln u0) sin(2 pi u1), (w2, w3) the next two. The result is within 2 ulp of the exact value rounded to fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdmd_kernels.triton.launching import launch

BLOCK = 1024


@triton.jit
def random_quads(seed, first, QUADS: tl.constexpr):
    """The words of the elements 4 first .. 4 (first + QUADS) - 1: uint32 [QUADS] four times."""
    return tl.randint4x(seed, first + tl.arange(0, QUADS))


@triton.jit
def normals(seed, first, QUADS: tl.constexpr):
    """The normals of the elements 4 first .. 4 (first + QUADS) - 1: fp32 [4 QUADS]."""
    w0, w1, w2, w3 = random_quads(seed, first, QUADS)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [4 * QUADS])


@triton.jit
def _box_muller(radius_word, angle_word):
    radius = _radius(_odd(radius_word))
    cos, sin = _cos_sin(_odd(angle_word))
    return radius * cos, radius * sin


@triton.jit
def _odd(word):
    return ((word >> 9).to(tl.int32) << 1) + 1


@triton.jit
def _radius(odd):
    """sqrt(-2 ln(odd 2^-24)), odd in [1, 2^24).

    odd = 2^e m with m in [sqrt(1/2), sqrt(2)) and s = m - 1, so that ln = (e - 24) ln 2 + s - s^2 / 2 + s^3 p(s), with
    ln 2 in two parts, of which the first has few bits and makes exact products.
    """
    bits = odd.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    s = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    exponent = (exponent - 24).to(tl.float32)
    p = tl.fma(s, 0.0674663856625557, -0.11675651371479034)
    p = tl.fma(s, p, 0.11888162791728973)
    p = tl.fma(s, p, -0.1240558922290802)
    p = tl.fma(s, p, 0.14219552278518677)
    p = tl.fma(s, p, -0.1666799634695053)
    p = tl.fma(s, p, 0.2000211924314499)
    p = tl.fma(s, p, -0.25000008940696716)
    p = tl.fma(s, p, 0.3333331346511841)
    small = tl.fma(s * s * s, p, exponent * -0.00021219444170128554)
    small = tl.fma(-0.5 * s, s, small)
    large = exponent * 0.693359375
    total = large + s
    rest = s - (total - large)
    return tl.sqrt_rn(-2.0 * (total + (rest + small)))


@triton.jit
def _cos_sin(odd):
    """cos and sin of 2 pi odd 2^-24. The integer holds a quadrant and z in [-1/2, 1/2), beyond it pi z / 2."""
    quadrant = (odd + 0x200000) >> 22
    z = (odd - (quadrant << 22)).to(tl.float32) * 2.384185791015625e-07
    w = z * z
    p = tl.fma(w, 0.0001582625409355387, -0.004681297577917576)
    p = tl.fma(w, p, 0.07969258725643158)
    p = tl.fma(w, p, -0.6459640860557556)
    sin = tl.fma(z, 1.5707963705062866, z * tl.fma(w, p, -4.371139000186241e-08))
    q = tl.fma(w, 0.0009040216682478786, -0.02086028829216957)
    q = tl.fma(w, q, 0.25366923213005066)
    q = tl.fma(w, q, -3.629644851343983e-08)
    leading = tl.fma(w, -1.2337005138397217, 1.0)
    rest = tl.fma(w, -1.2337005138397217, 1.0 - leading)
    square_rest = tl.fma(z, z, -w)
    cos = leading + tl.fma(square_rest, -1.2337005138397217, tl.fma(w, q, rest))
    swapped = (quadrant & 1) != 0
    turned_cos = tl.where(swapped, sin, cos)
    turned_sin = tl.where(swapped, cos, sin)
    turned_cos = tl.where(((quadrant + 1) & 2) != 0, -turned_cos, turned_cos)
    return turned_cos, tl.where((quadrant & 2) != 0, -turned_sin, turned_sin)


@triton.jit
def stream_kernel(seeds, out, numel, first, skipped, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Words or normals of the elements 4 first + skipped .. + numel - 1 of every sample's stream."""
    blocks = tl.cdiv(numel + skipped, BLOCK)
    sample = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    seed = tl.load(seeds + sample)
    quad = first + start // 4
    if WORDS:
        w0, w1, w2, w3 = random_quads(seed, quad, BLOCK // 4)
        value = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK]).to(tl.int64)
    else:
        value = normals(seed, quad, BLOCK // 4)
    lane = tl.arange(0, BLOCK)
    low = skipped - start
    high = numel + low
    row = out + (sample.to(tl.int64) * numel + start - skipped)
    tl.store(row + lane, value, mask=(lane >= low) & (lane < high))


def random_words(seeds: Tensor, numel: int, offset: int = 0) -> Tensor:
    """32 random bits an element, int64 [B, numel]; element j is offset + j of the stream of its seed [B]."""
    return _stream(seeds, numel, offset, torch.int64)


def normal(seeds: Tensor, numel: int, offset: int = 0) -> Tensor:
    """Standard normal numbers, fp32 [B, numel]; element j is offset + j of the stream of its seed [B]."""
    return _stream(seeds, numel, offset, torch.float32)


def _stream(seeds: Tensor, numel: int, offset: int, dtype: torch.dtype) -> Tensor:
    out = seeds.new_empty(seeds.shape[0], numel, dtype=dtype)
    if out.numel():
        launch(
            stream_kernel,
            (seeds.shape[0] * triton.cdiv(numel + offset % 4, BLOCK),),
            num_warps=4,
            seeds=seeds,
            out=out,
            numel=numel,
            first=offset // 4,
            skipped=offset % 4,
            WORDS=dtype == torch.int64,
            BLOCK=BLOCK,
        )
    return out
