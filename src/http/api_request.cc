#include "http/api_request.h"

#include <simdjson.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace baton::http {

using simdjson::dom::array;
using simdjson::dom::element;
using simdjson::dom::element_type;
using simdjson::dom::object;

ApiError to_api_error(const Status& status) {
  ApiError error;
  error.message = status.message();
  switch (status.code()) {
    case StatusCode::kInvalidArgument:
      break;
    case StatusCode::kNotFound:
      error.http_status = 404;
      break;
    case StatusCode::kResourceExhausted:
      error.http_status = 429;
      error.type = "rate_limit_error";
      error.code = "overloaded";
      break;
    case StatusCode::kUnavailable:
    case StatusCode::kAborted:
    case StatusCode::kCancelled:
      error.http_status = 503;
      error.type = "service_unavailable_error";
      break;
    case StatusCode::kDeadlineExceeded:
      error.http_status = 504;
      error.type = "timeout_error";
      break;
    case StatusCode::kUnimplemented:
      error.http_status = 501;
      break;
    default:
      error.http_status = 500;
      error.type = "internal_error";
  }
  return error;
}

namespace {

std::string_view type_name(element_type type) {
  switch (type) {
    case element_type::ARRAY: return "an array";
    case element_type::OBJECT: return "an object";
    case element_type::INT64:
    case element_type::UINT64: return "an integer";
    case element_type::DOUBLE: return "a number";
    case element_type::STRING: return "a string";
    case element_type::BOOL: return "a boolean";
    case element_type::NULL_VALUE: return "null";
  }
  return "something else";
}

/// Reads fields of one JSON object; keeps the first error. An absent field and null leave the target alone.
class Fields {
 public:
  explicit Fields(object fields) : fields_(fields) {}

  bool ok() const { return !error_.has_value(); }
  ApiError error() const { return *error_; }

  std::optional<element> find(const char* name) {
    element value;
    if (fields_.at_key(name).get(value) != simdjson::SUCCESS || value.is_null()) return std::nullopt;
    return value;
  }

  void fail(std::string param, std::string message, int http_status = 400) {
    if (error_) return;
    error_ = ApiError{};
    error_->http_status = http_status;
    error_->message = std::move(message);
    error_->param = std::move(param);
  }

  void boolean(const char* name, bool* out) {
    auto value = find(name);
    if (!value) return;
    if (value->get(*out) != simdjson::SUCCESS) wrong_type(name, "a boolean", *value);
  }

  void string(const char* name, std::string* out) {
    auto value = find(name);
    if (!value) return;
    std::string_view text;
    if (value->get(text) != simdjson::SUCCESS) return wrong_type(name, "a string", *value);
    out->assign(text);
  }

  template <typename T>
  bool number(const char* name, double min, double max, T* out) {
    auto value = find(name);
    if (!value) return false;
    double number = 0;
    if (value->get(number) != simdjson::SUCCESS || std::isnan(number)) {
      wrong_type(name, "a number", *value);
      return false;
    }
    return in_range(name, number, min, max, out);
  }

  template <typename T>
  bool integer(const char* name, int64_t min, int64_t max, T* out) {
    auto value = find(name);
    if (!value) return false;
    int64_t number = 0;
    double real = 0;
    if (value->get(number) == simdjson::SUCCESS) return in_range(name, number, min, max, out);
    if (value->is_uint64()) {  // is_uint64 is true of what int64 cannot hold
      fail(name, fmt::format("'{}' is {}; it must be between {} and {}", name, value->get_uint64().value_unsafe(), min, max));
    } else if (value->is_double() && value->get(real) == simdjson::SUCCESS && std::nearbyint(real) == real &&
               std::abs(real) <= 9007199254740992.0) {
      // Some languages know one kind of number and write 5 as 5.0.
      return in_range(name, static_cast<int64_t>(real), min, max, out);
    } else {
      wrong_type(name, "an integer", *value);
    }
    return false;
  }

  void wrong_type(const char* name, std::string_view wanted, const element& value) {
    fail(name, fmt::format("'{}' must be {}, not {}", name, wanted, type_name(value.type())));
  }

 private:
  template <typename V, typename T>
  bool in_range(const char* name, V number, V min, V max, T* out) {
    if (number < min || number > max) {
      fail(name, fmt::format("'{}' is {}; it must be between {} and {}", name, number, min, max));
      return false;
    }
    *out = static_cast<T>(number);
    return true;
  }

  object fields_;
  std::optional<ApiError> error_;
};

struct ParsedBody {
  simdjson::dom::parser parser;
  object root;
  std::optional<ApiError> error;
};

void parse_body(std::string_view body, ParsedBody* out) {
  element root;
  simdjson::error_code code = out->parser.parse(body.data(), body.size()).get(root);
  if (code != simdjson::SUCCESS) {
    out->error = ApiError{};
    out->error->message = fmt::format("the body is not valid JSON: {}", simdjson::error_message(code));
  } else if (root.get(out->root) != simdjson::SUCCESS) {
    out->error = ApiError{};
    out->error->message = "the body must be a JSON object";
  }
}

bool token_ids(const array& values, std::vector<int32_t>* out) {
  out->reserve(values.size());
  for (element value : values) {
    int64_t id = 0;
    if (value.get(id) != simdjson::SUCCESS || id < 0 || id > std::numeric_limits<int32_t>::max()) return false;
    out->push_back(static_cast<int32_t>(id));
  }
  return true;
}

void parse_prompts(Fields& fields, const ApiLimits& limits, std::vector<Prompt>* prompts) {
  constexpr const char* kForms =
      "'prompt' must be a string, an array of strings, an array of token ids, or an array of such arrays";
  auto value = fields.find("prompt");
  if (!value) return fields.fail("prompt", "'prompt' is missing");
  if (value->is_string()) {
    prompts->push_back(std::string(value->get_string().value_unsafe()));
    return;
  }
  array items;
  if (value->get(items) != simdjson::SUCCESS) return fields.fail("prompt", kForms);
  if (items.size() == 0) return fields.fail("prompt", "'prompt' is an empty array");
  bool ids = items.at(0).value_unsafe().is_number();
  if (ids) {
    std::vector<int32_t> tokens;
    if (!token_ids(items, &tokens)) {
      return fields.fail("prompt", "'prompt' has an element that is not a token id (an integer from 0 on)");
    }
    prompts->push_back(std::move(tokens));
    return;
  }
  if (items.size() > static_cast<size_t>(limits.max_prompts)) {
    return fields.fail("prompt", fmt::format("'prompt' has {} entries; the limit is {}", items.size(), limits.max_prompts));
  }
  for (element item : items) {
    array inner;
    if (item.is_string()) {
      prompts->push_back(std::string(item.get_string().value_unsafe()));
    } else if (item.get(inner) == simdjson::SUCCESS) {
      std::vector<int32_t> tokens;
      if (!token_ids(inner, &tokens)) {
        return fields.fail("prompt", "'prompt' has an element that is not a token id (an integer from 0 on)");
      }
      prompts->push_back(std::move(tokens));
    } else {
      return fields.fail("prompt", kForms);
    }
  }
}

void parse_stop(Fields& fields, const ApiLimits& limits, std::vector<std::string>* stop) {
  auto value = fields.find("stop");
  if (!value) return;
  auto add = [&](element item) {
    if (!item.is_string()) return fields.fail("stop", "'stop' must be a string or an array of strings");
    std::string_view text = item.get_string().value_unsafe();
    if (text.empty()) return fields.fail("stop", "'stop' has an empty string");
    if (text.size() > limits.max_stop_bytes) {
      return fields.fail("stop", fmt::format("'stop' has a string of {} bytes; the limit is {}", text.size(), limits.max_stop_bytes));
    }
    stop->emplace_back(text);
  };
  array items;
  if (value->get(items) != simdjson::SUCCESS) return add(*value);
  if (items.size() > static_cast<size_t>(limits.max_stop_strings)) {
    return fields.fail("stop", fmt::format("'stop' has {} strings; the limit is {}", items.size(), limits.max_stop_strings));
  }
  for (element item : items) add(item);
}

void parse_logit_bias(Fields& fields, const ApiLimits& limits, protocol::Sampling* sampling) {
  auto value = fields.find("logit_bias");
  if (!value) return;
  object entries;
  if (value->get(entries) != simdjson::SUCCESS) return fields.wrong_type("logit_bias", "an object", *value);
  if (entries.size() > static_cast<size_t>(limits.max_logit_bias)) {
    return fields.fail("logit_bias", fmt::format("'logit_bias' has {} entries; the limit is {}", entries.size(), limits.max_logit_bias));
  }
  for (auto [key, bias_value] : entries) {
    int32_t token = -1;
    std::string text(key);
    char* end = nullptr;
    long parsed = std::strtol(text.c_str(), &end, 10);
    if (!text.empty() && *end == '\0' && parsed >= 0 && parsed <= std::numeric_limits<int32_t>::max()) {
      token = static_cast<int32_t>(parsed);
    }
    double bias = 0;
    if (token < 0) return fields.fail("logit_bias", fmt::format("'logit_bias' key '{}' is not a token id", text.substr(0, 40)));
    if (bias_value.get(bias) != simdjson::SUCCESS || bias < -100 || bias > 100) {
      return fields.fail("logit_bias", fmt::format("'logit_bias' of token {} must be a number from -100 to 100", token));
    }
    auto* entry = sampling->add_logit_bias();
    entry->set_token(token);
    entry->set_bias(static_cast<float>(bias));
  }
}

void parse_sampling(Fields& fields, const SamplingDefaults& defaults, const ApiLimits& limits, CompletionRequest* request) {
  protocol::Sampling& sampling = request->sampling;
  float temperature = defaults.temperature.value_or(1.0f), top_p = defaults.top_p.value_or(1.0f),
        min_p = defaults.min_p.value_or(0.0f), repetition = defaults.repetition_penalty.value_or(1.0f);
  float presence = 0, frequency = 0;
  int32_t top_k = defaults.top_k.value_or(0), min_tokens = 0;
  fields.number("temperature", 0, 100, &temperature);
  fields.number("top_p", 0, 1, &top_p);
  fields.number("min_p", 0, 1, &min_p);
  fields.integer("top_k", -1, std::numeric_limits<int32_t>::max(), &top_k);
  fields.number("presence_penalty", -2, 2, &presence);
  fields.number("frequency_penalty", -2, 2, &frequency);
  fields.number("repetition_penalty", 0.01, 100, &repetition);
  if (top_p <= 0 && fields.ok()) fields.fail("top_p", "'top_p' is 0; it must be greater (for greedy output set temperature to 0)");
  int32_t max_tokens = 16;
  request->has_max_tokens = fields.integer("max_tokens", 1, std::numeric_limits<int32_t>::max(), &max_tokens);
  if (request->chat && fields.integer("max_completion_tokens", 1, std::numeric_limits<int32_t>::max(), &max_tokens)) {
    request->has_max_tokens = true;
  }
  fields.integer("min_tokens", 0, std::numeric_limits<int32_t>::max(), &min_tokens);
  if (request->has_max_tokens && min_tokens > max_tokens) {
    fields.fail("min_tokens", fmt::format("'min_tokens' is {}, more than 'max_tokens' ({})", min_tokens, max_tokens));
  }
  int64_t seed = 0;
  request->has_seed = fields.integer("seed", std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(), &seed);
  bool ignore_eos = false;
  fields.boolean("ignore_eos", &ignore_eos);
  sampling.set_temperature(temperature);
  sampling.set_top_p(top_p);
  sampling.set_min_p(min_p);
  sampling.set_top_k(top_k < 0 ? 0 : std::min(top_k, 1 << 24));  // no vocabulary is larger
  sampling.set_presence_penalty(presence);
  sampling.set_frequency_penalty(frequency);
  sampling.set_repetition_penalty(repetition);
  sampling.set_max_tokens(max_tokens);
  sampling.set_min_tokens(min_tokens);
  sampling.set_seed(static_cast<uint64_t>(seed));
  sampling.set_ignore_eos(ignore_eos);
  sampling.set_logprobs(-1);
  if (auto value = fields.find("stop_token_ids")) {
    array items;
    std::vector<int32_t> ids;
    if (value->get(items) != simdjson::SUCCESS || items.size() > static_cast<size_t>(limits.max_stop_token_ids) ||
        !token_ids(items, &ids)) {
      fields.fail("stop_token_ids", fmt::format("'stop_token_ids' must be an array of at most {} token ids", limits.max_stop_token_ids));
    }
    sampling.mutable_stop_token_ids()->Assign(ids.begin(), ids.end());
  }
  parse_logit_bias(fields, limits, &sampling);
}

void parse_logprobs(Fields& fields, const ApiLimits& limits, CompletionRequest* request) {
  int32_t logprobs = -1;
  if (request->chat) {
    bool wanted = false;
    int32_t top = 0;
    fields.boolean("logprobs", &wanted);
    bool has_top = fields.integer("top_logprobs", 0, limits.max_logprobs, &top);
    if (has_top && !wanted) return fields.fail("top_logprobs", "'top_logprobs' needs 'logprobs': true");
    if (wanted) logprobs = top;
  } else {
    fields.integer("logprobs", 0, limits.max_logprobs, &logprobs);
  }
  request->sampling.set_logprobs(logprobs);
}

/// What we know and cannot do is refused, not ignored: a client must not believe it got it.
void refuse_unsupported(Fields& fields, const CompletionRequest& request) {
  if (!request.chat) {
    if (auto value = fields.find("suffix")) fields.fail("suffix", "'suffix' is not supported");
    int64_t best_of = request.n;
    fields.integer("best_of", 1, 128, &best_of);
    if (best_of != request.n) fields.fail("best_of", fmt::format("'best_of' is {}; only the value of 'n' ({}) is supported", best_of, request.n));
    if (request.echo && request.sampling.logprobs() >= 0) {
      fields.fail("echo", "'echo' together with 'logprobs' is not supported: logprobs of prompt tokens are not computed");
    }
    return;
  }
  if (auto value = fields.find("response_format")) {
    object format;
    std::string_view type;
    if (value->get(format) != simdjson::SUCCESS || format["type"].get(type) != simdjson::SUCCESS || type != "text") {
      fields.fail("response_format", "only 'response_format': {\"type\": \"text\"} is supported");
    }
  }
  if (auto value = fields.find("tool_choice")) {
    std::string_view choice;
    if (value->get(choice) != simdjson::SUCCESS || (choice != "none" && choice != "auto")) {
      fields.fail("tool_choice", "'tool_choice' may be \"none\" or \"auto\"; forced tool calls are not supported");
    }
  }
  bool continue_final = false;
  fields.boolean("continue_final_message", &continue_final);
  if (continue_final) fields.fail("continue_final_message", "'continue_final_message' is not supported");
}

void parse_chat_inputs(Fields& fields, std::string* messages, std::string* tools, std::string* kwargs,
                       bool* add_generation_prompt) {
  auto value = fields.find("messages");
  array items;
  if (!value) return fields.fail("messages", "'messages' is missing");
  if (value->get(items) != simdjson::SUCCESS) return fields.wrong_type("messages", "an array", *value);
  if (items.size() == 0) return fields.fail("messages", "'messages' is empty; give at least one message");
  size_t index = 0;
  for (element item : items) {
    object message;
    std::string_view role;
    if (item.get(message) != simdjson::SUCCESS || message["role"].get(role) != simdjson::SUCCESS || role.empty()) {
      return fields.fail("messages", fmt::format("'messages[{}]' must be an object with a 'role'", index));
    }
    array parts;
    if (message["content"].get(parts) == simdjson::SUCCESS) {
      for (element part : parts) {
        object fields_of_part;
        std::string_view type;
        if (part.get(fields_of_part) == simdjson::SUCCESS && fields_of_part["type"].get(type) == simdjson::SUCCESS &&
            type != "text") {
          return fields.fail("messages", fmt::format("'messages[{}]' has a part of type '{}'; this server takes text only",
                                                     index, type.substr(0, 40)));
        }
      }
    }
    ++index;
  }
  *messages = simdjson::minify(*value);
  if (auto list = fields.find("tools")) {
    array entries;
    if (list->get(entries) != simdjson::SUCCESS) return fields.wrong_type("tools", "an array", *list);
    bool none = false;
    if (auto choice = fields.find("tool_choice")) {
      std::string_view text;
      none = choice->get(text) == simdjson::SUCCESS && text == "none";
    }
    if (entries.size() > 0 && !none) *tools = simdjson::minify(*list);
  }
  if (auto extra = fields.find("chat_template_kwargs")) {
    if (!extra->is_object()) return fields.wrong_type("chat_template_kwargs", "an object", *extra);
    *kwargs = simdjson::minify(*extra);
  }
  fields.boolean("add_generation_prompt", add_generation_prompt);
}

}  // namespace

std::variant<CompletionRequest, ApiError> parse_completion_request(std::string_view body, bool chat,
                                                                   const SamplingDefaults& defaults,
                                                                   const ApiLimits& limits) {
  ParsedBody parsed;
  parse_body(body, &parsed);
  if (parsed.error) return *parsed.error;
  Fields fields(parsed.root);
  CompletionRequest request;
  request.chat = chat;
  fields.string("model", &request.model);
  if (chat) {
    parse_chat_inputs(fields, &request.messages_json, &request.tools_json, &request.template_kwargs_json,
                      &request.add_generation_prompt);
    request.add_special_tokens = false;  // the template has written them
  } else {
    parse_prompts(fields, limits, &request.prompts);
    fields.boolean("echo", &request.echo);
  }
  parse_sampling(fields, defaults, limits, &request);
  fields.integer("n", 1, limits.max_n, &request.n);
  if (request.prompts.size() * request.n > static_cast<size_t>(limits.max_prompts)) {
    fields.fail("n", fmt::format("{} prompts with n = {} make more than {} sequences, the limit", request.prompts.size(),
                                 request.n, limits.max_prompts));
  }
  parse_logprobs(fields, limits, &request);
  fields.boolean("stream", &request.stream);
  if (auto options = fields.find("stream_options")) {
    object inner;
    if (options->get(inner) != simdjson::SUCCESS) {
      fields.wrong_type("stream_options", "an object", *options);
    } else if (!request.stream) {
      fields.fail("stream_options", "'stream_options' needs 'stream': true");
    } else {
      Fields stream_fields(inner);
      stream_fields.boolean("include_usage", &request.include_usage);
      if (!stream_fields.ok()) fields.fail("stream_options.include_usage", stream_fields.error().message);
    }
  }
  parse_stop(fields, limits, &request.stop);
  fields.boolean("include_stop_str_in_output", &request.include_stop_string);
  fields.boolean("skip_special_tokens", &request.skip_special_tokens);
  fields.boolean("add_special_tokens", &request.add_special_tokens);
  fields.boolean("return_token_ids", &request.return_token_ids);
  fields.boolean("return_tokens_as_token_ids", &request.tokens_as_ids);
  refuse_unsupported(fields, request);
  if (!fields.ok()) return fields.error();
  return request;
}

std::variant<TokenizeRequest, ApiError> parse_tokenize_request(std::string_view body) {
  ParsedBody parsed;
  parse_body(body, &parsed);
  if (parsed.error) return *parsed.error;
  Fields fields(parsed.root);
  TokenizeRequest request;
  fields.string("model", &request.model);
  if (fields.find("messages")) {
    request.has_messages = true;
    parse_chat_inputs(fields, &request.messages_json, &request.tools_json, &request.template_kwargs_json,
                      &request.add_generation_prompt);
  } else if (fields.find("prompt")) {
    fields.string("prompt", &request.prompt);
  } else {
    fields.fail("prompt", "give 'prompt' (a string) or 'messages'");
  }
  bool add_special = false;
  if (fields.find("add_special_tokens")) {
    fields.boolean("add_special_tokens", &add_special);
    request.add_special_tokens = add_special;
  }
  fields.boolean("return_token_strs", &request.return_token_strings);
  if (!fields.ok()) return fields.error();
  return request;
}

std::variant<DetokenizeRequest, ApiError> parse_detokenize_request(std::string_view body) {
  ParsedBody parsed;
  parse_body(body, &parsed);
  if (parsed.error) return *parsed.error;
  Fields fields(parsed.root);
  DetokenizeRequest request;
  fields.string("model", &request.model);
  auto value = fields.find("tokens");
  array items;
  if (!value) {
    fields.fail("tokens", "'tokens' is missing");
  } else if (value->get(items) != simdjson::SUCCESS || !token_ids(items, &request.tokens)) {
    fields.fail("tokens", "'tokens' must be an array of token ids");
  }
  if (!fields.ok()) return fields.error();
  return request;
}

}  // namespace baton::http
