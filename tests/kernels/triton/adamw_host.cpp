// The CUDA kernel's arithmetic on the host, for the tests.

#include "adamw_element.h"

extern "C" void adamw_host(int64_t numel, float* param, const float* grad, float* exp_avg_sq, uint16_t* copy, double lr,
                           double beta2, double eps, double weight_decay, int64_t step) {
  const pdmd::AdamwConstants constants = pdmd::adamw_constants(lr, beta2, eps, weight_decay, step);
  for (int64_t i = 0; i < numel; ++i) {
    pdmd::adamw_element(param[i], grad[i], exp_avg_sq[i], constants);
    copy[i] = pdmd::bf16_of(param[i]);
  }
}

extern "C" void widen_host(int64_t numel, const uint16_t* from, float* to) {
  for (int64_t i = 0; i < numel; ++i) to[i] = pdmd::widened(from[i]);
}

extern "C" void narrow_host(int64_t numel, const float* from, uint16_t* to) {
  for (int64_t i = 0; i < numel; ++i) to[i] = pdmd::bf16_of(from[i]);
}
