#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace baton::jinja {

class Interpreter;
struct Arguments;

/// What went wrong while parsing or rendering. Thrown inside src/text/jinja only: ChatTemplate
/// turns it into a Status at the library's border.
struct TemplateError {
  std::string message;
  int line = 0;           ///< of the template, from 1; 0 when it isn't known yet
  bool verbatim = false;  ///< raise_exception(): the template's own words, passed on as they are
};

template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw TemplateError{fmt::format(format, std::forward<Args>(args)...)};
}

/// Everything that is bounded. Templates come with models and messages come from clients, so a
/// render must end with an answer or an error, in bounded time, memory and stack.
struct Limits {
  std::size_t max_template_bytes = 1u << 20;
  std::size_t max_output_bytes = 32u << 20;        ///< of the result and of any string on the way
  std::uint64_t max_steps = 10'000'000;            ///< evaluated nodes and visited elements
  std::uint64_t max_work_bytes = 512ull << 20;     ///< bytes produced or scanned, live or not
  int max_depth = 1000;                            ///< nested evaluations: bounds the native stack
};

/// What one render has used of its Limits. Not thread-safe: each render has its own.
class Budget {
 public:
  explicit Budget(const Limits& limits) : limits_(limits) {}

  void charge(std::uint64_t steps) {
    steps_ += steps;
    if (steps_ > limits_.max_steps) out_of_steps();
  }
  void charge_bytes(std::uint64_t bytes) {
    work_bytes_ += bytes;
    if (work_bytes_ > limits_.max_work_bytes) out_of_bytes();
  }
  /// Before a string grows to `size` bytes.
  void check_size(std::size_t size) const {
    if (size > limits_.max_output_bytes) too_long(size);
  }
  void enter() {
    if (++depth_ > limits_.max_depth) too_deep();
  }
  void leave() { --depth_; }

 private:
  [[noreturn]] void out_of_steps() const;
  [[noreturn]] void out_of_bytes() const;
  [[noreturn]] void too_long(std::size_t size) const;
  [[noreturn]] void too_deep();

  const Limits& limits_;
  std::uint64_t steps_ = 0;
  std::uint64_t work_bytes_ = 0;
  int depth_ = 0;
};

enum class Kind : std::uint8_t {
  undefined,    ///< a name or attribute that isn't there; prints as nothing, carries why
  none,
  boolean,
  integer,      ///< int64; arithmetic that overflows is an error (Python's grow)
  big_integer,  ///< a JSON integer beyond int64, kept as its digits: printed, never computed with
  real,
  string,       ///< UTF-8; indices and lengths count code points, as Python's do
  sequence,     ///< list, tuple, range, dict views, one-shot iterators
  dict,         ///< keeps insertion order
  object,       ///< functions, macros, namespaces, loop
};

/// Base of what Values share by reference.
struct Object {
  virtual ~Object() = default;
};

struct StringObject;
struct Sequence;
struct Dict;
class NativeObject;

/// One Python-like value. Cheap to copy; strings and containers are shared and immutable once
/// built, except for the position of a one-shot iterator and the attributes of a namespace.
class Value {
 public:
  Value() = default;  ///< undefined, with no explanation
  static Value none() { return Value(Kind::none); }
  static Value boolean(bool value);
  static Value integer(std::int64_t value);
  static Value real(double value);
  static Value string(std::string text);
  static Value big_integer(std::string digits);
  static Value undefined(std::string why);
  static Value sequence(std::shared_ptr<Sequence> sequence);
  static Value dict(std::shared_ptr<Dict> dict);
  static Value object(std::shared_ptr<NativeObject> object);

  Kind kind() const { return kind_; }
  bool is(Kind kind) const { return kind_ == kind; }
  bool is_undefined() const { return kind_ == Kind::undefined; }
  bool is_none() const { return kind_ == Kind::none; }
  bool is_string() const { return kind_ == Kind::string; }
  /// Text that went through `safe` or `escape`: HTML, with which other text is escaped when joined.
  bool is_markup() const { return markup_; }
  Value as_markup() const;
  /// Whatever Python's int() semantics cover without conversion: bool and int.
  bool is_integral() const { return kind_ == Kind::integer || kind_ == Kind::boolean; }
  bool is_number() const { return is_integral() || kind_ == Kind::real; }

  bool as_bool() const { return integer_ != 0; }
  std::int64_t as_integer() const { return integer_; }  ///< of an integral value
  double as_real() const { return kind_ == Kind::real ? real_ : static_cast<double>(integer_); }
  const std::string& as_string() const;  ///< also the digits of a big integer
  Sequence& as_sequence() const;
  Dict& as_dict() const;
  NativeObject& as_object() const;
  /// Why an undefined value is undefined, for the error when it is used.
  std::string undefined_reason() const;
  const Object* identity() const { return object_.get(); }

  /// Levels of containers inside, 0 for scalars. Bounded when containers are built, so that
  /// recursion over a value (printing, comparing, destroying) is bounded too.
  int depth() const;

 private:
  explicit Value(Kind kind) : kind_(kind) {}

  Kind kind_ = Kind::undefined;
  bool markup_ = false;  ///< of a string
  union {
    std::int64_t integer_ = 0;
    double real_;
  };
  std::shared_ptr<Object> object_;
};

struct StringObject : Object {
  explicit StringObject(std::string value) : text(std::move(value)) {}
  std::string text;
};

enum class SequenceKind : std::uint8_t {
  list,
  tuple,
  group,  ///< a tuple from groupby, with .grouper and .list
  range,
  dict_items,
  dict_keys,
  dict_values,
  iterator,  ///< Python's generators and iterators: gone over once, no length
};

struct Sequence : Object {
  SequenceKind kind = SequenceKind::list;
  std::vector<Value> items;
  std::size_t position = 0;  ///< of an iterator: what has been taken
  int depth = 1;
  std::int64_t range_start = 0, range_stop = 0, range_step = 1;  ///< of a range, for printing

  bool is_tuple() const { return kind == SequenceKind::tuple || kind == SequenceKind::group; }
  bool is_indexable() const {
    return is_tuple() || kind == SequenceKind::list || kind == SequenceKind::range;
  }
};

struct Dict : Object {
  std::vector<std::pair<Value, Value>> entries;
  int depth = 1;

  const Value* find(std::string_view key) const;
  const Value* find(const Value& key, Budget& budget) const;
  /// Adds, or replaces in place as Python does. The key must be hashable.
  void set(Value key, Value value, Budget& budget);

 private:
  std::optional<std::size_t> find_index(std::string_view key) const;
  std::unordered_map<std::string_view, std::size_t> index_;  ///< of string keys, once there are many
};

/// Something with behaviour: callable, or with computed attributes, or both.
class NativeObject : public Object {
 public:
  virtual std::string_view type_name() const = 0;
  virtual bool callable() const { return false; }
  virtual Value call(Interpreter& interpreter, Arguments& arguments);
  /// nullopt: there is no such attribute.
  virtual std::optional<Value> attribute(Interpreter& interpreter, std::string_view name);
  virtual int depth() const { return 0; }
  virtual void append_repr(std::string& out, Budget& budget, int level) const;
};

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keyword;
};

/// Containers, with their nesting checked and their memory charged.
Value make_sequence(SequenceKind kind, std::vector<Value> items, Budget& budget);
inline Value make_list(std::vector<Value> items, Budget& budget) {
  return make_sequence(SequenceKind::list, std::move(items), budget);
}
inline Value make_tuple(std::vector<Value> items, Budget& budget) {
  return make_sequence(SequenceKind::tuple, std::move(items), budget);
}

/// Python's truth value.
bool truthy(const Value& value);
/// Python's ==.
bool equals(const Value& left, const Value& right, Budget& budget);
/// Python's <: fails on kinds that have no order.
bool less_than(const Value& left, const Value& right, Budget& budget);
bool hashable(const Value& value);
/// The name of the Python type: "str", "NoneType", "dict".
std::string_view type_name(const Value& value);
/// How Jinja's messages call a value: "dict object", "None".
std::string describe_type(const Value& value);

/// Python's str() and repr(), appended.
void append_text(std::string& out, const Value& value, Budget& budget);
void append_repr(std::string& out, const Value& value, Budget& budget, int level = 0);
void append_string_repr(std::string& out, std::string_view text);
std::string to_text(const Value& value, Budget& budget);
std::string to_repr(const Value& value, Budget& budget);
/// Shortest decimal that reads back the same, laid out as Python's repr(float).
std::string real_repr(double value);

}  // namespace baton::jinja
