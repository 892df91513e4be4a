// y = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): GELU with the tanh, as (1 + tanh u) / 2 = sigmoid(2 u).
//
// Backward, with s = sigmoid(2 u): dx = grad (s + x s (1 - s) 2 u').
#pragma once

#include "kernels.h"
#include "modulation.h"

namespace pdmd::PDMD_CAPABILITY {

// 2^t for t in [-126, 128], infinite from 127.5 on; relative error 2^-25 besides the rounding.
PDMD_INLINE vf exp2_of(vf t) {
  const vf shifted = t + 0x1.8p23f;  // its low bits are the nearest integer
  const vf f = t - (shifted - 0x1.8p23f);
  vf p = broadcast(0.000153375775f);
  p = p * f + 0.001339985989f;
  p = p * f + 0.009618519805f;
  p = p * f + 0.05550329015f;
  p = p * f + 0.2402264625f;
  p = p * f + 0.6931471825f;
  p = p * f + 1.0f;
  const vi exponent = (vi)as_bits(shifted) - 0x4B400000 + 127;
  return p * as_float((vu)(exponent << 23));
}

PDMD_INLINE vf sigmoid_2u(vf x) {
  constexpr float kFactor = -2.302208198f;  // -2 sqrt(2 / pi) log2(e)
  vf t = x * (kFactor + (kFactor * 0.044715f) * (x * x));
  t = t > 128.0f ? broadcast(128.0f) : t;  // a nan stays one
  t = t < -126.0f ? broadcast(-126.0f) : t;
  return 1.0f / (1.0f + exp2_of(t));
}

template <typename T>
static void gelu(const GeluArgs& args, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(args.x) + begin;
  T* y = static_cast<T*>(args.out) + begin;
  over_vectors(end - begin, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf value = take(x, i, n);
    give(y, i, value * sigmoid_2u(value), n);
  });
}

template <typename T>
static void gelu_backward(const GeluArgs& args, int64_t begin, int64_t end) {
  constexpr float kSlope = 1.595769122f;  // 2 sqrt(2 / pi)
  const T* grad = static_cast<const T*>(args.grad) + begin;
  const T* x = static_cast<const T*>(args.x) + begin;
  T* dx = static_cast<T*>(args.out) + begin;
  over_vectors(end - begin, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf value = take(x, i, n), s = sigmoid_2u(value);
    const vf slope = kSlope + (kSlope * 3 * 0.044715f) * (value * value);
    give(dx, i, take(grad, i, n) * (s + value * s * (1.0f - s) * slope), n);
  });
}

}  // namespace pdmd::PDMD_CAPABILITY
