// AdamW with beta_1 = 0, formula in adamw_element.h, over many tensors in one launch.
//
// A block takes one chunk of one tensor. The table of tensors travels in the kernel's arguments (constant memory), so a
// step needs no copy to the device. All accesses are 128 bits wide where a tensor's pointers allow it.

#include "adamw_beta1_zero.h"

namespace pdmd {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements a thread moves at a time: 128 bits of bf16, twice 128 bits of fp32
constexpr int kChunk = kThreads * kVector * 4;

struct Table {
  AdamwTensor tensors[kTensorsPerLaunch];
  uint32_t first_chunk[kTensorsPerLaunch + 1];  // of each tensor; the last entry is their number
  uint64_t aligned;                             // bit i: tensor i's pointers are multiples of 16 bytes
  int count;
};
static_assert(sizeof(Table) + sizeof(AdamwConstants) + sizeof(void*) <= 4096, "kernel arguments");

struct alignas(16) Floats {
  float value[4];
};

struct alignas(16) Halves {
  uint16_t value[8];
};

__device__ __forceinline__ void load(const float* from, float (&to)[kVector]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Floats four = reinterpret_cast<const Floats*>(from)[half];
#pragma unroll
    for (int i = 0; i < 4; ++i) to[4 * half + i] = four.value[i];
  }
}

__device__ __forceinline__ void load(const uint16_t* from, float (&to)[kVector]) {
  const Halves eight = *reinterpret_cast<const Halves*>(from);
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = widened(eight.value[i]);
}

__device__ __forceinline__ void store(float* to, const float (&from)[kVector]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Floats four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.value[i] = from[4 * half + i];
    reinterpret_cast<Floats*>(to)[half] = four;
  }
}

__device__ __forceinline__ void store(uint16_t* to, const float (&from)[kVector]) {
  Halves eight;
#pragma unroll
  for (int i = 0; i < kVector; ++i) eight.value[i] = bf16_of(from[i]);
  *reinterpret_cast<Halves*>(to) = eight;
}

// The tensor that a chunk belongs to: the last whose first chunk is not beyond it.
__device__ __forceinline__ int tensor_of(const Table& table, uint32_t chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Pointers that come out of an indexed table could point anywhere, as far as the compiler knows.
__device__ __forceinline__ AdamwTensor in_global_memory(const AdamwTensor& tensor) {
  __builtin_assume(__isGlobal(tensor.param));
  __builtin_assume(__isGlobal(tensor.grad));
  __builtin_assume(__isGlobal(tensor.exp_avg_sq));
  __builtin_assume(tensor.copy == nullptr || __isGlobal(tensor.copy));
  return tensor;
}

template <typename Grad, bool kCopy>
__global__ void __launch_bounds__(kThreads)
    adamw_beta1_zero_kernel(const __grid_constant__ Table table, const AdamwConstants constants,
                            const float* __restrict__ grad_scale) {
  const int index = tensor_of(table, blockIdx.x);
  const AdamwTensor tensor = in_global_memory(table.tensors[index]);
  const Grad* grad = static_cast<const Grad*>(tensor.grad);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_chunk[index]) * kChunk;
  const int64_t end = begin + kChunk < tensor.numel ? begin + kChunk : tensor.numel;
  const float scale = grad_scale == nullptr ? 1.0f : *grad_scale;
  const bool aligned = (table.aligned >> index) & 1;
  const int64_t vectors_end = aligned ? begin + (end - begin) / kVector * kVector : begin;

  for (int64_t i = begin + threadIdx.x * kVector; i < vectors_end; i += kThreads * kVector) {
    float p[kVector], g[kVector], v[kVector];
    load(tensor.param + i, p);
    load(grad + i, g);
    load(tensor.exp_avg_sq + i, v);
#pragma unroll
    for (int j = 0; j < kVector; ++j) adamw_element(p[j], multiply(g[j], scale), v[j], constants);
    store(tensor.param + i, p);
    store(tensor.exp_avg_sq + i, v);
    if (kCopy) store(tensor.copy + i, p);
  }
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += kThreads) {
    float p = tensor.param[i], v = tensor.exp_avg_sq[i];
    adamw_element(p, multiply(widened(grad[i]), scale), v, constants);
    tensor.param[i] = p;
    tensor.exp_avg_sq[i] = v;
    if (kCopy) tensor.copy[i] = bf16_of(p);
  }
}

template <typename Grad>
void launch(const Table& table, uint32_t chunks, const AdamwConstants& constants, const float* grad_scale, bool copy,
            cudaStream_t stream) {
  if (copy) {
    adamw_beta1_zero_kernel<Grad, true><<<chunks, kThreads, 0, stream>>>(table, constants, grad_scale);
  } else {
    adamw_beta1_zero_kernel<Grad, false><<<chunks, kThreads, 0, stream>>>(table, constants, grad_scale);
  }
}

}  // namespace

cudaError_t launch_adamw_beta1_zero(const AdamwTensor* tensors, int count, bool bf16_grads,
                                    const AdamwConstants& constants, const float* grad_scale, cudaStream_t stream) {
  Table table = {};
  uint32_t chunks = 0;
  for (int i = 0; i < count; ++i) {
    const AdamwTensor& tensor = tensors[i];
    if (tensor.numel == 0) continue;
    const uintptr_t pointers = reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(tensor.grad) |
                               reinterpret_cast<uintptr_t>(tensor.exp_avg_sq) | reinterpret_cast<uintptr_t>(tensor.copy);
    if (pointers % 16 == 0) table.aligned |= uint64_t{1} << table.count;
    table.tensors[table.count] = tensor;
    table.first_chunk[table.count++] = chunks;
    chunks += static_cast<uint32_t>((tensor.numel + kChunk - 1) / kChunk);
  }
  if (chunks == 0) return cudaSuccess;
  table.first_chunk[table.count] = chunks;
  const bool copy = table.tensors[0].copy != nullptr;
  if (bf16_grads) {
    launch<uint16_t>(table, chunks, constants, grad_scale, copy, stream);
  } else {
    launch<float>(table, chunks, constants, grad_scale, copy, stream);
  }
  return cudaGetLastError();
}

}  // namespace pdmd
