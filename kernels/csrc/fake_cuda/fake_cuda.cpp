// Just enough of "cuda" for autograd to run over fake CUDA tensors where there is no CUDA device.
//
// A dry run loads this library before torch is imported: torch asks for its CUDA hooks once, at the start, and keeps the
// answer. The guard replaces torch's, so it is installed after. No real run loads it.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

struct FakeCUDAHooks final : CUDAHooksInterface {
  explicit FakeCUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
  long versionCuDNNFrontend() const override { return 0; }
};

C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, FakeCUDAHooks)

// One device and one stream, which nothing ever runs on.
struct FakeCUDAGuard final : c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  Device exchangeDevice(Device device) const override { return device; }
  Device getDevice() const override { return {kCUDA, 0}; }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
};

}  // namespace at

extern "C" __attribute__((visibility("default"))) void install_fake_cuda_guard() {
  c10::impl::DeviceGuardImplRegistrar(at::kCUDA, new at::FakeCUDAGuard);
}
