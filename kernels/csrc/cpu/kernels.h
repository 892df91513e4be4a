// What the compiled variants offer: plain functions over ranges, so that the threads are started in one place.
//
// kernels.cpp is compiled once per instruction set into a table of these functions; bindings*.cpp check the tensors,
// allocate, split the range over threads and call. Nothing here may be an inline function: an inline function compiled
// for AVX-512 could be the copy that the linker keeps for every caller.
#pragma once

#include <cstdint>

namespace pdmd {

enum class Kind : int { kFloat, kBFloat16, kSeed, kNone };

// A tensor [B, N] to read: fp32 or bf16 values, or one int64 seed a sample for normals.
struct Source {
  const void* data;
  Kind kind;
};

// Where results [B, N] go; kNone: nowhere.
struct Sink {
  void* data;
  Kind kind;
};

// A sample's elements are worked on in tiles of this many, the unit of the ranges below: tile i belongs to the sample
// i / tiles, with tiles = ceil(N / kTile). A multiple of 4, so that no tile splits a Philox counter.
constexpr int64_t kTile = 2048;

struct LinearArgs {
  Source x, y;
  const float *a, *b;
  Sink out, copy;
  int64_t numel;
};

struct LossArgs {
  Source output, x_s, noise;
  const float *c_out, *c_eps, *c_x, *weight;
  Sink grad;
  double* partial;  // [B, tiles]: each tile's sum of squared residuals
  int64_t numel;
};

struct GradientArgs {
  Source teacher, unconditional, fake, x_s, x_t;
  float guidance;
  const float *weight, *c_x;
  const float* divisor;  // [B], or null: none
  float* gradient;
  double* partial;     // [B, tiles]: each tile's sum of |x_s - (c_x x_t - weight guided)|
  int64_t* nonfinite;  // [B, tiles]
  int64_t numel;
};

// fp32 [B, S or 1, d]: last dim contiguous; the stride of a broadcast dim is 0.
struct Modulation {
  const float* data;
  int64_t batch_stride, token_stride;
};

// Chunks of up to `chunk` rows of one sample of a [B, S, d] tensor; T is fp32 or bf16 throughout.
struct LayerNormArgs {
  const void* x;
  Modulation shift, scale;
  float eps;
  void* y;
  float *mean, *rstd;
  int64_t tokens, d, chunk;
};

// Chunks of up to `chunk` rows of one sample. The gradients of shift and scale are [B, chunks, d] partial sums if
// `summed`, else rows [B, S, d].
struct LayerNormBackwardArgs {
  const void *grad, *x;
  Modulation scale;
  const float *mean, *rstd;
  void* dx;               // null: not wanted
  float *dshift, *dscale;  // null: not wanted
  bool summed;
  int64_t tokens, d, chunk;
};

// Rows of a [B, S, d] tensor.
struct GatedArgs {
  const void *x, *h;
  Modulation gate;
  void* y;
  int64_t tokens, d;
};

struct GatedBackwardArgs {
  const void *grad, *h;
  Modulation gate;
  void* dh;      // null: not wanted
  float* dgate;  // null: not wanted; as in LayerNormBackwardArgs
  bool summed;
  int64_t tokens, d, chunk;
};

// Rows of [B, S, n]; rope is [S, head_dim / 2, 2] or null. Members that a function does not name are not read.
struct RmsArgs {
  const void *grad, *x;
  const float* weight;
  const float* rope;
  float *squares, *rstd, *dots;  // [B, S]
  void* out;                     // y or dx
  float* dweight;                // [chunks, n] partial sums
  float eps;
  int64_t tokens, tokens_in_all, n, head_dim, chunk;  // S, B S, and the rows of a chunk
};

// Elements; T is fp32 or bf16 throughout.
struct GeluArgs {
  const void *grad, *x;  // grad: backward alone
  void* out;             // y or dx
};

struct AdamArgs {
  float *param, *exp_avg_sq;
  Source grad;
  void* copy;  // bf16, or null
  float decay, beta2, one_minus_beta2, lr, inverse_correction, eps, grad_scale;
};

// Every range is [begin, end) in the unit that the arguments' comment names.
struct Kernels {
  const char* capability;
  void (*random_words)(uint64_t seed, int64_t offset, int64_t count, int64_t* out);
  void (*normal)(uint64_t seed, int64_t offset, int64_t count, float* out);
  void (*linear)(const LinearArgs&, int64_t begin, int64_t end);
  void (*loss)(const LossArgs&, int64_t begin, int64_t end);
  void (*gradient_scale)(const GradientArgs&, int64_t begin, int64_t end);
  void (*gradient)(const GradientArgs&, int64_t begin, int64_t end);
  // Two entries each: [0] for fp32 rows, [1] for bf16 rows.
  void (*layer_norm[2])(const LayerNormArgs&, int64_t begin, int64_t end);
  void (*layer_norm_backward[2])(const LayerNormBackwardArgs&, int64_t begin, int64_t end);
  void (*gated[2])(const GatedArgs&, int64_t begin, int64_t end);
  void (*gated_backward[2])(const GatedBackwardArgs&, int64_t begin, int64_t end);
  void (*sum_of_squares[2])(const RmsArgs&, int64_t begin, int64_t end);
  void (*rms_rope[2])(const RmsArgs&, int64_t begin, int64_t end);
  void (*rms_norm_rope[2])(const RmsArgs&, int64_t begin, int64_t end);
  void (*rms_rope_backward_dots[2])(const RmsArgs&, int64_t begin, int64_t end);
  void (*rms_rope_backward_dx[2])(const RmsArgs&, int64_t begin, int64_t end);
  void (*rms_norm_rope_backward[2])(const RmsArgs&, int64_t begin, int64_t end);
  void (*gelu[2])(const GeluArgs&, int64_t begin, int64_t end);
  void (*gelu_backward[2])(const GeluArgs&, int64_t begin, int64_t end);
  void (*sum_rows)(const float* rows, int64_t count, int64_t d, float* out, int64_t begin, int64_t end);
  void (*adamw)(const AdamArgs&, int64_t begin, int64_t end);
};

// Null where the compiler does not target the instruction set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The widest variant that this processor runs, or the one that force_capability chose.
const Kernels& kernels();

}  // namespace pdmd
