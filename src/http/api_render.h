#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "http/api_request.h"

/// OpenAI's response objects as JSON text. Written by hand rather than through a DOM: a stream has one of these per
/// token.
namespace baton::http {

/// One output token with what a client may want to know of it.
struct RenderedToken {
  int32_t id = 0;
  std::string text;                 ///< "token_id:17" where asked for or without a tokenizer
  std::string bytes;
  float logprob = 0;
  struct Alternative {
    std::string text, bytes;
    float logprob = 0;
  };
  std::vector<Alternative> top;
  int64_t text_offset = 0;          ///< completions: where it starts in the text
};

struct Usage {
  int64_t prompt_tokens = 0, completion_tokens = 0, cached_tokens = 0;
};

/// What is new of one choice (a stream's delta), or all of it.
struct Choice {
  int32_t index = 0;
  std::string_view text;
  std::string_view finish_reason;   ///< empty: null
  std::string_view stop_reason_json;  ///< empty: null (a string or a token id, as vLLM)
  bool has_logprobs = false;
  std::span<const RenderedToken> tokens;
  bool has_token_ids = false;
  std::span<const int32_t> token_ids;
  const std::vector<int32_t>* prompt_token_ids = nullptr;
};

struct ResponseHead {
  bool chat = false;
  std::string id;
  int64_t created_s = 0;
  std::string model;
};

/// An event of a stream: "data: {...}\n\n". `first`: chat's role comes with it. `null_usage`: the client asked for usage,
/// which comes last.
std::string render_stream_event(const ResponseHead& head, const Choice& choice, bool first, bool null_usage);
std::string render_stream_usage(const ResponseHead& head, const Usage& usage);
std::string render_stream_error(const ApiError& error);
inline constexpr std::string_view kStreamEnd = "data: [DONE]\n\n";

std::string render_response(const ResponseHead& head, std::span<const Choice> choices, const Usage& usage);
std::string render_error(const ApiError& error);

}  // namespace baton::http
