#pragma once

#include <memory>
#include <string>

#include "model/model.h"

namespace baton {

struct CudaOptions {
  int32_t ordinal = 0;              ///< of the devices that CUDA_VISIBLE_DEVICES leaves
  /// Share of the GPU's memory that may be in use when the KV pool is taken, everything counted.
  double memory_utilization = 0.9;
  /// Every row of every result has the same bits whatever else is in the batch and however a prompt was cut, as on the CPU. Costs
  /// speed, most of all at long contexts with few sequences.
  bool batch_invariant = false;
  int32_t threads = 0;              ///< that convert weights; as for ThreadPool
  std::string driver_library = {};  ///< empty: libcuda.so.1
  std::string blas_library = {};    ///< empty: libcublasLt.so.13 or .12
};

/// A model on one GPU. The keys and values of a head lie in rows (BlockLayout::order), so pairs with workers on a CPU are
/// refused. unavailable: no driver, no such device, no cuBLASLt (the message says which); unimplemented: a build without CUDA
/// kernels, or a shape that they do not have.
Result<std::unique_ptr<Model>> load_cuda_model(const ModelOptions& options, const CudaOptions& cuda);

}  // namespace baton
