#include <algorithm>
#include <array>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"

// Markup: what `safe` and `escape` return. Chat templates have no use for HTML, but some say
// `tojson | safe`, and what they then get by adding text to it is part of what their model has seen.

namespace baton::jinja {
namespace {

/// These see their arguments as they are; their results are no text.
constexpr std::array<std::string_view, 16> kQuestions = {
    "startswith", "endswith", "find",    "rfind",   "index",   "rindex",    "count",   "isdigit",
    "isdecimal",  "isalpha",  "isalnum", "isspace", "islower", "isnumeric", "isupper", "splitlines"};

/// Parts of markup are markup.
Value as_markup(Interpreter& interpreter, const Value& value) {
  if (value.is_string()) return value.as_markup();
  if (!value.is(Kind::sequence)) return value;
  std::vector<Value> items;
  for (const Value& item : value.as_sequence().items) items.push_back(item.as_markup());
  return make_sequence(value.as_sequence().kind, std::move(items), interpreter.budget());
}

}  // namespace

Value escape_html(Interpreter& interpreter, const Value& value) {
  if (value.is_markup()) return value;
  std::string out;
  for (const char c : interpreter.text(value)) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&#34;"; break;
      case '\'': out += "&#39;"; break;
      default: out += c;
    }
  }
  return interpreter.string(std::move(out)).as_markup();
}

Value call_method(Interpreter& interpreter, MethodFunction method, std::string_view name, const Value& self,
                  Arguments& arguments) {
  if (!self.is_markup()) return method(interpreter, self, arguments);
  const bool splits = name == "split" || name == "rsplit";
  const bool escapes = !splits && std::find(kQuestions.begin(), kQuestions.end(), name) == kQuestions.end();
  if (escapes) {
    const bool formats = name == "format";
    const auto escape = [&](Value& value) {
      if (value.is_string() || formats) value = escape_html(interpreter, value);
    };
    for (Value& value : arguments.positional) {
      if (name == "join") {
        std::vector<Value> items = interpreter.elements(value);
        for (Value& item : items) item = escape_html(interpreter, item);
        value = interpreter.list(std::move(items));
      }
      escape(value);
    }
    for (auto& [key, value] : arguments.keyword) escape(value);
  }
  return as_markup(interpreter, method(interpreter, self, arguments));
}

}  // namespace baton::jinja
