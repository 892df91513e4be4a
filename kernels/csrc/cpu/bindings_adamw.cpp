// adamw_beta1_zero for lists of tensors on the CPU.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "tensors.h"

namespace pdmd {
namespace {

using at::Tensor;

// The unit that threads share out; a long tensor has many, a short one has one.
constexpr int64_t kBlock = 16384;

struct Block {
  size_t tensor;
  int64_t begin, end;
};

void check_list(at::TensorList list, at::TensorList params, const char* argument) {
  TORCH_CHECK_VALUE(list.size() == params.size(), argument, " has ", list.size(), " tensors for ", params.size(), " params");
  for (size_t i = 0; i < list.size(); ++i) check_values(list[i], params[i], argument);
}

float scale_of(const std::optional<Tensor>& grad_scale) {
  if (!grad_scale) return 1.0f;
  check_tensor(*grad_scale, "grad_scale");
  check_dtype(*grad_scale, at::kFloat, "grad_scale");
  check(grad_scale->numel() == 1, "grad_scale", "must be one number");
  return *grad_scale->const_data_ptr<float>();
}

void adamw_beta1_zero(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avg_sqs, at::TensorList copies, double lr,
    double beta2, double eps, double weight_decay, int64_t step, const std::optional<Tensor>& grad_scale) {
  check(step > 0, "step", "must be positive: the number of this update, counted from 1");
  check_list(params, params, "params");
  check_list(grads, params, "grads");
  check_list(exp_avg_sqs, params, "exp_avg_sqs");
  if (!copies.empty()) check_list(copies, params, "copies");
  const double correction = std::sqrt(1 - std::pow(beta2, static_cast<double>(step)));
  const float scale = scale_of(grad_scale);
  std::vector<AdamArgs> args;
  std::vector<Block> blocks;
  for (size_t i = 0; i < params.size(); ++i) {
    check_dtype(params[i], at::kFloat, "params");
    check_dtype(exp_avg_sqs[i], at::kFloat, "exp_avg_sqs");
    if (!copies.empty()) check_dtype(copies[i], at::kBFloat16, "copies");
    args.push_back({params[i].data_ptr<float>(), exp_avg_sqs[i].data_ptr<float>(),
                    {grads[i].const_data_ptr(), kind_of(grads[i].scalar_type())},
                    copies.empty() ? nullptr : copies[i].data_ptr(), static_cast<float>(1 - lr * weight_decay),
                    static_cast<float>(beta2), static_cast<float>(1 - beta2), static_cast<float>(lr),
                    static_cast<float>(1 / correction), static_cast<float>(eps), scale});
    for (int64_t begin = 0; begin < params[i].numel(); begin += kBlock) {
      blocks.push_back({i, begin, std::min(begin + kBlock, params[i].numel())});
    }
  }
  parallel(static_cast<int64_t>(blocks.size()), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().adamw(args[blocks[i].tensor], blocks[i].begin, blocks[i].end);
  });
}

}  // namespace
}  // namespace pdmd

TORCH_LIBRARY_IMPL(pdmd, CPU, m) { m.impl("adamw_beta1_zero", &pdmd::adamw_beta1_zero); }
