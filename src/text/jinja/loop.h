#pragma once

#include <vector>

#include "text/jinja/interpreter.h"

namespace baton::jinja {

/// One run of a for loop, and the variable `loop` inside it. Elements are filtered as late as
/// Jinja2 does it, since the condition may read what the body of the loop changes.
class Loop : public NativeObject, public std::enable_shared_from_this<Loop> {
 public:
  Loop(Interpreter& interpreter, const ForStatement& code, ScopePtr scope, const Value& iterable, int depth);

  /// Goes to the next element; false when there is none.
  bool advance(Interpreter& interpreter);
  const Value& current() const { return current_; }
  /// Lets go of the elements once the loop is over.
  void release();

  std::string_view type_name() const override { return "LoopContext"; }
  bool callable() const override { return true; }
  /// loop(children): one level deeper in a recursive loop.
  Value call(Interpreter& interpreter, Arguments& arguments) override;
  std::optional<Value> attribute(Interpreter& interpreter, std::string_view name) override;

 private:
  /// Makes sure that the next element is known; false when there is none.
  bool peek(Interpreter& interpreter);
  bool accepts(Interpreter& interpreter, const Value& item);
  std::int64_t length(Interpreter& interpreter);
  bool changed(Interpreter& interpreter, const Arguments& arguments);

  const ForStatement& code_;
  ScopePtr scope_;  ///< around the loop
  std::vector<Value> items_;
  std::size_t position_ = 0;   ///< of the first item that was not looked at
  std::vector<Value> ahead_;   ///< accepted and not yet reached, next one last
  Value previous_, current_;
  std::int64_t index0_ = -1;
  std::int64_t depth0_;
  std::vector<Value> last_changed_;
  bool has_changed_ = false;
};

}  // namespace baton::jinja
