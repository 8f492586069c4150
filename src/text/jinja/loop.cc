#include "text/jinja/loop.h"

#include <algorithm>
#include <functional>

namespace baton::jinja {
namespace {

/// loop.cycle and loop.changed: functions that belong to a loop.
class LoopFunction : public NativeObject {
 public:
  using Function = std::function<Value(Interpreter&, Arguments&)>;
  LoopFunction(std::shared_ptr<Loop> loop, Function function) : loop_(std::move(loop)), function_(std::move(function)) {}
  std::string_view type_name() const override { return "method"; }
  bool callable() const override { return true; }
  Value call(Interpreter& interpreter, Arguments& arguments) override { return function_(interpreter, arguments); }

 private:
  std::shared_ptr<Loop> loop_;  ///< kept alive for the function
  Function function_;
};

}  // namespace

Loop::Loop(Interpreter& interpreter, const ForStatement& code, ScopePtr scope, const Value& iterable, int depth)
    : code_(code), scope_(std::move(scope)), items_(interpreter.elements(iterable)), depth0_(depth) {}

bool Loop::accepts(Interpreter& interpreter, const Value& item) {
  if (code_.condition == nullptr) return true;
  const auto inner = std::make_shared<Scope>(scope_);
  interpreter.bind_in(code_.target, item, inner);
  return truthy(interpreter.evaluate_in(*code_.condition, inner));
}

bool Loop::peek(Interpreter& interpreter) {
  while (ahead_.empty() && position_ < items_.size()) {
    interpreter.budget().charge(1);
    Value& item = items_[position_++];
    if (accepts(interpreter, item)) ahead_.push_back(item);
  }
  return !ahead_.empty();
}

bool Loop::advance(Interpreter& interpreter) {
  if (!peek(interpreter)) return false;
  previous_ = std::move(current_);
  current_ = std::move(ahead_.back());
  ahead_.pop_back();
  ++index0_;
  return true;
}

void Loop::release() {
  items_.clear();
  ahead_.clear();
  previous_ = Value();
  current_ = Value();
  last_changed_.clear();
}

std::int64_t Loop::length(Interpreter& interpreter) {
  if (code_.condition == nullptr) return static_cast<std::int64_t>(items_.size());
  // Decide on all that is left: the order is turned around so that the next one is last.
  std::vector<Value> accepted;
  while (peek(interpreter)) {
    accepted.insert(accepted.end(), ahead_.rbegin(), ahead_.rend());
    ahead_.clear();
  }
  ahead_.assign(accepted.rbegin(), accepted.rend());
  return index0_ + 1 + static_cast<std::int64_t>(ahead_.size());
}

bool Loop::changed(Interpreter& interpreter, const Arguments& arguments) {
  const bool same = has_changed_ && last_changed_.size() == arguments.positional.size() &&
                    std::equal(last_changed_.begin(), last_changed_.end(), arguments.positional.begin(),
                               [&](const Value& a, const Value& b) { return equals(a, b, interpreter.budget()); });
  has_changed_ = true;
  last_changed_ = arguments.positional;
  return !same;
}

Value Loop::call(Interpreter& interpreter, Arguments& arguments) {
  if (!code_.recursive) fail("loop() can be called only in a loop marked 'recursive'");
  if (arguments.positional.size() != 1) fail("loop() takes one argument: what to go over");
  return interpreter.string(
      interpreter.run_recursive_loop(code_, scope_, arguments.positional[0], static_cast<int>(depth0_) + 1));
}

std::optional<Value> Loop::attribute(Interpreter& interpreter, std::string_view name) {
  if (name == "index") return Value::integer(index0_ + 1);
  if (name == "index0") return Value::integer(index0_);
  if (name == "first") return Value::boolean(index0_ == 0);
  if (name == "last") return Value::boolean(!peek(interpreter));
  if (name == "length") return Value::integer(length(interpreter));
  if (name == "revindex") return Value::integer(length(interpreter) - index0_);
  if (name == "revindex0") return Value::integer(length(interpreter) - index0_ - 1);
  if (name == "depth") return Value::integer(depth0_ + 1);
  if (name == "depth0") return Value::integer(depth0_);
  if (name == "previtem") return index0_ == 0 ? Value::undefined("there is no previous item") : previous_;
  if (name == "nextitem") return peek(interpreter) ? ahead_.back() : Value::undefined("there is no next item");
  if (name == "cycle") {
    return Value::object(std::make_shared<LoopFunction>(shared_from_this(), [this](Interpreter&, Arguments& arguments) {
      if (arguments.positional.empty()) fail("loop.cycle() needs something to cycle through");
      return arguments.positional[static_cast<std::size_t>(index0_) % arguments.positional.size()];
    }));
  }
  if (name == "changed") {
    return Value::object(std::make_shared<LoopFunction>(shared_from_this(), [this](Interpreter& inner, Arguments& arguments) {
      return Value::boolean(changed(inner, arguments));
    }));
  }
  return std::nullopt;
}

}  // namespace baton::jinja
