#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/status.h"
#include "protocol/baton.pb.h"

/// What clients ask for, parsed from OpenAI's JSON and checked field by field.
namespace baton::http {

/// An OpenAI error object and its HTTP status.
struct ApiError {
  int http_status = 400;
  std::string message;
  std::string type = "invalid_request_error";
  std::string param;  ///< empty: null
  std::string code;   ///< empty: null
};

/// How a failed request looks to the client (429 and 503 tell it to come back).
ApiError to_api_error(const Status& status);

/// Text to be tokenized, or token ids as they are.
using Prompt = std::variant<std::string, std::vector<int32_t>>;

/// Defaults that a model's generation_config.json brings.
struct SamplingDefaults {
  std::optional<float> temperature, top_p, min_p, repetition_penalty;
  std::optional<int32_t> top_k;
};

struct ApiLimits {
  int32_t max_prompts = 256;
  int32_t max_n = 128;
  int32_t max_stop_strings = 32;
  size_t max_stop_bytes = 4096;
  int32_t max_logprobs = 20;
  int32_t max_logit_bias = 1024;
  int32_t max_stop_token_ids = 1024;
};

/// /v1/completions and /v1/chat/completions in one form.
struct CompletionRequest {
  bool chat = false;
  std::string model;
  std::vector<Prompt> prompts;       ///< completions
  std::string messages_json;         ///< chat: the array as it came
  std::string tools_json;            ///< chat: the array or empty
  std::string template_kwargs_json;  ///< chat: the object or empty
  bool add_generation_prompt = true;

  protocol::Sampling sampling;       ///< seed is 0 where none was given
  bool has_seed = false;
  bool has_max_tokens = false;
  int32_t n = 1;
  bool stream = false;
  bool include_usage = false;
  bool echo = false;
  std::vector<std::string> stop;
  bool include_stop_string = false;
  bool skip_special_tokens = true;
  bool add_special_tokens = true;
  bool return_token_ids = false;
  bool tokens_as_ids = false;        ///< logprobs name tokens "token_id:17"
};

std::variant<CompletionRequest, ApiError> parse_completion_request(std::string_view body, bool chat,
                                                                   const SamplingDefaults& defaults,
                                                                   const ApiLimits& limits);

struct TokenizeRequest {
  std::string model;
  bool has_messages = false;
  std::string prompt;
  std::string messages_json, tools_json, template_kwargs_json;
  bool add_generation_prompt = true;
  std::optional<bool> add_special_tokens;
  bool return_token_strings = false;
};
std::variant<TokenizeRequest, ApiError> parse_tokenize_request(std::string_view body);

struct DetokenizeRequest {
  std::string model;
  std::vector<int32_t> tokens;
};
std::variant<DetokenizeRequest, ApiError> parse_detokenize_request(std::string_view body);

}  // namespace baton::http
