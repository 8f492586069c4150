#include "kernels/cuda/kernel_module.h"

#include <cstring>
#include <utility>

namespace baton::cuda {

Result<KernelModule> KernelModule::load(std::shared_ptr<const Gpu> gpu, const void* image, const char* what) {
  CurrentDevice current(*gpu);
  KernelModule module;
  BATON_RETURN_IF_ERROR(gpu->driver().check(gpu->driver().module_load(&module.module_, image),
                                            fmt::format("loading the {} kernels on {}", what, gpu->name())));
  module.gpu_ = std::move(gpu);
  return module;
}

KernelModule::~KernelModule() {
  if (gpu_ == nullptr) return;
  CurrentDevice current(*gpu_);
  (void)gpu_->driver().module_unload(module_);
}

Result<CUfunction> KernelModule::find(const std::string& name) const {
  CurrentDevice current(*gpu_);
  CUfunction function = nullptr;
  BATON_RETURN_IF_ERROR(gpu_->driver().check(gpu_->driver().module_function(&function, module_, name.c_str()),
                                             fmt::format("cuModuleGetFunction of {}", name)));
  return function;
}

Result<ComputeCapability> compute_capability(const Gpu& gpu) {
  const Driver& cu = gpu.driver();
  if (!cu.can_compute) {
    return unimplemented("the CUDA driver (version {}) lacks what computing needs; a newer one has it", cu.version);
  }
  CUdevice device = 0;
  ComputeCapability out;
  BATON_RETURN_IF_ERROR(cu.check(cu.device_get(&device, gpu.ordinal()), "cuDeviceGet"));
  BATON_RETURN_IF_ERROR(cu.check(cu.device_attribute(&out.major, kAttributeComputeMajor, device), "cuDeviceGetAttribute"));
  BATON_RETURN_IF_ERROR(cu.check(cu.device_attribute(&out.minor, kAttributeComputeMinor, device), "cuDeviceGetAttribute"));
  if (out.major < 8) return unimplemented("{} is sm_{}{}; computing needs sm_80 or newer", gpu.name(), out.major, out.minor);
  return out;
}

Status launch_kernel(const Gpu& gpu, CUfunction function, const char* what, const LaunchShape& shape, CUstream stream,
                     void** parameters) {
  CUlaunchAttribute attributes[2] = {};
  attributes[0].id = kLaunchProgrammaticSerialization;
  attributes[0].value.number = 1;
  attributes[1].id = kLaunchClusterDimension;
  const unsigned dimensions[3] = {shape.cluster, 1, 1};
  std::memcpy(attributes[1].value.bytes, dimensions, sizeof(dimensions));
  CUlaunchConfig config{shape.blocks, 1, 1, shape.threads, 1, 1, shape.shared_bytes, stream, attributes, shape.cluster > 1 ? 2u : 1u};
  CurrentDevice current(gpu);
  const CUresult result = gpu.driver().launch_ex(&config, function, parameters, nullptr);
  return result == kSuccess ? Status() : gpu.driver().check(result, fmt::format("launching {} on {}", what, gpu.name()));
}

}  // namespace baton::cuda
