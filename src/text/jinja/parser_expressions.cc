#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>

#include "text/jinja/parser.h"

namespace baton::jinja {
namespace {

/// Bounds the recursion of evaluating and destroying a tree: long chains such as a + b + c + ...
/// grow to one side without nesting in the source.
constexpr int kMaxHeight = 250;

std::optional<CompareOperator> compare_operator(const Token& token) {
  if (token.kind != TokenKind::op) return std::nullopt;
  if (token.text == "==") return CompareOperator::equal;
  if (token.text == "!=") return CompareOperator::not_equal;
  if (token.text == "<") return CompareOperator::less;
  if (token.text == "<=") return CompareOperator::less_equal;
  if (token.text == ">") return CompareOperator::greater;
  if (token.text == ">=") return CompareOperator::greater_equal;
  return std::nullopt;
}

int height_of(const ExprPtr& expr) { return expr == nullptr ? 0 : expr->height; }

int max_height(const std::vector<ExprPtr>& exprs) {
  int result = 0;
  for (const ExprPtr& expr : exprs) result = std::max(result, height_of(expr));
  return result;
}

}  // namespace

ExprPtr Parser::finish_with_height(ExprPtr node, int inner) {
  if (inner + 1 > kMaxHeight) error(fmt::format("an expression is more than {} operations deep", kMaxHeight), node->line);
  node->height = inner + 1;
  return node;
}

template <typename Node>
ExprPtr Parser::finish(std::unique_ptr<Node> node, std::initializer_list<const Expr*> children) {
  int inner = 0;
  for (const Expr* child : children) inner = std::max(inner, child == nullptr ? 0 : child->height);
  return finish_with_height(std::move(node), inner);
}

int Parser::height(const ArgumentList& arguments) const {
  int inner = std::max(height_of(arguments.star), height_of(arguments.double_star));
  inner = std::max(inner, max_height(arguments.positional));
  for (const auto& [name, value] : arguments.keyword) inner = std::max(inner, height_of(value));
  return inner;
}

/// Expressions between commas: one alone is itself, several are a tuple.
ExprPtr Parser::parse_tuple(bool with_conditional, bool parenthesized, std::string_view end_name) {
  const int line = peek().line;
  const auto at_end = [&] {
    const Token& token = peek();
    return token.kind == TokenKind::variable_end || token.kind == TokenKind::block_end || token.is_op(")") ||
           (!end_name.empty() && token.is_name(end_name));
  };
  auto tuple = std::make_unique<SequenceExpr>(line, SequenceKind::tuple);
  bool has_comma = false;
  while (!at_end()) {
    tuple->items.push_back(parse_expression(with_conditional));
    if (!skip_op(",")) break;
    has_comma = true;
  }
  if (!has_comma) {
    if (!tuple->items.empty()) return std::move(tuple->items.front());
    if (!parenthesized) unexpected("an expression");
  }
  const int inner = max_height(tuple->items);
  return finish_with_height(std::move(tuple), inner);
}

ExprPtr Parser::parse_expression(bool with_conditional) {
  const Nesting nesting(*this);
  return with_conditional ? parse_conditional() : parse_logical(false);
}

ExprPtr Parser::parse_conditional() {
  const std::size_t first_unknown = unknown_.size();
  ExprPtr expr = parse_logical(false);
  while (peek().is_name("if")) {
    auto conditional = std::make_unique<ConditionalExpr>(next().line);
    conditional->then = std::move(expr);
    conditional->condition = parse_logical(false);
    if (skip_name("else")) {
      const Nesting nesting(*this);
      conditional->otherwise = parse_conditional();
    }
    for (std::size_t i = first_unknown; i < unknown_.size(); ++i) unknown_[i].guarded = true;
    const ConditionalExpr& node = *conditional;
    expr = finish(std::move(conditional), {node.then.get(), node.condition.get(), node.otherwise.get()});
  }
  return expr;
}

ExprPtr Parser::parse_logical(bool is_and) {
  const auto operand = [&] { return is_and ? parse_not() : parse_logical(true); };
  const std::string_view word = is_and ? "and" : "or";
  ExprPtr first = operand();
  if (!peek().is_name(word)) return first;
  auto logical = std::make_unique<LogicalExpr>(first->line, is_and);
  logical->operands.push_back(std::move(first));
  while (skip_name(word)) logical->operands.push_back(operand());
  const int inner = max_height(logical->operands);
  return finish_with_height(std::move(logical), inner);
}

ExprPtr Parser::parse_not() {
  if (!peek().is_name("not")) return parse_compare();
  const Nesting nesting(*this);
  const int line = next().line;
  auto node = std::make_unique<UnaryExpr>(line, UnaryOperator::logical_not, parse_not());
  const Expr* operand = node->operand.get();
  return finish(std::move(node), {operand});
}

ExprPtr Parser::parse_compare() {
  ExprPtr first = parse_sum();
  std::vector<std::pair<CompareOperator, ExprPtr>> rest;
  int inner = first->height;
  while (true) {
    CompareOperator op;
    if (const auto symbol = compare_operator(peek())) {
      op = *symbol;
      next();
    } else if (skip_name("in")) {
      op = CompareOperator::in;
    } else if (peek().is_name("not") && peek(1).is_name("in")) {
      next();
      next();
      op = CompareOperator::not_in;
    } else {
      break;
    }
    rest.emplace_back(op, parse_sum());
    inner = std::max(inner, rest.back().second->height);
  }
  if (rest.empty()) return first;
  auto compare = std::make_unique<CompareExpr>(first->line);
  compare->first = std::move(first);
  compare->rest = std::move(rest);
  return finish_with_height(std::move(compare), inner);
}

ExprPtr Parser::parse_sum() {
  ExprPtr left = parse_concat();
  while (peek().is_op("+") || peek().is_op("-")) {
    const Token& symbol = next();
    const auto op = symbol.text == "+" ? BinaryOperator::add : BinaryOperator::subtract;
    auto node = std::make_unique<BinaryExpr>(symbol.line, op, std::move(left), parse_concat());
    const BinaryExpr& view = *node;
    left = finish(std::move(node), {view.left.get(), view.right.get()});
  }
  return left;
}

ExprPtr Parser::parse_concat() {
  ExprPtr first = parse_product();
  if (!peek().is_op("~")) return first;
  auto concat = std::make_unique<ConcatExpr>(first->line);
  concat->operands.push_back(std::move(first));
  while (skip_op("~")) concat->operands.push_back(parse_product());
  const int inner = max_height(concat->operands);
  return finish_with_height(std::move(concat), inner);
}

ExprPtr Parser::parse_product() {
  ExprPtr left = parse_power();
  while (true) {
    BinaryOperator op;
    if (peek().is_op("*")) op = BinaryOperator::multiply;
    else if (peek().is_op("/")) op = BinaryOperator::divide;
    else if (peek().is_op("//")) op = BinaryOperator::floor_divide;
    else if (peek().is_op("%")) op = BinaryOperator::modulo;
    else return left;
    const int line = next().line;
    auto node = std::make_unique<BinaryExpr>(line, op, std::move(left), parse_power());
    const BinaryExpr& view = *node;
    left = finish(std::move(node), {view.left.get(), view.right.get()});
  }
}

/// Groups to the left, unlike Python's, as Jinja2 has it: 2 ** 3 ** 2 is 64.
ExprPtr Parser::parse_power() {
  ExprPtr left = parse_unary();
  while (peek().is_op("**")) {
    const int line = next().line;
    auto node = std::make_unique<BinaryExpr>(line, BinaryOperator::power, std::move(left), parse_unary());
    const BinaryExpr& view = *node;
    left = finish(std::move(node), {view.left.get(), view.right.get()});
  }
  return left;
}

ExprPtr Parser::parse_unary(bool with_filters) {
  ExprPtr expr;
  if (peek().is_op("-") || peek().is_op("+")) {
    const Nesting nesting(*this);
    const Token& symbol = next();
    const auto op = symbol.text == "-" ? UnaryOperator::negate : UnaryOperator::plus;
    auto node = std::make_unique<UnaryExpr>(symbol.line, op, parse_unary(false));
    const Expr* operand = node->operand.get();
    expr = finish(std::move(node), {operand});
  } else {
    expr = parse_primary();
  }
  expr = parse_postfix(std::move(expr));
  return with_filters ? parse_filters_and_tests(std::move(expr)) : std::move(expr);
}

ExprPtr Parser::parse_primary() {
  const Token& token = peek();
  const int line = token.line;
  switch (token.kind) {
    case TokenKind::name: {
      next();
      if (token.text == "true" || token.text == "True") return std::make_unique<ConstantExpr>(line, Value::boolean(true));
      if (token.text == "false" || token.text == "False") return std::make_unique<ConstantExpr>(line, Value::boolean(false));
      if (token.text == "none" || token.text == "None") return std::make_unique<ConstantExpr>(line, Value::none());
      for (Signature* macro : macros_) {
        macro->uses_varargs |= token.text == "varargs";
        macro->uses_kwargs |= token.text == "kwargs";
        macro->uses_caller |= token.text == "caller";
      }
      return std::make_unique<NameExpr>(line, intern(token.text));
    }
    case TokenKind::string: {
      std::string text;
      while (peek().kind == TokenKind::string) text += next().text;  // neighbours join
      return std::make_unique<ConstantExpr>(line, Value::string(std::move(text)));
    }
    case TokenKind::integer:
    case TokenKind::real: return parse_number();
    case TokenKind::op:
      if (token.text == "(") {
        next();
        ExprPtr inner = parse_tuple(true, true);
        expect_op(")");
        return inner;
      }
      if (token.text == "[") return parse_list();
      if (token.text == "{") return parse_dict();
      [[fallthrough]];
    default: unexpected("an expression");
  }
}

ExprPtr Parser::parse_number() {
  const Token& token = next();
  if (token.kind == TokenKind::real) {
    return std::make_unique<ConstantExpr>(token.line, Value::real(std::strtod(token.text.c_str(), nullptr)));
  }
  std::string_view digits = token.text;
  int base = 10;
  if (digits.size() > 2 && digits[0] == '0') {
    const char letter = static_cast<char>(digits[1] | 0x20);
    base = letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 10;
    if (base != 10) digits.remove_prefix(2);
  }
  std::int64_t value = 0;
  const auto [end, code] = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
  if (code != std::errc()) error(fmt::format("the number {} does not fit into 64 bits", token.text), token.line);
  return std::make_unique<ConstantExpr>(token.line, Value::integer(value));
}

ExprPtr Parser::parse_list() {
  auto list = std::make_unique<SequenceExpr>(next().line, SequenceKind::list);
  while (!peek().is_op("]")) {
    if (!list->items.empty()) {
      expect_op(",");
      if (peek().is_op("]")) break;
    }
    list->items.push_back(parse_expression());
  }
  expect_op("]");
  const int inner = max_height(list->items);
  return finish_with_height(std::move(list), inner);
}

ExprPtr Parser::parse_dict() {
  auto dict = std::make_unique<DictExpr>(next().line);
  int inner = 0;
  while (!peek().is_op("}")) {
    if (!dict->entries.empty()) {
      expect_op(",");
      if (peek().is_op("}")) break;
    }
    ExprPtr key = parse_expression();
    expect_op(":");
    ExprPtr value = parse_expression();
    inner = std::max({inner, key->height, value->height});
    dict->entries.emplace_back(std::move(key), std::move(value));
  }
  expect_op("}");
  return finish_with_height(std::move(dict), inner);
}

ExprPtr Parser::parse_postfix(ExprPtr expr) {
  while (true) {
    if (peek().is_op(".") || peek().is_op("[")) expr = parse_subscript(std::move(expr));
    else if (peek().is_op("(")) expr = parse_call(std::move(expr));
    else return expr;
  }
}

ExprPtr Parser::parse_filters_and_tests(ExprPtr expr) {
  while (true) {
    if (peek().is_op("|")) expr = parse_filter(std::move(expr));
    else if (peek().is_name("is")) expr = parse_test(std::move(expr));
    else if (peek().is_op("(")) expr = parse_call(std::move(expr));
    else return expr;
  }
}

ExprPtr Parser::parse_subscript(ExprPtr object) {
  const Token& open = next();
  const int line = open.line;
  if (open.text == ".") {
    if (peek().kind == TokenKind::name) {
      auto node = std::make_unique<AttributeExpr>(line, std::move(object), next().text);
      const Expr* inner = node->object.get();
      return finish(std::move(node), {inner});
    }
    if (peek().kind != TokenKind::integer) unexpected("a name or a number after '.'");
    auto node = std::make_unique<ItemExpr>(line, std::move(object), parse_number());
    const Expr* inner = node->object.get();
    return finish(std::move(node), {inner});
  }

  const auto at_bound_end = [&] { return peek().is_op(":") || peek().is_op("]") || peek().is_op(","); };
  ExprPtr first;
  if (peek().is_op("]")) first = std::make_unique<SequenceExpr>(line, SequenceKind::tuple);  // x[] is x[()]
  else if (!peek().is_op(":")) first = parse_expression();
  if (peek().is_op(":")) {
    auto slice = std::make_unique<SliceExpr>(line);
    next();
    slice->object = std::move(object);
    slice->start = std::move(first);
    if (!at_bound_end()) slice->stop = parse_expression();
    if (skip_op(":") && !at_bound_end()) slice->step = parse_expression();
    expect_op("]");
    const SliceExpr& view = *slice;
    return finish(std::move(slice), {view.object.get(), view.start.get(), view.stop.get(), view.step.get()});
  }
  if (peek().is_op(",")) {
    auto tuple = std::make_unique<SequenceExpr>(line, SequenceKind::tuple);
    tuple->items.push_back(std::move(first));
    while (skip_op(",")) tuple->items.push_back(parse_expression());
    const int inner = max_height(tuple->items);
    first = finish_with_height(std::move(tuple), inner);
  }
  expect_op("]");
  auto node = std::make_unique<ItemExpr>(line, std::move(object), std::move(first));
  const ItemExpr& view = *node;
  return finish(std::move(node), {view.object.get(), view.key.get()});
}

ArgumentList Parser::parse_arguments() {
  ArgumentList arguments;
  const int line = peek().line;
  expect_op("(");
  const auto ensure = [&](bool condition) {
    if (!condition) error("invalid order of arguments in a call", line);
  };
  for (bool first = true; !peek().is_op(")"); first = false) {
    if (!first) {
      expect_op(",");
      if (peek().is_op(")")) break;
    }
    if (skip_op("*")) {
      ensure(arguments.star == nullptr && arguments.double_star == nullptr);
      arguments.star = parse_expression();
    } else if (skip_op("**")) {
      ensure(arguments.double_star == nullptr);
      arguments.double_star = parse_expression();
    } else if (peek().kind == TokenKind::name && peek(1).is_op("=")) {
      ensure(arguments.double_star == nullptr);
      const std::string name = next().text;
      next();
      ExprPtr value = parse_expression();
      for (const auto& [other, unused] : arguments.keyword) {
        if (other == name) error(fmt::format("the argument '{}' is given twice", name), line);
      }
      arguments.keyword.emplace_back(name, std::move(value));
    } else {
      ensure(arguments.star == nullptr && arguments.double_star == nullptr && arguments.keyword.empty());
      arguments.positional.push_back(parse_expression());
    }
  }
  expect_op(")");
  return arguments;
}

ExprPtr Parser::parse_call(ExprPtr callee) {
  auto call = std::make_unique<CallExpr>(peek().line);
  call->callee = std::move(callee);
  call->arguments = parse_arguments();
  const int inner = std::max(call->callee->height, height(call->arguments));
  return finish_with_height(std::move(call), inner);
}

/// At "|", or at the name of the filter of a {% filter %} block.
ExprPtr Parser::parse_filter(ExprPtr input) {
  skip_op("|");
  auto filter = std::make_unique<FilterExpr>(peek().line);
  if (peek().kind != TokenKind::name) unexpected("the name of a filter");
  filter->name = next().text;
  while (skip_op(".")) {
    if (peek().kind != TokenKind::name) unexpected("the name of a filter");
    filter->name += '.' + next().text;
  }
  filter->function = find_filter(filter->name);
  if (filter->function == nullptr) note_unknown("filter", filter->name, filter->line);
  if (peek().is_op("(")) filter->arguments = parse_arguments();
  filter->input = std::move(input);
  const int inner = std::max(height_of(filter->input), height(filter->arguments));
  return finish_with_height(std::move(filter), inner);
}

ExprPtr Parser::parse_test(ExprPtr input) {
  const Nesting nesting(*this);
  const int line = next().line;
  const bool negated = skip_name("not");
  auto test = std::make_unique<TestExpr>(line);
  if (peek().kind != TokenKind::name) unexpected("the name of a test");
  test->name = next().text;
  while (skip_op(".")) {
    if (peek().kind != TokenKind::name) unexpected("the name of a test");
    test->name += '.' + next().text;
  }
  test->function = find_test(test->name);
  if (test->function == nullptr) note_unknown("test", test->name, line);

  const Token& token = peek();
  if (token.is_op("(")) {
    test->arguments = parse_arguments();
  } else if (token.kind == TokenKind::string || token.kind == TokenKind::integer || token.kind == TokenKind::real ||
             token.is_op("[") || token.is_op("{") ||
             (token.kind == TokenKind::name && !token.is_name("else") && !token.is_name("or") && !token.is_name("and"))) {
    if (token.is_name("is")) error("tests with 'is' cannot be chained");
    test->arguments.positional.push_back(parse_postfix(parse_primary()));  // x is divisibleby 3
  }
  test->input = std::move(input);
  const int inner = std::max(height_of(test->input), height(test->arguments));
  ExprPtr expr = finish_with_height(std::move(test), inner);
  if (!negated) return expr;
  auto inverted = std::make_unique<UnaryExpr>(line, UnaryOperator::logical_not, std::move(expr));
  const Expr* operand = inverted->operand.get();
  return finish(std::move(inverted), {operand});
}

}  // namespace baton::jinja
