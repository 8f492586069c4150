// A template, a zero byte, and a JSON object of its variables: parsed and rendered under small limits.
// Seeds: the templates and contexts of tests/golden/templates.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "text/jinja/content_format.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/json_reader.h"
#include "text/jinja/parser.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace jinja = baton::jinja;
  jinja::Limits limits;
  limits.max_output_bytes = 256u << 10;
  limits.max_steps = 20'000;
  limits.max_work_bytes = 8u << 20;

  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t split = input.find('\0');
  const std::string_view source = input.substr(0, split);
  const std::string_view context = split == std::string_view::npos ? std::string_view("{}") : input.substr(split + 1);
  try {
    const auto code = jinja::parse_template(source, limits);
    jinja::handles_content_parts(*code);
    jinja::Budget budget(limits);
    const jinja::Value variables = jinja::parse_json(context, "variables", budget);
    jinja::Interpreter::Variables given;
    if (variables.is(jinja::Kind::dict)) {
      for (const auto& [key, value] : variables.as_dict().entries) given.emplace_back(key.as_string(), value);
    }
    jinja::Interpreter(*code, limits, 1'785'000'000).render(given);
  } catch (const jinja::TemplateError&) {  // the only thing that may come out of there
  }
  return 0;
}
