#include "text/chat_template.h"

#include <array>
#include <fstream>
#include <optional>

#include "text/jinja/content_format.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/json_reader.h"
#include "text/jinja/parser.h"

namespace baton {
namespace {

using jinja::Budget;
using jinja::Dict;
using jinja::Kind;
using jinja::Limits;
using jinja::TemplateError;
using jinja::Value;

constexpr std::uintmax_t kMaxConfigBytes = 64u << 20;

/// Runs what may throw inside the interpreter and turns that into a Status.
template <typename Function>
auto guarded(const Function& function) -> Result<decltype(function())> {
  try {
    return function();
  } catch (const TemplateError& error) {
    if (error.verbatim) return Status(StatusCode::kInvalidArgument, error.message);
    if (error.line > 0) return invalid_argument("chat template, line {}: {}", error.line, error.message);
    return invalid_argument("chat template: {}", error.message);
  } catch (const std::bad_alloc&) {
    return resource_exhausted("chat template: out of memory");
  } catch (const std::exception& error) {
    return internal_error("chat template: {}", error.what());
  }
}

/// A copy of a dict with some entries replaced or added.
std::shared_ptr<Dict> copy_of(const Dict& dict, Budget& budget) {
  auto copy = std::make_shared<Dict>();
  for (const auto& [key, value] : dict.entries) copy->set(key, value, budget);
  return copy;
}

const Value* find_given(const Dict& dict, std::string_view key) {
  const Value* value = dict.find(key);
  return value == nullptr || value->is_none() ? nullptr : value;
}

/// Reasoning comes under several names; transformers fills in those that templates read.
Value with_reasoning_names(const Value& message, Budget& budget) {
  const Dict& given = message.as_dict();
  const Value* reasoning = nullptr;
  for (const std::string_view name : {"reasoning_content", "thinking", "reasoning"}) {
    if (reasoning == nullptr) reasoning = find_given(given, name);
  }
  if (reasoning == nullptr) return message;
  auto result = std::make_shared<Dict>();
  result->set(Value::string("thinking"), *reasoning, budget);
  for (const auto& [key, value] : given.entries) result->set(key, value, budget);
  result->set(Value::string("reasoning_content"), *reasoning, budget);
  return Value::dict(std::move(result));
}

/// [{"type": "text", "text": "a"}, ...] as "a\n...".
Value flattened(const Value& parts, Budget& budget) {
  std::string text;
  bool first = true;
  for (const Value& part : parts.as_sequence().items) {
    const Value* piece = nullptr;
    if (part.is_string()) {
      piece = &part;
    } else if (part.is(Kind::dict)) {
      piece = part.as_dict().find("text");
      const Value* type = part.as_dict().find("type");
      const bool is_text = type == nullptr || (type->is_string() && type->as_string() == "text");
      if (!is_text) {
        jinja::fail("messages with content of type '{}' are not supported by this model, only text",
                    type->is_string() ? type->as_string() : "?");
      }
    }
    if (piece == nullptr || !piece->is_string()) jinja::fail("a content part of type 'text' needs a string 'text'");
    if (!first) text += '\n';
    first = false;
    budget.check_size(text.size() + piece->as_string().size());
    text += piece->as_string();
  }
  return Value::string(std::move(text));
}

/// The arguments of a call as an object: OpenAI's API carries them as a JSON text.
Value with_parsed_arguments(const Value& call, Budget& budget) {
  if (!call.is(Kind::dict)) return call;
  const Value* function = call.as_dict().find("function");
  if (function == nullptr || !function->is(Kind::dict)) return call;
  const Value* arguments = function->as_dict().find("arguments");
  if (arguments == nullptr || !arguments->is_string()) return call;
  Value parsed = Value::dict(std::make_shared<Dict>());
  if (!arguments->as_string().empty()) {
    parsed = jinja::parse_json(arguments->as_string(), "the arguments of a tool call", budget);
  }
  auto new_function = copy_of(function->as_dict(), budget);
  new_function->set(Value::string("arguments"), std::move(parsed), budget);
  auto new_call = copy_of(call.as_dict(), budget);
  new_call->set(Value::string("function"), Value::dict(std::move(new_function)), budget);
  return Value::dict(std::move(new_call));
}

Value normalized(const Value& message, bool template_handles_parts, Budget& budget) {
  const Value* content = message.as_dict().find("content");
  const Value* calls = message.as_dict().find("tool_calls");
  const bool flatten = !template_handles_parts && content != nullptr && content->is(Kind::sequence);
  const bool parse_calls = calls != nullptr && calls->is(Kind::sequence);
  if (!flatten && !parse_calls) return message;
  auto result = copy_of(message.as_dict(), budget);
  if (flatten) result->set(Value::string("content"), flattened(*content, budget), budget);
  if (parse_calls) {
    std::vector<Value> parsed;
    for (const Value& call : calls->as_sequence().items) parsed.push_back(with_parsed_arguments(call, budget));
    result->set(Value::string("tool_calls"), jinja::make_list(std::move(parsed), budget), budget);
  }
  return Value::dict(std::move(result));
}

Result<std::string> read_file(const std::filesystem::path& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (error) return not_found("{} cannot be read: {}", path.string(), error.message());
  if (size > kMaxConfigBytes) return invalid_argument("{} has {} bytes, more than the limit of {}", path.string(), size, kMaxConfigBytes);
  std::ifstream file(path, std::ios::binary);
  std::string text(static_cast<std::size_t>(size), '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) return data_loss("{} cannot be read to its end", path.string());
  return text;
}

/// A token in tokenizer_config.json: a text, or an object with its text as `content`.
std::string token_text(const Value* token) {
  if (token == nullptr) return {};
  if (token->is_string()) return token->as_string();
  const Value* content = token->is(Kind::dict) ? token->as_dict().find("content") : nullptr;
  return content != nullptr && content->is_string() ? content->as_string() : std::string();
}

struct Sources {
  std::string standard;
  std::string tool_use;
  std::vector<std::pair<std::string, std::string>> special_tokens;
};

/// `chat_template` of a configuration: one text, or a list of named ones.
void read_templates(const Dict& config, Sources& sources) {
  const Value* given = config.find("chat_template");
  if (given == nullptr) return;
  if (given->is_string()) {
    sources.standard = given->as_string();
    return;
  }
  if (!given->is(Kind::sequence)) return;
  for (const Value& entry : given->as_sequence().items) {
    if (!entry.is(Kind::dict)) continue;
    const Value* name = entry.as_dict().find("name");
    const Value* text = entry.as_dict().find("template");
    if (name == nullptr || text == nullptr || !name->is_string() || !text->is_string()) continue;
    if (name->as_string() == "default") sources.standard = text->as_string();
    if (name->as_string() == "tool_use") sources.tool_use = text->as_string();
  }
}

Result<Sources> read_sources(const std::filesystem::path& model_dir) {
  Sources sources;
  const auto read_config = [&](const std::filesystem::path& path, bool with_tokens) -> Status {
    std::error_code error;
    if (!std::filesystem::exists(path, error)) return Status();
    BATON_ASSIGN_OR_RETURN(const std::string text, read_file(path));
    const auto done = guarded([&] {
      const Limits limits;
      Budget budget(limits);
      const Value config = jinja::parse_json(text, "its contents", budget);
      if (!config.is(Kind::dict)) jinja::fail("it is not a JSON object");
      if (sources.standard.empty()) read_templates(config.as_dict(), sources);
      if (!with_tokens) return true;
      for (const char* name : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}) {
        std::string token = token_text(config.as_dict().find(name));
        if (!token.empty()) sources.special_tokens.emplace_back(name, std::move(token));
      }
      return true;
    });
    return done.ok() ? Status() : done.status().with_context(path.string());
  };

  std::error_code error;
  const auto file = model_dir / "chat_template.jinja";
  if (std::filesystem::exists(file, error)) {
    BATON_ASSIGN_OR_RETURN(sources.standard, read_file(file));
  }
  BATON_RETURN_IF_ERROR(read_config(model_dir / "tokenizer_config.json", true));
  if (sources.standard.empty()) BATON_RETURN_IF_ERROR(read_config(model_dir / "chat_template.json", false));
  if (sources.standard.empty() && !sources.tool_use.empty()) sources.standard = sources.tool_use;
  return sources;
}

}  // namespace

ChatTemplate::~ChatTemplate() = default;

ChatTemplate::Program ChatTemplate::compile(const std::string& source) {
  Program program;
  program.code = jinja::parse_template(source, Limits());
  program.handles_parts = jinja::handles_content_parts(*program.code);
  return program;
}

Result<std::unique_ptr<ChatTemplate>> ChatTemplate::parse(std::string source, std::string bos_token, std::string eos_token) {
  return guarded([&] {
    std::unique_ptr<ChatTemplate> result(new ChatTemplate());
    result->default_ = compile(source);
    if (!bos_token.empty()) result->special_tokens_.emplace_back("bos_token", std::move(bos_token));
    if (!eos_token.empty()) result->special_tokens_.emplace_back("eos_token", std::move(eos_token));
    return result;
  });
}

Result<std::unique_ptr<ChatTemplate>> ChatTemplate::load(const std::filesystem::path& model_dir) {
  BATON_ASSIGN_OR_RETURN(Sources sources, read_sources(model_dir));
  if (sources.standard.empty()) {
    return not_found("{} has no chat template: neither chat_template.jinja nor chat_template in tokenizer_config.json",
                     model_dir.string());
  }
  auto result = guarded([&] {
    std::unique_ptr<ChatTemplate> chat(new ChatTemplate());
    chat->default_ = compile(sources.standard);
    if (!sources.tool_use.empty()) chat->tool_use_ = compile(sources.tool_use);
    chat->special_tokens_ = std::move(sources.special_tokens);
    return chat;
  });
  if (!result.ok()) return result.status().with_context(model_dir.string());
  return result;
}

Result<std::string> ChatTemplate::render(const ChatTemplateInputs& inputs) const {
  return guarded([&] { return render_or_throw(inputs); });
}

std::string ChatTemplate::render_or_throw(const ChatTemplateInputs& inputs) const {
  const Limits limits;
  Budget budget(limits);
  const Program& program = !inputs.tools_json.empty() && tool_use_.code != nullptr ? tool_use_ : default_;

  const Value given = jinja::parse_json(inputs.messages_json, "messages", budget);
  if (!given.is(Kind::sequence)) jinja::fail("messages must be an array");
  std::vector<Value> messages;
  for (const Value& message : given.as_sequence().items) {
    if (!message.is(Kind::dict)) jinja::fail("messages[{}] must be an object", messages.size());
    Value ready = inputs.normalize_messages ? normalized(message, program.handles_parts, budget) : message;
    messages.push_back(with_reasoning_names(ready, budget));
  }

  jinja::Interpreter::Variables variables;
  variables.emplace_back("messages", jinja::make_list(std::move(messages), budget));
  variables.emplace_back("tools", inputs.tools_json.empty() ? Value::none() : jinja::parse_json(inputs.tools_json, "tools", budget));
  variables.emplace_back("documents", Value::none());
  variables.emplace_back("add_generation_prompt", Value::boolean(inputs.add_generation_prompt));
  for (const auto& [name, text] : special_tokens_) variables.emplace_back(name, Value::string(text));
  if (!inputs.extra_json.empty()) {
    const Value extra = jinja::parse_json(inputs.extra_json, "chat_template_kwargs", budget);
    if (!extra.is(Kind::dict)) jinja::fail("chat_template_kwargs must be an object");
    for (const auto& [key, value] : extra.as_dict().entries) {
      const std::string& name = key.as_string();
      if (name == "messages" || name == "tools") jinja::fail("chat_template_kwargs must not contain '{}'", name);
      variables.emplace_back(name, value);  // later ones win
    }
  }
  return jinja::Interpreter(*program.code, limits, inputs.now_unix_s).render(variables);
}

}  // namespace baton
