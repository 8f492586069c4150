#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

namespace baton::ops {

/// What `baton bench kernels` measures: the operations of a transformer step on one GPU, at the shapes of real models, beside
/// what the GPU's memory and its tensor cores gave in the same run.
struct BenchKernelsOptions {
  std::string device = "cuda:0";
  std::string shape = "llama-8b";  ///< or "qwen3-0.6b"
  std::string only;                ///< operations whose name contains this; empty: all
  int32_t runs = 7;
  bool verify = false;             ///< every case's result is held beside the CPU's; large ones take minutes

  Status validate() const;
};

struct BenchKernelsRow {
  std::string operation, shape;
  double us = 0, min_us = 0, max_us = 0;  ///< of one launch inside a CUDA graph: median, least and most of the runs
  int64_t bytes = 0, flops = 0;
  double bytes_per_s = 0, flops_per_s = 0;
  double error = -1;                      ///< in units of what is allowed; -1: not verified
};

struct BenchKernelsResult {
  BenchKernelsOptions options;
  std::string device;
  double copy_bytes_per_s = 0;     ///< inside the GPU, reading and writing together
  double product_flops_per_s = 0;  ///< 8192 x 8192 x 8192 in bf16; 0: no cuBLASLt
  std::string product_note;        ///< why there is none
  std::vector<BenchKernelsRow> rows;
};

Result<BenchKernelsResult> run_bench_kernels(const BenchKernelsOptions& options);
std::string bench_kernels_table(const BenchKernelsResult& result);
std::string bench_kernels_json(const BenchKernelsResult& result);

}  // namespace baton::ops
