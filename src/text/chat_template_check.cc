// Renders the cases that tools/check_templates.py and tools/make_template_fixtures.py send, one JSON
// object per line on stdin: {"template", "messages", "tools", "add_generation_prompt", "extra",
// "bos_token", "eos_token", "now"}, where messages, tools and extra are JSON texts. Answers each with
// one line: {"output": ...} or {"error": ...}.

#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "text/chat_template.h"

namespace {

nlohmann::json answer(const nlohmann::json& request) {
  static std::map<std::string, std::shared_ptr<baton::ChatTemplate>> parsed;
  const std::string source = request.at("template");
  auto& chat = parsed[source];
  if (chat == nullptr) {
    auto result = baton::ChatTemplate::parse(source, request.value("bos_token", ""), request.value("eos_token", ""));
    if (!result.ok()) return {{"error", result.status().message()}};
    chat = std::move(result).value();
  }
  baton::ChatTemplateInputs inputs;
  inputs.messages_json = request.value("messages", "[]");
  inputs.tools_json = request.value("tools", "");
  inputs.add_generation_prompt = request.value("add_generation_prompt", false);
  inputs.extra_json = request.value("extra", "");
  inputs.now_unix_s = request.value("now", std::int64_t{0});
  inputs.normalize_messages = request.value("normalize", false);
  const auto text = chat->render(inputs);
  if (!text.ok()) return {{"error", text.status().message()}};
  return {{"output", *text}};
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  std::string line;
  while (std::getline(std::cin, line)) {
    try {
      std::cout << answer(nlohmann::json::parse(line)).dump() << '\n' << std::flush;
    } catch (const nlohmann::json::exception& error) {
      std::cerr << "chat_template_check: a request is not what it should be: " << error.what() << '\n';
      return 1;
    }
  }
  return 0;
}
