#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/cuda/gpu.h"
#include "model/weights_loader.h"

namespace baton {

/// Float32 values in a GPU's memory; null when there are none.
struct CudaVector {
  const float* data = nullptr;
  int64_t size = 0;
};

/// [out_features, in_features] bf16, row-major, in a GPU's memory.
struct CudaMatrix {
  const bf16* data = nullptr;
  int64_t out_features = 0;
  int64_t in_features = 0;
};

using CudaLayer = DecoderLayerWeights<CudaVector, CudaMatrix>;
using CudaWeights = DecoderWeights<CudaVector, CudaMatrix, CudaMatrix>;

/// Puts weights into a GPU's memory and keeps them there: what it returns points into it. Pieces are converted by all threads into
/// one page-locked buffer while another one is under way to the GPU. One thread.
class CudaWeightStore {
 public:
  using Vector = CudaVector;
  using Matrix = CudaMatrix;
  using Table = CudaMatrix;

  /// `threads` is used while loading only.
  static Result<std::unique_ptr<CudaWeightStore>> create(std::shared_ptr<const cuda::Gpu> gpu, ThreadPool& threads);
  ~CudaWeightStore();
  CudaWeightStore(const CudaWeightStore&) = delete;
  CudaWeightStore& operator=(const CudaWeightStore&) = delete;

  Result<Vector> vector(std::span<const float> values);
  Result<Matrix> matrix(std::span<const Kernels::MatrixPart> parts, int64_t in_features);
  Result<Table> table(const WeightView& view, int64_t rows, int64_t width);
  int64_t held_bytes() const { return held_bytes_; }

  /// Waits until everything is there and frees the page-locked buffers.
  Status finish();

 private:
  struct Staging {
    cuda::PinnedMemory memory;
    cuda::CUevent sent = nullptr;
  };

  CudaWeightStore(std::shared_ptr<const cuda::Gpu> gpu, ThreadPool& threads) : gpu_(std::move(gpu)), threads_(threads) {}
  Status init();
  Result<cuda::CUdeviceptr> allocate(int64_t bytes);
  /// Sends `bytes` to `to`, in pieces that `fill(begin, end, out)` writes: bytes [begin, end) of it to out.
  Status send(cuda::CUdeviceptr to, int64_t bytes, const std::function<void(int64_t, int64_t, std::byte*)>& fill);

  const std::shared_ptr<const cuda::Gpu> gpu_;
  ThreadPool& threads_;
  std::vector<cuda::DeviceMemory> memory_;
  cuda::CUstream stream_ = nullptr;
  Staging staging_[2];
  size_t turn_ = 0;
  // Small tensors share a piece of memory: the GPU hands out no less than 2 MiB at a time.
  cuda::CUdeviceptr small_ = 0;
  int64_t small_left_ = 0;
  int64_t held_bytes_ = 0;
};

}  // namespace baton
