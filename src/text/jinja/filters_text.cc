#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/unicode.h"

// Filters on text and numbers.

namespace baton::jinja {
namespace {

struct Entry {
  std::string_view name;
  FilterFunction function;
};

/// The method of str of that name, on the text of whatever the input is.
Value text_method(Interpreter& interpreter, const Value& input, std::string_view name, Arguments& arguments) {
  const Value text = input.is_string() ? input : interpreter.string(interpreter.text(input));
  return call_method(interpreter, find_method(text, name), name, text, arguments);
}

Value trim(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  return text_method(interpreter, input, "strip", arguments);
}
Value upper(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  return text_method(interpreter, input, "upper", arguments);
}
Value lower(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  return text_method(interpreter, input, "lower", arguments);
}
Value capitalize(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  return text_method(interpreter, input, "capitalize", arguments);
}

Value center(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("center", arguments, {"width"});
  Arguments width;
  width.positional.push_back(Value::integer(parameters.integer(0, 80)));
  return text_method(interpreter, input, "center", width);
}

Value string(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("string", arguments, {});
  return input.is_string() ? input : interpreter.string(interpreter.text(input));
}

Value safe(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  return string(interpreter, input, arguments).as_markup();
}

Value escape(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("escape", arguments, {});
  return escape_html(interpreter, input);
}

Value forceescape(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("forceescape", arguments, {});
  return escape_html(interpreter, interpreter.string(interpreter.text(input)));
}

/// Words start with a capital after space, brackets and dashes; unlike str.title().
Value title(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("title", arguments, {});
  const std::string text = interpreter.text(input);
  interpreter.budget().charge_bytes(text.size());
  std::string out;
  bool starts_word = true;
  for (std::size_t position = 0; position < text.size();) {
    const std::size_t start = position;
    const char32_t code = decode_utf8(text, position);
    const std::string_view character = std::string_view(text).substr(start, position - start);
    out += starts_word ? to_upper(character) : to_lower(character);
    starts_word = is_space(code) || code == '-' || code == '(' || code == '{' || code == '[' || code == '<';
  }
  return interpreter.string(std::move(out));
}

Value replace(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("replace", arguments, {"old", "new", "count"}, 2);
  Arguments texts;
  texts.positional = {interpreter.string(interpreter.text(parameters[0])), interpreter.string(interpreter.text(parameters[1]))};
  if (parameters.has(2) && !parameters[2].is_none()) texts.positional.push_back(parameters[2]);
  const Value plain = interpreter.string(interpreter.text(input));
  return text_method(interpreter, plain, "replace", texts);
}

Value indent(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("indent", arguments, {"width", "first", "blank"});
  if (!input.is_string()) {
    fail("{}", input.is_undefined() ? input.undefined_reason() : fmt::format("indent needs a string, not '{}'", type_name(input)));
  }
  std::string indention;
  if (parameters.has(0) && parameters[0].is_string()) {
    indention = parameters[0].as_string();
  } else {
    const std::int64_t width = std::max<std::int64_t>(0, parameters.integer(0, 4));
    interpreter.budget().check_size(static_cast<std::size_t>(width));
    indention.assign(static_cast<std::size_t>(width), ' ');
  }
  const bool blank = parameters.boolean(2, false);
  std::string out = parameters.boolean(1, false) ? indention : "";
  bool first = true;
  const std::string text = input.as_string() + "\n";
  interpreter.budget().charge_bytes(text.size());
  for (const std::string_view line : split_lines(text, false)) {
    if (!first) {
      out += '\n';
      if (blank || !line.empty()) out += indention;
    }
    first = false;
    out += line;
    interpreter.budget().check_size(out.size());
  }
  const Value result = interpreter.string(std::move(out));
  return input.is_markup() ? result.as_markup() : result;
}

Value truncate(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("truncate", arguments, {"length", "killwords", "end", "leeway"});
  const std::int64_t length = parameters.integer(0, 255);
  const std::string end = parameters.has(2) ? parameters.string(2) : "...";
  const std::int64_t leeway = parameters.has(3) && !parameters[3].is_none() ? parameters.integer(3, 5) : 5;
  const auto end_length = static_cast<std::int64_t>(code_point_count(end));
  if (length < end_length || leeway < 0) fail("truncate needs a length of at least that of its end, and no negative leeway");
  const auto size = static_cast<std::int64_t>(interpreter.length(input));
  if (size - length <= leeway) return input;
  if (!input.is_string()) fail("truncate needs a string, not '{}'", type_name(input));
  const std::string& text = input.as_string();
  std::string cut = text.substr(0, code_point_offsets(text)[static_cast<std::size_t>(length - end_length)]);
  if (!parameters.boolean(1, false)) cut = cut.substr(0, cut.rfind(' '));
  return interpreter.string(cut + end);
}

Value wordcount(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("wordcount", arguments, {});
  const std::string text = interpreter.text(input);
  std::int64_t words = 0;
  bool inside = false;
  for (std::size_t position = 0; position < text.size();) {
    const char32_t code = decode_utf8(text, position);
    const bool part = is_alphabetic(code) || is_decimal(code) || code == '_';
    words += part && !inside;
    inside = part;
  }
  return Value::integer(words);
}

Value format(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  if (!arguments.positional.empty() && !arguments.keyword.empty()) fail("format takes either positions or names");
  Value values = interpreter.tuple(arguments.positional);
  if (!arguments.keyword.empty()) {
    auto names = std::make_shared<Dict>();
    for (const auto& [name, value] : arguments.keyword) names->set(interpreter.string(name), value, interpreter.budget());
    values = Value::dict(std::move(names));
  }
  return interpreter.string(format_printf(interpreter, interpreter.text(input), values));
}

Value urlencode(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("urlencode", arguments, {});
  const auto quote = [&](const Value& value, bool query) {
    std::string out;
    for (const char c : interpreter.text(value)) {
      const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                         std::string_view("_.-~").find(c) != std::string_view::npos || (c == '/' && !query);
      if (plain) out += c;
      else if (c == ' ' && query) out += '+';
      else out += fmt::format("%{:02X}", static_cast<unsigned>(static_cast<unsigned char>(c)));
    }
    return out;
  };
  if (!input.is(Kind::dict)) return interpreter.string(quote(input, false));
  std::string out;
  for (const auto& [key, value] : input.as_dict().entries) {
    if (!out.empty()) out += '&';
    out += quote(key, true) + '=' + quote(value, true);
  }
  return interpreter.string(std::move(out));
}

Value tojson(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("tojson", arguments, {"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonOptions options;
  options.ensure_ascii = parameters.boolean(0, false);
  options.sort_keys = parameters.boolean(3, false);
  if (parameters.has(1) && !parameters[1].is_none()) {
    if (parameters[1].is_string()) {
      options.indent = parameters[1].as_string();
    } else {
      const std::int64_t width = std::max<std::int64_t>(0, parameters.integer(1, 0));
      if (width > 1000) fail("tojson is asked to indent by {}, more than the limit of 1000", width);
      options.indent = std::string(static_cast<std::size_t>(width), ' ');
    }
    options.item_separator = ",";
  }
  if (parameters.has(2) && !parameters[2].is_none()) {
    const std::vector<Value> separators = interpreter.elements(parameters[2]);
    if (separators.size() != 2 || !separators[0].is_string() || !separators[1].is_string()) {
      fail("tojson needs two strings as separators");
    }
    options.item_separator = separators[0].as_string();
    options.key_separator = separators[1].as_string();
  }
  return interpreter.string(dump_json(input, options, interpreter.budget()));
}

// ---- numbers

void require_defined(const Value& value) {
  if (value.is_undefined()) fail("{}", value.undefined_reason());
}

/// Python's int(text, base); nullopt: not a number.
std::optional<std::int64_t> parse_integer(std::string_view text, std::int64_t base) {
  std::string digits(strip_right(strip_left(text)));
  const bool negative = digits.starts_with('-');
  if (negative || digits.starts_with('+')) digits.erase(0, 1);
  if (digits.size() > 2 && digits[0] == '0') {
    const char letter = static_cast<char>(digits[1] | 0x20);
    const std::int64_t named = letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 0;
    if (named != 0 && (base == named || base == 0)) {
      digits.erase(0, 2);
      base = named;
    }
  }
  if (base == 0) base = 10;
  if (base < 2 || base > 36 || digits.empty() || digits.front() == '_' || digits.back() == '_') return std::nullopt;
  std::erase(digits, '_');
  if (digits.empty() || digits.front() == '-' || digits.front() == '+') return std::nullopt;
  if (negative) digits.insert(0, 1, '-');
  std::int64_t value = 0;
  const auto [end, code] = std::from_chars(digits.data(), digits.data() + digits.size(), value, static_cast<int>(base));
  if (code == std::errc::result_out_of_range) fail("the number {} does not fit into 64 bits", digits);
  if (code != std::errc() || end != digits.data() + digits.size()) return std::nullopt;
  return value;
}

/// Python's float(text).
std::optional<double> parse_real(std::string_view text) {
  std::string digits(strip_right(strip_left(text)));
  if (digits.size() > 400) digits.resize(400);
  // strtod() takes hexadecimal floats and "nan(...)", Python does not.
  if (digits.empty() || digits.find_first_of("xX(") != std::string::npos) return std::nullopt;
  if (digits.front() == '_' || digits.back() == '_') return std::nullopt;
  std::erase(digits, '_');
  char* end = nullptr;
  const double value = std::strtod(digits.c_str(), &end);
  if (end == digits.c_str() || *end != '\0') return std::nullopt;
  return value;
}

Value to_integer(double value) {
  if (!std::isfinite(value) || std::fabs(value) >= 9.2e18) fail("the float {} does not fit into a 64-bit integer", real_repr(value));
  return Value::integer(static_cast<std::int64_t>(value));
}

Value int_filter(Interpreter&, const Value& input, Arguments& arguments) {
  const Parameters parameters("int", arguments, {"default", "base"});
  require_defined(input);
  const Value fallback = parameters.has(0) ? parameters[0] : Value::integer(0);
  if (input.is(Kind::big_integer)) return input;
  if (input.is_integral()) return Value::integer(input.as_integer());
  if (input.is(Kind::real)) return std::isnan(input.as_real()) ? fallback : to_integer(input.as_real());
  if (!input.is_string()) return fallback;
  if (const auto value = parse_integer(input.as_string(), parameters.integer(1, 10))) return Value::integer(*value);
  if (const auto value = parse_real(input.as_string()); value && std::isfinite(*value)) return to_integer(*value);
  return fallback;
}

Value float_filter(Interpreter&, const Value& input, Arguments& arguments) {
  const Parameters parameters("float", arguments, {"default"});
  require_defined(input);
  if (input.is_number()) return Value::real(input.as_real());
  if (input.is_string() || input.is(Kind::big_integer)) {
    if (const auto value = parse_real(input.as_string())) return Value::real(*value);
  }
  return parameters.has(0) ? parameters[0] : Value::real(0.0);
}

Value abs_filter(Interpreter&, const Value& input, Arguments& arguments) {
  const Parameters parameters("abs", arguments, {});
  require_defined(input);
  if (!input.is_number()) fail("abs needs a number, not '{}'", type_name(input));
  if (input.is(Kind::real)) return Value::real(std::fabs(input.as_real()));
  if (input.as_integer() == INT64_MIN) fail("a number left the range of 64 bits");
  return Value::integer(std::abs(input.as_integer()));
}

/// Python's round(): to even, on the exact value of the double.
double round_decimal(double value, std::int64_t precision) {
  if (!std::isfinite(value) || precision > 300) return value;
  if (precision < 0) {
    const double scale = std::pow(10.0, static_cast<double>(std::min<std::int64_t>(-precision, 400)));
    return std::isinf(scale) ? 0.0 : std::nearbyint(value / scale) * scale;
  }
  return std::strtod(fmt::format("{:.{}f}", value, static_cast<int>(precision)).c_str(), nullptr);
}

Value round_filter(Interpreter&, const Value& input, Arguments& arguments) {
  const Parameters parameters("round", arguments, {"precision", "method"});
  require_defined(input);
  if (!input.is_number()) fail("round needs a number, not '{}'", type_name(input));
  const std::int64_t precision = parameters.integer(0, 0);
  const std::string method = parameters.has(1) ? parameters.string(1) : "common";
  if (method == "common") {
    if (!input.is_integral()) return Value::real(round_decimal(input.as_real(), precision));
    if (precision >= 0) return Value::integer(input.as_integer());
    return to_integer(round_decimal(static_cast<double>(input.as_integer()), precision));
  }
  if (method != "ceil" && method != "floor") fail("the method of round must be common, ceil or floor");
  const double scale = std::pow(10.0, static_cast<double>(precision));
  const double scaled = input.as_real() * scale;
  if (!std::isfinite(scaled)) fail("round cannot use a number that large");
  const double whole = method == "ceil" ? std::ceil(scaled) : std::floor(scaled);
  return Value::real(whole / scale);
}

constexpr std::array kFilters = {
    Entry{"trim", trim},
    Entry{"upper", upper},
    Entry{"lower", lower},
    Entry{"capitalize", capitalize},
    Entry{"title", title},
    Entry{"center", center},
    Entry{"string", string},
    Entry{"safe", safe},
    Entry{"escape", escape},
    Entry{"e", escape},
    Entry{"forceescape", forceescape},
    Entry{"replace", replace},
    Entry{"indent", indent},
    Entry{"truncate", truncate},
    Entry{"wordcount", wordcount},
    Entry{"format", format},
    Entry{"urlencode", urlencode},
    Entry{"tojson", tojson},
    Entry{"int", int_filter},
    Entry{"float", float_filter},
    Entry{"abs", abs_filter},
    Entry{"round", round_filter},
};

}  // namespace

FilterFunction find_text_filter(std::string_view name) {
  const auto found = std::find_if(kFilters.begin(), kFilters.end(), [&](const Entry& entry) { return entry.name == name; });
  return found == kFilters.end() ? nullptr : found->function;
}

FilterFunction find_filter(std::string_view name) {
  const FilterFunction function = find_text_filter(name);
  return function != nullptr ? function : find_sequence_filter(name);
}

}  // namespace baton::jinja
