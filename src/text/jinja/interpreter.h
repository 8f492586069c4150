#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/jinja/ast.h"
#include "text/jinja/value.h"

namespace baton::jinja {

/// Variables of one block. A block sees those of the blocks around it and sets only its own.
struct Scope {
  explicit Scope(std::shared_ptr<Scope> parent_in) : parent(std::move(parent_in)) {}
  void set(NameId name, Value value);
  const Value* find_here(NameId name) const;

  std::shared_ptr<Scope> parent;
  std::vector<std::pair<NameId, Value>> variables;
};
using ScopePtr = std::shared_ptr<Scope>;

/// {{ namespace() }}: the only thing a template can change.
class Namespace : public NativeObject {
 public:
  std::string_view type_name() const override { return "Namespace"; }
  std::optional<Value> attribute(Interpreter& interpreter, std::string_view name) override;
  void append_repr(std::string& out, Budget& budget, int level) const override;
  void set(std::string_view name, Value value, Budget& budget);

  Dict attributes;
};

/// Renders one template once. It walks the tree: templates are short, and their time goes into
/// building text. Not thread-safe; many may read the same Template.
///
/// Ownership: values are reference-counted, and cycles can arise in two ways only: through
/// namespaces and through macros (a macro holds the scope that holds it). The interpreter keeps
/// both, and empties them when it goes.
class Interpreter {
 public:
  using Variables = std::vector<std::pair<std::string, Value>>;

  Interpreter(const Template& code, const Limits& limits, std::int64_t now_unix_s);
  ~Interpreter();
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  /// The text. Throws TemplateError. Once only.
  std::string render(const Variables& variables);

  // What filters, tests, methods and functions use.
  Budget& budget() { return budget_; }
  std::int64_t now_unix_s() const { return now_unix_s_; }
  Value string(std::string text);
  Value list(std::vector<Value> items) { return make_list(std::move(items), budget_); }
  Value tuple(std::vector<Value> items) { return make_tuple(std::move(items), budget_); }
  Value iterator(std::vector<Value> items) { return make_sequence(SequenceKind::iterator, std::move(items), budget_); }
  std::string text(const Value& value) { return to_text(value, budget_); }
  /// Python's iter(): the elements, characters or keys. Uses up an iterator.
  std::vector<Value> elements(const Value& value);
  /// Python's len(); fails on what has none.
  std::size_t length(const Value& value);
  bool contains(const Value& container, const Value& element);
  /// value.name and value[key], by Jinja's rules. Undefined when there is nothing.
  Value attribute(const Value& value, std::string_view name);
  Value item(const Value& value, const Value& key);
  Value slice(const Value& value, const Value& start, const Value& stop, const Value& step);
  Value binary(BinaryOperator op, const Value& left, const Value& right);
  Value call(const Value& callee, Arguments& arguments);
  Value apply_filter(const std::string& name, const Value& input, Arguments& arguments);
  bool apply_test(const std::string& name, const Value& input, Arguments& arguments);
  /// A namespace that the interpreter keeps until it goes.
  std::shared_ptr<Namespace> new_namespace();

  /// The body of a macro, with its parameters bound.
  std::string run_macro(const MacroStatement& macro, const ScopePtr& scope, Arguments& arguments, std::string_view name);
  /// One level of a recursive loop.
  std::string run_recursive_loop(const ForStatement& statement, const ScopePtr& scope, const Value& iterable, int depth);
  Value evaluate_in(const Expr& expr, const ScopePtr& scope);
  void bind_in(const Target& target, Value value, const ScopePtr& scope);

 private:
  enum class Flow { normal, break_loop, next_iteration };
  class DepthGuard;
  class ScopeGuard;
  class OutputGuard;

  // interpreter.cc: statements
  Flow execute(const Body& body);
  Flow execute(const Statement& statement);
  Flow execute_if(const IfStatement& statement);
  Flow execute_for(const ForStatement& statement, const Value& iterable, int depth);
  void execute_set_block(const SetBlockStatement& statement);
  void execute_call_block(const CallBlockStatement& statement);
  void execute_filter_block(const FilterBlockStatement& statement);
  Flow execute_with(const WithStatement& statement);
  std::string capture(const Body& body, ScopePtr scope);
  Value define_macro(const MacroStatement& statement, std::string_view name);
  void assign(const Target& target, Value value);
  void write(const Value& value);

  // expressions.cc
  Value evaluate(const Expr& expr);
  Value evaluate_name(const NameExpr& expr);
  Value evaluate_item(const ItemExpr& expr);
  Value evaluate_slice(const SliceExpr& expr);
  Value evaluate_call(const CallExpr& expr, Value caller = Value());
  Value evaluate_filter(const FilterExpr& expr, const Value* body = nullptr);
  bool evaluate_test(const TestExpr& expr);
  Value evaluate_unary(const UnaryExpr& expr);
  Value evaluate_logical(const LogicalExpr& expr);
  Value evaluate_compare(const CompareExpr& expr);
  Value evaluate_concat(const ConcatExpr& expr);
  Value evaluate_conditional(const ConditionalExpr& expr);
  Value evaluate_sequence(const SequenceExpr& expr);
  Value evaluate_dict(const DictExpr& expr);
  Arguments evaluate_arguments(const ArgumentList& list);
  bool compare(CompareOperator op, const Value& left, const Value& right);

  const Template& code_;
  const Limits limits_;
  Budget budget_;
  std::int64_t now_unix_s_;
  int line_ = 0;  ///< of what is being evaluated, for messages
  ScopePtr scope_;
  std::string* out_ = nullptr;
  std::vector<ScopePtr> captured_scopes_;
  std::vector<std::shared_ptr<Namespace>> namespaces_;
};

}  // namespace baton::jinja
