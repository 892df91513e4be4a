// y = LN(x) (1 + scale) + shift and y = x + gate h, over rows of [B, S, d].
//
// Backward, with g = grad (1 + scale) and n = (x - mean) rstd: dx = rstd (g - mean(g) - n mean(g n)), dshift = grad,
// dscale = grad n; dh = grad gate, dgate = grad h. Where a modulation is one row for all tokens of a sample, its
// gradients are summed over chunks of a fixed number of rows, so that the result does not depend on the threads.
#pragma once

#include <type_traits>

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

// Sums of R rows in two levels, so that fp32 stays accurate over long rows.
template <int R>
struct Sums {
  vf inner[R] = {}, outer[R] = {};
};

template <int R>
PDMD_INLINE void flush(Sums<R>& sums) {
  for (int r = 0; r < R; ++r) {
    sums.outer[r] += sums.inner[r];
    sums.inner[r] = vf{};
  }
}

// Calls body(i, n) for the vectors of a row, as over_vectors, and carry() after every 16th and after the last.
template <typename Body, typename Carry>
PDMD_INLINE void over_blocks(int64_t d, Body body, Carry carry) {
  int64_t i = 0;
  for (; i + 16 * W <= d; carry()) {
    for (int j = 0; j < 16; ++j, i += W) body(i, static_cast<int64_t>(W));
  }
  for (; i + W <= d; i += W) body(i, static_cast<int64_t>(W));
  if (i < d) body(i, d - i);
  carry();
}

// R rows of a modulation, or one for all of them.
template <int R, bool kShared>
struct ModulationRows {
  const float* rows[R];
  vf shared = {};
};

template <int R, bool kShared>
PDMD_INLINE ModulationRows<R, kShared> rows_of(const Modulation& m, int64_t row, int64_t tokens) {
  ModulationRows<R, kShared> found;
  for (int r = 0; r < R; ++r) found.rows[r] = row_of(m, row + r, tokens);
  return found;
}

template <int R, bool kShared>
PDMD_INLINE void load_shared(ModulationRows<R, kShared>& m, int64_t i, int64_t n) {
  if (kShared) m.shared = take(m.rows[0], i, n);
}

template <int R, bool kShared>
PDMD_INLINE vf value_of(const ModulationRows<R, kShared>& m, int r, int64_t i, int64_t n) {
  return kShared ? m.shared : take(m.rows[r], i, n);
}

// Calls each(R, row, ahead) for the rows [first, last) of one sample in groups of R = kRows, or 1 at the end, a
// compile-time constant; `ahead` is the distance to the rows to bring into the cache meanwhile. The rows of a group
// share the loads of a modulation, and their sums do not wait for one another; a group should fit into the cache.
template <int kRows, typename Each>
PDMD_INLINE void over_groups(int64_t first, int64_t last, Each each) {
  int64_t row = first;
  for (; row + kRows <= last; row += kRows) {
    each(std::integral_constant<int, kRows>{}, row, row + 2 * kRows <= last ? kRows : int64_t{0});
  }
  for (; row < last; ++row) each(std::integral_constant<int, 1>{}, row, int64_t{0});
}

// The chunk's sample and rows [first, last).
struct Chunk {
  int64_t sample, first, last;
};

PDMD_INLINE Chunk chunk_at(int64_t index, int64_t tokens, int64_t chunk) {
  const int64_t chunks = (tokens + chunk - 1) / chunk, sample = index / chunks, token = index % chunks * chunk;
  const int64_t end = token + chunk < tokens ? token + chunk : tokens;
  return {sample, sample * tokens + token, sample * tokens + end};
}

template <bool kShared, int R, typename T>
PDMD_INLINE void layer_norm_rows(const LayerNormArgs& args, int64_t row, int64_t ahead) {
  const int64_t d = args.d;
  const T* x = static_cast<const T*>(args.x) + row * d;
  T* y = static_cast<T*>(args.y) + row * d;
  Sums<R> sums, squares;
  over_blocks(d, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) sums.inner[r] += take(x + r * d, i, n);
  }, [&]() __attribute__((always_inline)) { flush(sums); });
  float mean[R], rstd[R];
  for (int r = 0; r < R; ++r) mean[r] = total(sums.outer[r]) / static_cast<float>(d);
  over_blocks(d, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      const vf deviation = first_of(take(x + r * d, i, n) - mean[r], n);
      squares.inner[r] += deviation * deviation;
    }
  }, [&]() __attribute__((always_inline)) { flush(squares); });
  for (int r = 0; r < R; ++r) {
    rstd[r] = 1.0f / __builtin_sqrtf(total(squares.outer[r]) / static_cast<float>(d) + args.eps);
    args.mean[row + r] = mean[r];
    args.rstd[row + r] = rstd[r];
  }
  auto shift = rows_of<R, kShared>(args.shift, row, args.tokens);
  auto scale = rows_of<R, kShared>(args.scale, row, args.tokens);
  over_vectors(d, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    load_shared(shift, i, n);
    load_shared(scale, i, n);
    for (int r = 0; r < R; ++r) {
      const vf normed = (take(x + r * d, i, n) - mean[r]) * rstd[r];
      give(y + r * d, i, normed * (1.0f + value_of(scale, r, i, n)) + value_of(shift, r, i, n), n);
      prefetch(x + (ahead + r) * d + i);
    }
  });
}

template <typename T>
static void layer_norm(const LayerNormArgs& args, int64_t begin, int64_t end) {
  const bool shared = args.shift.token_stride == 0 && args.scale.token_stride == 0;
  for (int64_t index = begin; index < end; ++index) {
    const Chunk chunk = chunk_at(index, args.tokens, args.chunk);
    over_groups<4>(chunk.first, chunk.last, [&](auto rows, int64_t row, int64_t ahead) __attribute__((always_inline)) {
      shared ? layer_norm_rows<true, rows(), T>(args, row, ahead) : layer_norm_rows<false, rows(), T>(args, row, ahead);
    });
  }
}

// R rows: dx, and dshift and dscale, set (kFirst) or added to; these are shared, as `scale` is, or one a row.
template <bool kShared, int R, typename T>
PDMD_INLINE void layer_norm_backward_rows(const LayerNormBackwardArgs& args, int64_t row, int64_t ahead, bool first,
                                          float* dshift, float* dscale) {
  const int64_t d = args.d;
  const T* grad = static_cast<const T*>(args.grad) + row * d;
  const T* x = static_cast<const T*>(args.x) + row * d;
  const float *mean = args.mean + row, *rstd = args.rstd + row;
  auto scale = rows_of<R, kShared>(args.scale, row, args.tokens);
  Sums<R> sum_g, sum_gn;
  over_blocks(d, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    load_shared(scale, i, n);
    vf dshifts = {}, dscales = {};
    for (int r = 0; r < R; ++r) {
      const vf dy = take(grad + r * d, i, n), dy_normed = dy * ((take(x + r * d, i, n) - mean[r]) * rstd[r]);
      const vf factor = 1.0f + value_of(scale, r, i, n);
      sum_g.inner[r] += dy * factor;
      sum_gn.inner[r] += dy_normed * factor;
      if (kShared) {
        dshifts += dy;
        dscales += dy_normed;
      } else if (dshift != nullptr) {
        give(dshift + r * d, i, dy, n);
        give(dscale + r * d, i, dy_normed, n);
      }
    }
    if (kShared && dshift != nullptr) {
      give(dshift, i, first ? dshifts : take(dshift, i, n) + dshifts, n);
      give(dscale, i, first ? dscales : take(dscale, i, n) + dscales, n);
    }
  }, [&]() __attribute__((always_inline)) {
    flush(sum_g);
    flush(sum_gn);
  });
  if (args.dx == nullptr) return;
  T* dx = static_cast<T*>(args.dx) + row * d;
  float mean_g[R], mean_gn[R];
  for (int r = 0; r < R; ++r) {
    mean_g[r] = total(sum_g.outer[r]) / static_cast<float>(d);
    mean_gn[r] = total(sum_gn.outer[r]) / static_cast<float>(d);
  }
  over_vectors(d, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    load_shared(scale, i, n);
    for (int r = 0; r < R; ++r) {
      const vf g = take(grad + r * d, i, n) * (1.0f + value_of(scale, r, i, n));
      const vf normed = (take(x + r * d, i, n) - mean[r]) * rstd[r];
      give(dx + r * d, i, rstd[r] * (g - mean_g[r] - normed * mean_gn[r]), n);
      prefetch(grad + (ahead + r) * d + i);
      prefetch(x + (ahead + r) * d + i);
    }
  });
}

template <typename T>
static void layer_norm_backward(const LayerNormBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Chunk chunk = chunk_at(index, args.tokens, args.chunk);
    over_groups<2>(chunk.first, chunk.last, [&](auto rows, int64_t row, int64_t ahead) __attribute__((always_inline)) {
      const bool wanted = args.dshift != nullptr;
      const int64_t target = (args.summed ? index : row) * args.d;
      float *dshift = wanted ? args.dshift + target : nullptr, *dscale = wanted ? args.dscale + target : nullptr;
      args.summed ? layer_norm_backward_rows<true, rows(), T>(args, row, ahead, row == chunk.first, dshift, dscale)
                  : layer_norm_backward_rows<false, rows(), T>(args, row, ahead, true, dshift, dscale);
    });
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
