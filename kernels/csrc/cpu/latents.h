// The ops on latents [B, N] with one coefficient a sample, tile by tile; eps is given or drawn again from a seed.
//
//   linear:    a x + b y                                             (subinterval_noise, euler_step)
//   loss:      sum (c_out output - c_eps eps - c_x x_s)^2 and its gradient
//   gradient:  weight (guided - fake) / divisor, guided = unconditional + guidance (teacher - unconditional)
//
// Inputs are brought to fp32 in a tile that stays in the first-level cache, so that the arithmetic is written once.
#pragma once

#include "kernels.h"
#include "philox.h"

namespace pdmd::PDMD_CAPABILITY {

struct Tile {
  int64_t index, sample, offset, count;
};

PDMD_INLINE Tile tile_at(int64_t index, int64_t numel) {
  const int64_t tiles = (numel + kTile - 1) / kTile;
  const int64_t offset = index % tiles * kTile;
  return {index, index / tiles, offset, numel - offset < kTile ? numel - offset : kTile};
}

// The tile's values in fp32: where they lie, or made in the buffer.
static const float* read(const Source& source, const Tile& tile, int64_t numel, float* buffer) {
  const int64_t start = tile.sample * numel + tile.offset;
  switch (source.kind) {
    case Kind::kFloat:
      return static_cast<const float*>(source.data) + start;
    case Kind::kBFloat16: {
      const bf16* values = static_cast<const bf16*>(source.data) + start;
      int64_t i = 0;
      for (; i + W <= tile.count; i += W) store(buffer + i, load(values + i));
      if (i < tile.count) store(buffer + i, load(values + i, tile.count - i), tile.count - i);
      return buffer;
    }
    case Kind::kSeed:
      normal(static_cast<const uint64_t*>(source.data)[tile.sample], tile.offset, tile.count, buffer);
      return buffer;
    case Kind::kNone:
      break;
  }
  return nullptr;
}

PDMD_INLINE void put(const Sink& sink, int64_t position, vf value, int64_t count) {
  if (sink.kind == Kind::kFloat) {
    float* out = static_cast<float*>(sink.data) + position;
    count >= W ? store(out, value) : store(out, value, count);
  } else if (sink.kind == Kind::kBFloat16) {
    bf16* out = static_cast<bf16*>(sink.data) + position;
    count >= W ? store(out, value) : store(out, value, count);
  }
}

// Calls body(i, n) for the vectors of a tile: n values from i, n < W in the last one alone.
template <typename Body>
PDMD_INLINE void over_vectors(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + W <= count; i += W) body(i, static_cast<int64_t>(W));
  if (i < count) body(i, count - i);
}

PDMD_INLINE vf take(const float* p, int64_t i, int64_t n) { return n == W ? load(p + i) : load(p + i, n); }

static void linear(const LinearArgs& args, int64_t begin, int64_t end) {
  float x_buffer[kTile], y_buffer[kTile];
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(index, args.numel);
    const float* x = read(args.x, tile, args.numel, x_buffer);
    const float* y = read(args.y, tile, args.numel, y_buffer);
    const float a = args.a[tile.sample], b = args.b[tile.sample];
    const int64_t start = tile.sample * args.numel + tile.offset;
    over_vectors(tile.count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const vf value = a * take(x, i, n) + b * take(y, i, n);
      put(args.out, start + i, value, n);
      put(args.copy, start + i, value, n);
    });
  }
}

static void loss(const LossArgs& args, int64_t begin, int64_t end) {
  float output_buffer[kTile], x_buffer[kTile], eps_buffer[kTile];
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(index, args.numel);
    const float* output = read(args.output, tile, args.numel, output_buffer);
    const float* x_s = read(args.x_s, tile, args.numel, x_buffer);
    const float* eps = read(args.noise, tile, args.numel, eps_buffer);
    const float c_out = args.c_out[tile.sample], c_eps = args.c_eps[tile.sample], c_x = args.c_x[tile.sample];
    const float factor = 2 * args.weight[tile.sample] * c_out / static_cast<float>(args.numel);
    const int64_t start = tile.sample * args.numel + tile.offset;
    Sum sum;
    over_vectors(tile.count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const vf residual = c_out * take(output, i, n) - c_eps * take(eps, i, n) - c_x * take(x_s, i, n);
      add(sum, residual * residual);
      put(args.grad, start + i, factor * residual, n);
    });
    args.partial[index] = total(sum);
  }
}

struct Flows {
  const float *teacher, *unconditional;
  float guidance;
};

// As torch.lerp: exact at guidance 0 and at 1.
PDMD_INLINE vf guided(const Flows& flows, int64_t i, int64_t n) {
  const vf conditional = take(flows.teacher, i, n);
  if (flows.unconditional == nullptr) return conditional;
  const vf base = take(flows.unconditional, i, n);
  return flows.guidance < 0.5f ? base + flows.guidance * (conditional - base)
                               : conditional - (conditional - base) * (1 - flows.guidance);
}

static void gradient_scale(const GradientArgs& args, int64_t begin, int64_t end) {
  float teacher_buffer[kTile], base_buffer[kTile], s_buffer[kTile], t_buffer[kTile];
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(index, args.numel);
    const Flows flows = {read(args.teacher, tile, args.numel, teacher_buffer),
                         read(args.unconditional, tile, args.numel, base_buffer), args.guidance};
    const float* x_s = read(args.x_s, tile, args.numel, s_buffer);
    const float* x_t = read(args.x_t, tile, args.numel, t_buffer);
    const float weight = args.weight[tile.sample], c_x = args.c_x[tile.sample];
    Sum sum;
    over_vectors(tile.count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      add(sum, absolute(take(x_s, i, n) - (c_x * take(x_t, i, n) - weight * guided(flows, i, n))));
    });
    args.partial[index] = total(sum);
  }
}

static void gradient(const GradientArgs& args, int64_t begin, int64_t end) {
  float teacher_buffer[kTile], base_buffer[kTile], fake_buffer[kTile];
  const Sink sink = {args.gradient, Kind::kFloat};
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(index, args.numel);
    const Flows flows = {read(args.teacher, tile, args.numel, teacher_buffer),
                         read(args.unconditional, tile, args.numel, base_buffer), args.guidance};
    const float* fake = read(args.fake, tile, args.numel, fake_buffer);
    const float weight = args.weight[tile.sample];
    const float divisor = args.divisor == nullptr ? 1.0f : args.divisor[tile.sample];
    const int64_t start = tile.sample * args.numel + tile.offset;
    vi count = {};
    over_vectors(tile.count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      vf value = weight * (guided(flows, i, n) - take(fake, i, n));
      if (args.divisor != nullptr) value /= divisor;
      // The lanes beyond a short vector's end may be 0 / 0.
      const vi bad = nonfinite(value);
      for (int lane = 0; n < W && lane < n; ++lane) count[0] += bad[lane];
      if (n == W) count += bad;
      put(sink, start + i, value, n);
    });
    int64_t sum = 0;
    for (int lane = 0; lane < W; ++lane) sum += count[lane];
    args.nonfinite[index] = sum;
  }
}

}  // namespace pdmd::PDMD_CAPABILITY
