#include "engine/sample_batch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"

namespace baton {

SampleBatch::SampleBatch(int32_t vocab_size, std::vector<TokenId> eos_token_ids)
    : vocab_size_(vocab_size), eos_token_ids_(std::move(eos_token_ids)) {
  std::erase_if(eos_token_ids_, [&](TokenId id) { return id < 0 || id >= vocab_size; });
}

void SampleBatch::clear() {
  rows_.clear();
  edits_.clear();
}

cuda::SampleEdit& SampleBatch::edit_of(TokenId token) {
  const auto [at, added] = index_.try_emplace(token, edits_.size());
  if (added) edits_.push_back({.token = token, .bias = 0, .repetition = 1, .frequency = 0, .presence = 0});
  return edits_[at->second];
}

void SampleBatch::add(const SampleContext& context) {
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  const SamplingParams& params = *context.params;
  index_.clear();
  cuda::SampleRow row = {};
  row.edit_begin = static_cast<int32_t>(edits_.size());
  if (context.output_index < params.min_tokens) {
    for (TokenId token : eos_token_ids_) edit_of(token).bias = kMinusInfinity;
    for (TokenId token : params.stop_token_ids) edit_of(token).bias = kMinusInfinity;
  }
  for (const auto& [token, bias] : params.logit_bias) edit_of(token).bias += std::clamp(bias, -100.0f, 100.0f);
  if (params.repetition_penalty != 1.0f || params.frequency_penalty != 0.0f || params.presence_penalty != 0.0f) {
    BATON_CHECK(context.counts != nullptr) << "penalties need the token counts";
    context.counts->update(context.tokens, context.prompt_tokens);
    for (const auto& [token, output_count] : context.counts->entries()) {
      cuda::SampleEdit& edit = edit_of(token);
      edit.repetition = params.repetition_penalty;
      edit.frequency = params.frequency_penalty * static_cast<float>(output_count);
      edit.presence = output_count > 0 ? params.presence_penalty : 0.0f;
    }
  }
  row.edit_count = static_cast<int32_t>(edits_.size()) - row.edit_begin;
  row.greedy = is_greedy(params) ? 1 : 0;
  if (row.greedy == 0) {
    row.uniform = sampling_uniform(params.seed, context.output_index);
    row.scale = 1.0f / params.temperature;
    row.min_p_offset = params.min_p > 0 ? params.temperature * std::log(params.min_p) : kMinusInfinity;
    row.top_p = params.top_p;
    row.top_k = params.top_k;
  }
  rows_.push_back(row);
}

}  // namespace baton
