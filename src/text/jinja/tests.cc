#include <algorithm>
#include <array>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/unicode.h"

// What stands behind `is`.

namespace baton::jinja {
namespace {

using Test = TestFunction;

void no_arguments(std::string_view name, const Arguments& arguments) {
  if (!arguments.positional.empty() || !arguments.keyword.empty()) fail("the test '{}' takes no argument", name);
}

const Value& one_argument(std::string_view name, const Arguments& arguments) {
  if (arguments.positional.size() != 1 || !arguments.keyword.empty()) fail("the test '{}' takes one argument", name);
  return arguments.positional[0];
}

Value modulo(Interpreter& interpreter, const Value& value, const Value& divisor) {
  if (!value.is_number()) fail("'{}' cannot be divided", type_name(value));
  return interpreter.binary(BinaryOperator::modulo, value, divisor);
}

bool is_odd(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  no_arguments("odd", arguments);
  return equals(modulo(interpreter, value, Value::integer(2)), Value::integer(1), interpreter.budget());
}

bool is_even(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  no_arguments("even", arguments);
  return !truthy(modulo(interpreter, value, Value::integer(2)));
}

bool is_divisible(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  return !truthy(modulo(interpreter, value, one_argument("divisibleby", arguments)));
}

bool is_sequence(const Value& value) {
  switch (value.kind()) {
    case Kind::undefined:
    case Kind::string:
    case Kind::dict: return true;
    case Kind::sequence: return value.as_sequence().is_indexable();
    default: return false;
  }
}

bool is_iterable(const Value& value) {
  return value.is_undefined() || value.is_string() || value.is(Kind::dict) || value.is(Kind::sequence);
}

/// str.islower() and str.isupper(): some letter has case, and none the other.
bool has_only_case(std::string_view text, bool lower) {
  bool any = false;
  for (std::size_t position = 0; position < text.size();) {
    const char32_t code = decode_utf8(text, position);
    if (!is_cased(code)) continue;
    if (is_lower(code) != lower) return false;
    any = true;
  }
  return any;
}

bool is_same(const Value& left, const Value& right, Budget& budget) {
  if (left.kind() != right.kind()) return false;
  if (left.identity() != nullptr && left.is_string()) return equals(left, right, budget);
  return left.identity() == right.identity() && (left.identity() != nullptr || equals(left, right, budget));
}

template <bool (*Predicate)(const Value&)>
bool simple(Interpreter&, const Value& value, Arguments& arguments) {
  no_arguments("of a type", arguments);
  return Predicate(value);
}

template <Kind K>
bool has_kind(const Value& value) { return value.is(K); }

template <bool Lower>
bool case_test(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  no_arguments(Lower ? "lower" : "upper", arguments);
  return has_only_case(interpreter.text(value), Lower);
}

template <CompareOperator Op>
bool comparison(Interpreter& interpreter, const Value& left, Arguments& arguments) {
  const Value& right = one_argument("of a comparison", arguments);
  Budget& budget = interpreter.budget();
  switch (Op) {
    case CompareOperator::equal: return equals(left, right, budget);
    case CompareOperator::not_equal: return !equals(left, right, budget);
    case CompareOperator::less: return less_than(left, right, budget);
    case CompareOperator::less_equal: return less_than(left, right, budget) || equals(left, right, budget);
    case CompareOperator::greater: return less_than(right, left, budget);
    case CompareOperator::greater_equal: return less_than(right, left, budget) || equals(left, right, budget);
    case CompareOperator::in: return interpreter.contains(right, left);
    case CompareOperator::not_in: return !interpreter.contains(right, left);
  }
  return false;
}

struct Entry {
  std::string_view name;
  Test test;
};

bool is_true(const Value& value) { return value.is(Kind::boolean) && value.as_bool(); }
bool is_false(const Value& value) { return value.is(Kind::boolean) && !value.as_bool(); }
bool is_defined(const Value& value) { return !value.is_undefined(); }
bool is_integer(const Value& value) { return value.is(Kind::integer) || value.is(Kind::big_integer); }
bool is_any_number(const Value& value) { return value.is_number() || value.is(Kind::big_integer); }
bool is_callable(const Value& value) {
  return value.is_undefined() || (value.is(Kind::object) && value.as_object().callable());
}
bool is_escaped(const Value& value) { return value.is_markup(); }

const std::array kTests = {
    Entry{"defined", simple<is_defined>},
    Entry{"undefined", simple<has_kind<Kind::undefined>>},
    Entry{"none", simple<has_kind<Kind::none>>},
    Entry{"string", simple<has_kind<Kind::string>>},
    Entry{"mapping", simple<has_kind<Kind::dict>>},
    Entry{"sequence", simple<is_sequence>},
    Entry{"iterable", simple<is_iterable>},
    Entry{"boolean", simple<has_kind<Kind::boolean>>},
    Entry{"true", simple<is_true>},
    Entry{"false", simple<is_false>},
    Entry{"integer", simple<is_integer>},
    Entry{"float", simple<has_kind<Kind::real>>},
    Entry{"number", simple<is_any_number>},
    Entry{"callable", simple<is_callable>},
    Entry{"escaped", simple<is_escaped>},
    Entry{"odd", is_odd},
    Entry{"even", is_even},
    Entry{"divisibleby", is_divisible},
    Entry{"lower", case_test<true>},
    Entry{"upper", case_test<false>},
    Entry{"in", comparison<CompareOperator::in>},
    Entry{"==", comparison<CompareOperator::equal>},
    Entry{"eq", comparison<CompareOperator::equal>},
    Entry{"equalto", comparison<CompareOperator::equal>},
    Entry{"!=", comparison<CompareOperator::not_equal>},
    Entry{"ne", comparison<CompareOperator::not_equal>},
    Entry{">", comparison<CompareOperator::greater>},
    Entry{"gt", comparison<CompareOperator::greater>},
    Entry{"greaterthan", comparison<CompareOperator::greater>},
    Entry{">=", comparison<CompareOperator::greater_equal>},
    Entry{"ge", comparison<CompareOperator::greater_equal>},
    Entry{"<", comparison<CompareOperator::less>},
    Entry{"lt", comparison<CompareOperator::less>},
    Entry{"lessthan", comparison<CompareOperator::less>},
    Entry{"<=", comparison<CompareOperator::less_equal>},
    Entry{"le", comparison<CompareOperator::less_equal>},
    Entry{"sameas",
          [](Interpreter& interpreter, const Value& value, Arguments& arguments) {
            return is_same(value, one_argument("sameas", arguments), interpreter.budget());
          }},
    Entry{"filter",
          [](Interpreter&, const Value& value, Arguments& arguments) {
            no_arguments("filter", arguments);
            return value.is_string() && find_filter(value.as_string()) != nullptr;
          }},
    Entry{"test",
          [](Interpreter&, const Value& value, Arguments& arguments) {
            no_arguments("test", arguments);
            return value.is_string() && find_test(value.as_string()) != nullptr;
          }},
};

}  // namespace

TestFunction find_test(std::string_view name) {
  const auto found = std::find_if(kTests.begin(), kTests.end(), [&](const Entry& entry) { return entry.name == name; });
  return found == kTests.end() ? nullptr : found->test;
}

}  // namespace baton::jinja
