#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "text/jinja/builtins.h"
#include "text/jinja/value.h"

// The parsed template. Immutable after parsing and read by any number of renders at once.

namespace baton::jinja {

using NameId = std::uint32_t;  ///< index into Template::names

enum class ExprKind : std::uint8_t {
  constant, name, attribute, item, slice, call, filter, test, unary, binary, logical, compare, concat,
  conditional, sequence, dict,
};

struct Expr {
  Expr(ExprKind kind_in, int line_in) : kind(kind_in), line(line_in) {}
  virtual ~Expr() = default;
  ExprKind kind;
  int line;
  int height = 1;  ///< of the tree below, bounded by the parser
};
using ExprPtr = std::unique_ptr<Expr>;

struct ConstantExpr : Expr {
  ConstantExpr(int line_in, Value value_in) : Expr(ExprKind::constant, line_in), value(std::move(value_in)) {}
  Value value;
};

struct NameExpr : Expr {
  NameExpr(int line_in, NameId name_in) : Expr(ExprKind::name, line_in), name(name_in) {}
  NameId name;
};

/// object.name: Python attributes come before dict keys.
struct AttributeExpr : Expr {
  AttributeExpr(int line_in, ExprPtr object_in, std::string name_in)
      : Expr(ExprKind::attribute, line_in), object(std::move(object_in)), name(std::move(name_in)) {}
  ExprPtr object;
  std::string name;
};

/// object[key]: dict keys come before Python attributes.
struct ItemExpr : Expr {
  ItemExpr(int line_in, ExprPtr object_in, ExprPtr key_in)
      : Expr(ExprKind::item, line_in), object(std::move(object_in)), key(std::move(key_in)) {}
  ExprPtr object;
  ExprPtr key;
};

struct SliceExpr : Expr {
  explicit SliceExpr(int line_in) : Expr(ExprKind::slice, line_in) {}
  ExprPtr object;
  ExprPtr start, stop, step;  ///< each may be missing
};

struct ArgumentList {
  std::vector<ExprPtr> positional;
  std::vector<std::pair<std::string, ExprPtr>> keyword;
  ExprPtr star;         ///< *args
  ExprPtr double_star;  ///< **kwargs
};

struct CallExpr : Expr {
  explicit CallExpr(int line_in) : Expr(ExprKind::call, line_in) {}
  ExprPtr callee;
  ArgumentList arguments;
};

/// A filter whose input is missing applies to the body of its block.
struct FilterExpr : Expr {
  explicit FilterExpr(int line_in) : Expr(ExprKind::filter, line_in) {}
  ExprPtr input;
  std::string name;
  FilterFunction function = nullptr;  ///< nullptr: no such filter
  ArgumentList arguments;
};

struct TestExpr : Expr {
  explicit TestExpr(int line_in) : Expr(ExprKind::test, line_in) {}
  ExprPtr input;
  std::string name;
  TestFunction function = nullptr;  ///< nullptr: no such test
  ArgumentList arguments;
};

enum class UnaryOperator : std::uint8_t { logical_not, negate, plus };

struct UnaryExpr : Expr {
  UnaryExpr(int line_in, UnaryOperator op_in, ExprPtr operand_in)
      : Expr(ExprKind::unary, line_in), op(op_in), operand(std::move(operand_in)) {}
  UnaryOperator op;
  ExprPtr operand;
};

enum class BinaryOperator : std::uint8_t { add, subtract, multiply, divide, floor_divide, modulo, power };

struct BinaryExpr : Expr {
  BinaryExpr(int line_in, BinaryOperator op_in, ExprPtr left_in, ExprPtr right_in)
      : Expr(ExprKind::binary, line_in), op(op_in), left(std::move(left_in)), right(std::move(right_in)) {}
  BinaryOperator op;
  ExprPtr left, right;
};

/// a and b and c; a or b or c.
struct LogicalExpr : Expr {
  LogicalExpr(int line_in, bool is_and_in) : Expr(ExprKind::logical, line_in), is_and(is_and_in) {}
  bool is_and;
  std::vector<ExprPtr> operands;
};

enum class CompareOperator : std::uint8_t { equal, not_equal, less, less_equal, greater, greater_equal, in, not_in };

/// a < b <= c: each operand is evaluated at most once.
struct CompareExpr : Expr {
  explicit CompareExpr(int line_in) : Expr(ExprKind::compare, line_in) {}
  ExprPtr first;
  std::vector<std::pair<CompareOperator, ExprPtr>> rest;
};

struct ConcatExpr : Expr {
  explicit ConcatExpr(int line_in) : Expr(ExprKind::concat, line_in) {}
  std::vector<ExprPtr> operands;
};

struct ConditionalExpr : Expr {
  explicit ConditionalExpr(int line_in) : Expr(ExprKind::conditional, line_in) {}
  ExprPtr condition, then, otherwise;  ///< otherwise may be missing
};

struct SequenceExpr : Expr {
  SequenceExpr(int line_in, SequenceKind kind_in) : Expr(ExprKind::sequence, line_in), sequence_kind(kind_in) {}
  SequenceKind sequence_kind;  ///< list or tuple
  std::vector<ExprPtr> items;
};

struct DictExpr : Expr {
  explicit DictExpr(int line_in) : Expr(ExprKind::dict, line_in) {}
  std::vector<std::pair<ExprPtr, ExprPtr>> entries;
};

/// What can be assigned to: a name, an attribute of a namespace, or a tuple of those.
struct Target {
  int line = 0;
  NameId name = 0;
  std::string attribute;       ///< of the namespace `name`, when not empty
  std::vector<Target> items;   ///< of a tuple
  bool is_tuple = false;
};

enum class StatementKind : std::uint8_t {
  data, output, if_, for_, set, set_block, macro, call_block, filter_block, with, scope, break_, continue_,
};

struct Statement {
  Statement(StatementKind kind_in, int line_in) : kind(kind_in), line(line_in) {}
  virtual ~Statement() = default;
  StatementKind kind;
  int line;
};
using Body = std::vector<std::unique_ptr<Statement>>;

struct DataStatement : Statement {
  DataStatement(int line_in, std::string text_in) : Statement(StatementKind::data, line_in), text(std::move(text_in)) {}
  std::string text;
};

struct OutputStatement : Statement {
  OutputStatement(int line_in, ExprPtr value_in) : Statement(StatementKind::output, line_in), value(std::move(value_in)) {}
  ExprPtr value;
};

struct IfStatement : Statement {
  explicit IfStatement(int line_in) : Statement(StatementKind::if_, line_in) {}
  std::vector<std::pair<ExprPtr, Body>> branches;  ///< if, elif...
  Body otherwise;
};

struct ForStatement : Statement {
  explicit ForStatement(int line_in) : Statement(StatementKind::for_, line_in) {}
  Target target;
  ExprPtr iterable;
  ExprPtr condition;  ///< may be missing
  bool recursive = false;
  Body body;
  Body otherwise;  ///< when there was nothing to go over
};

struct SetStatement : Statement {
  explicit SetStatement(int line_in) : Statement(StatementKind::set, line_in) {}
  Target target;
  ExprPtr value;
};

struct SetBlockStatement : Statement {
  explicit SetBlockStatement(int line_in) : Statement(StatementKind::set_block, line_in) {}
  Target target;
  ExprPtr filter;  ///< may be missing
  Body body;
};

struct Signature {
  std::vector<std::pair<NameId, ExprPtr>> parameters;  ///< with default, or without
  bool uses_varargs = false, uses_kwargs = false, uses_caller = false;
};

struct MacroStatement : Statement {
  explicit MacroStatement(int line_in) : Statement(StatementKind::macro, line_in) {}
  NameId name = 0;
  Signature signature;
  Body body;
};

/// {% call(parameters) macro(arguments) %} body {% endcall %}
struct CallBlockStatement : Statement {
  explicit CallBlockStatement(int line_in) : Statement(StatementKind::call_block, line_in) {}
  MacroStatement caller{0};
  std::unique_ptr<CallExpr> call;
};

struct FilterBlockStatement : Statement {
  explicit FilterBlockStatement(int line_in) : Statement(StatementKind::filter_block, line_in) {}
  ExprPtr filter;
  Body body;
};

struct WithStatement : Statement {
  explicit WithStatement(int line_in) : Statement(StatementKind::with, line_in) {}
  std::vector<std::pair<Target, ExprPtr>> bindings;
  Body body;
};

/// A body with its own variables: {% block %}, {% generation %}, {% autoescape false %}.
struct ScopeStatement : Statement {
  explicit ScopeStatement(int line_in) : Statement(StatementKind::scope, line_in) {}
  Body body;
};

struct JumpStatement : Statement {
  JumpStatement(int line_in, bool is_break) : Statement(is_break ? StatementKind::break_ : StatementKind::continue_, line_in) {}
};

struct Template {
  Body body;
  std::vector<std::string> names;
};

}  // namespace baton::jinja
