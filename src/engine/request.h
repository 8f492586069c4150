#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "kv/block_pool.h"

namespace baton {

/// Unique among the requests an engine holds; chosen by the caller.
enum class RequestId : uint64_t {};

/// How the next token is chosen. Meaning and defaults as in vLLM's SamplingParams.
struct SamplingParams {
  float temperature = 1.0f;          ///< 0: greedy
  float top_p = 1.0f;
  int32_t top_k = 0;                 ///< 0: all
  float min_p = 0.0f;
  uint64_t seed = 0;                 ///< always set: the router draws one when the client gave none
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;
  std::vector<std::pair<TokenId, float>> logit_bias = {};
  int32_t max_tokens = 16;           ///< output tokens, counted from the start of the request (replays included)
  int32_t min_tokens = 0;
  std::vector<TokenId> stop_token_ids = {};
  bool ignore_eos = false;
  int32_t logprobs = -1;             ///< -1: none; n: the chosen token's and the n most likely

  Status validate(int32_t vocab_size) const;
};

struct Request {
  RequestId id{};
  std::vector<TokenId> prompt = {};
  /// Tokens already generated elsewhere (replay after a decode worker's death): treated as output, not
  /// reported again; sampling goes on at index generated.size().
  std::vector<TokenId> generated = {};
  SamplingParams sampling = {};
  /// Stop after prefill: report the first token, keep the KV until release(). Never preempted.
  bool prefill_only = false;
  Deadline deadline = {};              ///< of waiting and running; kDeadlineExceeded when it passes
};

struct TokenLogprob {
  TokenId token = 0;
  float logprob = 0;
};

enum class FinishReason : uint8_t {
  kNone = 0,
  kStop = 1,        ///< EOS or a stop token (which is the output's last token)
  kLength = 2,      ///< max_tokens or the model's length
  kPrefillDone = 3, ///< prefill_only: the KV waits to be released
  kError = 4,       ///< see status
  kCancelled = 5,
};

/// One new token of one request, or its end.
struct TokenOutput {
  RequestId request{};
  std::optional<TokenId> token;
  int32_t index = 0;                          ///< of the token among the request's outputs
  float logprob = 0;                          ///< natural log, after temperature 1 softmax of raw logits
  std::vector<TokenLogprob> top_logprobs = {}; ///< sampling.logprobs entries, most likely first
  FinishReason finish = FinishReason::kNone;
  Status status = {};                         ///< set with kError
  int32_t cached_prompt_tokens = 0;           ///< prompt tokens taken from the prefix cache (first output only)
};

/// What one engine step produced, for all requests in it.
struct StepOutput {
  std::vector<TokenOutput> tokens;
  int64_t step_ns = 0;  ///< what the step that these come from took, from the end of the one before if it was under way; 0: none
  /// Not ok: the device is lost. Nothing was computed and nothing will be; its requests are as they were before the step.
  Status device = {};
};

}  // namespace baton
