// y = rope(x rstd weight) with rstd = (mean(x^2) + eps)^(-1/2), over rows of [B, S, n], n = heads * head_dim.
//
// Backward, with g = unrope(grad): dots = sum(g weight x rstd), dx = rstd (g weight - x rstd mean_dots),
// dweight = sum(g x rstd). rms_norm_rope and rms_norm_rope_backward do a row in one go, where one rank holds all heads;
// the other functions are the halves around a sum over ranks.
#pragma once

#include "kernels.h"
#include "modulation.h"

namespace pdmd::PDMD_CAPABILITY {

// (even, odd) of each pair of lanes changed for each other.
PDMD_INLINE vf swap_pairs(vf x) {
  const vu64 pairs = (vu64)x;
  return (vf)((pairs << 32) | (pairs >> 32));
}

// Channels (2i, 2i + 1) of a head turned by the angle i of the token: (e cos - o sin, e sin + o cos).
struct Rotation {
  const float* table;  // [head_dim / 2, 2] of one token, or null
  float sign;          // 1 turns, -1 turns back
};

// x and the table hold whole pairs, for W is even and so is head_dim.
PDMD_INLINE vf turned(vf x, vf table, float sign) {
  const vu64 pairs = (vu64)table;
  const vf cos = (vf)((pairs & 0xFFFFFFFF) | (pairs << 32));
  const vf sin = (vf)((pairs >> 32) | (pairs & 0xFFFFFFFF00000000));
  const vf signs = (vf)((vu64{} + 0x3F80000000000000) | (vu64{} + 0xBF800000));  // (-1, 1) in each pair
  return x * cos + swap_pairs(x) * (sin * (signs * sign));
}

// Calls body(i, n, j): n values from i of the row, and j, where they lie in their head.
template <typename Body>
PDMD_INLINE void over_heads(int64_t n, int64_t head_dim, Body body) {
  for (int64_t head = 0; head < n; head += head_dim) {
    over_vectors(head_dim, [&](int64_t j, int64_t count) __attribute__((always_inline)) { body(head + j, count, j); });
  }
}

PDMD_INLINE vf rotated(vf x, const Rotation& rotation, int64_t j, int64_t n) {
  return rotation.table == nullptr ? x : turned(x, take(rotation.table, j, n), rotation.sign);
}

PDMD_INLINE Rotation rotation_of(const RmsArgs& args, int64_t row, float sign) {
  return {args.rope == nullptr ? nullptr : args.rope + row % args.tokens * args.head_dim, sign};
}

template <typename T>
PDMD_INLINE float squares_of(const T* x, int64_t n) {
  Sum sum;
  over_vectors(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const vf value = take(x, i, count);
    add(sum, value * value);
  });
  return total(sum);
}

template <typename T>
PDMD_INLINE void rms_rope_row(const RmsArgs& args, int64_t row, float rstd) {
  const T* x = static_cast<const T*>(args.x) + row * args.n;
  T* y = static_cast<T*>(args.out) + row * args.n;
  const Rotation rotation = rotation_of(args, row, 1);
  over_heads(args.n, args.head_dim, [&](int64_t i, int64_t n, int64_t j) __attribute__((always_inline)) {
    give(y, i, rotated(take(x, i, n) * rstd * take(args.weight, i, n), rotation, j, n), n);
  });
}

// One row's dots; dweight is set or added to.
template <bool kFirst, typename T>
PDMD_INLINE float dots_row(const RmsArgs& args, int64_t row, float* dweight) {
  const T* grad = static_cast<const T*>(args.grad) + row * args.n;
  const T* x = static_cast<const T*>(args.x) + row * args.n;
  const float rstd = args.rstd[row];
  const Rotation rotation = rotation_of(args, row, -1);
  Sum sum;
  over_heads(args.n, args.head_dim, [&](int64_t i, int64_t n, int64_t j) __attribute__((always_inline)) {
    const vf product = rotated(take(grad, i, n), rotation, j, n) * (take(x, i, n) * rstd);
    give(dweight, i, kFirst ? product : take(dweight, i, n) + product, n);
    add(sum, product * take(args.weight, i, n));
  });
  return total(sum);
}

template <typename T>
PDMD_INLINE void dx_row(const RmsArgs& args, int64_t row, float mean) {
  const T* grad = static_cast<const T*>(args.grad) + row * args.n;
  const T* x = static_cast<const T*>(args.x) + row * args.n;
  T* dx = static_cast<T*>(args.out) + row * args.n;
  const float rstd = args.rstd[row], factor = rstd * mean;
  const Rotation rotation = rotation_of(args, row, -1);
  over_heads(args.n, args.head_dim, [&](int64_t i, int64_t n, int64_t j) __attribute__((always_inline)) {
    const vf weighted = rotated(take(grad, i, n), rotation, j, n) * take(args.weight, i, n);
    give(dx, i, rstd * (weighted - take(x, i, n) * factor), n);
  });
}

template <typename T>
static void sum_of_squares(const RmsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    args.squares[row] = squares_of(static_cast<const T*>(args.x) + row * args.n, args.n);
  }
}

template <typename T>
static void rms_rope(const RmsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) rms_rope_row<T>(args, row, args.rstd[row]);
}

template <typename T>
static void rms_norm_rope(const RmsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float squares = squares_of(static_cast<const T*>(args.x) + row * args.n, args.n);
    args.rstd[row] = 1.0f / __builtin_sqrtf(squares / static_cast<float>(args.n) + args.eps);
    rms_rope_row<T>(args, row, args.rstd[row]);
  }
}

// Calls each(row, dots) for the rows of the chunks, whose dweight it sums.
template <typename T, typename Each>
PDMD_INLINE void over_chunks(const RmsArgs& args, int64_t begin, int64_t end, Each each) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * args.chunk;
    const int64_t last = first + args.chunk < args.tokens_in_all ? first + args.chunk : args.tokens_in_all;
    float* dweight = args.dweight + chunk * args.n;
    each(first, dots_row<true, T>(args, first, dweight));
    for (int64_t row = first + 1; row < last; ++row) each(row, dots_row<false, T>(args, row, dweight));
  }
}

template <typename T>
static void rms_rope_backward_dots(const RmsArgs& args, int64_t begin, int64_t end) {
  over_chunks<T>(args, begin, end, [&](int64_t row, float dots) { args.dots[row] = dots; });
}

template <typename T>
static void rms_rope_backward_dx(const RmsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) dx_row<T>(args, row, args.dots[row]);
}

template <typename T>
static void rms_norm_rope_backward(const RmsArgs& args, int64_t begin, int64_t end) {
  over_chunks<T>(args, begin, end,
                 [&](int64_t row, float dots) { dx_row<T>(args, row, dots / static_cast<float>(args.n)); });
}

}  // namespace pdmd::PDMD_CAPABILITY
