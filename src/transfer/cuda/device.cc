#include "transfer/cuda/device.h"

#include <utility>

#include "base/cuda/embed.h"
#include "transfer/cuda/copy_arguments.h"

namespace baton::transfer::cuda {
namespace {

#ifdef BATON_CUDA_FATBIN
BATON_EMBED(baton_transfer_cuda_fatbin, BATON_CUDA_FATBIN);
const void* kernel_image() { return baton_transfer_cuda_fatbin; }
bool has_kernels() { return true; }
#else
const void* kernel_image() {
  alignas(64) static const char kNone[64] = "built without nvcc";
  return kNone;
}
bool has_kernels() { return false; }
#endif

}  // namespace

Result<std::shared_ptr<const Device>> Device::open(std::shared_ptr<const Driver> driver, int ordinal) {
  std::shared_ptr<Device> device(new Device(std::move(driver), ordinal));
  BATON_RETURN_IF_ERROR(device->init());
  BATON_RETURN_IF_ERROR(device->load());
  return std::shared_ptr<const Device>(std::move(device));
}

Status Device::load() {
  const Driver& cu = driver();
  CurrentDevice current(*this);
  Status loaded = cu.check(cu.module_load(&module_, kernel_image()), fmt::format("loading the copy kernel on {}", name()));
  if (!loaded.ok() && !has_kernels()) {
    return unimplemented("this build has no CUDA kernels (nvcc was not found when it was built), so it cannot move GPU "
                         "memory");
  }
  BATON_RETURN_IF_ERROR(loaded);
  return cu.check(cu.module_function(&copy_kernel_, module_, kCopyKernelName), "cuModuleGetFunction");
}

Device::~Device() {
  if (module_ == nullptr) return;
  CurrentDevice current(*this);
  (void)driver().module_unload(module_);
}

}  // namespace baton::transfer::cuda
