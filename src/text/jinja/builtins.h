#pragma once

#include <initializer_list>
#include <string_view>
#include <vector>

#include "text/jinja/value.h"

// The functions that templates find there: filters, tests, methods of values, global functions.

namespace baton::jinja {

using FilterFunction = Value (*)(Interpreter&, const Value& input, Arguments&);
using TestFunction = bool (*)(Interpreter&, const Value& input, Arguments&);
using MethodFunction = Value (*)(Interpreter&, const Value& self, Arguments&);

/// Python's html.escape() as Jinja has it, and str(), for other values. Markup stays as it is.
Value escape_html(Interpreter& interpreter, const Value& value);
/// A method call, with the rules of Markup when the object is such: text given to it is escaped.
Value call_method(Interpreter& interpreter, MethodFunction method, std::string_view name, const Value& self, Arguments& arguments);

/// nullptr when there is none of that name. All are pure lookups in constant tables.
FilterFunction find_filter(std::string_view name);
FilterFunction find_text_filter(std::string_view name);      // filters_text.cc
FilterFunction find_sequence_filter(std::string_view name);  // filters_sequence.cc
TestFunction find_test(std::string_view name);
MethodFunction find_method(const Value& self, std::string_view name);
/// Methods that would change their object: Jinja's immutable sandbox hides them.
bool is_forbidden_method(const Value& self, std::string_view name);
/// A global function or class by name; nullptr when there is none.
const Value* find_global(std::string_view name);

/// Matches arguments with parameter names as Python does: `required` of them must be given.
class Parameters {
 public:
  Parameters(std::string_view function, const Arguments& arguments, std::initializer_list<std::string_view> names,
             std::size_t required = 0);

  bool has(std::size_t index) const { return values_[index] != nullptr; }
  /// Undefined when it isn't given.
  const Value& operator[](std::size_t index) const;
  std::int64_t integer(std::size_t index, std::int64_t fallback) const;
  bool boolean(std::size_t index, bool fallback) const;
  /// Fails unless it is a string.
  const std::string& string(std::size_t index) const;

 private:
  std::string_view function_;
  std::vector<const Value*> values_;
};

/// Python's "format % arguments" and format.format(arguments).
std::string format_printf(Interpreter& interpreter, std::string_view format, const Value& arguments);
std::string format_braces(Interpreter& interpreter, std::string_view format, const Arguments& arguments);

/// json.dumps as transformers' tojson filter calls it.
struct JsonOptions {
  bool ensure_ascii = false;
  std::optional<std::string> indent;  ///< one level of it; none: all on one line
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool sort_keys = false;
};
std::string dump_json(const Value& value, const JsonOptions& options, Budget& budget);

}  // namespace baton::jinja
