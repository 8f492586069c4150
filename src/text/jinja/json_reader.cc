#include "text/jinja/json_reader.h"

#include <nlohmann/json.hpp>

namespace baton::jinja {
namespace {

constexpr std::size_t kMaxJsonDepth = 100;

/// Builds Values straight from the parser's events: no tree in between, no recursion, and no
/// quadratic look-up of keys.
class Builder {
 public:
  using number_integer_t = nlohmann::json::number_integer_t;
  using number_unsigned_t = nlohmann::json::number_unsigned_t;
  using number_float_t = nlohmann::json::number_float_t;
  using string_t = nlohmann::json::string_t;
  using binary_t = nlohmann::json::binary_t;

  Builder(std::string_view what, Budget& budget) : what_(what), budget_(budget) {}

  Value take() { return std::move(result_); }

  bool null() { return add(Value::none()); }
  bool boolean(bool value) { return add(Value::boolean(value)); }
  bool number_integer(number_integer_t value) { return add(Value::integer(value)); }
  bool number_unsigned(number_unsigned_t value) {
    if (value > static_cast<number_unsigned_t>(INT64_MAX)) return add(Value::big_integer(fmt::format("{}", value)));
    return add(Value::integer(static_cast<std::int64_t>(value)));
  }
  bool number_float(number_float_t value, const string_t& text) {
    // The parser turns integers that are too long into floats, but hands over what was written.
    if (text.find_first_not_of("-0123456789") == std::string::npos) return add(Value::big_integer(text));
    return add(Value::real(value));
  }
  bool string(string_t& value) {
    budget_.charge_bytes(value.size());
    return add(Value::string(std::move(value)));
  }
  bool binary(binary_t&) { return false; }
  bool start_object(std::size_t) { return open(Kind::dict); }
  bool start_array(std::size_t) { return open(Kind::sequence); }
  bool key(string_t& name) {
    open_.back().key = std::move(name);
    return true;
  }
  bool end_object() {
    Value value = Value::dict(std::move(open_.back().dict));
    open_.pop_back();
    return add(std::move(value));
  }
  bool end_array() {
    Value value = make_list(std::move(open_.back().items), budget_);
    open_.pop_back();
    return add(std::move(value));
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) {
    fail("{} are not valid JSON: error at byte {}", what_, position);
  }

 private:
  struct Open {
    Kind kind;
    std::shared_ptr<Dict> dict;
    std::vector<Value> items;
    std::string key;
  };

  bool open(Kind kind) {
    if (open_.size() >= kMaxJsonDepth) fail("{} are nested more than {} levels deep", what_, kMaxJsonDepth);
    open_.push_back({kind, kind == Kind::dict ? std::make_shared<Dict>() : nullptr, {}, {}});
    budget_.charge_bytes(sizeof(Open));
    return true;
  }

  bool add(Value value) {
    budget_.charge_bytes(sizeof(Value));
    if (open_.empty()) {
      result_ = std::move(value);
    } else if (open_.back().kind == Kind::dict) {
      open_.back().dict->set(Value::string(std::move(open_.back().key)), std::move(value), budget_);
    } else {
      open_.back().items.push_back(std::move(value));
    }
    return true;
  }

  std::string_view what_;
  Budget& budget_;
  std::vector<Open> open_;
  Value result_;
};

}  // namespace

Value parse_json(std::string_view text, std::string_view what, Budget& budget) {
  Builder builder(what, budget);
  nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

}  // namespace baton::jinja
