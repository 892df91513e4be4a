// The choice of a variant, and the ops by which tests look at it and change it.
#include <torch/library.h>

#include <atomic>
#include <string>

#include "tensors.h"

namespace pdmd {
namespace {

bool runs_here(const Kernels* variant) {
#if PDMD_X86
  const std::string capability = variant->capability;
  if (capability == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (capability == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return variant == portable_kernels();
}

std::vector<const Kernels*> variants() {
  std::vector<const Kernels*> found;
#if PDMD_X86
  found = {avx512_kernels(), avx2_kernels()};
#endif
  found.push_back(portable_kernels());
  std::erase_if(found, [](const Kernels* variant) { return !runs_here(variant); });
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> variant{variants().front()};
  return variant;
}

std::string cpu_capability() { return kernels().capability; }

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const Kernels* variant : variants()) names.emplace_back(variant->capability);
  return names;
}

void force_cpu_capability(c10::string_view name) {
  for (const Kernels* variant : variants()) {
    if (name == variant->capability) return chosen().store(variant);
  }
  TORCH_CHECK_VALUE(false, "name is ", name, "; this processor runs ", cpu_capabilities());
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace pdmd

TORCH_LIBRARY_FRAGMENT(pdmd, m) {
  m.def("cpu_capability() -> str", &pdmd::cpu_capability);
  m.def("cpu_capabilities() -> str[]", &pdmd::cpu_capabilities);
  m.def("force_cpu_capability(str name) -> ()", &pdmd::force_cpu_capability);
}
