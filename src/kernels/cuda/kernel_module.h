#pragma once

#include <memory>
#include <string>

#include "base/cuda/gpu.h"
#include "base/status.h"

namespace baton::cuda {

/// Code that was loaded into a GPU; unloaded at the end.
class KernelModule {
 public:
  /// `image` is a fatbin. `what` names the kernels in messages.
  static Result<KernelModule> load(std::shared_ptr<const Gpu> gpu, const void* image, const char* what);
  KernelModule() = default;
  KernelModule(KernelModule&& other) noexcept { *this = std::move(other); }
  KernelModule& operator=(KernelModule&& other) noexcept {
    std::swap(gpu_, other.gpu_);
    std::swap(module_, other.module_);
    return *this;
  }
  ~KernelModule();

  Result<CUfunction> find(const std::string& name) const;

 private:
  std::shared_ptr<const Gpu> gpu_;
  CUmodule module_ = nullptr;
};

/// What the kernels are compiled for.
struct ComputeCapability {
  int major = 0, minor = 0;
  bool has_clusters() const { return major >= 9; }
};
/// unimplemented: the driver is too old to compute with, or the GPU older than sm_80.
Result<ComputeCapability> compute_capability(const Gpu& gpu);

struct LaunchShape {
  unsigned blocks = 1;
  unsigned threads = 32;
  unsigned shared_bytes = 0;
  unsigned cluster = 1;  ///< blocks of a cluster; more than 1 where there are clusters only
};

/// Puts a kernel on `stream` that waits itself for what was launched before it (wait_for_previous of device_math.cuh).
Status launch_kernel(const Gpu& gpu, CUfunction function, const char* what, const LaunchShape& shape, CUstream stream,
                     void** parameters);

template <typename... Arguments>
Status launch_kernel(const Gpu& gpu, CUfunction function, const char* what, const LaunchShape& shape, CUstream stream,
                     Arguments... arguments) {
  void* parameters[] = {&arguments...};
  return launch_kernel(gpu, function, what, shape, stream, static_cast<void**>(parameters));
}

}  // namespace baton::cuda
