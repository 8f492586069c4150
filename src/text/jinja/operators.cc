#include <algorithm>
#include <cmath>

#include "text/jinja/interpreter.h"
#include "text/jinja/unicode.h"

// Python's operators on Values.

namespace baton::jinja {
namespace {

constexpr const char* kOverflow = "a number left the range of 64 bits";

std::string_view symbol(BinaryOperator op) {
  switch (op) {
    case BinaryOperator::add: return "+";
    case BinaryOperator::subtract: return "-";
    case BinaryOperator::multiply: return "*";
    case BinaryOperator::divide: return "/";
    case BinaryOperator::floor_divide: return "//";
    case BinaryOperator::modulo: return "%";
    case BinaryOperator::power: return "**";
  }
  return "?";
}

Value integer_power(std::int64_t base, std::int64_t exponent) {
  if (exponent < 0) {
    if (base == 0) fail("zero cannot be raised to a negative power");
    return Value::real(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
  }
  std::int64_t result = 1;
  while (exponent > 0) {
    if ((exponent & 1) != 0 && __builtin_mul_overflow(result, base, &result)) fail("{}", kOverflow);
    exponent >>= 1;
    if (exponent > 0 && __builtin_mul_overflow(base, base, &base)) fail("{}", kOverflow);
  }
  return Value::integer(result);
}

Value integer_arithmetic(BinaryOperator op, std::int64_t left, std::int64_t right) {
  std::int64_t result = 0;
  bool overflow = false;
  switch (op) {
    case BinaryOperator::add: overflow = __builtin_add_overflow(left, right, &result); break;
    case BinaryOperator::subtract: overflow = __builtin_sub_overflow(left, right, &result); break;
    case BinaryOperator::multiply: overflow = __builtin_mul_overflow(left, right, &result); break;
    case BinaryOperator::divide:
      if (right == 0) fail("division by zero");
      return Value::real(static_cast<double>(left) / static_cast<double>(right));
    case BinaryOperator::floor_divide:
    case BinaryOperator::modulo: {
      if (right == 0) fail("division by zero");
      if (right == -1) {  // the one quotient that can overflow, and a trap in hardware
        if (op == BinaryOperator::modulo) return Value::integer(0);
        overflow = __builtin_sub_overflow(std::int64_t{0}, left, &result);
        break;
      }
      std::int64_t quotient = left / right;
      std::int64_t remainder = left % right;
      if (remainder != 0 && (remainder < 0) != (right < 0)) {  // Python rounds down
        --quotient;
        remainder += right;
      }
      result = op == BinaryOperator::modulo ? remainder : quotient;
      break;
    }
    case BinaryOperator::power: return integer_power(left, right);
  }
  if (overflow) fail("{}", kOverflow);
  return Value::integer(result);
}

Value real_arithmetic(BinaryOperator op, double left, double right) {
  switch (op) {
    case BinaryOperator::add: return Value::real(left + right);
    case BinaryOperator::subtract: return Value::real(left - right);
    case BinaryOperator::multiply: return Value::real(left * right);
    case BinaryOperator::divide:
      if (right == 0) fail("division by zero");
      return Value::real(left / right);
    case BinaryOperator::floor_divide:
    case BinaryOperator::modulo: {
      if (right == 0) fail("division by zero");
      double remainder = std::fmod(left, right);
      double quotient = (left - remainder) / right;
      if (remainder != 0 && (remainder < 0) != (right < 0)) {
        remainder += right;
        quotient -= 1;
      }
      if (op == BinaryOperator::floor_divide) return Value::real(std::isfinite(quotient) ? std::round(quotient) : quotient);
      return Value::real(remainder == 0 ? std::copysign(0.0, right) : remainder);
    }
    case BinaryOperator::power: {
      if (left == 0 && right < 0) fail("zero cannot be raised to a negative power");
      const double result = std::pow(left, right);
      if (std::isnan(result) && !std::isnan(left) && !std::isnan(right)) fail("the power of a negative number is not real");
      if (std::isinf(result) && std::isfinite(left) && std::isfinite(right)) fail("the result of ** is too large");
      return Value::real(result);
    }
  }
  return Value();
}

/// How often a sequence is repeated by `count`, with the size of the result checked.
std::size_t repetitions(std::int64_t count, std::size_t size, Budget& budget) {
  if (count <= 0 || size == 0) return 0;
  std::size_t total = 0;
  if (__builtin_mul_overflow(size, static_cast<std::size_t>(count), &total)) total = SIZE_MAX;
  budget.check_size(total);
  return static_cast<std::size_t>(count);
}

Value repeat(Interpreter& interpreter, const Value& value, std::int64_t count) {
  Budget& budget = interpreter.budget();
  if (value.is_string()) {
    const std::string& text = value.as_string();
    const std::size_t times = repetitions(count, text.size(), budget);
    std::string result;
    result.reserve(times * text.size());
    for (std::size_t i = 0; i < times; ++i) result += text;
    return interpreter.string(std::move(result));
  }
  const Sequence& sequence = value.as_sequence();
  const std::size_t times = repetitions(count, sequence.items.size() * sizeof(Value), budget);
  budget.charge(times * sequence.items.size());
  std::vector<Value> items;
  items.reserve(times * sequence.items.size());
  for (std::size_t i = 0; i < times; ++i) items.insert(items.end(), sequence.items.begin(), sequence.items.end());
  return make_sequence(sequence.is_tuple() ? SequenceKind::tuple : SequenceKind::list, std::move(items), budget);
}

/// list or tuple: what + and * take.
bool is_joinable(const Value& value) {
  return value.is(Kind::sequence) && (value.as_sequence().is_tuple() || value.as_sequence().kind == SequenceKind::list);
}

/// What differs when Markup takes part: other text is escaped, and the result is Markup.
std::optional<Value> markup_binary(Interpreter& interpreter, BinaryOperator op, const Value& left, const Value& right) {
  if (op == BinaryOperator::add && left.is_string() && right.is_string()) {
    std::string text = escape_html(interpreter, left).as_string() + escape_html(interpreter, right).as_string();
    return interpreter.string(std::move(text)).as_markup();
  }
  if (op == BinaryOperator::multiply && (left.is_integral() || right.is_integral())) {
    const bool text_first = left.is_string();
    return repeat(interpreter, text_first ? left : right, (text_first ? right : left).as_integer()).as_markup();
  }
  if (op != BinaryOperator::modulo || !left.is_markup()) return std::nullopt;
  // Values are escaped as they are put in; numbers need none, and keep their formats.
  const auto escaped = [&](const Value& value) { return value.is_number() ? value : escape_html(interpreter, value); };
  Value arguments = right;
  if (right.is(Kind::sequence) && right.as_sequence().is_tuple()) {
    std::vector<Value> items;
    for (const Value& item : right.as_sequence().items) items.push_back(escaped(item));
    arguments = interpreter.tuple(std::move(items));
  } else if (!right.is(Kind::dict)) {
    arguments = escaped(right);
  }
  return interpreter.string(format_printf(interpreter, left.as_string(), arguments)).as_markup();
}

struct Range {
  std::int64_t start, stop, step;
  std::size_t count;

  /// Of the i-th element, i < count.
  std::size_t index(std::size_t i) const { return static_cast<std::size_t>(start + static_cast<std::int64_t>(i) * step); }
};

/// Python's slice.indices(). nullopt: a bound is not an integer.
std::optional<Range> slice_range(const Value& start, const Value& stop, const Value& step, std::int64_t size) {
  for (const Value* part : {&start, &stop, &step}) {
    if (!part->is_none() && !part->is_integral()) return std::nullopt;
  }
  const std::int64_t by = step.is_none() ? 1 : step.as_integer();
  if (by == 0) fail("the step of a slice cannot be zero");
  const std::int64_t low = by < 0 ? -1 : 0;
  const std::int64_t high = by < 0 ? size - 1 : size;
  const auto bound = [&](const Value& value, std::int64_t fallback) {
    if (value.is_none()) return fallback;
    std::int64_t index = value.as_integer();
    if (index < 0) index = index < -size ? low : index + size;
    return std::clamp(index, low, high);
  };
  const std::int64_t from = bound(start, by < 0 ? high : low);
  const std::int64_t to = bound(stop, by < 0 ? low : high);
  std::uint64_t count = 0;
  if (by > 0 && from < to) count = (static_cast<std::uint64_t>(to - from) - 1) / static_cast<std::uint64_t>(by) + 1;
  if (by < 0 && to < from) count = (static_cast<std::uint64_t>(from - to) - 1) / (0 - static_cast<std::uint64_t>(by)) + 1;
  return Range{from, to, by, static_cast<std::size_t>(count)};
}

}  // namespace

Value Interpreter::binary(BinaryOperator op, const Value& left, const Value& right) {
  if (left.is_markup() || right.is_markup()) {
    if (const auto result = markup_binary(*this, op, left, right)) return *result;
  }
  if (op == BinaryOperator::modulo && left.is_string()) return string(format_printf(*this, left.as_string(), right));
  for (const Value* operand : {&left, &right}) {
    if (operand->is_undefined()) fail("{}", operand->undefined_reason());
  }
  if (left.is_number() && right.is_number()) {
    if (left.is(Kind::real) || right.is(Kind::real)) return real_arithmetic(op, left.as_real(), right.as_real());
    return integer_arithmetic(op, left.as_integer(), right.as_integer());
  }
  if (op == BinaryOperator::add) {
    if (left.is_string() && right.is_string()) {
      budget_.check_size(left.as_string().size() + right.as_string().size());
      return string(left.as_string() + right.as_string());
    }
    if (is_joinable(left) && is_joinable(right) && left.as_sequence().is_tuple() == right.as_sequence().is_tuple()) {
      std::vector<Value> items = left.as_sequence().items;
      const auto& more = right.as_sequence().items;
      budget_.charge(items.size() + more.size());
      items.insert(items.end(), more.begin(), more.end());
      return make_sequence(left.as_sequence().is_tuple() ? SequenceKind::tuple : SequenceKind::list, std::move(items), budget_);
    }
    if (left.is_string()) fail("can only concatenate str (not \"{}\") to str", type_name(right));
  }
  if (op == BinaryOperator::multiply) {
    if ((left.is_string() || is_joinable(left)) && right.is_integral()) return repeat(*this, left, right.as_integer());
    if ((right.is_string() || is_joinable(right)) && left.is_integral()) return repeat(*this, right, left.as_integer());
  }
  fail("'{}' cannot be used between '{}' and '{}'", symbol(op), type_name(left), type_name(right));
}

Value Interpreter::slice(const Value& value, const Value& start, const Value& stop, const Value& step) {
  if (value.is_undefined()) fail("{}", value.undefined_reason());
  if (value.is_string()) {
    const std::string& text = value.as_string();
    budget_.charge_bytes(text.size());
    const std::size_t size = code_point_count(text);
    const auto range = slice_range(start, stop, step, static_cast<std::int64_t>(size));
    if (range) {
      if (size == text.size() && range->step == 1) {  // ASCII, the common case
        Value part = string(range->count == 0 ? std::string() : text.substr(static_cast<std::size_t>(range->start), range->count));
        return value.is_markup() ? part.as_markup() : part;
      }
      const std::vector<std::size_t> offsets = code_point_offsets(text);
      budget_.charge_bytes(offsets.size() * sizeof offsets[0]);
      std::string result;
      for (std::size_t i = 0; i < range->count; ++i) {
        const std::size_t index = range->index(i);
        result.append(text, offsets[index], offsets[index + 1] - offsets[index]);
      }
      return value.is_markup() ? string(std::move(result)).as_markup() : string(std::move(result));
    }
  } else if (value.is(Kind::sequence) && value.as_sequence().is_indexable()) {
    const Sequence& sequence = value.as_sequence();
    const auto range = slice_range(start, stop, step, static_cast<std::int64_t>(sequence.items.size()));
    if (range) {
      budget_.charge(range->count);
      std::vector<Value> items;
      items.reserve(range->count);
      for (std::size_t i = 0; i < range->count; ++i) items.push_back(sequence.items[range->index(i)]);
      if (sequence.kind != SequenceKind::range) {
        return make_sequence(sequence.is_tuple() ? SequenceKind::tuple : SequenceKind::list, std::move(items), budget_);
      }
      Value part = make_sequence(SequenceKind::range, std::move(items), budget_);
      // Bounds that leave 64 bits belong to ranges that are printed nowhere: let them wrap.
      const auto scaled = [&](std::int64_t index) {
        return static_cast<std::int64_t>(static_cast<std::uint64_t>(sequence.range_start) +
                                         static_cast<std::uint64_t>(index) * static_cast<std::uint64_t>(sequence.range_step));
      };
      part.as_sequence().range_start = scaled(range->start);
      part.as_sequence().range_stop = scaled(range->stop);
      part.as_sequence().range_step = static_cast<std::int64_t>(static_cast<std::uint64_t>(range->step) *
                                                                static_cast<std::uint64_t>(sequence.range_step));
      return part;
    }
  }
  // Jinja2 compiles slices to Python's, so that this is an error where an index would be undefined.
  fail("a '{}' cannot be sliced with bounds of the types '{}', '{}' and '{}'", type_name(value), type_name(start),
       type_name(stop), type_name(step));
}

std::vector<Value> Interpreter::elements(const Value& value) {
  std::vector<Value> items;
  switch (value.kind()) {
    case Kind::undefined: return items;
    case Kind::string: {
      const std::string& text = value.as_string();
      budget_.charge(text.size());
      budget_.charge_bytes(text.size() * (sizeof(Value) + sizeof(StringObject)));
      for (std::size_t position = 0; position < text.size();) {
        const std::size_t start = position;
        decode_utf8(text, position);
        items.push_back(Value::string(text.substr(start, position - start)));
      }
      return items;
    }
    case Kind::dict:
      budget_.charge(value.as_dict().entries.size());
      for (const auto& entry : value.as_dict().entries) items.push_back(entry.first);
      return items;
    case Kind::sequence: {
      Sequence& sequence = value.as_sequence();
      budget_.charge(sequence.items.size() - sequence.position);
      if (sequence.kind != SequenceKind::iterator) return sequence.items;
      items.assign(sequence.items.begin() + static_cast<std::ptrdiff_t>(sequence.position), sequence.items.end());
      sequence.position = sequence.items.size();
      return items;
    }
    default: fail("'{}' object is not iterable", type_name(value));
  }
}

std::size_t Interpreter::length(const Value& value) {
  switch (value.kind()) {
    case Kind::undefined: return 0;
    case Kind::string: budget_.charge_bytes(value.as_string().size()); return code_point_count(value.as_string());
    case Kind::dict: return value.as_dict().entries.size();
    case Kind::sequence:
      if (value.as_sequence().kind != SequenceKind::iterator) return value.as_sequence().items.size();
      [[fallthrough]];
    default: fail("object of type '{}' has no length", type_name(value));
  }
}

bool Interpreter::contains(const Value& container, const Value& element) {
  switch (container.kind()) {
    case Kind::undefined: return false;
    case Kind::string:
      if (!element.is_string()) fail("'in <string>' requires a string on its left, not '{}'", type_name(element));
      budget_.charge_bytes(container.as_string().size());
      return container.as_string().find(element.as_string()) != std::string::npos;
    case Kind::dict:
      if (!hashable(element)) fail("a {} cannot be the key of a dict", type_name(element));
      return container.as_dict().find(element, budget_) != nullptr;
    case Kind::sequence: {
      Sequence& sequence = container.as_sequence();
      for (std::size_t i = sequence.position; i < sequence.items.size(); ++i) {
        if (sequence.kind == SequenceKind::iterator) sequence.position = i + 1;
        if (equals(sequence.items[i], element, budget_)) return true;
      }
      return false;
    }
    default: fail("'in' cannot look into '{}'", type_name(container));
  }
}

}  // namespace baton::jinja
