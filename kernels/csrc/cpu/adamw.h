// AdamW with beta_1 = 0, whose first moment is the gradient itself, in one pass over a tensor's elements:
//
//   g = grad grad_scale;  p = (1 - lr weight_decay) p;  v = beta2 v + (1 - beta2) g^2
//   p = p - lr g / (sqrt(v) / sqrt(1 - beta2^step) + eps);  copy = bf16(p)
#pragma once

#include "kernels.h"
#include "modulation.h"

namespace pdmd::PDMD_CAPABILITY {

template <typename T>
PDMD_INLINE void adamw_elements(const AdamArgs& args, const T* grad, int64_t begin, int64_t end) {
  bf16* copy = static_cast<bf16*>(args.copy);
  over_vectors(end - begin, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    const int64_t i = begin + j;
    const vf g = take(grad, i, n) * args.grad_scale;
    const vf v = args.beta2 * take(args.exp_avg_sq, i, n) + args.one_minus_beta2 * g * g;
    const vf denominator = square_root(v) * args.inverse_correction + args.eps;
    const vf p = take(args.param, i, n) * args.decay - args.lr * g / denominator;
    give(args.exp_avg_sq, i, v, n);
    give(args.param, i, p, n);
    if (copy != nullptr) give(copy, i, p, n);
  });
}

static void adamw(const AdamArgs& args, int64_t begin, int64_t end) {
  if (args.grad.kind == Kind::kFloat) {
    adamw_elements(args, static_cast<const float*>(args.grad.data), begin, end);
  } else {
    adamw_elements(args, static_cast<const bf16*>(args.grad.data), begin, end);
  }
}

}  // namespace pdmd::PDMD_CAPABILITY
