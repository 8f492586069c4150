#include <algorithm>
#include <array>
#include <ctime>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"

// The global names of a template: range, dict, namespace, cycler, joiner, and what transformers adds.

namespace baton::jinja {
namespace {

constexpr std::size_t kMaxRange = 100'000;  // Jinja2's sandbox has the same

class Function : public NativeObject {
 public:
  using Body = Value (*)(Interpreter&, Arguments&);
  Function(std::string_view name, Body body) : name_(name), body_(body) {}
  std::string_view type_name() const override { return "function"; }
  bool callable() const override { return true; }
  Value call(Interpreter& interpreter, Arguments& arguments) override { return body_(interpreter, arguments); }
  void append_repr(std::string& out, Budget&, int) const override { out += fmt::format("<function {}>", name_); }

 private:
  std::string_view name_;
  Body body_;
};

/// Gives its values in turn.
class Cycler : public NativeObject, public std::enable_shared_from_this<Cycler> {
 public:
  explicit Cycler(std::vector<Value> items) : items_(std::move(items)) {
    for (const Value& item : items_) depth_ = std::max(depth_, item.depth() + 1);
  }
  std::string_view type_name() const override { return "Cycler"; }
  int depth() const override { return depth_; }
  Value next() {
    const Value value = items_[position_];
    position_ = (position_ + 1) % items_.size();
    return value;
  }
  std::optional<Value> attribute(Interpreter& interpreter, std::string_view name) override;
  void reset() { position_ = 0; }

 private:
  std::vector<Value> items_;
  std::size_t position_ = 0;
  int depth_ = 0;
};

class CyclerMethod : public NativeObject {
 public:
  CyclerMethod(Value cycler, bool resets) : cycler_(std::move(cycler)), resets_(resets) {}
  std::string_view type_name() const override { return "method"; }
  bool callable() const override { return true; }
  int depth() const override { return cycler_.depth() + 1; }
  Value call(Interpreter&, Arguments&) override {
    auto& cycler = static_cast<Cycler&>(cycler_.as_object());
    if (!resets_) return cycler.next();
    cycler.reset();
    return Value::none();
  }

 private:
  Value cycler_;
  bool resets_;
};

/// Nothing the first time it is called, a separator from then on.
class Joiner : public NativeObject {
 public:
  explicit Joiner(Value separator) : separator_(std::move(separator)) {}
  std::string_view type_name() const override { return "Joiner"; }
  bool callable() const override { return true; }
  int depth() const override { return separator_.depth() + 1; }
  Value call(Interpreter&, Arguments&) override {
    if (used_) return separator_;
    used_ = true;
    return Value::string("");
  }

 private:
  Value separator_;
  bool used_ = false;
};

std::optional<Value> Cycler::attribute(Interpreter&, std::string_view name) {
  if (name == "current") return items_[position_];
  if (name != "next" && name != "reset") return std::nullopt;
  return Value::object(std::make_shared<CyclerMethod>(Value::object(shared_from_this()), name == "reset"));
}

/// What dict() and namespace() take: a mapping or pairs, then keywords.
template <typename Set>
void each_entry(Interpreter& interpreter, std::string_view function, const Arguments& arguments, Set set) {
  if (arguments.positional.size() > 1) fail("{} takes at most one positional argument", function);
  if (!arguments.positional.empty()) {
    const Value& source = arguments.positional[0];
    if (source.is_undefined()) fail("{}", source.undefined_reason());
    if (source.is(Kind::dict)) {
      interpreter.budget().charge(source.as_dict().entries.size());
      for (const auto& [key, value] : source.as_dict().entries) set(key, value);
    } else {
      for (const Value& pair : interpreter.elements(source)) {
        const std::vector<Value> parts = interpreter.elements(pair);
        if (parts.size() != 2) fail("{} needs pairs, not {} values", function, parts.size());
        set(parts[0], parts[1]);
      }
    }
  }
  for (const auto& [name, value] : arguments.keyword) set(Value::string(name), value);
}

Value make_dict(Interpreter& interpreter, Arguments& arguments) {
  auto dict = std::make_shared<Dict>();
  each_entry(interpreter, "dict()", arguments,
             [&](const Value& key, const Value& value) { dict->set(key, value, interpreter.budget()); });
  return Value::dict(std::move(dict));
}

Value make_namespace(Interpreter& interpreter, Arguments& arguments) {
  const auto space = interpreter.new_namespace();
  each_entry(interpreter, "namespace()", arguments, [&](const Value& key, const Value& value) {
    if (!key.is_string()) fail("the attributes of a namespace need names");
    space->set(key.as_string(), value, interpreter.budget());
  });
  return Value::object(space);
}

Value make_range(Interpreter& interpreter, Arguments& arguments) {
  const auto& given = arguments.positional;
  if (given.empty() || given.size() > 3 || !arguments.keyword.empty()) fail("range() takes one to three arguments");
  for (const Value& value : given) {
    if (value.is_undefined()) fail("{}", value.undefined_reason());
    if (!value.is_integral()) fail("range() needs integers, not '{}'", type_name(value));
  }
  const std::int64_t start = given.size() > 1 ? given[0].as_integer() : 0;
  const std::int64_t stop = given.size() > 1 ? given[1].as_integer() : given[0].as_integer();
  const std::int64_t step = given.size() > 2 ? given[2].as_integer() : 1;
  if (step == 0) fail("the step of range() cannot be zero");
  std::uint64_t count = 0;
  const auto distance = [](std::int64_t a, std::int64_t b) { return static_cast<std::uint64_t>(b) - static_cast<std::uint64_t>(a); };
  if (step > 0 && start < stop) count = (distance(start, stop) - 1) / static_cast<std::uint64_t>(step) + 1;
  if (step < 0 && stop < start) count = (distance(stop, start) - 1) / (0 - static_cast<std::uint64_t>(step)) + 1;
  if (count > kMaxRange) fail("range() of {} numbers is longer than the limit of {}", count, kMaxRange);
  interpreter.budget().charge(count);
  std::vector<Value> items;
  items.reserve(count);
  for (std::uint64_t i = 0; i < count; ++i) items.push_back(Value::integer(start + static_cast<std::int64_t>(i) * step));
  Value range = make_sequence(SequenceKind::range, std::move(items), interpreter.budget());
  range.as_sequence().range_start = start;
  range.as_sequence().range_stop = stop;
  range.as_sequence().range_step = step;
  return range;
}

Value make_cycler(Interpreter& interpreter, Arguments& arguments) {
  if (arguments.positional.empty()) fail("cycler() needs at least one value");
  // Its nesting is checked as that of a tuple of its values.
  const Value items = interpreter.tuple(arguments.positional);
  return Value::object(std::make_shared<Cycler>(items.as_sequence().items));
}

Value make_joiner(Interpreter& interpreter, Arguments& arguments) {
  const Parameters parameters("joiner()", arguments, {"sep"});
  const Value separator = parameters.has(0) ? parameters[0] : Value::string(", ");
  interpreter.tuple({separator});
  return Value::object(std::make_shared<Joiner>(separator));
}

Value raise_exception(Interpreter& interpreter, Arguments& arguments) {
  const Parameters parameters("raise_exception()", arguments, {"message"}, 1);
  throw TemplateError{interpreter.text(parameters[0]), 0, true};
}

Value strftime_now(Interpreter& interpreter, Arguments& arguments) {
  const Parameters parameters("strftime_now()", arguments, {"format"}, 1);
  const std::string& format = parameters.string(0);
  if (format.empty()) return Value::string("");
  const std::time_t now = interpreter.now_unix_s();
  std::tm local{};
  if (localtime_r(&now, &local) == nullptr) fail("the time {} s cannot be expressed as a date", now);
  std::array<char, 4096> buffer;
  const std::size_t length = std::strftime(buffer.data(), buffer.size(), format.c_str(), &local);
  if (length == 0) fail("strftime_now() gives nothing, or more than {} bytes, for this format", buffer.size());
  return interpreter.string(std::string(buffer.data(), length));
}

}  // namespace

const Value* find_global(std::string_view name) {
  struct Entry {
    std::string_view name;
    Value value;
  };
  const auto function = [](std::string_view name, Function::Body body) {
    return Entry{name, Value::object(std::make_shared<Function>(name, body))};
  };
  // Functions have no state, so all renders share them.
  static const std::array<Entry, 7> globals = {
      function("namespace", make_namespace), function("range", make_range),
      function("raise_exception", raise_exception), function("strftime_now", strftime_now),
      function("dict", make_dict), function("cycler", make_cycler), function("joiner", make_joiner)};
  for (const Entry& entry : globals) {
    if (entry.name == name) return &entry.value;
  }
  return nullptr;
}

Parameters::Parameters(std::string_view function, const Arguments& arguments, std::initializer_list<std::string_view> names,
                       std::size_t required)
    : function_(function), values_(names.size(), nullptr) {
  if (arguments.positional.size() > names.size()) {
    fail("{} takes at most {} arguments, {} were given", function, names.size(), arguments.positional.size());
  }
  for (std::size_t i = 0; i < arguments.positional.size(); ++i) values_[i] = &arguments.positional[i];
  for (const auto& [name, value] : arguments.keyword) {
    const auto* known = std::find(names.begin(), names.end(), name);
    if (known == names.end()) fail("{} takes no argument '{}'", function, name);
    const Value*& slot = values_[static_cast<std::size_t>(known - names.begin())];
    if (slot != nullptr) fail("{} was given '{}' twice", function, name);
    slot = &value;
  }
  for (std::size_t i = 0; i < required; ++i) {
    if (values_[i] == nullptr) fail("{} needs the argument '{}'", function, *(names.begin() + i));
  }
}

const Value& Parameters::operator[](std::size_t index) const {
  static const Value missing{};
  return values_[index] == nullptr ? missing : *values_[index];
}

std::int64_t Parameters::integer(std::size_t index, std::int64_t fallback) const {
  if (!has(index)) return fallback;
  const Value& value = *values_[index];
  if (!value.is_integral()) fail("{} needs an integer, not '{}'", function_, type_name(value));
  return value.as_integer();
}

bool Parameters::boolean(std::size_t index, bool fallback) const { return has(index) ? truthy(*values_[index]) : fallback; }

const std::string& Parameters::string(std::size_t index) const {
  const Value& value = (*this)[index];
  if (value.is_undefined()) fail("{}", value.undefined_reason());
  if (!value.is_string()) fail("{} needs a string, not '{}'", function_, type_name(value));
  return value.as_string();
}

}  // namespace baton::jinja
