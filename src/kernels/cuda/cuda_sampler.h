#pragma once

#include <cstdint>
#include <memory>

#include "base/cuda/gpu.h"
#include "base/status.h"
#include "kernels/cuda/sample_arguments.h"

namespace baton::cuda {

/// Chooses tokens from logits on a GPU as the engine's Sampler does on the CPU: the same token wherever a draw or a cut does not fall
/// closer to an edge than rounding reaches (about 1e-9 of the mass), always the same one for the same logits and parameters, and the
/// same in any batch.
class CudaSampler {
 public:
  /// unimplemented: built without nvcc, or a GPU older than sm_80; unavailable: the driver refuses.
  static Result<std::unique_ptr<CudaSampler>> create(std::shared_ptr<const Gpu> gpu);
  virtual ~CudaSampler() = default;

  /// tokens[m] = the choice for logits[m, :], or kSampleNotFinite or kSampleNoToken. `how` [rows] and what it names of `edits` (may be
  /// null when no row has any) are in device memory, so one CUDA graph serves whatever they hold; `logits` [rows, vocab] float32 are
  /// left edited. Asynchronous on `stream`; allocates nothing, may be captured. One thread at a time.
  virtual Status sample(CUstream stream, float* logits, int64_t rows, int64_t vocab, const SampleRow* how,
                        const SampleEdit* edits, int32_t* tokens) = 0;
};

}  // namespace baton::cuda
