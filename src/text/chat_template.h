#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"

namespace baton {

namespace jinja {
struct Template;
}

/// What a template renders. The JSON texts are outside input and are checked here.
struct ChatTemplateInputs {
  std::string messages_json;           ///< an array of objects
  std::string tools_json;              ///< an array of tool schemas; empty: none
  bool add_generation_prompt = true;   ///< end with the start of the assistant's answer
  std::string extra_json;              ///< an object of further variables (chat_template_kwargs); empty: none
  std::int64_t now_unix_s = 0;         ///< what strftime_now() shows, in the local time zone
  /// Bring messages in OpenAI's form into the form that templates were written for, as vLLM does:
  ///  - `content` given as parts becomes a string, the texts joined by newlines, unless the template
  ///    goes over the parts itself; a part that isn't text is an error then;
  ///  - `function.arguments` of tool calls, a JSON text on the wire, becomes an object.
  bool normalize_messages = true;
};

/// A model's chat template: Jinja2 as transformers' apply_chat_template sets it up, interpreted here.
/// Immutable and safe to use from any number of threads once parsed.
///
/// Templates and messages are not trusted: size, nesting, loops, time and output are bounded (see
/// jinja::Limits), templates cannot reach anything but their inputs. All failures of a render are
/// invalid_argument: with the template's line and what happened or, for the template's own
/// raise_exception(message), exactly that message.
class ChatTemplate {
 public:
  /// An empty token is not visible to the template.
  static Result<std::unique_ptr<ChatTemplate>> parse(std::string source, std::string bos_token, std::string eos_token);

  /// From a model's folder: chat_template.jinja, else `chat_template` in tokenizer_config.json (a
  /// text, or a list of named ones: "default", and "tool_use" for requests with tools), else
  /// chat_template.json. The special tokens are those of tokenizer_config.json.
  /// not_found when the model has no template.
  static Result<std::unique_ptr<ChatTemplate>> load(const std::filesystem::path& model_dir);

  ~ChatTemplate();

  /// The prompt. It contains the special tokens as text: tokenize it without adding them again.
  Result<std::string> render(const ChatTemplateInputs& inputs) const;

 private:
  ChatTemplate() = default;

  struct Program {
    std::shared_ptr<const jinja::Template> code;
    bool handles_parts = false;
  };
  static Program compile(const std::string& source);
  std::string render_or_throw(const ChatTemplateInputs& inputs) const;

  Program default_;
  Program tool_use_;  ///< code is null when the model has no template of that name
  std::vector<std::pair<std::string, std::string>> special_tokens_;  ///< variable, text
};

}  // namespace baton
