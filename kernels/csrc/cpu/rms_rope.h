// y = rope(x rstd weight) with rstd = (mean(x^2) + eps)^(-1/2), over rows of [B, S, n], n = heads * head_dim.
//
// Backward, with g = unrope(grad): dots = sum(g weight x rstd), dx = rstd (g weight - x rstd mean_dots),
// dweight = sum(g x rstd). rms_norm_rope and rms_norm_rope_backward do a row in one go, where one rank holds all heads;
// the other functions are the halves around a sum over ranks.
#pragma once

#include "kernels.h"
#include "modulation.h"

namespace pdmd::PDMD_CAPABILITY {

// The tables [head_dim / 2, 2] of the tokens of R rows.
template <int R>
struct Rotations {
  const float* tables[R];
};

template <int R>
PDMD_INLINE Rotations<R> rotations_of(const RmsArgs& args, int64_t row) {
  Rotations<R> found;
  for (int r = 0; r < R; ++r) {
    found.tables[r] = args.rope == nullptr ? nullptr : args.rope + (row + r) % args.tokens * args.head_dim;
  }
  return found;
}

// Channels (2i, 2i + 1) of a head turned by the angle i of the token, to (e cos - o sin, e sin + o cos), or back.
// x and the table hold whole pairs, for W is even and so is head_dim.
template <int kSign>
PDMD_INLINE vf turned(vf x, vf table) {
  const vu64 flipped = vu64{} + (kSign > 0 ? 0x80000000 : 0x8000000000000000);  // the even or the odd lanes' sign
  return x * even_lanes(table) + swap_pairs(x) * (vf)((vu64)odd_lanes(table) ^ flipped);
}

// Calls body(i, n, j) for the vectors of a row: n values from i, which lie at j in their head; carry() as over_blocks.
template <typename Body, typename Carry>
PDMD_INLINE void over_heads(int64_t n, int64_t head_dim, Body body, Carry carry) {
  for (int64_t head = 0; head < n; head += head_dim) {
    over_blocks(head_dim, [&](int64_t j, int64_t count) __attribute__((always_inline)) { body(head + j, count, j); },
                carry);
  }
}

template <bool kRope, int kSign, int R>
PDMD_INLINE vf rotated(vf x, const Rotations<R>& rotations, int r, int64_t j, int64_t n) {
  return kRope ? turned<kSign>(x, take(rotations.tables[r], j, n)) : x;
}

// The sums of squares of R rows.
template <int R, typename T>
PDMD_INLINE void squares_of(const RmsArgs& args, int64_t row, float* squares) {
  const T* x = static_cast<const T*>(args.x) + row * args.n;
  Sums<R> sums;
  over_blocks(args.n, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      const vf value = take(x + r * args.n, i, n);
      sums.inner[r] += value * value;
    }
  }, [&]() __attribute__((always_inline)) { flush(sums); });
  for (int r = 0; r < R; ++r) squares[r] = total(sums.outer[r]);
}

template <bool kRope, int R, typename T>
PDMD_INLINE void rms_rope_rows(const RmsArgs& args, int64_t row, int64_t ahead) {
  const T* x = static_cast<const T*>(args.x) + row * args.n;
  T* y = static_cast<T*>(args.out) + row * args.n;
  const float* rstd = args.rstd + row;
  const Rotations<R> rotations = rotations_of<R>(args, row);
  over_heads(args.n, args.head_dim, [&](int64_t i, int64_t n, int64_t j) __attribute__((always_inline)) {
    const vf weight = take(args.weight, i, n);
    for (int r = 0; r < R; ++r) {
      const vf normed = take(x + r * args.n, i, n) * rstd[r] * weight;
      give(y + r * args.n, i, rotated<kRope, 1>(normed, rotations, r, j, n), n);
      prefetch(x + (ahead + r) * args.n + i);
    }
  }, []() {});
}

// The dots of R rows; their dweight is set (first) or added.
template <bool kRope, int R, typename T>
PDMD_INLINE void dots_rows(const RmsArgs& args, int64_t row, bool first, float* dweight, float* dots) {
  const T* grad = static_cast<const T*>(args.grad) + row * args.n;
  const T* x = static_cast<const T*>(args.x) + row * args.n;
  const float* rstd = args.rstd + row;
  const Rotations<R> rotations = rotations_of<R>(args, row);
  Sums<R> sums;
  over_heads(args.n, args.head_dim, [&](int64_t i, int64_t n, int64_t j) __attribute__((always_inline)) {
    const vf weight = take(args.weight, i, n);
    vf products = {};
    for (int r = 0; r < R; ++r) {
      const vf turned_back = rotated<kRope, -1>(take(grad + r * args.n, i, n), rotations, r, j, n);
      const vf product = turned_back * (take(x + r * args.n, i, n) * rstd[r]);
      products += product;
      sums.inner[r] += product * weight;
    }
    give(dweight, i, first ? products : take(dweight, i, n) + products, n);
  }, [&]() __attribute__((always_inline)) { flush(sums); });
  for (int r = 0; r < R; ++r) dots[r] = total(sums.outer[r]);
}

template <bool kRope, int R, typename T>
PDMD_INLINE void dx_rows(const RmsArgs& args, int64_t row, int64_t ahead, const float* means) {
  const T* grad = static_cast<const T*>(args.grad) + row * args.n;
  const T* x = static_cast<const T*>(args.x) + row * args.n;
  T* dx = static_cast<T*>(args.out) + row * args.n;
  const float* rstd = args.rstd + row;
  const Rotations<R> rotations = rotations_of<R>(args, row);
  over_heads(args.n, args.head_dim, [&](int64_t i, int64_t n, int64_t j) __attribute__((always_inline)) {
    const vf weight = take(args.weight, i, n);
    for (int r = 0; r < R; ++r) {
      const vf weighted = rotated<kRope, -1>(take(grad + r * args.n, i, n), rotations, r, j, n) * weight;
      give(dx + r * args.n, i, rstd[r] * (weighted - take(x + r * args.n, i, n) * (rstd[r] * means[r])), n);
      prefetch(grad + (ahead + r) * args.n + i);
      prefetch(x + (ahead + r) * args.n + i);
    }
  }, []() {});
}

// Calls each(rope, R, row, ahead), the first two as compile-time constants; see over_groups.
template <typename Each>
PDMD_INLINE void over_rope_groups(const RmsArgs& args, int64_t begin, int64_t end, Each each) {
  over_groups<2>(begin, end, [&](auto rows, int64_t row, int64_t ahead) __attribute__((always_inline)) {
    args.rope == nullptr ? each(std::false_type{}, rows, row, ahead) : each(std::true_type{}, rows, row, ahead);
  });
}

template <typename T>
static void sum_of_squares(const RmsArgs& args, int64_t begin, int64_t end) {
  over_groups<2>(begin, end, [&](auto rows, int64_t row, int64_t) __attribute__((always_inline)) {
    squares_of<rows(), T>(args, row, args.squares + row);
  });
}

template <typename T>
static void rms_rope(const RmsArgs& args, int64_t begin, int64_t end) {
  over_rope_groups(args, begin, end,
      [&](auto rope, auto rows, int64_t row, int64_t ahead) __attribute__((always_inline)) {
    rms_rope_rows<rope(), rows(), T>(args, row, ahead);
  });
}

template <typename T>
static void rms_norm_rope(const RmsArgs& args, int64_t begin, int64_t end) {
  over_rope_groups(args, begin, end,
      [&](auto rope, auto rows, int64_t row, int64_t ahead) __attribute__((always_inline)) {
    float squares[rows()];
    squares_of<rows(), T>(args, row, squares);
    for (int r = 0; r < rows(); ++r) {
      args.rstd[row + r] = 1.0f / __builtin_sqrtf(squares[r] / static_cast<float>(args.n) + args.eps);
    }
    rms_rope_rows<rope(), rows(), T>(args, row, ahead);
  });
}

// Calls each(rope, R, row, ahead, first, dweight) for the rows of the chunks, whose dweight is summed in one row.
template <typename Each>
PDMD_INLINE void over_chunks(const RmsArgs& args, int64_t begin, int64_t end, Each each) {
  for (int64_t index = begin; index < end; ++index) {
    const Chunk chunk = chunk_at(index, args.tokens_in_all, args.chunk);
    float* dweight = args.dweight + index * args.n;
    over_rope_groups(args, chunk.first, chunk.last,
        [&](auto rope, auto rows, int64_t row, int64_t ahead) __attribute__((always_inline)) {
      each(rope, rows, row, ahead, row == chunk.first, dweight);
    });
  }
}

template <typename T>
static void rms_rope_backward_dots(const RmsArgs& args, int64_t begin, int64_t end) {
  over_chunks(args, begin, end,
      [&](auto rope, auto rows, int64_t row, int64_t, bool first, float* dweight) __attribute__((always_inline)) {
    dots_rows<rope(), rows(), T>(args, row, first, dweight, args.dots + row);
  });
}

template <typename T>
static void rms_rope_backward_dx(const RmsArgs& args, int64_t begin, int64_t end) {
  over_rope_groups(args, begin, end,
      [&](auto rope, auto rows, int64_t row, int64_t ahead) __attribute__((always_inline)) {
    dx_rows<rope(), rows(), T>(args, row, ahead, args.dots + row);
  });
}

template <typename T>
static void rms_norm_rope_backward(const RmsArgs& args, int64_t begin, int64_t end) {
  over_chunks(args, begin, end,
      [&](auto rope, auto rows, int64_t row, int64_t ahead, bool first, float* dweight) __attribute__((always_inline)) {
    float means[rows()];
    dots_rows<rope(), rows(), T>(args, row, first, dweight, means);
    for (float& mean : means) mean /= static_cast<float>(args.n);
    dx_rows<rope(), rows(), T>(args, row, ahead, means);
  });
}

}  // namespace pdmd::PDMD_CAPABILITY
