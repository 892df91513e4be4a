// y = LN(x) (1 + scale) + shift and y = x + gate h, over rows of [B, S, d].
//
// Backward, with g = grad (1 + scale) and n = (x - mean) rstd: dx = rstd (g - mean(g) - n mean(g n)), dshift = grad,
// dscale = grad n; dh = grad gate, dgate = grad h. Where a modulation is one row for all tokens of a sample, its
// gradients are summed over chunks of a fixed number of rows, so that the result does not depend on the threads.
#pragma once

#include "kernels.h"
#include "latents.h"

namespace pdmd::PDMD_CAPABILITY {

PDMD_INLINE const float* row_of(const Modulation& m, int64_t row, int64_t tokens) {
  return m.data + row / tokens * m.batch_stride + row % tokens * m.token_stride;
}

template <typename T>
PDMD_INLINE vf take(const T* p, int64_t i, int64_t n) {
  return n == W ? load(p + i) : load(p + i, n);
}

template <typename T>
PDMD_INLINE void give(T* p, int64_t i, vf value, int64_t n) {
  n == W ? store(p + i, value) : store(p + i, value, n);
}

template <typename T>
static void layer_norm(const LayerNormArgs& args, int64_t begin, int64_t end) {
  const int64_t d = args.d;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * d;
    T* y = static_cast<T*>(args.y) + row * d;
    const float* shift = row_of(args.shift, row, args.tokens);
    const float* scale = row_of(args.scale, row, args.tokens);
    Sum sum, squares;
    over_vectors(d, [&](int64_t i, int64_t n) __attribute__((always_inline)) { add(sum, take(x, i, n)); });
    const float mean = total(sum) / static_cast<float>(d);
    int64_t i = 0;
    for (; i + W <= d; i += W) {
      const vf deviation = load(x + i) - mean;
      add(squares, deviation * deviation);
    }
    float variance = total(squares);
    for (; i < d; ++i) {
      const float deviation = load(x + i, 1)[0] - mean;
      variance += deviation * deviation;
    }
    const float rstd = 1.0f / __builtin_sqrtf(variance / static_cast<float>(d) + args.eps);
    over_vectors(d, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      const vf normed = (take(x, j, n) - mean) * rstd;
      give(y, j, normed * (1.0f + take(scale, j, n)) + take(shift, j, n), n);
    });
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
}

// One row: the sums of g and g n, and on the way dshift and dscale, set or added to.
template <bool kFirst, typename T>
PDMD_INLINE void layer_norm_sums(const LayerNormBackwardArgs& args, const T* grad, const T* x, const float* scale,
                                 float mean, float rstd, float* dshift, float* dscale, float sums[2]) {
  Sum sum_g, sum_gn;
  over_vectors(args.d, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf dy = take(grad, i, n), dy_normed = dy * ((take(x, i, n) - mean) * rstd), factor = 1.0f + take(scale, i, n);
    add(sum_g, dy * factor);
    add(sum_gn, dy_normed * factor);
    if (dshift != nullptr) {
      give(dshift, i, kFirst ? dy : take(dshift, i, n) + dy, n);
      give(dscale, i, kFirst ? dy_normed : take(dscale, i, n) + dy_normed, n);
    }
  });
  sums[0] = total(sum_g) / static_cast<float>(args.d);
  sums[1] = total(sum_gn) / static_cast<float>(args.d);
}

template <typename T>
static void layer_norm_backward(const LayerNormBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t d = args.d, chunks = (args.tokens + args.chunk - 1) / args.chunk;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t sample = chunk / chunks, first = chunk % chunks * args.chunk;
    const int64_t last = first + args.chunk < args.tokens ? first + args.chunk : args.tokens;
    for (int64_t token = first; token < last; ++token) {
      const int64_t row = sample * args.tokens + token;
      const T* grad = static_cast<const T*>(args.grad) + row * d;
      const T* x = static_cast<const T*>(args.x) + row * d;
      const float* scale = row_of(args.scale, row, args.tokens);
      const float mean = args.mean[row], rstd = args.rstd[row];
      const int64_t target = (args.summed ? chunk : row) * d;
      float* dshift = args.dshift == nullptr ? nullptr : args.dshift + target;
      float* dscale = args.dscale == nullptr ? nullptr : args.dscale + target;
      float means[2];
      if (!args.summed || token == first) {
        layer_norm_sums<true>(args, grad, x, scale, mean, rstd, dshift, dscale, means);
      } else {
        layer_norm_sums<false>(args, grad, x, scale, mean, rstd, dshift, dscale, means);
      }
      if (args.dx == nullptr) continue;
      T* dx = static_cast<T*>(args.dx) + row * d;
      over_vectors(d, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const vf g = take(grad, i, n) * (1.0f + take(scale, i, n)), normed = (take(x, i, n) - mean) * rstd;
        give(dx, i, rstd * (g - means[0] - normed * means[1]), n);
      });
    }
  }
}

template <typename T>
static void gated(const GatedArgs& args, int64_t begin, int64_t end) {
  const int64_t d = args.d;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * d;
    const T* h = static_cast<const T*>(args.h) + row * d;
    T* y = static_cast<T*>(args.y) + row * d;
    const float* gate = row_of(args.gate, row, args.tokens);
    over_vectors(d, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      give(y, i, take(x, i, n) + take(gate, i, n) * take(h, i, n), n);
    });
  }
}

template <bool kFirst, typename T>
PDMD_INLINE void gated_backward_row(int64_t d, const T* grad, const T* h, const float* gate, T* dh, float* dgate) {
  over_vectors(d, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf dy = take(grad, i, n);
    if (dh != nullptr) give(dh, i, dy * take(gate, i, n), n);
    if (dgate != nullptr) {
      const vf product = dy * take(h, i, n);
      give(dgate, i, kFirst ? product : take(dgate, i, n) + product, n);
    }
  });
}

template <typename T>
static void gated_backward(const GatedBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t d = args.d, chunks = (args.tokens + args.chunk - 1) / args.chunk;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t sample = chunk / chunks, first = chunk % chunks * args.chunk;
    const int64_t last = first + args.chunk < args.tokens ? first + args.chunk : args.tokens;
    for (int64_t token = first; token < last; ++token) {
      const int64_t row = sample * args.tokens + token;
      const T* grad = static_cast<const T*>(args.grad) + row * d;
      const T* h = static_cast<const T*>(args.h) + row * d;
      const float* gate = row_of(args.gate, row, args.tokens);
      T* dh = args.dh == nullptr ? nullptr : static_cast<T*>(args.dh) + row * d;
      float* dgate = args.dgate == nullptr ? nullptr : args.dgate + (args.summed ? chunk : row) * d;
      if (!args.summed || token == first) {
        gated_backward_row<true>(d, grad, h, gate, dh, dgate);
      } else {
        gated_backward_row<false>(d, grad, h, gate, dh, dgate);
      }
    }
  }
}

// out[i] = the sum over the rows [count, d], for i in [begin, end).
static void sum_rows(const float* rows, int64_t count, int64_t d, float* out, int64_t begin, int64_t end) {
  over_vectors(end - begin, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    Sum sum;
    for (int64_t row = 0; row < count; ++row) add(sum, take(rows + row * d + begin, i, n));
    give(out + begin, i, sum.outer + sum.inner, n);
  });
}

}  // namespace pdmd::PDMD_CAPABILITY
