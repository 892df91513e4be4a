// AdamW with beta_1 = 0 over many tensors at once. Contract with the build: binding.cpp registers `adamw_beta1_zero` for
// CUDA in TORCH_LIBRARY_IMPL(pdmd, CUDA, m); where these two sources are not built, Triton's kernel of the op stays.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "adamw_element.h"

namespace pdmd {

struct AdamwTensor {
  float* param;
  const void* grad;  // fp32 or bf16
  float* exp_avg_sq;
  uint16_t* copy;    // bf16, or null
  int64_t numel;
};

// Tensors a launch can take: their table is a kernel argument, of which there are 4 KB.
constexpr int kTensorsPerLaunch = 64;

// Updates `count` tensors (at most kTensorsPerLaunch) of one gradient dtype, all with a copy or all without.
// grad_scale: fp32 on the device, or null. Returns the launch's error.
cudaError_t launch_adamw_beta1_zero(const AdamwTensor* tensors, int count, bool bf16_grads,
                                    const AdamwConstants& constants, const float* grad_scale, cudaStream_t stream);

}  // namespace pdmd
