#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "base/cuda/gpu.h"
#include "kernels/cuda/gemv_arguments.h"
#include "kernels/cuda/stream_workspaces.h"

namespace baton::cuda {

/// Products of up to kGemvMaxRows rows by our own kernels (gemv.cu). One thread at a time.
class Gemv {
 public:
  /// Inputs that a row may have when it is to be normalised.
  static constexpr int64_t kMaxNormedInputs = 16384;

  /// unimplemented: built without nvcc, or a GPU older than sm_80.
  static Result<std::unique_ptr<Gemv>> create(std::shared_ptr<const Gpu> gpu);
  ~Gemv();

  Status reserve(CUstream stream) { return normed_.find(stream).status(); }

  /// All of `args` but x_shared_stride, which is found here.
  Status launch(CUstream stream, GemvArguments args);

 private:
  struct Variant {
    int max_rows = 0;
    int tiles = 0;
    int ring_bytes = 0;
    int shared_bytes = 0;  ///< without x
    CUfunction function = nullptr;
  };
  explicit Gemv(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)), normed_(gpu_, kGemvMaxRows * kMaxNormedInputs * 2) {}
  Status load();
  const Variant* choose(const GemvArguments& args) const;
  Status normalise(CUstream stream, GemvArguments& args);
  Status launch_kernel(CUstream stream, CUfunction function, int blocks, int shared_bytes, void* args) const;

  const std::shared_ptr<const Gpu> gpu_;
  StreamWorkspaces normed_;
  CUmodule module_ = nullptr;
  CUfunction norm_rows_ = nullptr;
  int max_shared_bytes_ = 0;
  std::array<Variant, 15> variants_;
};

}  // namespace baton::cuda
