// Registers the CUDA kernel of pdmd::adamw_beta1_zero; it runs on torch's current stream.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "adamw_beta1_zero.h"

namespace pdmd {
namespace {

void check(const at::Tensor& tensor, const at::Tensor& param, const char* name, bool may_be_fp32, bool may_be_bf16) {
  TORCH_CHECK_VALUE(tensor.device() == param.device(), name, " must be on ", param.device(), ", like params");
  TORCH_CHECK_VALUE(tensor.sizes() == param.sizes(), name, " must have the shapes of params");
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
  const bool known = (may_be_fp32 && tensor.scalar_type() == at::kFloat) ||
                     (may_be_bf16 && tensor.scalar_type() == at::kBFloat16);
  TORCH_CHECK_VALUE(known, name, " cannot be ", tensor.scalar_type());
}

void adamw_beta1_zero(at::TensorList params, at::TensorList grads, at::TensorList exp_avg_sqs, at::TensorList copies,
                      double lr, double beta2, double eps, double weight_decay, int64_t step,
                      const std::optional<at::Tensor>& grad_scale) {
  TORCH_CHECK_VALUE(grads.size() == params.size(), "grads must be as many as params");
  TORCH_CHECK_VALUE(exp_avg_sqs.size() == params.size(), "exp_avg_sqs must be as many as params");
  TORCH_CHECK_VALUE(copies.empty() || copies.size() == params.size(), "copies must be none or as many as params");
  if (params.empty()) return;
  const float* scale = nullptr;
  if (grad_scale.has_value()) {
    TORCH_CHECK_VALUE(grad_scale->scalar_type() == at::kFloat && grad_scale->numel() == 1 &&
                          grad_scale->device() == params[0].device(),
                      "grad_scale must be one fp32 number on ", params[0].device());
    scale = grad_scale->const_data_ptr<float>();
  }
  const c10::cuda::CUDAGuard guard(params[0].device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const AdamwConstants constants = adamw_constants(lr, beta2, eps, weight_decay, step);

  std::vector<AdamwTensor> batch;
  bool bf16_grads = false;
  const auto flush = [&] {
    const int count = static_cast<int>(batch.size());
    C10_CUDA_CHECK(launch_adamw_beta1_zero(batch.data(), count, bf16_grads, constants, scale, stream));
    batch.clear();
  };
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK_VALUE(params[i].device() == params[0].device(), "params must be on one device");
    check(params[i], params[i], "params", true, false);
    check(grads[i], params[i], "grads", true, true);
    check(exp_avg_sqs[i], params[i], "exp_avg_sqs", true, false);
    if (!copies.empty()) check(copies[i], params[i], "copies", false, true);
    const bool bf16 = grads[i].scalar_type() == at::kBFloat16;
    if (batch.size() == kTensorsPerLaunch || (!batch.empty() && bf16 != bf16_grads)) flush();
    bf16_grads = bf16;
    batch.push_back({params[i].mutable_data_ptr<float>(), grads[i].const_data_ptr(),
                     exp_avg_sqs[i].mutable_data_ptr<float>(),
                     copies.empty() ? nullptr : static_cast<uint16_t*>(copies[i].mutable_data_ptr()),
                     params[i].numel()});
  }
  flush();
}

}  // namespace

TORCH_LIBRARY_IMPL(pdmd, CUDA, m) { m.impl("adamw_beta1_zero", &adamw_beta1_zero); }

}  // namespace pdmd
