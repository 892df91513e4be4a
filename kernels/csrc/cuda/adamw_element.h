// AdamW with beta_1 = 0 for one element, the same on the device and on the host:
//
//   g = grad grad_scale;  v = beta2 v + (1 - beta2) g^2;  p = (1 - lr weight_decay) p - lr g / (sqrt(v) / c + eps)
//
// with c = sqrt(1 - beta2^step). Each operation rounds once, and is fused where torch.optim.AdamW(fused=True) fuses it
// on the CPU, so that the results are equal to the bit. Host compilers need -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PDMD_DEVICE __host__ __device__ __forceinline__
#else
#define PDMD_DEVICE inline
#endif

namespace pdmd {

struct AdamwConstants {
  float decay;            // 1 - lr weight_decay
  float beta2;
  float one_minus_beta2;
  float correction;       // sqrt(1 - beta2^step)
  float eps;
  float minus_lr;
};

inline AdamwConstants adamw_constants(double lr, double beta2, double eps, double weight_decay, int64_t step) {
  return {static_cast<float>(1 - lr * weight_decay),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))),
          static_cast<float>(eps),
          static_cast<float>(-lr)};
}

PDMD_DEVICE float multiply(float x, float y) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}

PDMD_DEVICE float add(float x, float y) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(x, y);
#else
  return x + y;
#endif
}

PDMD_DEVICE float multiply_add(float x, float y, float z) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(x, y, z);
#else
  return std::fma(x, y, z);
#endif
}

PDMD_DEVICE float divide(float x, float y) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(x, y);
#else
  return x / y;
#endif
}

PDMD_DEVICE float square_root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

PDMD_DEVICE void adamw_element(float& p, float g, float& v, const AdamwConstants& c) {
  v = multiply_add(multiply(c.one_minus_beta2, g), g, multiply(v, c.beta2));
  const float denominator = add(divide(square_root(v), c.correction), c.eps);
  p = add(multiply(p, c.decay), divide(multiply(c.minus_lr, g), denominator));
}

PDMD_DEVICE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

PDMD_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

PDMD_DEVICE float widened(float x) { return x; }

// A bf16 number is the upper half of an fp32 number.
PDMD_DEVICE float widened(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// To nearest, ties to even; a NaN stays one.
PDMD_DEVICE uint16_t bf16_of(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace pdmd
