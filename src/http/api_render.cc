#include "http/api_render.h"

#include <fmt/format.h>

#include "http/json_text.h"

namespace baton::http {

namespace {

void append_ids(std::string& out, std::span<const int32_t> ids) {
  out += '[';
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += ',';
    fmt::format_to(std::back_inserter(out), "{}", ids[i]);
  }
  out += ']';
}

void append_bytes(std::string& out, std::string_view bytes) {
  out += '[';
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (i > 0) out += ',';
    fmt::format_to(std::back_inserter(out), "{}", static_cast<uint8_t>(bytes[i]));
  }
  out += ']';
}

void append_chat_logprobs(std::string& out, std::span<const RenderedToken> tokens) {
  auto entry = [&](std::string_view text, std::string_view bytes, float logprob) {
    out += "{\"token\":";
    append_json_string(out, text);
    out += ",\"logprob\":";
    append_json_number(out, logprob);
    out += ",\"bytes\":";
    append_bytes(out, bytes);
  };
  out += "{\"content\":[";
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) out += ',';
    entry(tokens[i].text, tokens[i].bytes, tokens[i].logprob);
    out += ",\"top_logprobs\":[";
    for (size_t j = 0; j < tokens[i].top.size(); ++j) {
      if (j > 0) out += ',';
      const auto& top = tokens[i].top[j];
      entry(top.text, top.bytes, top.logprob);
      out += '}';
    }
    out += "]}";
  }
  out += "]}";
}

void append_completion_logprobs(std::string& out, std::span<const RenderedToken> tokens) {
  auto list = [&](std::string_view name, auto&& each) {
    fmt::format_to(std::back_inserter(out), "\"{}\":[", name);
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (i > 0) out += ',';
      each(tokens[i]);
    }
    out += ']';
  };
  out += '{';
  list("text_offset", [&](const RenderedToken& token) {
    fmt::format_to(std::back_inserter(out), "{}", token.text_offset);
  });
  out += ',';
  list("token_logprobs", [&](const RenderedToken& token) { append_json_number(out, token.logprob); });
  out += ',';
  list("tokens", [&](const RenderedToken& token) { append_json_string(out, token.text); });
  out += ',';
  list("top_logprobs", [&](const RenderedToken& token) {
    out += '{';
    for (size_t j = 0; j < token.top.size(); ++j) {
      if (j > 0) out += ',';
      append_json_string(out, token.top[j].text);
      out += ':';
      append_json_number(out, token.top[j].logprob);
    }
    out += '}';
  });
  out += '}';
}

void append_head(std::string& out, const ResponseHead& head, bool stream) {
  std::string_view object = !head.chat ? "text_completion" : stream ? "chat.completion.chunk" : "chat.completion";
  out += "{\"id\":";
  append_json_string(out, head.id);
  fmt::format_to(std::back_inserter(out), ",\"object\":\"{}\",\"created\":{},\"model\":", object, head.created_s);
  append_json_string(out, head.model);
  out += ",\"choices\":[";
}

void append_choice(std::string& out, const ResponseHead& head, const Choice& choice, bool stream, bool first) {
  fmt::format_to(std::back_inserter(out), "{{\"index\":{},", choice.index);
  if (head.chat) {
    out += stream ? "\"delta\":{" : "\"message\":{";
    if (first || !stream) out += "\"role\":\"assistant\",";
    out += "\"content\":";
    append_json_string(out, choice.text);
    out += stream ? "}" : ",\"refusal\":null}";
  } else {
    out += "\"text\":";
    append_json_string(out, choice.text);
  }
  out += ",\"logprobs\":";
  if (!choice.has_logprobs) {
    out += "null";
  } else if (head.chat) {
    append_chat_logprobs(out, choice.tokens);
  } else {
    append_completion_logprobs(out, choice.tokens);
  }
  out += ",\"finish_reason\":";
  if (choice.finish_reason.empty()) {
    out += "null";
  } else {
    append_json_string(out, choice.finish_reason);
  }
  out += ",\"stop_reason\":";
  out += choice.stop_reason_json.empty() ? "null" : choice.stop_reason_json;
  if (choice.has_token_ids) {
    out += ",\"token_ids\":";
    append_ids(out, choice.token_ids);
  }
  if (choice.prompt_token_ids != nullptr) {
    out += ",\"prompt_token_ids\":";
    append_ids(out, *choice.prompt_token_ids);
  }
  out += '}';
}

void append_usage(std::string& out, const Usage& usage) {
  fmt::format_to(std::back_inserter(out),
                 "{{\"prompt_tokens\":{},\"completion_tokens\":{},\"total_tokens\":{},"
                 "\"prompt_tokens_details\":{{\"cached_tokens\":{}}}}}",
                 usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens + usage.completion_tokens,
                 usage.cached_tokens);
}

}  // namespace

std::string render_stream_event(const ResponseHead& head, const Choice& choice, bool first, bool null_usage) {
  std::string out = "data: ";
  append_head(out, head, true);
  append_choice(out, head, choice, true, first);
  out += null_usage ? "],\"usage\":null}\n\n" : "]}\n\n";
  return out;
}

std::string render_stream_usage(const ResponseHead& head, const Usage& usage) {
  std::string out = "data: ";
  append_head(out, head, true);
  out += "],\"usage\":";
  append_usage(out, usage);
  out += "}\n\n";
  return out;
}

std::string render_stream_error(const ApiError& error) { return "data: " + render_error(error) + "\n\n"; }

std::string render_response(const ResponseHead& head, std::span<const Choice> choices, const Usage& usage) {
  std::string out;
  append_head(out, head, false);
  for (size_t i = 0; i < choices.size(); ++i) {
    if (i > 0) out += ',';
    append_choice(out, head, choices[i], false, true);
  }
  out += "],\"usage\":";
  append_usage(out, usage);
  out += '}';
  return out;
}

std::string render_error(const ApiError& error) {
  std::string out = "{\"error\":{\"message\":";
  append_json_string(out, error.message);
  out += ",\"type\":";
  append_json_string(out, error.type);
  out += ",\"param\":";
  out += error.param.empty() ? "null" : json_string(error.param);
  out += ",\"code\":";
  out += error.code.empty() ? "null" : json_string(error.code);
  out += "}}";
  return out;
}

}  // namespace baton::http
