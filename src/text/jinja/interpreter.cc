#include "text/jinja/interpreter.h"

#include <algorithm>

#include "text/jinja/loop.h"

namespace baton::jinja {

void Scope::set(NameId name, Value value) {
  for (auto& [known, slot] : variables) {
    if (known == name) {
      slot = std::move(value);
      return;
    }
  }
  variables.emplace_back(name, std::move(value));
}

const Value* Scope::find_here(NameId name) const {
  for (const auto& [known, value] : variables) {
    if (known == name) return &value;
  }
  return nullptr;
}

std::optional<Value> Namespace::attribute(Interpreter&, std::string_view name) {
  const Value* value = attributes.find(name);
  return value == nullptr ? std::nullopt : std::optional<Value>(*value);
}

void Namespace::append_repr(std::string& out, Budget& budget, int level) const {
  out += "<Namespace {";
  bool first = true;
  for (const auto& [key, value] : attributes.entries) {
    if (!first) out += ", ";
    first = false;
    jinja::append_repr(out, key, budget, level + 1);
    out += ": ";
    jinja::append_repr(out, value, budget, level + 1);
  }
  out += "}>";
}

void Namespace::set(std::string_view name, Value value, Budget& budget) {
  if (name.starts_with('_')) fail("the attribute '{}' of a namespace must not start with an underscore", name);
  attributes.set(Value::string(std::string(name)), std::move(value), budget);
}

/// Bounds the native stack over everything that recurses through the tree.
class Interpreter::DepthGuard {
 public:
  explicit DepthGuard(Budget& budget) : budget_(budget) { budget_.enter(); }
  ~DepthGuard() { budget_.leave(); }

 private:
  Budget& budget_;
};

/// Puts another scope in place until the end of a block.
class Interpreter::ScopeGuard {
 public:
  ScopeGuard(Interpreter& interpreter, ScopePtr scope) : interpreter_(interpreter), saved_(std::move(interpreter.scope_)) {
    interpreter_.scope_ = std::move(scope);
  }
  ~ScopeGuard() { interpreter_.scope_ = std::move(saved_); }
  const ScopePtr& outer() const { return saved_; }

 private:
  Interpreter& interpreter_;
  ScopePtr saved_;
};

/// Sends the output into a string of its own until the end of a block.
class Interpreter::OutputGuard {
 public:
  OutputGuard(Interpreter& interpreter, std::string& out) : interpreter_(interpreter), saved_(interpreter.out_) {
    interpreter_.out_ = &out;
  }
  ~OutputGuard() { interpreter_.out_ = saved_; }

 private:
  Interpreter& interpreter_;
  std::string* saved_;
};

namespace {

/// A macro, or the caller() of a call block.
class Macro : public NativeObject {
 public:
  Macro(const MacroStatement& code, ScopePtr scope, std::string name)
      : code_(code), scope_(std::move(scope)), name_(std::move(name)) {}

  std::string_view type_name() const override { return "Macro"; }
  bool callable() const override { return true; }
  Value call(Interpreter& interpreter, Arguments& arguments) override {
    return interpreter.string(interpreter.run_macro(code_, scope_, arguments, name_));
  }
  std::optional<Value> attribute(Interpreter& interpreter, std::string_view name) override {
    if (name == "name") return interpreter.string(name_);
    if (name == "catch_varargs") return Value::boolean(code_.signature.uses_varargs);
    if (name == "catch_kwargs") return Value::boolean(code_.signature.uses_kwargs);
    if (name == "caller") return Value::boolean(code_.signature.uses_caller);
    return std::nullopt;
  }
  void append_repr(std::string& out, Budget&, int) const override { out += fmt::format("<Macro '{}'>", name_); }

 private:
  const MacroStatement& code_;
  ScopePtr scope_;  ///< where it was defined
  std::string name_;
};

}  // namespace

Interpreter::Interpreter(const Template& code, const Limits& limits, std::int64_t now_unix_s)
    : code_(code), limits_(limits), budget_(limits_), now_unix_s_(now_unix_s), scope_(std::make_shared<Scope>(nullptr)) {}

Interpreter::~Interpreter() {
  for (const ScopePtr& scope : captured_scopes_) scope->variables.clear();
  for (const auto& space : namespaces_) space->attributes.entries.clear();
}

std::string Interpreter::render(const Variables& variables) {
  // Only names that the template mentions can be looked up, so the others need no slot.
  for (const auto& [name, value] : variables) {
    const auto found = std::find(code_.names.begin(), code_.names.end(), name);
    if (found != code_.names.end()) scope_->set(static_cast<NameId>(found - code_.names.begin()), value);
  }
  std::string result;
  const OutputGuard output(*this, result);
  try {
    const ScopeGuard top(*this, std::make_shared<Scope>(scope_));
    execute(code_.body);
  } catch (TemplateError& error) {
    if (error.line == 0) error.line = line_;
    throw;
  }
  return result;
}

Value Interpreter::string(std::string text) {
  budget_.check_size(text.size());
  budget_.charge_bytes(text.size());
  return Value::string(std::move(text));
}

std::shared_ptr<Namespace> Interpreter::new_namespace() {
  budget_.charge_bytes(sizeof(Namespace) + sizeof(Value));
  namespaces_.push_back(std::make_shared<Namespace>());
  return namespaces_.back();
}

void Interpreter::write(const Value& value) {
  budget_.check_size(out_->size());
  append_text(*out_, value, budget_);
}

Interpreter::Flow Interpreter::execute(const Body& body) {
  for (const auto& statement : body) {
    const Flow flow = execute(*statement);
    if (flow != Flow::normal) return flow;
  }
  return Flow::normal;
}

Interpreter::Flow Interpreter::execute(const Statement& statement) {
  const DepthGuard depth(budget_);
  budget_.charge(1);
  line_ = statement.line;
  switch (statement.kind) {
    case StatementKind::data: {
      const std::string& text = static_cast<const DataStatement&>(statement).text;
      budget_.check_size(out_->size() + text.size());
      budget_.charge_bytes(text.size());
      *out_ += text;
      return Flow::normal;
    }
    case StatementKind::output: write(evaluate(*static_cast<const OutputStatement&>(statement).value)); return Flow::normal;
    case StatementKind::if_: return execute_if(static_cast<const IfStatement&>(statement));
    case StatementKind::for_: {
      const auto& loop = static_cast<const ForStatement&>(statement);
      return execute_for(loop, evaluate(*loop.iterable), 0);
    }
    case StatementKind::set: {
      const auto& set = static_cast<const SetStatement&>(statement);
      assign(set.target, evaluate(*set.value));
      return Flow::normal;
    }
    case StatementKind::set_block: execute_set_block(static_cast<const SetBlockStatement&>(statement)); return Flow::normal;
    case StatementKind::macro: {
      const auto& macro = static_cast<const MacroStatement&>(statement);
      scope_->set(macro.name, define_macro(macro, code_.names[macro.name]));
      return Flow::normal;
    }
    case StatementKind::call_block: execute_call_block(static_cast<const CallBlockStatement&>(statement)); return Flow::normal;
    case StatementKind::filter_block:
      execute_filter_block(static_cast<const FilterBlockStatement&>(statement));
      return Flow::normal;
    case StatementKind::with: return execute_with(static_cast<const WithStatement&>(statement));
    case StatementKind::scope: {
      const ScopeGuard inner(*this, std::make_shared<Scope>(scope_));
      return execute(static_cast<const ScopeStatement&>(statement).body);
    }
    case StatementKind::break_: return Flow::break_loop;
    case StatementKind::continue_: return Flow::next_iteration;
  }
  return Flow::normal;
}

Interpreter::Flow Interpreter::execute_if(const IfStatement& statement) {
  for (const auto& [condition, body] : statement.branches) {
    if (truthy(evaluate(*condition))) return execute(body);
  }
  return execute(statement.otherwise);
}

Interpreter::Flow Interpreter::execute_for(const ForStatement& statement, const Value& iterable, int depth) {
  const auto loop = std::make_shared<Loop>(*this, statement, scope_, iterable, depth);
  struct Release {  // a loop object that was kept must not keep what it went over
    Loop& loop;
    ~Release() { loop.release(); }
  } release{*loop};

  static const std::string loop_name = "loop";
  const auto name = std::find(code_.names.begin(), code_.names.end(), loop_name);
  // `else` is for loops without a complete pass: leaving all of them early counts as none.
  bool completed = false;
  while (loop->advance(*this)) {
    budget_.charge(1);
    const ScopeGuard inner(*this, std::make_shared<Scope>(scope_));
    if (name != code_.names.end()) scope_->set(static_cast<NameId>(name - code_.names.begin()), Value::object(loop));
    assign(statement.target, loop->current());
    const Flow flow = execute(statement.body);
    if (flow == Flow::break_loop) break;
    completed |= flow == Flow::normal;
  }
  if (completed) return Flow::normal;
  const ScopeGuard inner(*this, std::make_shared<Scope>(scope_));
  return execute(statement.otherwise);
}

std::string Interpreter::run_recursive_loop(const ForStatement& statement, const ScopePtr& scope, const Value& iterable,
                                            int depth) {
  const DepthGuard guard(budget_);
  const ScopeGuard outer(*this, scope);
  std::string text;
  const OutputGuard output(*this, text);
  execute_for(statement, iterable, depth);
  return text;
}

std::string Interpreter::capture(const Body& body, ScopePtr scope) {
  const ScopeGuard inner(*this, std::move(scope));
  std::string text;
  const OutputGuard output(*this, text);
  execute(body);
  return text;
}

void Interpreter::execute_set_block(const SetBlockStatement& statement) {
  Value value = string(capture(statement.body, std::make_shared<Scope>(scope_)));
  if (statement.filter != nullptr) value = evaluate_filter(static_cast<const FilterExpr&>(*statement.filter), &value);
  assign(statement.target, std::move(value));
}

void Interpreter::execute_call_block(const CallBlockStatement& statement) {
  write(evaluate_call(*statement.call, define_macro(statement.caller, "caller")));
}

void Interpreter::execute_filter_block(const FilterBlockStatement& statement) {
  const Value body = string(capture(statement.body, std::make_shared<Scope>(scope_)));
  write(evaluate_filter(static_cast<const FilterExpr&>(*statement.filter), &body));
}

Interpreter::Flow Interpreter::execute_with(const WithStatement& statement) {
  const auto inner = std::make_shared<Scope>(scope_);
  for (const auto& [target, expr] : statement.bindings) bind_in(target, evaluate(*expr), inner);
  const ScopeGuard guard(*this, inner);
  return execute(statement.body);
}

Value Interpreter::define_macro(const MacroStatement& statement, std::string_view name) {
  budget_.charge_bytes(sizeof(Macro) + sizeof(Scope));
  captured_scopes_.push_back(scope_);
  return Value::object(std::make_shared<Macro>(statement, scope_, std::string(name)));
}

std::string Interpreter::run_macro(const MacroStatement& macro, const ScopePtr& scope, Arguments& arguments,
                                   std::string_view name) {
  const DepthGuard depth(budget_);
  budget_.charge(1);
  const auto inner = std::make_shared<Scope>(scope);
  const ScopeGuard guard(*this, inner);
  const auto& parameters = macro.signature.parameters;
  auto& keyword = arguments.keyword;
  bool caller_bound = false;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const auto& [id, fallback] = parameters[i];
    const std::string& parameter = code_.names[id];
    caller_bound |= parameter == "caller";
    if (i < arguments.positional.size()) {
      inner->set(id, arguments.positional[i]);
      continue;
    }
    const auto given = std::find_if(keyword.begin(), keyword.end(), [&](const auto& item) { return item.first == parameter; });
    if (given != keyword.end()) {
      inner->set(id, std::move(given->second));
      keyword.erase(given);
    } else if (fallback != nullptr) {
      inner->set(id, evaluate(*fallback));
    } else {
      inner->set(id, Value::undefined(fmt::format("parameter '{}' was not provided", parameter)));
    }
  }

  const auto bind_special = [&](std::string_view special, Value value) {
    const auto id = std::find(code_.names.begin(), code_.names.end(), special);
    if (id != code_.names.end()) inner->set(static_cast<NameId>(id - code_.names.begin()), std::move(value));
  };
  if (macro.signature.uses_caller && !caller_bound) {
    const auto given = std::find_if(keyword.begin(), keyword.end(), [](const auto& item) { return item.first == "caller"; });
    if (given == keyword.end()) {
      bind_special("caller", Value::undefined("no caller defined"));
    } else {
      bind_special("caller", std::move(given->second));
      keyword.erase(given);
    }
  }
  if (macro.signature.uses_kwargs) {
    auto rest = std::make_shared<Dict>();
    for (auto& [key, value] : keyword) rest->set(string(key), std::move(value), budget_);
    bind_special("kwargs", Value::dict(std::move(rest)));
  } else if (!keyword.empty()) {
    fail("macro '{}' takes no keyword argument '{}'", name, keyword.front().first);
  }
  const std::size_t taken = std::min(parameters.size(), arguments.positional.size());
  if (macro.signature.uses_varargs) {
    bind_special("varargs", tuple({arguments.positional.begin() + static_cast<std::ptrdiff_t>(taken), arguments.positional.end()}));
  } else if (arguments.positional.size() > taken) {
    fail("macro '{}' takes not more than {} arguments, {} were given", name, parameters.size(), arguments.positional.size());
  }

  std::string text;
  const OutputGuard output(*this, text);
  execute(macro.body);
  return text;
}

void Interpreter::assign(const Target& target, Value value) { bind_in(target, std::move(value), scope_); }

void Interpreter::bind_in(const Target& target, Value value, const ScopePtr& scope) {
  if (target.is_tuple) {
    std::vector<Value> parts = elements(value);
    if (parts.size() != target.items.size()) {
      fail("{} values cannot be assigned to {} names", parts.size(), target.items.size());
    }
    for (std::size_t i = 0; i < parts.size(); ++i) bind_in(target.items[i], std::move(parts[i]), scope);
    return;
  }
  if (target.attribute.empty()) {
    scope->set(target.name, std::move(value));
    return;
  }
  for (const Scope* s = scope.get(); s != nullptr; s = s->parent.get()) {
    const Value* space = s->find_here(target.name);
    if (space == nullptr) continue;
    auto* attributes = space->is(Kind::object) ? dynamic_cast<Namespace*>(&space->as_object()) : nullptr;
    if (attributes == nullptr) break;
    attributes->set(target.attribute, std::move(value), budget_);
    return;
  }
  fail("'{}.{}' cannot be set: '{}' is not a namespace", code_.names[target.name], target.attribute, code_.names[target.name]);
}

Value Interpreter::evaluate_in(const Expr& expr, const ScopePtr& scope) {
  const ScopeGuard guard(*this, scope);
  return evaluate(expr);
}

}  // namespace baton::jinja
