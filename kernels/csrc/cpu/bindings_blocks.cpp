// The transformer block's ops and the optimizer's for tensors on the CPU.
#include <torch/library.h>

#include "tensors.h"

namespace pdmd {
namespace {

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;

// Rows whose gradients of a shared row are added one after the other; few, so that fp32 sums stay accurate.
constexpr int64_t kChunk = 32;

void check_rows(const Tensor& x, const char* argument) {
  check_values(x, x, argument);
  check(x.dim() == 3, argument, "must be [B, S, d]");
}

void check_like(const Tensor& tensor, const Tensor& x, const char* argument) {
  check_values(tensor, x, argument);
  check_dtype(tensor, x.scalar_type(), argument);
}

Modulation modulation(const Tensor& m, const Tensor& x, const char* argument) {
  check(m.device().is_cpu(), argument, "must be on the CPU, like the other tensors");
  check_dtype(m, at::kFloat, argument);
  const bool fits = m.dim() == 3 && m.size(0) == x.size(0) && m.size(2) == x.size(2) &&
                    (m.size(1) == 1 || m.size(1) == x.size(1));
  TORCH_CHECK_VALUE(fits, argument, " is ", m.sizes(), "; it must be [B, 1 or S, d] for ", x.sizes());
  check(m.size(2) < 2 || m.stride(2) == 1, argument, "must be contiguous in its last dim; call .contiguous()");
  return {m.const_data_ptr<float>(), m.stride(0), m.size(1) == 1 ? 0 : m.stride(1)};
}

// Where the gradients of `count` modulations go: rows, one row, or partial sums of rows that finish() adds up.
struct ModulationGradient {
  ModulationGradient(const Tensor& m, const Tensor& x)
      : summed(m.size(1) == 1), chunks((x.size(1) + kChunk - 1) / kChunk), batch(x.size(0)), d(x.size(2)) {
    result = empty_fp32({batch, m.size(1), d});
    if (x.size(1) == 0 && summed) result.zero_();
    partial = summed && chunks > 1 ? empty_fp32({batch * chunks, d}) : result;
  }

  float* data() const { return partial.data_ptr<float>(); }

  void finish() const {
    if (!summed || chunks <= 1) return;
    const float* rows = partial.const_data_ptr<float>();
    float* out = result.data_ptr<float>();
    for (int64_t sample = 0; sample < batch; ++sample) {
      parallel(d, chunks, [&](int64_t begin, int64_t end) {
        kernels().sum_rows(rows + sample * chunks * d, chunks, d, out + sample * d, begin, end);
      });
    }
  }

  bool summed;
  int64_t chunks, batch, d;
  Tensor result, partial;
};

std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm(
    const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  check_rows(x, "x");
  const Modulation shifts = modulation(shift, x, "shift"), scales = modulation(scale, x, "scale");
  const int64_t d = x.size(2);
  Tensor y = allocate(x.sizes(), x.scalar_type());
  Tensor mean = empty_fp32(x.sizes().slice(0, 2)), rstd = empty_fp32(x.sizes().slice(0, 2));
  const LayerNormArgs args = {x.const_data_ptr(), shifts, scales, static_cast<float>(eps), y.data_ptr(),
                              mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), x.size(1), d, kChunk};
  const auto kernel = kernels().layer_norm[is_bf16(x)];
  const int64_t chunks = x.size(0) * ((x.size(1) + kChunk - 1) / kChunk);
  parallel(chunks, kChunk * d, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& mean, const Tensor& rstd,
    std::array<bool, 2> mask) {
  check_rows(x, "x");
  check_like(grad, x, "grad");
  check_fp32(mean, x.sizes().slice(0, 2), "mean");
  check_fp32(rstd, x.sizes().slice(0, 2), "rstd");
  const Modulation scales = modulation(scale, x, "scale");
  Tensor dx = mask[0] ? allocate(x.sizes(), x.scalar_type()) : allocate({0}, x.scalar_type());
  LayerNormBackwardArgs args = {grad.const_data_ptr(), x.const_data_ptr(), scales, mean.const_data_ptr<float>(),
                                rstd.const_data_ptr<float>(), mask[0] ? dx.data_ptr() : nullptr, nullptr, nullptr,
                                scale.size(1) == 1, x.size(1), x.size(2), kChunk};
  const auto kernel = kernels().layer_norm_backward[is_bf16(x)];
  const int64_t chunks = x.size(0) * ((x.size(1) + kChunk - 1) / kChunk);
  const auto run = [&](int64_t begin, int64_t end) { kernel(args, begin, end); };
  if (!mask[1]) {
    parallel(chunks, kChunk * args.d, run);
    return {dx, empty_fp32({0}), empty_fp32({0})};
  }
  ModulationGradient dshift(scale, x), dscale(scale, x);
  args.dshift = dshift.data();
  args.dscale = dscale.data();
  parallel(chunks, kChunk * args.d, run);
  dshift.finish();
  dscale.finish();
  return {dx, dshift.result, dscale.result};
}

Tensor gated_residual(const Tensor& x, const Tensor& h, const Tensor& gate) {
  check_rows(x, "x");
  check_like(h, x, "h");
  const Modulation gates = modulation(gate, x, "gate");
  Tensor y = allocate(x.sizes(), x.scalar_type());
  const GatedArgs args = {x.const_data_ptr(), h.const_data_ptr(), gates, y.data_ptr(), x.size(1), x.size(2)};
  const auto kernel = kernels().gated[is_bf16(x)];
  parallel(x.size(0) * x.size(1), args.d, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> gated_residual_backward(
    const Tensor& grad, const Tensor& h, const Tensor& gate, std::array<bool, 2> mask) {
  check_rows(h, "h");
  check_like(grad, h, "grad");
  const Modulation gates = modulation(gate, h, "gate");
  Tensor dh = mask[0] ? allocate(h.sizes(), h.scalar_type()) : allocate({0}, h.scalar_type());
  GatedBackwardArgs args = {grad.const_data_ptr(), h.const_data_ptr(), gates, mask[0] ? dh.data_ptr() : nullptr,
                            nullptr, gate.size(1) == 1, h.size(1), h.size(2), kChunk};
  const auto kernel = kernels().gated_backward[is_bf16(h)];
  const int64_t chunks = h.size(0) * ((h.size(1) + kChunk - 1) / kChunk);
  const auto run = [&](int64_t begin, int64_t end) { kernel(args, begin, end); };
  if (!mask[1]) {
    parallel(chunks, kChunk * args.d, run);
    return {dh, empty_fp32({0})};
  }
  ModulationGradient dgate(gate, h);
  args.dgate = dgate.data();
  parallel(chunks, kChunk * args.d, run);
  dgate.finish();
  return {dh, dgate.result};
}

Tensor sum_of_squares(const Tensor& x) {
  check(x.dim() > 0, "x", "has no dimension to sum over");
  check_values(x, x, "x");
  Tensor squares = empty_fp32(x.sizes().slice(0, x.dim() - 1));
  RmsArgs args = {};
  args.x = x.const_data_ptr();
  args.squares = squares.mutable_data_ptr<float>();
  args.n = x.size(-1);
  const auto kernel = kernels().sum_of_squares[is_bf16(x)];
  parallel(squares.numel(), args.n, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return squares;
}

// The arguments that all RMS ops have; `weight` is converted to fp32 and must outlive them.
RmsArgs rms_args(const Tensor& x, const Tensor& weight, OptionalTensor rope, int64_t heads) {
  const int64_t n = x.size(2);
  TORCH_CHECK_VALUE(heads > 0 && n % heads == 0, "heads is ", heads, "; it must divide the last dim, ", n);
  RmsArgs args = {};
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr<float>();
  args.tokens = x.size(1);
  args.tokens_in_all = x.size(0) * x.size(1);
  args.n = n;
  args.head_dim = n;
  args.chunk = kChunk;
  if (rope) {
    args.head_dim = n / heads;
    TORCH_CHECK_VALUE(args.head_dim % 2 == 0, "heads is ", heads, "; a head has ", args.head_dim, " channels, not pairs");
    check_fp32(*rope, {x.size(1), args.head_dim / 2, 2}, "rope");
    args.rope = rope->const_data_ptr<float>();
  }
  return args;
}

Tensor fp32_weight(const Tensor& weight, const Tensor& x) {
  check_rows(x, "x");
  check_tensor(weight, "weight");
  check_real(weight.scalar_type(), "weight");
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == x.size(2), "weight is ", weight.sizes(), "; it must be [", x.size(2), "]");
  return weight.to(at::kFloat);
}

Tensor rms_rope(const Tensor& x, const Tensor& weight, const Tensor& rstd, OptionalTensor rope, int64_t heads) {
  const Tensor wide = fp32_weight(weight, x);
  RmsArgs args = rms_args(x, wide, rope, heads);
  check_fp32(rstd, x.sizes().slice(0, 2), "rstd");
  Tensor y = allocate(x.sizes(), x.scalar_type());
  args.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  args.out = y.data_ptr();
  const auto kernel = kernels().rms_rope[is_bf16(x)];
  parallel(args.tokens_in_all, args.n, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_rope(
    const Tensor& x, const Tensor& weight, OptionalTensor rope, int64_t heads, double eps) {
  const Tensor wide = fp32_weight(weight, x);
  RmsArgs args = rms_args(x, wide, rope, heads);
  Tensor y = allocate(x.sizes(), x.scalar_type()), rstd = empty_fp32(x.sizes().slice(0, 2));
  args.rstd = rstd.mutable_data_ptr<float>();
  args.out = y.data_ptr();
  args.eps = static_cast<float>(eps);
  const auto kernel = kernels().rms_norm_rope[is_bf16(x)];
  parallel(args.tokens_in_all, args.n, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {y, rstd};
}

// Runs a kernel over chunks of rows and returns the sum of their dweight.
template <typename Kernel>
Tensor run_chunks(RmsArgs& args, Kernel kernel) {
  const int64_t chunks = (args.tokens_in_all + kChunk - 1) / kChunk;
  Tensor dweight = empty_fp32({args.n});
  if (chunks == 0) return dweight.zero_();
  const Tensor partial = chunks > 1 ? empty_fp32({chunks, args.n}) : dweight;
  args.dweight = partial.data_ptr<float>();
  parallel(chunks, kChunk * args.n, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (chunks > 1) {
    parallel(args.n, chunks, [&](int64_t begin, int64_t end) {
      kernels().sum_rows(args.dweight, chunks, args.n, dweight.data_ptr<float>(), begin, end);
    });
  }
  return dweight;
}

RmsArgs backward_args(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd, OptionalTensor rope,
                      int64_t heads) {
  RmsArgs args = rms_args(x, weight, rope, heads);
  check_like(grad, x, "grad");
  check_fp32(rstd, x.sizes().slice(0, 2), "rstd");
  args.grad = grad.const_data_ptr();
  args.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  return args;
}

std::tuple<Tensor, Tensor> rms_rope_backward_dots(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd, OptionalTensor rope, int64_t heads) {
  const Tensor wide = fp32_weight(weight, x);
  RmsArgs args = backward_args(grad, x, wide, rstd, rope, heads);
  Tensor dots = empty_fp32(rstd.sizes());
  args.dots = dots.mutable_data_ptr<float>();
  Tensor dweight = run_chunks(args, kernels().rms_rope_backward_dots[is_bf16(x)]);
  return {dots, dweight};
}

Tensor rms_rope_backward_dx(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& mean_dots,
    OptionalTensor rope, int64_t heads) {
  const Tensor wide = fp32_weight(weight, x);
  RmsArgs args = backward_args(grad, x, wide, rstd, rope, heads);
  check_fp32(mean_dots, rstd.sizes(), "mean_dots");
  Tensor dx = allocate(x.sizes(), x.scalar_type());
  args.dots = const_cast<float*>(mean_dots.const_data_ptr<float>());
  args.out = dx.data_ptr();
  const auto kernel = kernels().rms_rope_backward_dx[is_bf16(x)];
  parallel(args.tokens_in_all, args.n, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return dx;
}

std::tuple<Tensor, Tensor> rms_norm_rope_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd, OptionalTensor rope, int64_t heads) {
  const Tensor wide = fp32_weight(weight, x);
  RmsArgs args = backward_args(grad, x, wide, rstd, rope, heads);
  Tensor dx = allocate(x.sizes(), x.scalar_type());
  args.out = dx.data_ptr();
  Tensor dweight = run_chunks(args, kernels().rms_norm_rope_backward[is_bf16(x)]);
  return {dx, dweight};
}

Tensor run_gelu(const Tensor& x, const void* grad, void (*kernel)(const GeluArgs&, int64_t, int64_t)) {
  Tensor out = allocate(x.sizes(), x.scalar_type());
  const GeluArgs args = {grad, x.const_data_ptr(), out.data_ptr()};
  parallel(x.numel(), 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor gelu_tanh(const Tensor& x) {
  check_values(x, x, "x");
  return run_gelu(x, nullptr, kernels().gelu[is_bf16(x)]);
}

Tensor gelu_tanh_backward(const Tensor& grad, const Tensor& x) {
  check_values(x, x, "x");
  check_like(grad, x, "grad");
  return run_gelu(x, grad.const_data_ptr(), kernels().gelu_backward[is_bf16(x)]);
}

}  // namespace
}  // namespace pdmd

TORCH_LIBRARY_IMPL(pdmd, CPU, m) {
  m.impl("gelu_tanh", &pdmd::gelu_tanh);
  m.impl("gelu_tanh_backward", &pdmd::gelu_tanh_backward);
  m.impl("modulated_layer_norm", &pdmd::modulated_layer_norm);
  m.impl("modulated_layer_norm_backward", &pdmd::modulated_layer_norm_backward);
  m.impl("gated_residual", &pdmd::gated_residual);
  m.impl("gated_residual_backward", &pdmd::gated_residual_backward);
  m.impl("sum_of_squares", &pdmd::sum_of_squares);
  m.impl("rms_rope", &pdmd::rms_rope);
  m.impl("rms_norm_rope", &pdmd::rms_norm_rope);
  m.impl("rms_rope_backward_dots", &pdmd::rms_rope_backward_dots);
  m.impl("rms_rope_backward_dx", &pdmd::rms_rope_backward_dx);
  m.impl("rms_norm_rope_backward", &pdmd::rms_norm_rope_backward);
}
