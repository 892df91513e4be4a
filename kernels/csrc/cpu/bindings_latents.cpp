// random_words, normal, subinterval_noise, subinterval_loss, dmd_gradient and euler_step for tensors on the CPU.
#include <torch/library.h>

#include "tensors.h"

namespace pdmd {
namespace {

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;

int64_t numel_of(const Tensor& x) { return x.size(0) == 0 ? 0 : x.numel() / x.size(0); }

int64_t tiles_of(int64_t numel) { return (numel + kTile - 1) / kTile; }

void check_batched(const Tensor& x, const char* argument) {
  check(x.dim() > 0, argument, "has no batch dimension");
}

Source values(const Tensor& tensor) { return {tensor.const_data_ptr(), kind_of(tensor.scalar_type())}; }

Source optional_values(OptionalTensor tensor, const Tensor& like, const char* argument) {
  if (!tensor) return {nullptr, Kind::kNone};
  check_values(*tensor, like, argument);
  return values(*tensor);
}

void check_seeds(const Tensor& seeds, const char* argument) {
  check_tensor(seeds, argument);
  check_dtype(seeds, at::kLong, argument);
  check(seeds.dim() == 1, argument, "must be [B]");
}

// eps of the shape of x, or seeds [B].
Source noise_source(const Tensor& noise, const Tensor& x) {
  if (noise.scalar_type() != at::kLong) {
    check_values(noise, x, "noise");
    return values(noise);
  }
  check_seeds(noise, "noise");
  check(noise.size(0) == x.size(0), "noise", "has not one seed for each sample");
  return {noise.const_data_ptr(), Kind::kSeed};
}

const float* coefficients(const Tensor& tensor, const Tensor& x, const char* argument) {
  check_fp32(tensor, {x.size(0)}, argument);
  return tensor.const_data_ptr<float>();
}

Sink sink(const Tensor& tensor) { return {tensor.data_ptr(), kind_of(tensor.scalar_type())}; }

void check_range(int64_t numel, int64_t offset) {
  check(numel >= 0, "numel", "must not be negative");
  check(offset >= 0 && offset <= INT64_MAX - numel - 4, "offset", "must not be negative, nor must offset + numel exceed 2^63");
}

template <typename T, typename Fill>
Tensor fill_stream(const Tensor& seeds, int64_t numel, int64_t offset, at::ScalarType dtype, Fill fill) {
  check_seeds(seeds, "seeds");
  check_range(numel, offset);
  Tensor out = allocate({seeds.size(0), numel}, dtype);
  const int64_t* seed = seeds.const_data_ptr<int64_t>();
  T* data = out.mutable_data_ptr<T>();
  const int64_t tiles = tiles_of(numel);
  parallel(seeds.size(0) * tiles, kTile, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / tiles, start = unit % tiles * kTile;
      fill(static_cast<uint64_t>(seed[sample]), offset + start, std::min(kTile, numel - start), data + sample * numel + start);
    }
  });
  return out;
}

Tensor random_words(const Tensor& seeds, int64_t numel, int64_t offset) {
  return fill_stream<int64_t>(seeds, numel, offset, at::kLong, kernels().random_words);
}

Tensor normal(const Tensor& seeds, int64_t numel, int64_t offset) {
  return fill_stream<float>(seeds, numel, offset, at::kFloat, kernels().normal);
}

void run_linear(const LinearArgs& args, int64_t batch) {
  parallel(batch * tiles_of(args.numel), kTile, [&](int64_t begin, int64_t end) { kernels().linear(args, begin, end); });
}

Tensor subinterval_noise(const Tensor& x_s, const Tensor& noise, const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  check_batched(x_s, "x_s");
  check_values(x_s, x_s, "x_s");
  check_real(dtype, "dtype");
  const Source eps = noise_source(noise, x_s);
  const float *a_data = coefficients(a, x_s, "a"), *b_data = coefficients(b, x_s, "b");
  Tensor out = allocate(x_s.sizes(), dtype);
  run_linear({values(x_s), eps, a_data, b_data, sink(out), {nullptr, Kind::kNone}, numel_of(x_s)}, x_s.size(0));
  return out;
}

std::tuple<Tensor, Tensor> euler_step(
    const Tensor& x, const Tensor& flow, const Tensor& a, const Tensor& b, std::optional<at::ScalarType> copy_dtype) {
  check_batched(x, "x");
  check_values(x, x, "x");
  check_dtype(x, at::kFloat, "x");
  check_values(flow, x, "flow");
  check_real(copy_dtype.value_or(at::kFloat), "copy_dtype");
  const float *a_data = coefficients(a, x, "a"), *b_data = coefficients(b, x, "b");
  Tensor out = allocate(x.sizes(), at::kFloat);
  Tensor copy = copy_dtype ? allocate(x.sizes(), *copy_dtype) : empty_fp32({0});
  const Sink copy_sink = copy_dtype ? sink(copy) : Sink{nullptr, Kind::kNone};
  run_linear({values(x), values(flow), a_data, b_data, sink(out), copy_sink, numel_of(x)}, x.size(0));
  return {out, copy};
}

std::tuple<Tensor, Tensor> subinterval_loss(
    const Tensor& output, const Tensor& x_s, const Tensor& noise, const Tensor& c_out, const Tensor& c_eps,
    const Tensor& c_x, const Tensor& weight) {
  check_batched(output, "output");
  check_values(output, output, "output");
  check_values(x_s, output, "x_s");
  const Source eps = noise_source(noise, output);
  const float *out_data = coefficients(c_out, output, "c_out"), *eps_data = coefficients(c_eps, output, "c_eps");
  const float *x_data = coefficients(c_x, output, "c_x"), *weight_data = coefficients(weight, output, "weight");
  const int64_t batch = output.size(0), numel = numel_of(output), tiles = tiles_of(numel);
  Tensor grad = allocate(output.sizes(), output.scalar_type()), loss = empty_fp32({batch});
  std::vector<double> partial(batch * tiles);
  const LossArgs args = {values(output), values(x_s), eps, out_data, eps_data, x_data, weight_data, sink(grad), partial.data(), numel};
  parallel(batch * tiles, kTile, [&](int64_t begin, int64_t end) { kernels().loss(args, begin, end); });
  float* result = loss.mutable_data_ptr<float>();
  for (int64_t i = 0; i < batch; ++i) {
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += partial[i * tiles + tile];
    result[i] = static_cast<float>(weight_data[i] * (sum / static_cast<double>(numel)));
  }
  return {loss, grad};
}

// max(mean |x_s - (c_x x_t - weight guided)|, floor) of each sample; a nan stays one.
std::vector<float> normalisers(const GradientArgs& args, int64_t batch, float floor) {
  const int64_t tiles = tiles_of(args.numel);
  std::vector<float> scales(batch);
  parallel(batch * tiles, kTile, [&](int64_t begin, int64_t end) { kernels().gradient_scale(args, begin, end); });
  for (int64_t i = 0; i < batch; ++i) {
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += args.partial[i * tiles + tile];
    const float mean = static_cast<float>(sum / static_cast<double>(args.numel));
    scales[i] = mean < floor ? floor : mean;
  }
  return scales;
}

std::tuple<Tensor, Tensor> dmd_gradient(
    const Tensor& teacher, OptionalTensor unconditional, double guidance, const Tensor& fake, const Tensor& weight,
    OptionalTensor x_s, OptionalTensor x_t, OptionalTensor c_x, double floor) {
  check_batched(teacher, "teacher");
  check_values(teacher, teacher, "teacher");
  check_values(fake, teacher, "fake");
  check(x_s.has_value() == x_t.has_value() && x_s.has_value() == c_x.has_value(), "x_s,", "x_t and c_x come together");
  const int64_t batch = teacher.size(0), numel = numel_of(teacher), tiles = tiles_of(numel);
  Tensor gradient = empty_fp32(teacher.sizes()), counts = allocate({batch}, at::kLong);
  std::vector<double> partial(batch * tiles);
  std::vector<int64_t> nonfinite(batch * tiles);
  GradientArgs args = {};
  args.teacher = values(teacher);
  args.unconditional = optional_values(unconditional, teacher, "unconditional");
  args.fake = values(fake);
  args.x_s = optional_values(x_s, teacher, "x_s");
  args.x_t = optional_values(x_t, teacher, "x_t");
  args.guidance = static_cast<float>(guidance);
  args.weight = coefficients(weight, teacher, "weight");
  args.c_x = c_x ? coefficients(*c_x, teacher, "c_x") : nullptr;
  args.gradient = gradient.mutable_data_ptr<float>();
  args.partial = partial.data();
  args.nonfinite = nonfinite.data();
  args.numel = numel;
  std::vector<float> scales;
  if (x_s) {
    scales = normalisers(args, batch, static_cast<float>(floor));
    args.divisor = scales.data();
  }
  parallel(batch * tiles, kTile, [&](int64_t begin, int64_t end) { kernels().gradient(args, begin, end); });
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch; ++i) {
    count[i] = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) count[i] += nonfinite[i * tiles + tile];
  }
  return {gradient, counts};
}

}  // namespace
}  // namespace pdmd

TORCH_LIBRARY_IMPL(pdmd, CPU, m) {
  m.impl("random_words", &pdmd::random_words);
  m.impl("normal", &pdmd::normal);
  m.impl("subinterval_noise", &pdmd::subinterval_noise);
  m.impl("subinterval_loss", &pdmd::subinterval_loss);
  m.impl("dmd_gradient", &pdmd::dmd_gradient);
  m.impl("euler_step", &pdmd::euler_step);
}
