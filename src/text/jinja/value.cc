#include "text/jinja/value.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "text/jinja/unicode.h"

namespace baton::jinja {
namespace {

constexpr int kMaxValueDepth = 200;
/// Dicts of messages are small: up to here a scan is faster than hashing.
constexpr std::size_t kScannedEntries = 8;

int checked_depth(int inner) {
  if (inner + 1 > kMaxValueDepth) fail("lists and dicts are nested more than {} levels deep", kMaxValueDepth);
  return inner + 1;
}

bool sequences_equal(const Sequence& left, const Sequence& right, Budget& budget) {
  if (left.items.size() != right.items.size()) return false;
  for (std::size_t i = 0; i < left.items.size(); ++i) {
    if (!equals(left.items[i], right.items[i], budget)) return false;
  }
  return true;
}

/// Values of these kinds are compared element by element when both are the same.
bool same_sequence_type(const Sequence& left, const Sequence& right) {
  if (left.kind == SequenceKind::iterator) return false;
  return left.kind == right.kind || (left.is_tuple() && right.is_tuple());
}

bool dicts_equal(const Dict& left, const Dict& right, Budget& budget) {
  if (left.entries.size() != right.entries.size()) return false;
  for (const auto& [key, value] : left.entries) {
    const Value* other = right.find(key, budget);
    if (other == nullptr || !equals(value, *other, budget)) return false;
  }
  return true;
}

std::string_view sequence_type_name(const Sequence& sequence) {
  switch (sequence.kind) {
    case SequenceKind::list: return "list";
    case SequenceKind::tuple:
    case SequenceKind::group: return "tuple";
    case SequenceKind::range: return "range";
    case SequenceKind::dict_items: return "dict_items";
    case SequenceKind::dict_keys: return "dict_keys";
    case SequenceKind::dict_values: return "dict_values";
    case SequenceKind::iterator: return "generator";
  }
  return "list";
}

void append_sequence_repr(std::string& out, const Sequence& sequence, Budget& budget, int level) {
  if (sequence.kind == SequenceKind::range) {
    out += fmt::format("range({}, {}", sequence.range_start, sequence.range_stop);
    if (sequence.range_step != 1) out += fmt::format(", {}", sequence.range_step);
    out += ')';
    return;
  }
  if (sequence.kind == SequenceKind::iterator) {
    out += "<generator object>";
    return;
  }
  const bool view = !sequence.is_tuple() && sequence.kind != SequenceKind::list;
  if (view) out += fmt::format("{}(", sequence_type_name(sequence));
  out += sequence.is_tuple() ? '(' : '[';
  for (std::size_t i = 0; i < sequence.items.size(); ++i) {
    if (i > 0) out += ", ";
    append_repr(out, sequence.items[i], budget, level + 1);
  }
  if (sequence.is_tuple() && sequence.items.size() == 1) out += ',';
  out += sequence.is_tuple() ? ')' : ']';
  if (view) out += ')';
}

}  // namespace

void Budget::out_of_steps() const {
  fail("the template took more than {} steps; it loops too much for this input", limits_.max_steps);
}

void Budget::out_of_bytes() const {
  fail("the template worked through more than {} bytes of text and data", limits_.max_work_bytes);
}

void Budget::too_long(std::size_t size) const {
  fail("a text of {} bytes is longer than the limit of {} bytes", size, limits_.max_output_bytes);
}

void Budget::too_deep() {
  --depth_;  // the guard that would undo it isn't built when this throws
  fail("calls and expressions are nested more than {} levels deep (endless recursion?)", limits_.max_depth);
}

Value Value::boolean(bool value) {
  Value result(Kind::boolean);
  result.integer_ = value ? 1 : 0;
  return result;
}

Value Value::integer(std::int64_t value) {
  Value result(Kind::integer);
  result.integer_ = value;
  return result;
}

Value Value::real(double value) {
  Value result(Kind::real);
  result.real_ = value;
  return result;
}

Value Value::string(std::string text) {
  Value result(Kind::string);
  result.object_ = std::make_shared<StringObject>(std::move(text));
  return result;
}

Value Value::as_markup() const {
  Value result = *this;
  result.markup_ = is_string();
  return result;
}

Value Value::big_integer(std::string digits) {
  Value result(Kind::big_integer);
  result.object_ = std::make_shared<StringObject>(std::move(digits));
  return result;
}

Value Value::undefined(std::string why) {
  Value result;
  result.object_ = std::make_shared<StringObject>(std::move(why));
  return result;
}

Value Value::sequence(std::shared_ptr<Sequence> sequence) {
  Value result(Kind::sequence);
  result.object_ = std::move(sequence);
  return result;
}

Value Value::dict(std::shared_ptr<Dict> dict) {
  Value result(Kind::dict);
  result.object_ = std::move(dict);
  return result;
}

Value Value::object(std::shared_ptr<NativeObject> object) {
  Value result(Kind::object);
  result.object_ = std::move(object);
  return result;
}

const std::string& Value::as_string() const { return static_cast<const StringObject&>(*object_).text; }
Sequence& Value::as_sequence() const { return static_cast<Sequence&>(*object_); }
Dict& Value::as_dict() const { return static_cast<Dict&>(*object_); }
NativeObject& Value::as_object() const { return static_cast<NativeObject&>(*object_); }

std::string Value::undefined_reason() const {
  return object_ == nullptr ? "the value is undefined" : static_cast<const StringObject&>(*object_).text;
}

int Value::depth() const {
  switch (kind_) {
    case Kind::sequence: return as_sequence().depth;
    case Kind::dict: return as_dict().depth;
    case Kind::object: return as_object().depth();
    default: return 0;
  }
}

Value make_sequence(SequenceKind kind, std::vector<Value> items, Budget& budget) {
  budget.charge_bytes(sizeof(Sequence) + items.size() * sizeof(Value));
  int inner = 0;
  for (const Value& item : items) inner = std::max(inner, item.depth());
  auto sequence = std::make_shared<Sequence>();
  sequence->kind = kind;
  sequence->items = std::move(items);
  sequence->depth = checked_depth(inner);
  return Value::sequence(std::move(sequence));
}

std::optional<std::size_t> Dict::find_index(std::string_view key) const {
  if (!index_.empty()) {
    const auto found = index_.find(key);
    if (found == index_.end()) return std::nullopt;
    return found->second;
  }
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const Value& candidate = entries[i].first;
    if (candidate.is_string() && candidate.as_string() == key) return i;
  }
  return std::nullopt;
}

const Value* Dict::find(std::string_view key) const {
  const auto index = find_index(key);
  return index ? &entries[*index].second : nullptr;
}

const Value* Dict::find(const Value& key, Budget& budget) const {
  if (key.is_string()) return find(key.as_string());
  budget.charge(entries.size());
  for (const auto& [candidate, value] : entries) {
    if (!candidate.is_string() && equals(candidate, key, budget)) return &value;
  }
  return nullptr;
}

void Dict::set(Value key, Value value, Budget& budget) {
  if (!hashable(key)) fail("a {} cannot be the key of a dict", type_name(key));
  budget.charge_bytes(2 * sizeof(Value));
  depth = std::max(depth, checked_depth(std::max(key.depth(), value.depth())));
  if (const Value* present = find(key, budget)) {
    *const_cast<Value*>(present) = std::move(value);
    return;
  }
  entries.emplace_back(std::move(key), std::move(value));
  // The index points into the strings themselves, which the entries keep alive.
  if (!index_.empty()) {
    if (entries.back().first.is_string()) index_.emplace(entries.back().first.as_string(), entries.size() - 1);
  } else if (entries.size() > kScannedEntries) {
    for (std::size_t i = 0; i < entries.size(); ++i) {
      if (entries[i].first.is_string()) index_.emplace(entries[i].first.as_string(), i);
    }
  }
}

Value NativeObject::call(Interpreter&, Arguments&) { fail("'{}' object is not callable", type_name()); }

std::optional<Value> NativeObject::attribute(Interpreter&, std::string_view) { return std::nullopt; }

void NativeObject::append_repr(std::string& out, Budget&, int) const { out += fmt::format("<{}>", type_name()); }

bool truthy(const Value& value) {
  switch (value.kind()) {
    case Kind::undefined:
    case Kind::none: return false;
    case Kind::boolean:
    case Kind::integer: return value.as_integer() != 0;
    case Kind::real: return value.as_real() != 0.0;
    case Kind::string: return !value.as_string().empty();
    case Kind::sequence:
      return value.as_sequence().kind == SequenceKind::iterator || !value.as_sequence().items.empty();
    case Kind::dict: return !value.as_dict().entries.empty();
    case Kind::big_integer:
    case Kind::object: return true;
  }
  return false;
}

bool equals(const Value& left, const Value& right, Budget& budget) {
  budget.charge(1);
  if (left.is_number() && right.is_number()) {
    if (left.is(Kind::real) || right.is(Kind::real)) return left.as_real() == right.as_real();
    return left.as_integer() == right.as_integer();
  }
  if (left.kind() != right.kind()) return false;
  switch (left.kind()) {
    case Kind::undefined:
    case Kind::none: return true;
    case Kind::string:
    case Kind::big_integer: return left.identity() == right.identity() || left.as_string() == right.as_string();
    case Kind::sequence:
      return left.identity() == right.identity() ||
             (same_sequence_type(left.as_sequence(), right.as_sequence()) &&
              sequences_equal(left.as_sequence(), right.as_sequence(), budget));
    case Kind::dict:
      return left.identity() == right.identity() || dicts_equal(left.as_dict(), right.as_dict(), budget);
    default: return left.identity() == right.identity();
  }
}

bool less_than(const Value& left, const Value& right, Budget& budget) {
  budget.charge(1);
  if (left.is_undefined()) fail("{}", left.undefined_reason());
  if (right.is_undefined()) fail("{}", right.undefined_reason());
  if (left.is_number() && right.is_number()) {
    if (left.is(Kind::real) || right.is(Kind::real)) return left.as_real() < right.as_real();
    return left.as_integer() < right.as_integer();
  }
  // UTF-8 sorts bytewise as its code points do.
  if (left.is_string() && right.is_string()) return left.as_string() < right.as_string();
  if (left.is(Kind::sequence) && right.is(Kind::sequence)) {
    const Sequence& a = left.as_sequence();
    const Sequence& b = right.as_sequence();
    const bool ordered = (a.is_tuple() && b.is_tuple()) ||
                         (a.kind == SequenceKind::list && b.kind == SequenceKind::list);
    if (ordered) {
      for (std::size_t i = 0; i < std::min(a.items.size(), b.items.size()); ++i) {
        if (!equals(a.items[i], b.items[i], budget)) return less_than(a.items[i], b.items[i], budget);
      }
      return a.items.size() < b.items.size();
    }
  }
  fail("'{}' and '{}' have no order", type_name(left), type_name(right));
}

bool hashable(const Value& value) {
  if (value.is(Kind::dict)) return false;
  if (!value.is(Kind::sequence)) return true;
  const Sequence& sequence = value.as_sequence();
  if (sequence.kind == SequenceKind::range) return true;
  return sequence.is_tuple() && std::all_of(sequence.items.begin(), sequence.items.end(), hashable);
}

std::string_view type_name(const Value& value) {
  if (value.is_markup()) return "Markup";
  switch (value.kind()) {
    case Kind::undefined: return "Undefined";
    case Kind::none: return "NoneType";
    case Kind::boolean: return "bool";
    case Kind::integer:
    case Kind::big_integer: return "int";
    case Kind::real: return "float";
    case Kind::string: return "str";
    case Kind::sequence: return sequence_type_name(value.as_sequence());
    case Kind::dict: return "dict";
    case Kind::object: return value.as_object().type_name();
  }
  return "object";
}

std::string describe_type(const Value& value) {
  return value.is_none() ? "None" : fmt::format("{} object", type_name(value));
}

void append_text(std::string& out, const Value& value, Budget& budget) {
  if (value.is_undefined()) return;
  if (value.is_string()) {
    budget.check_size(out.size() + value.as_string().size());
    budget.charge_bytes(value.as_string().size());
    out += value.as_string();
    return;
  }
  append_repr(out, value, budget);
}

void append_repr(std::string& out, const Value& value, Budget& budget, int level) {
  // Namespaces may contain themselves; everything else is bounded by construction.
  if (level > 2 * kMaxValueDepth) fail("a value that contains itself cannot be printed");
  budget.charge(1);
  budget.check_size(out.size());
  const std::size_t before = out.size();
  switch (value.kind()) {
    case Kind::undefined: out += "Undefined"; break;
    case Kind::none: out += "None"; break;
    case Kind::boolean: out += value.as_bool() ? "True" : "False"; break;
    case Kind::integer: out += fmt::format("{}", value.as_integer()); break;
    case Kind::big_integer: out += value.as_string(); break;
    case Kind::real: out += real_repr(value.as_real()); break;
    case Kind::string:
      budget.charge_bytes(value.as_string().size());
      if (value.is_markup()) out += "Markup(";
      append_string_repr(out, value.as_string());
      if (value.is_markup()) out += ')';
      return;
    case Kind::sequence: append_sequence_repr(out, value.as_sequence(), budget, level); return;
    case Kind::dict: {
      out += '{';
      bool first = true;
      for (const auto& [key, item] : value.as_dict().entries) {
        if (!first) out += ", ";
        first = false;
        append_repr(out, key, budget, level + 1);
        out += ": ";
        append_repr(out, item, budget, level + 1);
      }
      out += '}';
      return;
    }
    case Kind::object: value.as_object().append_repr(out, budget, level); return;
  }
  budget.charge_bytes(out.size() - before);
}

void append_string_repr(std::string& out, std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
  out += quote;
  for (std::size_t position = 0; position < text.size();) {
    const std::size_t start = position;
    const char32_t code = decode_utf8(text, position);
    if (code == static_cast<char32_t>(quote) || code == '\\') {
      out += '\\';
      out += static_cast<char>(code);
    } else if (code == '\n') {
      out += "\\n";
    } else if (code == '\r') {
      out += "\\r";
    } else if (code == '\t') {
      out += "\\t";
    } else if (is_printable(code)) {
      out += text.substr(start, position - start);
    } else if (code <= 0xff) {
      out += fmt::format("\\x{:02x}", static_cast<unsigned>(code));
    } else if (code <= 0xffff) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(code));
    } else {
      out += fmt::format("\\U{:08x}", static_cast<unsigned>(code));
    }
  }
  out += quote;
}

std::string to_text(const Value& value, Budget& budget) {
  std::string out;
  append_text(out, value, budget);
  return out;
}

std::string to_repr(const Value& value, Budget& budget) {
  std::string out;
  append_repr(out, value, budget);
  return out;
}

std::string real_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  std::string_view text(buffer, static_cast<std::size_t>(end - buffer));
  const bool negative = text.front() == '-';
  if (negative) text.remove_prefix(1);
  const std::size_t e = text.find('e');
  int exponent = 0;
  const std::size_t sign = text[e + 1] == '+' ? 2 : 1;
  std::from_chars(text.data() + e + sign, text.data() + text.size(), exponent);
  std::string digits(1, text[0]);
  if (e > 2) digits += text.substr(2, e - 2);

  std::string out = negative ? "-" : "";
  if (exponent < -4 || exponent >= 16) {
    out += digits[0];
    if (digits.size() > 1) out += '.' + digits.substr(1);
    out += fmt::format("e{}{:02}", exponent < 0 ? '-' : '+', std::abs(exponent));
  } else if (exponent < 0) {
    out += "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
  } else {
    const std::size_t whole = static_cast<std::size_t>(exponent) + 1;
    if (digits.size() < whole) digits.append(whole - digits.size(), '0');
    out += digits.substr(0, whole) + '.';
    out += digits.size() > whole ? digits.substr(whole) : "0";
  }
  return out;
}

}  // namespace baton::jinja
