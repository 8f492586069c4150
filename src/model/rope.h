#pragma once

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "kernels/kernels.h"
#include "model/model_config.h"
#include "tensor/buffer.h"
#include "tensor/thread_pool.h"

namespace baton {

/// What RoPE (Su et al. 2021) with its scaling comes down to: the angle of pair i at position p is
/// p * inverse_frequencies[i], and cos and sin are multiplied by attention_factor.
struct RopeFrequencies {
  std::vector<double> inverse_frequencies;  // [head_dim / 2]
  double attention_factor = 1.0;
};

/// linear: Chen et al. 2023 (arXiv 2306.15595). llama3: the Llama 3.1 release, as in transformers'
/// modeling_rope_utils. yarn: Peng et al. 2023 (arXiv 2309.00071), sections 3.2 to 3.4.
RopeFrequencies rope_frequencies(const RopeConfig& config, int32_t head_dim);

/// The cos and sin tables. Rows are computed when a batch first reaches them: a context of 131,072
/// positions would take 64 MiB that short requests never touch. One thread (the engine's) uses it.
class RopeTables {
 public:
  static Result<RopeTables> create(const RopeConfig& config, int32_t head_dim, int64_t max_positions);

  /// Makes rows [0, positions) valid. positions <= max_positions.
  void ensure(int64_t positions, ThreadPool& threads);
  RopeTable view() const;
  int64_t max_positions() const { return max_positions_; }

 private:
  RopeTables() = default;

  std::vector<float> inverse_frequencies_;
  float attention_factor_ = 1.0f;
  int64_t max_positions_ = 0;
  int64_t filled_ = 0;
  Buffer cos_;  // [max_positions, head_dim / 2] float32
  Buffer sin_;
};

}  // namespace baton
