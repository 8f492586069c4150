#pragma once

#include <memory>

#include "base/cuda/gpu.h"
#include "base/cuda/driver.h"

namespace baton::transfer::cuda {

using namespace ::baton::cuda;

/// A GPU with the copy kernel loaded. Safe from any thread.
class Device final : public Gpu {
 public:
  /// unimplemented: this build has no kernels.
  static Result<std::shared_ptr<const Device>> open(std::shared_ptr<const Driver> driver, int ordinal);
  ~Device() override;

  CUfunction copy_kernel() const { return copy_kernel_; }

 private:
  using Gpu::Gpu;
  Status load();

  CUmodule module_ = nullptr;
  CUfunction copy_kernel_ = nullptr;
};

}  // namespace baton::transfer::cuda
