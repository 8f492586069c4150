#pragma once

#include <span>
#include <unordered_map>
#include <vector>

#include "engine/sampler.h"
#include "kernels/cuda/sample_arguments.h"

namespace baton {

/// Requests' sampling parameters as a GPU's sampler (kernels/cuda/cuda_sampler.h) takes them: what depends on a request's history is
/// worked out here, into one change per token. Keeps its memory from batch to batch. One thread.
class SampleBatch {
 public:
  /// `eos_token_ids` outside the vocabulary are ignored, as Sampler does.
  SampleBatch(int32_t vocab_size, std::vector<TokenId> eos_token_ids);

  void clear();
  /// The next row. Logprobs are not the GPU's business: requests that want some are sampled on the CPU.
  void add(const SampleContext& context);

  std::span<const cuda::SampleRow> rows() const { return rows_; }
  std::span<const cuda::SampleEdit> edits() const { return edits_; }

 private:
  cuda::SampleEdit& edit_of(TokenId token);

  int32_t vocab_size_;
  std::vector<TokenId> eos_token_ids_;
  std::vector<cuda::SampleRow> rows_;
  std::vector<cuda::SampleEdit> edits_;
  std::unordered_map<TokenId, size_t> index_;  // of the row that is being added
};

}  // namespace baton
