// What the bindings share: checks that become Python's ValueError, views of tensors, and the split over threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace pdmd {

// A thread is worth starting for this many elements.
constexpr int64_t kGrain = 32768;

inline void check(bool right, const char* argument, const char* what) {
  TORCH_CHECK_VALUE(right, argument, " ", what);
}

inline void check_tensor(const at::Tensor& tensor, const char* argument) {
  check(tensor.device().is_cpu(), argument, "must be on the CPU, like the other tensors");
  check(tensor.is_contiguous(), argument, "must be contiguous; call .contiguous()");
}

inline void check_dtype(const at::Tensor& tensor, at::ScalarType dtype, const char* argument) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, argument, " is ", tensor.scalar_type(), "; it must be ", dtype);
}

inline bool is_bf16(const at::Tensor& tensor) { return tensor.scalar_type() == at::kBFloat16; }

inline void check_real(at::ScalarType dtype, const char* argument) {
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16, argument, " is ", dtype,
                    "; the native kernels take float32 and bfloat16, the reference backend takes more");
}

// fp32 or bf16, contiguous, on the CPU and of the shape of `like`.
inline void check_values(const at::Tensor& tensor, const at::Tensor& like, const char* argument) {
  check_tensor(tensor, argument);
  check_real(tensor.scalar_type(), argument);
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes(), argument, " is ", tensor.sizes(), "; it must be ", like.sizes());
}

inline void check_fp32(const at::Tensor& tensor, at::IntArrayRef sizes, const char* argument) {
  check_tensor(tensor, argument);
  check_dtype(tensor, at::kFloat, argument);
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, argument, " is ", tensor.sizes(), "; it must be ", sizes);
}

// An uninitialised tensor. A large one is fresh memory each time, and asks for huge pages: faults on small ones would
// cost more than the kernel that fills it.
inline at::Tensor allocate(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor tensor = at::empty(sizes, dtype);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  if (tensor.nbytes() >= 4 * kHugePage) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    const uintptr_t first = (start + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t last = (start + tensor.nbytes()) & ~(kHugePage - 1);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: failure changes nothing
  }
#endif
  return tensor;
}

inline at::Tensor empty_fp32(at::IntArrayRef sizes) { return allocate(sizes, at::kFloat); }

inline Kind kind_of(at::ScalarType dtype) { return dtype == at::kBFloat16 ? Kind::kBFloat16 : Kind::kFloat; }

template <typename Body>
void parallel(int64_t units, int64_t elements_per_unit, const Body& body) {
  if (units == 0) return;
  const int64_t grain = elements_per_unit < kGrain ? kGrain / (elements_per_unit > 0 ? elements_per_unit : 1) : 1;
  if (units <= grain) {
    body(0, units);
  } else {
    at::parallel_for(0, units, grain, body);
  }
}

}  // namespace pdmd
