#include "engine/request.h"

#include <cmath>

#include "engine/sampler.h"

namespace baton {
namespace {

constexpr size_t kMaxListEntries = 4096;  // stop_token_ids, logit_bias: bounded input

Status check_range(const char* name, float value, float low, float high) {
  if (std::isfinite(value) && value >= low && value <= high) return {};
  return invalid_argument("{} is {}; it must be from {} to {}", name, value, low, high);
}

Status check_token(const char* name, TokenId token, int32_t vocab_size) {
  if (token >= 0 && token < vocab_size) return {};
  return invalid_argument("{} contains token id {}; the vocabulary has ids 0 to {}", name, token, vocab_size - 1);
}

Status check_entries(const char* name, size_t count) {
  if (count <= kMaxListEntries) return {};
  return invalid_argument("{} has {} entries; at most {} are allowed", name, count, kMaxListEntries);
}

}  // namespace

Status SamplingParams::validate(int32_t vocab_size) const {
  constexpr float kHuge = 1e6f;
  BATON_RETURN_IF_ERROR(check_range("temperature", temperature, 0.0f, kHuge));
  BATON_RETURN_IF_ERROR(check_range("top_p", top_p, 0.0f, 1.0f));
  if (top_p == 0.0f) return invalid_argument("top_p is 0; it must be above 0 and at most 1");
  BATON_RETURN_IF_ERROR(check_range("min_p", min_p, 0.0f, 1.0f));
  if (top_k < 0) return invalid_argument("top_k is {}; it must be 0 (all tokens) or positive", top_k);
  BATON_RETURN_IF_ERROR(check_range("presence_penalty", presence_penalty, -2.0f, 2.0f));
  BATON_RETURN_IF_ERROR(check_range("frequency_penalty", frequency_penalty, -2.0f, 2.0f));
  BATON_RETURN_IF_ERROR(check_range("repetition_penalty", repetition_penalty, 0.0f, kHuge));
  if (repetition_penalty < 1e-6f) {
    return invalid_argument("repetition_penalty is {}; it must be positive (1 changes nothing)", repetition_penalty);
  }
  if (max_tokens < 1) return invalid_argument("max_tokens is {}; it must be at least 1", max_tokens);
  if (min_tokens < 0 || min_tokens > max_tokens) {
    return invalid_argument("min_tokens is {}; it must be from 0 to max_tokens ({})", min_tokens, max_tokens);
  }
  if (logprobs < -1 || logprobs > Sampler::kMaxLogprobs) {
    return invalid_argument("logprobs is {}; it must be from 0 to {}, or -1 for none", logprobs, Sampler::kMaxLogprobs);
  }
  BATON_RETURN_IF_ERROR(check_entries("stop_token_ids", stop_token_ids.size()));
  for (TokenId token : stop_token_ids) BATON_RETURN_IF_ERROR(check_token("stop_token_ids", token, vocab_size));
  BATON_RETURN_IF_ERROR(check_entries("logit_bias", logit_bias.size()));
  for (const auto& [token, bias] : logit_bias) {
    BATON_RETURN_IF_ERROR(check_token("logit_bias", token, vocab_size));
    if (!std::isfinite(bias)) return invalid_argument("logit_bias of token {} is not a finite number", token);
  }
  return {};
}

}  // namespace baton
