// Vectors of W floats in the compiler's vector extension: one source for AVX-512 (16), AVX2 (8) and anything else (4).
//
// Everything is static inline in a namespace of its own per instruction set, so that no symbol is shared between the
// variants. The includer defines PDMD_CAPABILITY.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define PDMD_INLINE static inline __attribute__((always_inline))

namespace pdmd::PDMD_CAPABILITY {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint64_t vu64 __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

PDMD_INLINE vf broadcast(float x) { return vf{} + x; }
PDMD_INLINE vf as_float(vu x) { return (vf)x; }
PDMD_INLINE vu as_bits(vf x) { return (vu)x; }

// A vf from W values at an address of any alignment.
PDMD_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// GCC widens and narrows 512 bits in halves; the instructions do it at once.
PDMD_INLINE vu widened(vh x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}

PDMD_INLINE vh narrowed(vu x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, vh);
#endif
}

PDMD_INLINE vf load(const bf16* p) {
  vh x;
  std::memcpy(&x, p, sizeof x);
  return as_float(widened(x) << 16);
}

// To bf16: nearest, ties to even; a nan stays one.
PDMD_INLINE vh rounded(vf x) {
  vu u = as_bits(x);
  vu r = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  return narrowed((vu)_mm512_mask_mov_epi32((__m512i)r, nan, _mm512_set1_epi32(0x7FC0)));
#else
  vu nan = (vu)(x != x);
  return narrowed((r & ~nan) | (nan & 0x7FC0));
#endif
}

PDMD_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

PDMD_INLINE void store(bf16* p, vf x) {
  vh r = rounded(x);
  std::memcpy(p, &r, sizeof r);
}

// The first n of W values; the rest of the vector is zero, and the rest of the memory is not touched.
template <typename T>
PDMD_INLINE vf load(const T* p, int64_t n) {
  T values[W] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = p[i];
  return load(values);
}

template <typename T>
PDMD_INLINE void store(T* p, vf x, int64_t n) {
  T values[W];
  store(values, x);
  for (int64_t i = 0; i < n; ++i) p[i] = values[i];
}

PDMD_INLINE float total(vf x) {
  float sum = 0;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
}

// x with zeros beyond its first n elements.
PDMD_INLINE vf first_of(vf x, int64_t n) {
  if (n == W) return x;
  for (int64_t i = n; i < W; ++i) x[i] = 0;
  return x;
}

// Asks for the cache line of an address, which may lie outside of any tensor.
PDMD_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// A sum in two levels, so that fp32 stays accurate over long rows.
struct Sum {
  vf inner = {}, outer = {};
  int added = 0;
};

PDMD_INLINE void add(Sum& sum, vf x) {
  sum.inner += x;
  if (++sum.added == 16) {
    sum.outer += sum.inner;
    sum.inner = vf{};
    sum.added = 0;
  }
}

PDMD_INLINE float total(const Sum& sum) { return total(sum.outer + sum.inner); }

PDMD_INLINE vf absolute(vf x) { return as_float(as_bits(x) & 0x7FFFFFFF); }

// 1 for each element that is inf or nan.
PDMD_INLINE vi nonfinite(vf x) { return (vi)(((as_bits(x) & 0x7F800000) == 0x7F800000)) & 1; }

// a b + c with one rounding. Elsewhere the compiler may fuse or not.
PDMD_INLINE vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < W; ++i) a[i] = static_cast<float>(static_cast<double>(a[i]) * b[i] + c[i]);
  return a;
#endif
}

PDMD_INLINE vf square_root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// 1 / sqrt(x) to at least 11 bits, for positive normal x.
PDMD_INLINE vf rough_rsqrt(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_rsqrt14_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_rsqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vf)_mm_rsqrt_ps((__m128)x);
#else
  return 1.0f / square_root(x);
#endif
}

// (even, odd) of each pair of lanes as (odd, even), (even, even) and (odd, odd).
PDMD_INLINE vf swap_pairs(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)x, 0xB1);
#elif defined(__AVX2__)
  return (vf)_mm256_permute_ps((__m256)x, 0xB1);
#else
  return (vf)(((vu64)x << 32) | ((vu64)x >> 32));
#endif
}

PDMD_INLINE vf even_lanes(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_moveldup_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_moveldup_ps((__m256)x);
#else
  return (vf)(((vu64)x & 0xFFFFFFFF) | ((vu64)x << 32));
#endif
}

PDMD_INLINE vf odd_lanes(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_movehdup_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_movehdup_ps((__m256)x);
#else
  return (vf)(((vu64)x >> 32) | ((vu64)x & 0xFFFFFFFF00000000));
#endif
}

// The products of the low 32 bits of each 64-bit lane; the high 32 bits may hold anything.
PDMD_INLINE vu64 widening_multiply(vu64 a, vu64 b) {
#if defined(__AVX512F__)
  return (vu64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vu64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vu64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// Within each group of four lanes: rows to columns of the 4 x 4 matrix that r[0] .. r[3] hold there.
PDMD_INLINE void transpose_lanes(vf r[4]) {
#if defined(__AVX512F__)
  __m512d p = (__m512d)_mm512_unpacklo_ps((__m512)r[0], (__m512)r[1]);
  __m512d q = (__m512d)_mm512_unpackhi_ps((__m512)r[0], (__m512)r[1]);
  __m512d s = (__m512d)_mm512_unpacklo_ps((__m512)r[2], (__m512)r[3]);
  __m512d t = (__m512d)_mm512_unpackhi_ps((__m512)r[2], (__m512)r[3]);
  r[0] = (vf)_mm512_unpacklo_pd(p, s);
  r[1] = (vf)_mm512_unpackhi_pd(p, s);
  r[2] = (vf)_mm512_unpacklo_pd(q, t);
  r[3] = (vf)_mm512_unpackhi_pd(q, t);
#elif defined(__AVX2__)
  __m256d p = (__m256d)_mm256_unpacklo_ps((__m256)r[0], (__m256)r[1]);
  __m256d q = (__m256d)_mm256_unpackhi_ps((__m256)r[0], (__m256)r[1]);
  __m256d s = (__m256d)_mm256_unpacklo_ps((__m256)r[2], (__m256)r[3]);
  __m256d t = (__m256d)_mm256_unpackhi_ps((__m256)r[2], (__m256)r[3]);
  r[0] = (vf)_mm256_unpacklo_pd(p, s);
  r[1] = (vf)_mm256_unpackhi_pd(p, s);
  r[2] = (vf)_mm256_unpacklo_pd(q, t);
  r[3] = (vf)_mm256_unpackhi_pd(q, t);
#else
  for (int group = 0; group < W; group += 4) {
    for (int i = 0; i < 4; ++i) {
      for (int j = i + 1; j < 4; ++j) {
        float kept = r[i][group + j];
        r[i][group + j] = r[j][group + i];
        r[j][group + i] = kept;
      }
    }
  }
#endif
}

}  // namespace pdmd::PDMD_CAPABILITY
