// Philox4x32-10 and Box-Muller: element 4 i + k of a seed's stream comes of the k-th word of the counter (i, 0).
//
// A word w gives u = (2 (w >> 9) + 1) 2^-24. The words (w0, w1) give r cos(2 pi u1) and r sin(2 pi u1) with
// r = sqrt(-2 ln u0), the words (w2, w3) the next two. The root and the angle are carried as sums of two floats, so that
// a normal is its exact value rounded almost once (at most 2 ulp off; the contract is 2).
//
// A block of 64 normals is about 330 AVX-512 instructions, 5 a normal. Two a cycle at 2 GHz would be 1.3 ns a normal: more
// than a copy takes for the bytes of one, so drawing is bound by arithmetic.
#pragma once

#include "vector.h"

namespace pdmd::PDMD_CAPABILITY {

// The words of W counters from `first`. A 64-bit lane computes one counter; of its state only the low 32 bits count,
// and the multiplication ignores the rest. Lane p of a word vector holds the counter first + (W / 4) (p % 4) + p / 4, so
// that a transposition within groups of four lanes leaves consecutive elements.
PDMD_INLINE void philox(uint64_t seed, uint64_t first, vu words[4]) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kStep0 = 0x9E3779B9, kStep1 = 0xBB67AE85;
  const vu64 m0 = vu64{} + kMultiplier0, m1 = vu64{} + kMultiplier1;
  vu64 c0[2], c1[2], c2[2], c3[2];
  for (int half = 0; half < 2; ++half) {
    for (int lane = 0; lane < W / 2; ++lane) {
      const int p = 2 * lane + half;
      c0[half][lane] = static_cast<uint64_t>(W / 4 * (p % 4) + p / 4);
    }
    c0[half] += first;
    c1[half] = c0[half] >> 32;
    c2[half] = c3[half] = vu64{};
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kStep0, k1 += kStep1) {
    for (int half = 0; half < 2; ++half) {
      const vu64 p0 = widening_multiply(c0[half], m0), p1 = widening_multiply(c2[half], m1);
      c0[half] = (p1 >> 32) ^ c1[half] ^ static_cast<uint64_t>(k0);
      c2[half] = (p0 >> 32) ^ c3[half] ^ static_cast<uint64_t>(k1);
      c1[half] = p1;
      c3[half] = p0;
    }
  }
  const vu64* state[4] = {c0, c1, c2, c3};
  for (int word = 0; word < 4; ++word) {
    words[word] = (vu)((state[word][0] & 0xFFFFFFFF) | (state[word][1] << 32));
  }
}

// -2 ln(k 2^-24) as high + low, for odd k below 2^24.
PDMD_INLINE void minus_two_log(vi k, vf& high, vf& low) {
  constexpr int32_t kHalfRoot = 0x3F3504F3;  // the bits of sqrt(1/2)
  const vi bits = (vi)as_bits(__builtin_convertvector(k, vf)) - kHalfRoot;
  const vf exponent = __builtin_convertvector((bits >> 23) - 24, vf);
  const vf f = as_float((vu)((bits & 0x7FFFFF) + kHalfRoot)) - 1.0f;
  const vf square = f * f;
  // (ln(1 + f) - f + f^2 / 2) / f^3 for sqrt(1/2) <= 1 + f < sqrt(2), relative error of the logarithm 2^-30.
  vf p = broadcast(0.0674649029970169f);
  p = p * f - 0.11675615608692169f;
  p = p * f + 0.11888211965560913f;
  p = p * f - 0.12405598163604736f;
  p = p * f + 0.142195463180542f;
  p = p * f - 0.16667994856834412f;
  p = p * f + 0.2000211924314499f;
  p = p * f - 0.25000008940696716f;
  p = p * f + 0.3333331346511841f;
  // ln 2 = 0.693359375 - 2.12194440e-4; the first factor's product with the exponent is exact.
  const vf leading = exponent * 0.693359375f;
  const vf sum = leading + f;
  const vf rest = (f - (sum - leading)) + ((square * f) * p + (exponent * -2.12194440e-4f - 0.5f * square));
  const vf log = sum + rest;
  high = -2.0f * log;
  low = -2.0f * (rest - (log - sum));
}

// The normals r cos(2 pi u1) and r sin(2 pi u1) of two words.
PDMD_INLINE void box_muller(vu w0, vu w1, vf& cosine, vf& sine) {
  vf high, low;
  minus_two_log((vi)((w0 >> 8) | 1), high, low);
  // Newton's step for the root, and what still lacks to it.
  const vf inverse = rough_rsqrt(high), half = 0.5f * inverse;
  vf r = high * inverse;
  r = fused(fused(-r, r, high), half, r);
  const vf r_low = (fused(-r, r, high) + low) * half;
  // The angle is quarter (pi / 2) + 2 pi f with |f| <= 1/8, exactly.
  const vi k = (vi)((w1 >> 8) | 1);
  const vi quarter = (k + (1 << 21)) >> 22;
  const vf f = __builtin_convertvector(k - (quarter << 22), vf) * 0x1p-24f;
  const vf z = f * f;
  const vf tau = broadcast(6.2831854820251465f);
  vf s = broadcast(41.487571716308594f);
  s = s * z - 76.69837951660156f;
  s = s * z + 81.60520935058594f;
  s = s * z - 41.34170150756836f;
  vf c = broadcast(60.23845672607422f) - 26.06450653076172f * z;
  c = c * z - 85.45677185058594f;
  c = c * z + 64.93939208984375f;
  c = c * z - 19.739208221435547f;
  const vf sin_high = f * tau;
  const vf sin_low = fused(f, tau, -sin_high) + (f * -1.7484555314695172e-07f + (f * z) * s);
  const vf along_sin = fused(r, sin_high, r * sin_low + r_low * sin_high);
  const vf along_cos = r + (r * (c * z) + r_low);
  // Quarters 1 and 3 swap the two; the signs are those of cos and sin at quarter (pi / 2).
  const vu swapped = (vu)((quarter & 1) != 0);
  const vu from_sin = as_bits(along_sin), from_cos = as_bits(along_cos);
  const vu cos_sign = ((vu)(quarter + 1) & 2) << 30, sin_sign = ((vu)quarter & 2) << 30;
  cosine = as_float(((from_sin & swapped) | (from_cos & ~swapped)) ^ cos_sign);
  sine = as_float(((from_cos & swapped) | (from_sin & ~swapped)) ^ sin_sign);
}

// 4 W normals of W counters, in order.
PDMD_INLINE void normal_block(uint64_t seed, uint64_t first, float* out) {
  vu words[4];
  vf normals[4];
  philox(seed, first, words);
  box_muller(words[0], words[1], normals[0], normals[1]);
  box_muller(words[2], words[3], normals[2], normals[3]);
  transpose_lanes(normals);
  for (int i = 0; i < 4; ++i) store(out + i * W, normals[i]);
}

// Calls block(seed, counter, buffer) for the counters of the elements [offset, offset + count) and copies those.
template <typename T, typename Block>
PDMD_INLINE void fill_stream(uint64_t seed, int64_t offset, int64_t count, T* out, Block block) {
  uint64_t counter = static_cast<uint64_t>(offset) / 4;
  int64_t skipped = offset % 4;
  while (count > 0) {
    if (skipped == 0 && count >= 4 * W) {
      block(seed, counter, out);
      out += 4 * W;
      count -= 4 * W;
    } else {
      T buffer[4 * W];
      block(seed, counter, buffer);
      const int64_t taken = count < 4 * W - skipped ? count : 4 * W - skipped;
      for (int64_t i = 0; i < taken; ++i) out[i] = buffer[skipped + i];
      out += taken;
      count -= taken;
      skipped = 0;
    }
    counter += W;
  }
}

static void normal(uint64_t seed, int64_t offset, int64_t count, float* out) {
  fill_stream(seed, offset, count, out, [](uint64_t s, uint64_t i, float* p) { normal_block(s, i, p); });
}

static void random_words(uint64_t seed, int64_t offset, int64_t count, int64_t* out) {
  fill_stream(seed, offset, count, out, [](uint64_t s, uint64_t first, int64_t* p) {
    vu words[4];
    philox(s, first, words);
    for (int lane = 0; lane < W; ++lane) {
      const int counter = W / 4 * (lane % 4) + lane / 4;
      for (int word = 0; word < 4; ++word) p[4 * counter + word] = words[word][lane];
    }
  });
}

}  // namespace pdmd::PDMD_CAPABILITY
