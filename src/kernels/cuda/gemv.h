#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "base/cuda/gpu.h"
#include "kernels/cuda/cuda_linear.h"
#include "kernels/cuda/gemv_arguments.h"

namespace baton::cuda {

/// Products of up to kGemvMaxRows rows by our own kernels (gemv.cu). One thread at a time.
class Gemv {
 public:
  /// unimplemented: built without nvcc, or a GPU older than sm_80.
  static Result<std::unique_ptr<Gemv>> create(std::shared_ptr<const Gpu> gpu);
  ~Gemv();

  /// rows, out, in and the pointers of `args` are set; the rest is found here.
  Status launch(CUstream stream, GemvArguments args) const;
  /// Whether x, to be normalised, finds room in shared memory.
  bool normed_fits(int64_t rows, int64_t in) const;

 private:
  struct Variant {
    int max_rows = 0;
    int tiles = 0;
    int shared_base_bytes = 0;
    CUfunction function = nullptr;
  };
  explicit Gemv(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}
  Status load();
  const Variant& choose(const GemvArguments& args) const;

  const std::shared_ptr<const Gpu> gpu_;
  CUmodule module_ = nullptr;
  int max_shared_bytes_ = 0;
  std::array<Variant, 12> variants_;
};

}  // namespace baton::cuda
