#include <algorithm>
#include <array>
#include <cmath>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/unicode.h"

// The methods of Python's str, dict, list, tuple and float that a sandboxed template may call.

namespace baton::jinja {
namespace {

struct Entry {
  std::string_view name;
  MethodFunction function;
};

template <std::size_t N>
MethodFunction lookup(const std::array<Entry, N>& entries, std::string_view name) {
  const auto found = std::find_if(entries.begin(), entries.end(), [&](const Entry& entry) { return entry.name == name; });
  return found == entries.end() ? nullptr : found->function;
}

/// The text of a method's object, with the work on it charged.
const std::string& subject(Interpreter& interpreter, const Value& self) {
  interpreter.budget().charge_bytes(self.as_string().size());
  return self.as_string();
}

Value list_of(Interpreter& interpreter, const std::vector<std::string_view>& parts) {
  interpreter.budget().charge(parts.size());
  std::vector<Value> items;
  items.reserve(parts.size());
  for (const std::string_view part : parts) items.push_back(interpreter.string(std::string(part)));
  return interpreter.list(std::move(items));
}

// ---- str: stripping and splitting

template <bool Left, bool Right>
Value strip(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("strip()", arguments, {"chars"});
  std::string_view text = subject(interpreter, self);
  if (parameters.has(0) && !parameters[0].is_none()) {
    const std::string& characters = parameters.string(0);
    interpreter.budget().charge_bytes(characters.size() * 8);
    if (Left) text = strip_left(text, characters);
    if (Right) text = strip_right(text, characters);
  } else {
    if (Left) text = strip_left(text);
    if (Right) text = strip_right(text);
  }
  return interpreter.string(std::string(text));
}

/// Splits at runs of space, at most `limit` times (always when negative). What is left keeps its end.
std::vector<std::string_view> split_at_space(std::string_view text, std::int64_t limit) {
  std::vector<std::string_view> parts;
  text = strip_left(text);
  while (!text.empty()) {
    if (limit >= 0 && static_cast<std::int64_t>(parts.size()) >= limit) {
      parts.push_back(text);
      break;
    }
    std::size_t end = 0;
    std::size_t position = 0;
    while (position < text.size()) {
      end = position;
      if (is_space(decode_utf8(text, position))) break;
      end = position;
    }
    parts.push_back(text.substr(0, end));
    text = strip_left(text.substr(end));
  }
  return parts;
}

/// The last `limit` words, and before them the rest of the text, which keeps its start.
std::vector<std::string_view> rsplit_at_space(std::string_view text, std::int64_t limit) {
  std::vector<std::string_view> words = split_at_space(text, -1);
  if (limit < 0 || static_cast<std::int64_t>(words.size()) <= limit) return words;
  const std::size_t kept = words.size() - static_cast<std::size_t>(limit);
  const std::string_view last = words[kept - 1];
  const auto end = static_cast<std::size_t>(last.data() + last.size() - text.data());
  words.erase(words.begin(), words.begin() + static_cast<std::ptrdiff_t>(kept) - 1);
  words.front() = text.substr(0, end);
  return words;
}

Value split(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("split()", arguments, {"sep", "maxsplit"});
  std::string_view text = subject(interpreter, self);
  const std::int64_t limit = parameters.integer(1, -1);
  if (!parameters.has(0) || parameters[0].is_none()) return list_of(interpreter, split_at_space(text, limit));
  const std::string& separator = parameters.string(0);
  if (separator.empty()) fail("split() needs a separator that is not empty");
  std::vector<std::string_view> parts;
  std::size_t start = 0;
  for (std::size_t found = text.find(separator); found != std::string_view::npos; found = text.find(separator, start)) {
    if (limit >= 0 && static_cast<std::int64_t>(parts.size()) >= limit) break;
    parts.push_back(text.substr(start, found - start));
    start = found + separator.size();
  }
  parts.push_back(text.substr(start));
  return list_of(interpreter, parts);
}

Value rsplit(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("rsplit()", arguments, {"sep", "maxsplit"});
  std::string_view text = subject(interpreter, self);
  const std::int64_t limit = parameters.integer(1, -1);
  if (!parameters.has(0) || parameters[0].is_none()) {
    return list_of(interpreter, rsplit_at_space(text, limit));
  }
  const std::string& separator = parameters.string(0);
  if (separator.empty()) fail("rsplit() needs a separator that is not empty");
  std::vector<std::string_view> parts;
  while (limit < 0 || static_cast<std::int64_t>(parts.size()) < limit) {
    const std::size_t found = text.rfind(separator);
    if (found == std::string_view::npos) break;
    parts.push_back(text.substr(found + separator.size()));
    text = text.substr(0, found);
  }
  parts.push_back(text);
  std::reverse(parts.begin(), parts.end());
  return list_of(interpreter, parts);
}

Value splitlines(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("splitlines()", arguments, {"keepends"});
  return list_of(interpreter, split_lines(subject(interpreter, self), parameters.integer(0, 0) != 0));
}

template <bool FromRight>
Value partition(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("partition()", arguments, {"sep"}, 1);
  const std::string& text = subject(interpreter, self);
  const std::string& separator = parameters.string(0);
  if (separator.empty()) fail("partition() needs a separator that is not empty");
  const std::size_t found = FromRight ? text.rfind(separator) : text.find(separator);
  const auto string = [&](std::string part) { return interpreter.string(std::move(part)); };
  if (found == std::string::npos) {
    if (FromRight) return interpreter.tuple({string(""), string(""), self});
    return interpreter.tuple({self, string(""), string("")});
  }
  return interpreter.tuple({string(text.substr(0, found)), string(separator), string(text.substr(found + separator.size()))});
}

// ---- str: searching

/// text[start:end] by code points, for methods that take such a range; also where it starts.
struct Part {
  std::string_view text;
  std::size_t first;  ///< code points before it
  bool valid;         ///< false when the start lies behind the end of the text
};

Part part_of(std::string_view text, const Parameters& parameters, std::size_t start_index) {
  const bool has_start = parameters.has(start_index) && !parameters[start_index].is_none();
  const bool has_stop = parameters.has(start_index + 1) && !parameters[start_index + 1].is_none();
  if (!has_start && !has_stop) return {text, 0, true};
  const std::vector<std::size_t> offsets = code_point_offsets(text);
  const auto size = static_cast<std::int64_t>(offsets.size() - 1);
  const auto bound = [&](std::size_t index, bool given, std::int64_t fallback) {
    std::int64_t value = given ? parameters.integer(index, 0) : fallback;
    if (value < 0) value = value < -size ? 0 : value + size;
    return value;
  };
  const std::int64_t start = bound(start_index, has_start, 0);
  const std::int64_t stop = std::min(bound(start_index + 1, has_stop, size), size);
  if (start > size || start > stop) return {{}, static_cast<std::size_t>(std::min(start, size)), false};
  const std::size_t from = offsets[static_cast<std::size_t>(start)];
  return {text.substr(from, offsets[static_cast<std::size_t>(stop)] - from), static_cast<std::size_t>(start), true};
}

template <bool AtStart>
Value starts_or_ends(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters(AtStart ? "startswith()" : "endswith()", arguments, {"prefix", "start", "end"}, 1);
  const Part part = part_of(self.as_string(), parameters, 1);
  const auto matches = [&](const std::string& affix) {
    interpreter.budget().charge_bytes(affix.size());
    return part.valid && (AtStart ? part.text.starts_with(affix) : part.text.ends_with(affix));
  };
  const Value& affix = parameters[0];
  if (affix.is(Kind::sequence) && affix.as_sequence().is_tuple()) {
    for (const Value& one : affix.as_sequence().items) {
      if (!one.is_string()) fail("startswith() and endswith() need strings");
      if (matches(one.as_string())) return Value::boolean(true);
    }
    return Value::boolean(false);
  }
  return Value::boolean(matches(parameters.string(0)));
}

template <bool FromRight, bool MustExist>
Value find(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("find()", arguments, {"sub", "start", "end"}, 1);
  const Part part = part_of(subject(interpreter, self), parameters, 1);
  const std::string& sub = parameters.string(0);
  const std::size_t found = !part.valid ? std::string_view::npos : FromRight ? part.text.rfind(sub) : part.text.find(sub);
  if (found == std::string_view::npos) {
    if (MustExist) fail("the substring was not found");
    return Value::integer(-1);
  }
  return Value::integer(static_cast<std::int64_t>(part.first + code_point_count(part.text.substr(0, found))));
}

Value count(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("count()", arguments, {"sub", "start", "end"}, 1);
  const Part part = part_of(subject(interpreter, self), parameters, 1);
  const std::string& sub = parameters.string(0);
  if (!part.valid) return Value::integer(0);
  if (sub.empty()) return Value::integer(static_cast<std::int64_t>(code_point_count(part.text)) + 1);
  std::int64_t total = 0;
  for (std::size_t at = part.text.find(sub); at != std::string_view::npos; at = part.text.find(sub, at + sub.size())) ++total;
  return Value::integer(total);
}

// ---- str: changing

std::string replaced(Interpreter& interpreter, std::string_view text, std::string_view from, std::string_view to, std::int64_t limit) {
  Budget& budget = interpreter.budget();
  std::string out;
  std::int64_t done = 0;
  std::size_t position = 0;
  const auto more = [&] { return limit < 0 || done < limit; };
  if (from.empty()) {  // between all characters
    while (more()) {
      out += to;
      budget.check_size(out.size());
      ++done;
      if (position >= text.size()) return out;
      const std::size_t start = position;
      decode_utf8(text, position);
      out += text.substr(start, position - start);
    }
    return out + std::string(text.substr(position));
  }
  for (std::size_t found = text.find(from); found != std::string_view::npos && more(); found = text.find(from, position)) {
    out += text.substr(position, found - position);
    out += to;
    budget.check_size(out.size());
    position = found + from.size();
    ++done;
  }
  out += text.substr(position);
  return out;
}

Value replace(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("replace()", arguments, {"old", "new", "count"}, 2);
  return interpreter.string(replaced(interpreter, subject(interpreter, self), parameters.string(0), parameters.string(1),
                                     parameters.integer(2, -1)));
}

template <std::string (*Change)(std::string_view)>
Value change_case(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("the method", arguments, {});
  return interpreter.string(Change(subject(interpreter, self)));
}

Value join(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("join()", arguments, {"iterable"}, 1);
  std::string out;
  bool first = true;
  for (const Value& item : interpreter.elements(parameters[0])) {
    if (!item.is_string()) fail("join() needs strings, not '{}'", type_name(item));
    if (!first) out += self.as_string();
    first = false;
    interpreter.budget().check_size(out.size() + item.as_string().size());
    out += item.as_string();
  }
  return interpreter.string(std::move(out));
}

template <bool Prefix>
Value remove_affix(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters(Prefix ? "removeprefix()" : "removesuffix()", arguments, {"affix"}, 1);
  std::string_view text = subject(interpreter, self);
  const std::string& affix = parameters.string(0);
  if (Prefix && text.starts_with(affix)) text.remove_prefix(affix.size());
  if (!Prefix && text.ends_with(affix)) text.remove_suffix(affix.size());
  return interpreter.string(std::string(text));
}

/// align: '<' ljust, '>' rjust, '^' center.
template <char Align>
Value justify(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("the method", arguments, {"width", "fillchar"}, 1);
  const std::string fill = parameters.has(1) ? parameters.string(1) : " ";
  if (code_point_count(fill) != 1) fail("the fill character must be one character");
  const std::string& text = subject(interpreter, self);
  const auto length = static_cast<std::int64_t>(code_point_count(text));
  const std::int64_t width = parameters.integer(0, 0);
  if (width <= length) return self;
  interpreter.budget().check_size(static_cast<std::size_t>(width));
  const std::int64_t missing = width - length;
  // Python's center() puts the odd space to the left when the width is odd.
  const std::int64_t left = Align == '<' ? 0 : Align == '>' ? missing : missing / 2 + (missing & width & 1);
  std::string out;
  for (std::int64_t i = 0; i < left; ++i) out += fill;
  out += text;
  for (std::int64_t i = left; i < missing; ++i) out += fill;
  return interpreter.string(std::move(out));
}

Value zfill(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("zfill()", arguments, {"width"}, 1);
  std::string text = subject(interpreter, self);
  const auto length = static_cast<std::int64_t>(code_point_count(text));
  const std::int64_t width = parameters.integer(0, 0);
  if (width <= length) return self;
  interpreter.budget().check_size(static_cast<std::size_t>(width));
  const bool sign = !text.empty() && (text[0] == '-' || text[0] == '+');
  text.insert(sign ? 1 : 0, static_cast<std::size_t>(width - length), '0');
  return interpreter.string(std::move(text));
}

Value expandtabs(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("expandtabs()", arguments, {"tabsize"});
  const std::int64_t size = std::clamp<std::int64_t>(parameters.integer(0, 8), 0, 1000);
  std::string out;
  std::int64_t column = 0;
  for (const char c : subject(interpreter, self)) {
    if (c == '\t') {
      const std::int64_t spaces = size == 0 ? 0 : size - column % size;
      out.append(static_cast<std::size_t>(spaces), ' ');
      column += spaces;
      interpreter.budget().check_size(out.size());
      continue;
    }
    out += c;
    if (c == '\n' || c == '\r') column = 0;
    else if ((static_cast<unsigned char>(c) & 0xc0) != 0x80) ++column;
  }
  return interpreter.string(std::move(out));
}

Value format(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  return interpreter.string(format_braces(interpreter, self.as_string(), arguments));
}

Value format_map(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("format_map()", arguments, {"mapping"}, 1);
  if (!parameters[0].is(Kind::dict)) fail("format_map() needs a dict");
  Arguments named;
  for (const auto& [key, value] : parameters[0].as_dict().entries) {
    if (key.is_string()) named.keyword.emplace_back(key.as_string(), value);
  }
  return interpreter.string(format_braces(interpreter, self.as_string(), named));
}

// ---- str: questions

/// Whether all characters are such, and there is at least one.
template <bool (*Predicate)(char32_t)>
Value all_are(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("the method", arguments, {});
  const std::string& text = subject(interpreter, self);
  for (std::size_t position = 0; position < text.size();) {
    if (!Predicate(decode_utf8(text, position))) return Value::boolean(false);
  }
  return Value::boolean(!text.empty());
}

bool is_alphanumeric(char32_t code) { return is_alphabetic(code) || is_decimal(code); }

template <const char* Name>
Value case_question(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("the method", arguments, {});
  Arguments none;
  return Value::boolean(interpreter.apply_test(Name, self, none));
}
constexpr char kLower[] = "lower";
constexpr char kUpper[] = "upper";

constexpr std::array kStringMethods = {
    Entry{"strip", strip<true, true>},
    Entry{"lstrip", strip<true, false>},
    Entry{"rstrip", strip<false, true>},
    Entry{"split", split},
    Entry{"rsplit", rsplit},
    Entry{"splitlines", splitlines},
    Entry{"partition", partition<false>},
    Entry{"rpartition", partition<true>},
    Entry{"startswith", starts_or_ends<true>},
    Entry{"endswith", starts_or_ends<false>},
    Entry{"find", find<false, false>},
    Entry{"rfind", find<true, false>},
    Entry{"index", find<false, true>},
    Entry{"rindex", find<true, true>},
    Entry{"count", count},
    Entry{"replace", replace},
    Entry{"upper", change_case<to_upper>},
    Entry{"lower", change_case<to_lower>},
    Entry{"casefold", change_case<to_lower>},
    Entry{"title", change_case<to_title>},
    Entry{"capitalize", change_case<capitalized>},
    Entry{"swapcase", change_case<swap_case>},
    Entry{"join", join},
    Entry{"removeprefix", remove_affix<true>},
    Entry{"removesuffix", remove_affix<false>},
    Entry{"center", justify<'^'>},
    Entry{"ljust", justify<'<'>},
    Entry{"rjust", justify<'>'>},
    Entry{"zfill", zfill},
    Entry{"expandtabs", expandtabs},
    Entry{"format", format},
    Entry{"format_map", format_map},
    Entry{"isdigit", all_are<is_decimal>},
    Entry{"isdecimal", all_are<is_decimal>},
    Entry{"isnumeric", all_are<is_decimal>},
    Entry{"isalpha", all_are<is_alphabetic>},
    Entry{"isalnum", all_are<is_alphanumeric>},
    Entry{"isspace", all_are<is_space>},
    Entry{"islower", case_question<kLower>},
    Entry{"isupper", case_question<kUpper>},
};

// ---- dict

Value dict_get(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  if (!arguments.keyword.empty()) fail("get() takes no keyword arguments");
  const Parameters parameters("get()", arguments, {"key", "default"}, 1);
  if (!hashable(parameters[0])) fail("a {} cannot be the key of a dict", type_name(parameters[0]));
  if (const Value* found = self.as_dict().find(parameters[0], interpreter.budget())) return *found;
  return parameters.has(1) ? parameters[1] : Value::none();
}

template <SequenceKind View>
Value dict_view(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("the method", arguments, {});
  const auto& entries = self.as_dict().entries;
  interpreter.budget().charge(entries.size());
  std::vector<Value> items;
  items.reserve(entries.size());
  for (const auto& [key, value] : entries) {
    if (View == SequenceKind::dict_keys) items.push_back(key);
    else if (View == SequenceKind::dict_values) items.push_back(value);
    else items.push_back(interpreter.tuple({key, value}));
  }
  return make_sequence(View, std::move(items), interpreter.budget());
}

Value copy(Interpreter&, const Value& self, Arguments& arguments) {
  const Parameters parameters("copy()", arguments, {});
  return self;  // nothing that a template can do would tell the copy from the original
}

constexpr std::array kDictMethods = {
    Entry{"get", dict_get},
    Entry{"items", dict_view<SequenceKind::dict_items>},
    Entry{"keys", dict_view<SequenceKind::dict_keys>},
    Entry{"values", dict_view<SequenceKind::dict_values>},
    Entry{"copy", copy},
};

// ---- list, tuple, range

Value sequence_index(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("index()", arguments, {"value"}, 1);
  const auto& items = self.as_sequence().items;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (equals(items[i], parameters[0], interpreter.budget())) return Value::integer(static_cast<std::int64_t>(i));
  }
  fail("the value is not in the {}", type_name(self));
}

Value sequence_count(Interpreter& interpreter, const Value& self, Arguments& arguments) {
  const Parameters parameters("count()", arguments, {"value"}, 1);
  std::int64_t total = 0;
  for (const Value& item : self.as_sequence().items) total += equals(item, parameters[0], interpreter.budget());
  return Value::integer(total);
}

constexpr std::array kSequenceMethods = {Entry{"index", sequence_index}, Entry{"count", sequence_count}, Entry{"copy", copy}};

Value real_is_integer(Interpreter&, const Value& self, Arguments& arguments) {
  const Parameters parameters("is_integer()", arguments, {});
  return Value::boolean(std::isfinite(self.as_real()) && std::trunc(self.as_real()) == self.as_real());
}

constexpr std::array<std::string_view, 5> kDictMutators = {"clear", "pop", "popitem", "setdefault", "update"};
constexpr std::array<std::string_view, 8> kListMutators = {"append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"};

}  // namespace

MethodFunction find_method(const Value& self, std::string_view name) {
  switch (self.kind()) {
    case Kind::string: return lookup(kStringMethods, name);
    case Kind::dict: return lookup(kDictMethods, name);
    case Kind::sequence:
      if (!self.as_sequence().is_indexable()) return nullptr;
      if (name == "copy" && self.as_sequence().kind != SequenceKind::list) return nullptr;
      return lookup(kSequenceMethods, name);
    case Kind::real: return name == "is_integer" ? real_is_integer : nullptr;
    default: return nullptr;
  }
}

bool is_forbidden_method(const Value& self, std::string_view name) {
  const auto contains = [&](const auto& names) { return std::find(names.begin(), names.end(), name) != names.end(); };
  if (self.is(Kind::dict)) return contains(kDictMutators);
  return self.is(Kind::sequence) && self.as_sequence().kind == SequenceKind::list && contains(kListMutators);
}

}  // namespace baton::jinja
