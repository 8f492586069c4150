#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/unicode.h"

// Python's two ways of formatting: "%5.2f" % x and "{:>8}".format(x).

namespace baton::jinja {
namespace {

constexpr int kMaxWidth = 10'000;
constexpr int kMaxPrecision = 300;

struct Spec {
  std::string fill = " ";
  char align = '\0';  ///< < > ^ =
  char sign = '-';    ///< + - space
  bool alternate = false;
  char grouping = '\0';
  int width = 0;
  int precision = -1;
  char type = '\0';
};

int read_number(std::string_view text, std::size_t& position, int limit) {
  int value = 0;
  while (position < text.size() && text[position] >= '0' && text[position] <= '9') {
    value = value * 10 + (text[position++] - '0');
    if (value > limit) fail("a width or precision in a format is more than {}", limit);
  }
  return value;
}

std::string pad(std::string text, const Spec& spec, char default_align) {
  const std::size_t length = code_point_count(text);
  const auto width = static_cast<std::size_t>(spec.width);
  if (length >= width) return text;
  const std::size_t missing = width - length;
  const char align = spec.align == '\0' ? default_align : spec.align;
  std::size_t left = align == '<' ? 0 : align == '^' ? missing / 2 : missing;
  std::size_t after = 0;
  if (align == '=' && !text.empty() && (text[0] == '-' || text[0] == '+' || text[0] == ' ')) after = 1;
  if (after + 2 <= text.size() && align == '=' && text[after] == '0' && spec.alternate) after += 2;  // 0x
  std::string out = text.substr(0, after);
  for (std::size_t i = 0; i < left; ++i) out += spec.fill;
  out += text.substr(after);
  for (std::size_t i = left; i < missing; ++i) out += spec.fill;
  return out;
}

std::string with_sign(std::string digits, bool negative, const Spec& spec) {
  if (negative) return "-" + digits;
  if (spec.sign == '+' || spec.sign == ' ') return spec.sign + digits;
  return digits;
}

/// Thousands separated, up to the point.
std::string grouped(const std::string& digits, char separator) {
  if (separator == '\0') return digits;
  const std::size_t whole = std::min(digits.find_first_not_of("0123456789"), digits.size());
  std::string out;
  for (std::size_t i = 0; i < whole; ++i) {
    if (i > 0 && (whole - i) % 3 == 0) out += separator;
    out += digits[i];
  }
  return out + digits.substr(whole);
}

std::string integer_text(std::int64_t value, const Spec& spec) {
  const std::uint64_t magnitude = value < 0 ? 0 - static_cast<std::uint64_t>(value) : static_cast<std::uint64_t>(value);
  std::string digits;
  switch (spec.type) {
    case 'b': digits = fmt::format("{:b}", magnitude); break;
    case 'o': digits = fmt::format("{:o}", magnitude); break;
    case 'x': digits = fmt::format("{:x}", magnitude); break;
    case 'X': digits = fmt::format("{:X}", magnitude); break;
    default: digits = grouped(fmt::format("{}", magnitude), spec.grouping);
  }
  if (spec.alternate && std::string_view("boxX").find(spec.type) != std::string_view::npos) {
    digits = fmt::format("0{}{}", spec.type, digits);
  }
  return with_sign(std::move(digits), value < 0, spec);
}

std::string real_text(double value, const Spec& spec) {
  const bool negative = std::signbit(value) && !std::isnan(value);
  const double magnitude = std::fabs(value);
  std::string digits;
  if (!std::isfinite(value)) {
    digits = std::isnan(value) ? "nan" : "inf";
    if (spec.type == 'F' || spec.type == 'E' || spec.type == 'G') digits = to_upper(digits);
    if (spec.type == '%') digits += '%';
  } else if (spec.type == '\0' && spec.precision < 0) {
    digits = real_repr(magnitude);
  } else {
    char type = spec.type == '\0' || spec.type == 'n' ? 'g' : spec.type;
    const bool percent = type == '%';
    if (percent) type = 'f';
    const std::string format = std::string(spec.alternate ? "%#.*" : "%.*") + type;
    char buffer[1024];  // more than the digits of the largest double and kMaxPrecision
    const int precision = spec.precision < 0 ? 6 : spec.precision;
    const int length = std::snprintf(buffer, sizeof buffer, format.c_str(), precision, percent ? magnitude * 100 : magnitude);
    digits.assign(buffer, static_cast<std::size_t>(std::min<int>(length, sizeof buffer - 1)));
    if (spec.type == '\0' && digits.find_first_of(".en") == std::string::npos) digits += ".0";
    if (percent) digits += '%';
  }
  return with_sign(grouped(digits, spec.grouping), negative, spec);
}

bool is_real_type(char type) { return std::string_view("eEfFgG%").find(type) != std::string_view::npos && type != '\0'; }

Spec parse_spec(std::string_view text) {
  Spec spec;
  std::size_t position = 0;
  const auto is_align = [&](std::size_t at) { return at < text.size() && std::string_view("<>^=").find(text[at]) != std::string_view::npos; };
  std::size_t after_fill = 0;
  if (!text.empty()) decode_utf8(text, after_fill);
  if (!text.empty() && is_align(after_fill)) {
    spec.fill = std::string(text.substr(0, after_fill));
    spec.align = text[after_fill];
    position = after_fill + 1;
  } else if (is_align(0)) {
    spec.align = text[position++];
  }
  const auto at = [&] { return position < text.size() ? text[position] : '\0'; };
  if (at() == '+' || at() == '-' || at() == ' ') spec.sign = text[position++];
  if (at() == '#') {
    spec.alternate = true;
    ++position;
  }
  if (at() == '0') {
    ++position;
    if (spec.align == '\0') {
      spec.fill = "0";
      spec.align = '=';
    }
  }
  spec.width = read_number(text, position, kMaxWidth);
  if (at() == ',' || at() == '_') spec.grouping = text[position++];
  if (at() == '.') {
    ++position;
    if (at() < '0' || at() > '9') fail("the format '{}' lacks its precision", text);
    spec.precision = read_number(text, position, kMaxPrecision);
  }
  if (position < text.size()) spec.type = text[position++];
  if (position != text.size()) fail("invalid format '{}'", text);
  return spec;
}

/// format(value, spec)
std::string format_value(Interpreter& interpreter, const Value& value, std::string_view text) {
  if (text.empty()) return interpreter.text(value);
  Spec spec = parse_spec(text);
  if (value.is_string()) {
    if ((spec.type != '\0' && spec.type != 's') || spec.align == '=') fail("the format '{}' does not fit a string", text);
    std::string out = value.as_string();
    if (spec.precision >= 0 && code_point_count(out) > static_cast<std::size_t>(spec.precision)) {
      out.resize(code_point_offsets(out)[static_cast<std::size_t>(spec.precision)]);
    }
    return pad(std::move(out), spec, '<');
  }
  if (!value.is_number()) fail("the format '{}' does not fit '{}'", text, type_name(value));
  if (value.is_integral() && spec.type == 'c') {
    std::string out;
    append_utf8(out, static_cast<char32_t>(std::clamp<std::int64_t>(value.as_integer(), 0, 0x10ffff)));
    return pad(std::move(out), spec, '<');
  }
  if (value.is_integral() && !is_real_type(spec.type)) {
    if (spec.precision >= 0 || (spec.type != '\0' && std::string_view("bdnoxX").find(spec.type) == std::string_view::npos)) {
      fail("the format '{}' does not fit an integer", text);
    }
    return pad(integer_text(value.as_integer(), spec), spec, '>');
  }
  if (spec.type != '\0' && spec.type != 'n' && !is_real_type(spec.type)) fail("the format '{}' does not fit a float", text);
  return pad(real_text(value.as_real(), spec), spec, '>');
}

/// One "%..." conversion of "format % arguments".
class PrintfFormatter {
 public:
  PrintfFormatter(Interpreter& interpreter, std::string_view format, const Value& arguments)
      : interpreter_(interpreter), format_(format), arguments_(arguments) {
    is_tuple_ = arguments.is(Kind::sequence) && arguments.as_sequence().is_tuple();
  }

  std::string run() {
    std::string out;
    while (position_ < format_.size()) {
      const char c = format_[position_++];
      if (c != '%') {
        out += c;
        continue;
      }
      if (at() == '%') {
        ++position_;
        out += '%';
        continue;
      }
      out += convert();
      interpreter_.budget().check_size(out.size());
    }
    const bool all_used = is_tuple_ ? used_ == arguments_.as_sequence().items.size() : used_ > 0 || named_ || arguments_.is(Kind::dict) || arguments_.is_undefined();
    if (!all_used && !(arguments_.is(Kind::sequence) && !is_tuple_)) fail("not all arguments of a %-format were used");
    return out;
  }

 private:
  char at() const { return position_ < format_.size() ? format_[position_] : '\0'; }

  Value next_argument() {
    if (named_) fail("a %-format mixes names and positions");
    if (!is_tuple_) {
      if (used_++ > 0) fail("a %-format has too few arguments");
      return arguments_;
    }
    if (used_ >= arguments_.as_sequence().items.size()) fail("a %-format has too few arguments");
    return arguments_.as_sequence().items[used_++];
  }

  std::string convert() {
    Value value;
    bool has_value = false;
    if (at() == '(') {
      const std::size_t close = format_.find(')', position_);
      if (close == std::string_view::npos) fail("a name in a %-format is never closed");
      if (!arguments_.is(Kind::dict)) fail("a %-format with names needs a dict");
      const std::string_view name = format_.substr(position_ + 1, close - position_ - 1);
      const Value* found = arguments_.as_dict().find(name);
      if (found == nullptr) fail("a %-format names '{}', which is not there", name);
      value = *found;
      has_value = named_ = true;
      position_ = close + 1;
    }
    Spec spec;
    bool zero = false;
    for (; std::string_view("-+ #0").find(at()) != std::string_view::npos && at() != '\0'; ++position_) {
      if (at() == '-') spec.align = '<';
      else if (at() == '0') zero = true;
      else if (at() == '#') spec.alternate = true;
      else if (spec.sign != '+') spec.sign = at();
    }
    spec.width = number_or_star(kMaxWidth);
    if (spec.width < 0) {
      spec.width = -spec.width;
      spec.align = '<';
    }
    if (at() == '.') {
      ++position_;
      spec.precision = std::max(0, number_or_star(kMaxPrecision));
    }
    while (at() == 'l' || at() == 'h' || at() == 'L') ++position_;
    if (at() == '\0') fail("a %-format ends too early");
    const char type = format_[position_++];
    if (!has_value) value = next_argument();
    if (zero && spec.align == '\0' && type != 's' && type != 'r' && type != 'c') {
      spec.fill = "0";
      spec.align = '=';
    }
    return pad(conversion(type, value, spec), spec, '>');
  }

  int number_or_star(int limit) {
    if (at() != '*') return read_number(format_, position_, limit);
    ++position_;
    const Value value = next_argument();
    if (!value.is_integral() || std::abs(value.as_integer()) > limit) fail("'*' in a %-format needs an integer up to {}", limit);
    return static_cast<int>(value.as_integer());
  }

  std::string conversion(char type, const Value& value, Spec& spec) {
    switch (type) {
      case 's':
      case 'r':
      case 'a': {
        std::string out = type == 's' ? interpreter_.text(value) : to_repr(value, interpreter_.budget());
        if (spec.precision >= 0 && code_point_count(out) > static_cast<std::size_t>(spec.precision)) {
          out.resize(code_point_offsets(out)[static_cast<std::size_t>(spec.precision)]);
        }
        return out;
      }
      case 'd': case 'i': case 'u': case 'x': case 'X': case 'o': {
        if (!value.is_number()) fail("%{} needs a number, not '{}'", type, type_name(value));
        if (value.is(Kind::real) && (!std::isfinite(value.as_real()) || std::fabs(value.as_real()) >= 9.2e18)) {
          fail("%{} cannot show this float", type);
        }
        if (value.is(Kind::real) && (type == 'x' || type == 'X' || type == 'o')) fail("%{} needs an integer", type);
        const std::int64_t number = value.is(Kind::real) ? static_cast<std::int64_t>(value.as_real()) : value.as_integer();
        spec.type = type == 'i' || type == 'u' ? 'd' : type;
        std::string out = integer_text(number, spec);
        if (spec.precision > 0) {  // a minimum of digits
          const std::size_t sign = out.find_first_of("0123456789abcdefABCDEF");
          const std::size_t digits = out.size() - sign;
          if (digits < static_cast<std::size_t>(spec.precision)) out.insert(sign, static_cast<std::size_t>(spec.precision) - digits, '0');
        }
        return out;
      }
      case 'e': case 'E': case 'f': case 'F': case 'g': case 'G':
        if (!value.is_number()) fail("%{} needs a number, not '{}'", type, type_name(value));
        spec.type = type;
        return real_text(value.as_real(), spec);
      case 'c': {
        std::string out;
        if (value.is_string() && code_point_count(value.as_string()) == 1) return value.as_string();
        if (!value.is_integral() || value.as_integer() < 0 || value.as_integer() > 0x10ffff) fail("%c needs one character");
        append_utf8(out, static_cast<char32_t>(value.as_integer()));
        return out;
      }
      default: fail("unsupported conversion %{}", type);
    }
  }

  Interpreter& interpreter_;
  std::string_view format_;
  const Value& arguments_;
  std::size_t position_ = 0;
  std::size_t used_ = 0;
  bool is_tuple_ = false;
  bool named_ = false;
};

/// The replacement fields of str.format().
class BraceFormatter {
 public:
  BraceFormatter(Interpreter& interpreter, const Arguments& arguments) : interpreter_(interpreter), arguments_(arguments) {}

  std::string run(std::string_view format, int level = 0) {
    if (level > 2) fail("the fields of a format are nested too deep");
    std::string out;
    for (std::size_t i = 0; i < format.size(); ++i) {
      const char c = format[i];
      if (c != '{' && c != '}') {
        out += c;
        continue;
      }
      if (i + 1 < format.size() && format[i + 1] == c) {
        out += c;
        ++i;
        continue;
      }
      if (c == '}') fail("a format has a single '}}'");
      const std::size_t end = field_end(format, i + 1);
      out += field(format.substr(i + 1, end - i - 1), level);
      interpreter_.budget().check_size(out.size());
      i = end;
    }
    return out;
  }

 private:
  static std::size_t field_end(std::string_view format, std::size_t position) {
    int open = 1;
    for (; position < format.size(); ++position) {
      if (format[position] == '{') ++open;
      if (format[position] == '}' && --open == 0) return position;
    }
    fail("a format has a '{{' that is never closed");
  }

  std::string field(std::string_view text, int level) {
    std::size_t split = 0;
    int brackets = 0;
    while (split < text.size() && (brackets > 0 || (text[split] != ':' && text[split] != '!'))) {
      if (text[split] == '[') ++brackets;
      if (text[split] == ']' && brackets > 0) --brackets;
      ++split;
    }
    Value value = lookup(text.substr(0, split));
    char conversion = '\0';
    if (split < text.size() && text[split] == '!') {
      if (split + 1 >= text.size()) fail("a format ends after '!'");
      conversion = text[split + 1];
      split += 2;
      if (split < text.size() && text[split] != ':') fail("a format has more than one letter after '!'");
    }
    if (conversion == 'r' || conversion == 'a') value = interpreter_.string(to_repr(value, interpreter_.budget()));
    else if (conversion == 's') value = interpreter_.string(interpreter_.text(value));
    else if (conversion != '\0') fail("unknown conversion '!{}' in a format", conversion);
    const std::string spec = split < text.size() ? run(text.substr(split + 1), level + 1) : std::string();
    return format_value(interpreter_, value, spec);
  }

  Value lookup(std::string_view path) {
    const std::size_t end = std::min(path.find_first_of(".["), path.size());
    Value value = argument(path.substr(0, end));
    std::string_view rest = path.substr(end);
    while (!rest.empty()) {
      if (rest[0] == '.') {
        const std::size_t stop = std::min(rest.find_first_of(".[", 1), rest.size());
        value = interpreter_.attribute(value, rest.substr(1, stop - 1));
        rest = rest.substr(stop);
      } else {
        const std::size_t close = rest.find(']');
        if (rest[0] != '[' || close == std::string_view::npos) fail("a format has an invalid field '{}'", path);
        const std::string_view key = rest.substr(1, close - 1);
        std::int64_t index = 0;
        const auto [stop, code] = std::from_chars(key.data(), key.data() + key.size(), index);
        const bool number = code == std::errc() && stop == key.data() + key.size() && !key.starts_with('-');
        value = interpreter_.item(value, number ? Value::integer(index) : Value::string(std::string(key)));
        rest = rest.substr(close + 1);
      }
      if (value.is_undefined()) fail("{}", value.undefined_reason());
    }
    return value;
  }

  Value argument(std::string_view name) {
    const bool is_number = !name.empty() && name.find_first_not_of("0123456789") == std::string_view::npos;
    if (name.empty() || is_number) {
      std::size_t index = next_;
      if (is_number) {
        if (std::from_chars(name.data(), name.data() + name.size(), index).ec != std::errc()) fail("a format has an invalid index");
        if (next_ > 0) fail("a format mixes numbered and automatic fields");
        numbered_ = true;
      } else {
        if (numbered_) fail("a format mixes numbered and automatic fields");
        ++next_;
      }
      if (index >= arguments_.positional.size()) fail("a format needs more than its {} arguments", arguments_.positional.size());
      return arguments_.positional[index];
    }
    for (const auto& [key, value] : arguments_.keyword) {
      if (key == name) return value;
    }
    fail("a format names '{}', which is not given", name);
  }

  Interpreter& interpreter_;
  const Arguments& arguments_;
  std::size_t next_ = 0;
  bool numbered_ = false;
};

}  // namespace

std::string format_printf(Interpreter& interpreter, std::string_view format, const Value& arguments) {
  interpreter.budget().charge_bytes(format.size());
  return PrintfFormatter(interpreter, format, arguments).run();
}

std::string format_braces(Interpreter& interpreter, std::string_view format, const Arguments& arguments) {
  interpreter.budget().charge_bytes(format.size());
  return BraceFormatter(interpreter, arguments).run(format);
}

}  // namespace baton::jinja
