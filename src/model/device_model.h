#pragma once

#include <memory>
#include <string>

#include "model/model.h"

namespace baton {

/// Where a model is computed, and how.
struct DeviceOptions {
  /// "cpu", "cuda:N" (N counts what CUDA_VISIBLE_DEVICES leaves), "cuda" (the first), or "auto": a GPU if one can be used,
  /// else the CPU, and the log says why.
  std::string device = "auto";
  std::string isa = "auto";            ///< of the CPU: "auto", "avx512bf16", "avx2", "plain"
  int32_t threads = 0;                 ///< as for ThreadPool
  double gpu_memory_utilization = 0.9; ///< share of the GPU's memory that this process may take
  bool batch_invariant = false;        ///< on a GPU: CudaOptions has what it means; the CPU always is

  Status validate() const;
};

/// A model together with what it computes with.
struct DeviceModel {
  std::unique_ptr<Kernels> kernels;    ///< null on a GPU
  std::unique_ptr<Model> model;        ///< never outlives `kernels`
  std::string name;                    ///< "cpu/avx512bf16", "cuda/sm_90 (NVIDIA H200)"
};

/// Errors name file and tensor, or what the device lacks.
Result<DeviceModel> load_on_device(const ModelOptions& options, const DeviceOptions& device);

}  // namespace baton
