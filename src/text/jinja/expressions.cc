#include <algorithm>

#include "text/jinja/interpreter.h"
#include "text/jinja/unicode.h"

namespace baton::jinja {
namespace {

/// value.method without a call: the method with its object.
class BoundMethod : public NativeObject {
 public:
  BoundMethod(Value self, MethodFunction function, std::string_view name)
      : self_(std::move(self)), function_(function), name_(name) {}
  std::string_view type_name() const override { return "builtin_function_or_method"; }
  bool callable() const override { return true; }
  int depth() const override { return self_.depth() + 1; }
  Value call(Interpreter& interpreter, Arguments& arguments) override {
    return call_method(interpreter, function_, name_, self_, arguments);
  }

 private:
  Value self_;
  MethodFunction function_;
  std::string name_;
};

void require_defined(const Value& value) {
  if (value.is_undefined()) fail("{}", value.undefined_reason());
}

}  // namespace

Value Interpreter::evaluate(const Expr& expr) {
  budget_.charge(1);
  // Constants and names are most of what there is, and need no guard.
  if (expr.kind == ExprKind::constant) return static_cast<const ConstantExpr&>(expr).value;
  if (expr.kind == ExprKind::name) return evaluate_name(static_cast<const NameExpr&>(expr));

  struct Depth {
    explicit Depth(Budget& budget) : budget(budget) { budget.enter(); }
    ~Depth() { budget.leave(); }
    Budget& budget;
  } depth(budget_);
  line_ = expr.line;
  switch (expr.kind) {
    case ExprKind::attribute: {
      const auto& node = static_cast<const AttributeExpr&>(expr);
      return attribute(evaluate(*node.object), node.name);
    }
    case ExprKind::item: return evaluate_item(static_cast<const ItemExpr&>(expr));
    case ExprKind::slice: return evaluate_slice(static_cast<const SliceExpr&>(expr));
    case ExprKind::call: return evaluate_call(static_cast<const CallExpr&>(expr));
    case ExprKind::filter: return evaluate_filter(static_cast<const FilterExpr&>(expr));
    case ExprKind::test: return Value::boolean(evaluate_test(static_cast<const TestExpr&>(expr)));
    case ExprKind::unary: return evaluate_unary(static_cast<const UnaryExpr&>(expr));
    case ExprKind::binary: {
      const auto& node = static_cast<const BinaryExpr&>(expr);
      const Value left = evaluate(*node.left);
      const Value right = evaluate(*node.right);
      line_ = expr.line;
      return binary(node.op, left, right);
    }
    case ExprKind::logical: return evaluate_logical(static_cast<const LogicalExpr&>(expr));
    case ExprKind::compare: return evaluate_compare(static_cast<const CompareExpr&>(expr));
    case ExprKind::concat: return evaluate_concat(static_cast<const ConcatExpr&>(expr));
    case ExprKind::conditional: return evaluate_conditional(static_cast<const ConditionalExpr&>(expr));
    case ExprKind::sequence: return evaluate_sequence(static_cast<const SequenceExpr&>(expr));
    case ExprKind::dict: return evaluate_dict(static_cast<const DictExpr&>(expr));
    case ExprKind::constant:
    case ExprKind::name: break;
  }
  return Value();
}

Value Interpreter::evaluate_name(const NameExpr& expr) {
  for (const Scope* scope = scope_.get(); scope != nullptr; scope = scope->parent.get()) {
    if (const Value* value = scope->find_here(expr.name)) return *value;
  }
  const std::string& name = code_.names[expr.name];
  if (const Value* global = find_global(name)) return *global;
  return Value::undefined(fmt::format("'{}' is undefined", name));
}

Value Interpreter::evaluate_item(const ItemExpr& expr) {
  const Value object = evaluate(*expr.object);
  const Value key = evaluate(*expr.key);
  line_ = expr.line;
  return item(object, key);
}

Value Interpreter::evaluate_slice(const SliceExpr& expr) {
  const Value object = evaluate(*expr.object);
  const auto bound = [&](const ExprPtr& part) { return part == nullptr ? Value::none() : evaluate(*part); };
  const Value start = bound(expr.start);
  const Value stop = bound(expr.stop);
  const Value step = bound(expr.step);
  line_ = expr.line;
  return slice(object, start, stop, step);
}

Arguments Interpreter::evaluate_arguments(const ArgumentList& list) {
  Arguments arguments;
  arguments.positional.reserve(list.positional.size());
  for (const ExprPtr& expr : list.positional) arguments.positional.push_back(evaluate(*expr));
  if (list.star != nullptr) {
    for (Value& value : elements(evaluate(*list.star))) arguments.positional.push_back(std::move(value));
  }
  for (const auto& [name, expr] : list.keyword) arguments.keyword.emplace_back(name, evaluate(*expr));
  if (list.double_star != nullptr) {
    const Value rest = evaluate(*list.double_star);
    if (!rest.is(Kind::dict)) fail("the argument after ** must be a dict, not '{}'", type_name(rest));
    for (const auto& [key, value] : rest.as_dict().entries) {
      if (!key.is_string()) fail("the keys of a dict after ** must be strings");
      const std::string& name = key.as_string();
      const bool given = std::any_of(list.keyword.begin(), list.keyword.end(), [&](const auto& item) { return item.first == name; });
      if (given) fail("the argument '{}' is given twice", name);
      arguments.keyword.emplace_back(name, value);
    }
  }
  return arguments;
}

Value Interpreter::evaluate_call(const CallExpr& expr, Value caller) {
  // value.method(...) is by far the most frequent call: it needs no object for the method.
  if (expr.callee->kind == ExprKind::attribute) {
    const auto& node = static_cast<const AttributeExpr&>(*expr.callee);
    budget_.charge(1);
    const Value self = evaluate(*node.object);
    require_defined(self);
    if (const MethodFunction method = find_method(self, node.name)) {
      Arguments arguments = evaluate_arguments(expr.arguments);
      line_ = expr.line;
      return call_method(*this, method, node.name, self, arguments);
    }
    const Value callee = attribute(self, node.name);
    Arguments arguments = evaluate_arguments(expr.arguments);
    if (!caller.is_undefined()) arguments.keyword.emplace_back("caller", std::move(caller));
    line_ = expr.line;
    return call(callee, arguments);
  }
  const Value callee = evaluate(*expr.callee);
  Arguments arguments = evaluate_arguments(expr.arguments);
  if (!caller.is_undefined()) arguments.keyword.emplace_back("caller", std::move(caller));
  line_ = expr.line;
  return call(callee, arguments);
}

Value Interpreter::call(const Value& callee, Arguments& arguments) {
  require_defined(callee);
  if (!callee.is(Kind::object)) fail("a '{}' cannot be called", type_name(callee));
  return callee.as_object().call(*this, arguments);
}

Value Interpreter::evaluate_filter(const FilterExpr& expr, const Value* body) {
  if (expr.function == nullptr) fail("no filter named '{}'", expr.name);
  Value input;
  if (expr.input == nullptr) {
    input = *body;
  } else if (expr.input->kind == ExprKind::filter) {
    input = evaluate_filter(static_cast<const FilterExpr&>(*expr.input), body);
  } else {
    input = evaluate(*expr.input);
  }
  Arguments arguments = evaluate_arguments(expr.arguments);
  line_ = expr.line;
  return expr.function(*this, input, arguments);
}

bool Interpreter::evaluate_test(const TestExpr& expr) {
  if (expr.function == nullptr) fail("no test named '{}'", expr.name);
  const Value input = evaluate(*expr.input);
  Arguments arguments = evaluate_arguments(expr.arguments);
  line_ = expr.line;
  return expr.function(*this, input, arguments);
}

Value Interpreter::apply_filter(const std::string& name, const Value& input, Arguments& arguments) {
  const FilterFunction function = find_filter(name);
  if (function == nullptr) fail("no filter named '{}'", name);
  budget_.charge(1);
  return function(*this, input, arguments);
}

bool Interpreter::apply_test(const std::string& name, const Value& input, Arguments& arguments) {
  const TestFunction function = find_test(name);
  if (function == nullptr) fail("no test named '{}'", name);
  budget_.charge(1);
  return function(*this, input, arguments);
}

Value Interpreter::evaluate_unary(const UnaryExpr& expr) {
  const Value operand = evaluate(*expr.operand);
  if (expr.op == UnaryOperator::logical_not) return Value::boolean(!truthy(operand));
  require_defined(operand);
  if (!operand.is_number()) fail("'{}' has no sign", type_name(operand));
  if (operand.is(Kind::real)) return Value::real(expr.op == UnaryOperator::negate ? -operand.as_real() : operand.as_real());
  if (expr.op == UnaryOperator::plus) return Value::integer(operand.as_integer());
  std::int64_t negative = 0;
  if (__builtin_sub_overflow(std::int64_t{0}, operand.as_integer(), &negative)) fail("a number left the range of 64 bits");
  return Value::integer(negative);
}

Value Interpreter::evaluate_logical(const LogicalExpr& expr) {
  Value value;
  for (const ExprPtr& operand : expr.operands) {
    value = evaluate(*operand);
    if (truthy(value) != expr.is_and) return value;
  }
  return value;
}

Value Interpreter::evaluate_compare(const CompareExpr& expr) {
  Value left = evaluate(*expr.first);
  for (const auto& [op, operand] : expr.rest) {
    Value right = evaluate(*operand);
    line_ = expr.line;
    if (!compare(op, left, right)) return Value::boolean(false);
    left = std::move(right);
  }
  return Value::boolean(true);
}

bool Interpreter::compare(CompareOperator op, const Value& left, const Value& right) {
  switch (op) {
    case CompareOperator::equal: return equals(left, right, budget_);
    case CompareOperator::not_equal: return !equals(left, right, budget_);
    case CompareOperator::less: return less_than(left, right, budget_);
    case CompareOperator::greater: return less_than(right, left, budget_);
    // Not !(right < left): that would be true of NaN.
    case CompareOperator::less_equal: return less_than(left, right, budget_) || equals(left, right, budget_);
    case CompareOperator::greater_equal: return less_than(right, left, budget_) || equals(left, right, budget_);
    case CompareOperator::in: return contains(right, left);
    case CompareOperator::not_in: return !contains(right, left);
  }
  return false;
}

Value Interpreter::evaluate_concat(const ConcatExpr& expr) {
  std::string text;
  for (const ExprPtr& operand : expr.operands) append_text(text, evaluate(*operand), budget_);
  return Value::string(std::move(text));
}

Value Interpreter::evaluate_conditional(const ConditionalExpr& expr) {
  if (truthy(evaluate(*expr.condition))) return evaluate(*expr.then);
  if (expr.otherwise != nullptr) return evaluate(*expr.otherwise);
  return Value::undefined("the inline if was false and has no else");
}

Value Interpreter::evaluate_sequence(const SequenceExpr& expr) {
  std::vector<Value> items;
  items.reserve(expr.items.size());
  for (const ExprPtr& item : expr.items) items.push_back(evaluate(*item));
  return make_sequence(expr.sequence_kind, std::move(items), budget_);
}

Value Interpreter::evaluate_dict(const DictExpr& expr) {
  auto dict = std::make_shared<Dict>();
  budget_.charge_bytes(sizeof(Dict));
  for (const auto& [key, value] : expr.entries) {
    Value evaluated_key = evaluate(*key);
    dict->set(std::move(evaluated_key), evaluate(*value), budget_);
  }
  return Value::dict(std::move(dict));
}

Value Interpreter::attribute(const Value& value, std::string_view name) {
  require_defined(value);
  if (value.is(Kind::object)) {
    if (auto found = value.as_object().attribute(*this, name)) return std::move(*found);
  } else if (const MethodFunction method = find_method(value, name)) {
    return Value::object(std::make_shared<BoundMethod>(value, method, name));
  } else if (is_forbidden_method(value, name)) {
    return Value::undefined(fmt::format("the method '{}' of '{}' changes it, which templates must not", name, type_name(value)));
  } else if (value.is(Kind::dict)) {
    if (const Value* found = value.as_dict().find(name)) return *found;
  } else if (value.is(Kind::sequence) && value.as_sequence().kind == SequenceKind::group) {
    if (name == "grouper") return value.as_sequence().items[0];
    if (name == "list") return value.as_sequence().items[1];
  }
  return Value::undefined(fmt::format("'{}' has no attribute '{}'", describe_type(value), name));
}

Value Interpreter::item(const Value& value, const Value& key) {
  require_defined(value);
  if (value.is(Kind::dict) && hashable(key)) {
    if (const Value* found = value.as_dict().find(key, budget_)) return *found;
  } else if (key.is_integral()) {
    std::int64_t index = key.as_integer();
    if (value.is(Kind::sequence) && value.as_sequence().is_indexable()) {
      const auto& items = value.as_sequence().items;
      const auto size = static_cast<std::int64_t>(items.size());
      if (index < 0) index += size;
      if (index >= 0 && index < size) return items[static_cast<std::size_t>(index)];
    } else if (value.is_string()) {
      const std::string& text = value.as_string();
      budget_.charge_bytes(text.size());
      const auto size = static_cast<std::int64_t>(code_point_count(text));
      if (index < 0) index += size;
      if (index >= 0 && index < size) {
        std::size_t position = 0;
        for (std::int64_t i = 0; i < index; ++i) decode_utf8(text, position);
        const std::size_t start = position;
        decode_utf8(text, position);
        const Value character = Value::string(text.substr(start, position - start));
        return value.is_markup() ? character.as_markup() : character;
      }
    }
  }
  if (key.is_string() && !value.is(Kind::dict)) return attribute(value, key.as_string());
  if (key.is_string()) {
    const std::string& name = key.as_string();
    if (const MethodFunction method = find_method(value, name)) {
      return Value::object(std::make_shared<BoundMethod>(value, method, name));
    }
    return Value::undefined(fmt::format("'{}' has no attribute '{}'", describe_type(value), name));
  }
  return Value::undefined(fmt::format("{} has no element {}", describe_type(value), to_repr(key, budget_)));
}

}  // namespace baton::jinja
