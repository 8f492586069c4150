#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/status.h"
#include "model/device_model.h"

namespace baton::ops {

/// What `baton bench engine` measures: the engine alone, in this process, no HTTP and no handoff.
struct BenchEngineOptions {
  std::filesystem::path model_path;   ///< a config.json is enough with load_format "dummy"
  std::string load_format = "dummy";
  std::vector<int32_t> prefill_tokens = {512, 2048};
  std::vector<int32_t> decode_contexts = {16, 2048};
  std::vector<int32_t> decode_batches = {1};
  int32_t decode_tokens = 32;
  int32_t runs = 5;
  DeviceOptions device;
  int32_t block_tokens = 16;
  int32_t max_batched_tokens = 0;  ///< 0: what suits the device

  Status validate() const;
};

struct BenchEngineRow {
  std::string what;                ///< "prefill" or "decode"
  int32_t tokens = 0;              ///< prompt length or context
  int32_t batch = 1;
  double tokens_per_s = 0;         ///< median over the runs
  double min_tokens_per_s = 0, max_tokens_per_s = 0;
  double limit_tokens_per_s = 0;   ///< from the limit measured next to it; 0: none
  double share = 0;                ///< median of the ratios to the limit, run by run
  double bare_share = 0;           ///< the same, to loads of the same bytes where they lie; 0: not measured
};

struct BenchEngineResult {
  BenchEngineOptions options;
  std::string model, kernels;
  int threads = 0;
  int64_t weight_bytes = 0;
  double load_s = 0;
  double read_bytes_per_s = 0;     ///< median: all threads streaming through as many bytes as the weights
  std::vector<BenchEngineRow> rows;
};

Result<BenchEngineResult> run_bench_engine(const BenchEngineOptions& options);
std::string bench_engine_table(const BenchEngineResult& result);
std::string bench_engine_json(const BenchEngineResult& result);

}  // namespace baton::ops
