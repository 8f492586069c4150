#include "model/config_reader.h"

#include <cmath>
#include <nlohmann/json.hpp>

namespace baton {

using nlohmann::json;

namespace {

/// A value as the message shows it: short, whatever the file holds.
std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  constexpr size_t kMaxShown = 60;
  if (text.size() > kMaxShown) text = text.substr(0, kMaxShown) + "...";
  return text;
}

}  // namespace

ConfigReader::ConfigReader(const json& object, std::string context)
    : object_(object), context_(std::move(context)) {
  BATON_CHECK(object.is_object());
}

void ConfigReader::fail(const Status& status) {
  if (status_.ok()) status_ = status.with_context(context_);
}

bool ConfigReader::has(const std::string& key) const {
  auto it = object_.find(key);
  return it != object_.end() && !it->is_null();
}

bool ConfigReader::has_key(const std::string& key) const { return object_.contains(key); }

const json* ConfigReader::find(const std::string& key) {
  read_.insert(key);
  auto it = object_.find(key);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

int64_t ConfigReader::to_int(const std::string& key, const json& value, int64_t fallback, int64_t min,
                             int64_t max) {
  bool integral = value.is_number_integer() || value.is_number_unsigned();
  double number = value.is_number() ? value.get<double>() : 0.0;
  // 8192.0 is written by some tools; anything else with a fraction is a mistake.
  if (!integral && !(value.is_number_float() && std::nearbyint(number) == number)) {
    fail(invalid_argument("{} is {}; it must be an integer", key, shown(value)));
    return fallback;
  }
  // The comparison is made in double first: a uint64 or 1e300 must not wrap into the range.
  if (number < static_cast<double>(min) || number > static_cast<double>(max)) {
    fail(invalid_argument("{} is {}; it must be in [{}, {}]", key, shown(value), min, max));
    return fallback;
  }
  return integral ? value.get<int64_t>() : static_cast<int64_t>(number);
}

int64_t ConfigReader::required_int(const std::string& key, int64_t min, int64_t max) {
  const json* value = find(key);
  if (value == nullptr) {
    fail(invalid_argument("{} is missing; it must be an integer in [{}, {}]", key, min, max));
    return min;
  }
  return to_int(key, *value, min, min, max);
}

int64_t ConfigReader::optional_int(const std::string& key, int64_t fallback, int64_t min, int64_t max) {
  const json* value = find(key);
  return value == nullptr ? fallback : to_int(key, *value, fallback, min, max);
}

double ConfigReader::optional_number(const std::string& key, double fallback, double min, double max) {
  const json* value = find(key);
  if (value == nullptr) return fallback;
  double number = value->is_number() ? value->get<double>() : std::nan("");
  if (!(number >= min && number <= max)) {  // false for NaN too
    fail(invalid_argument("{} is {}; it must be a number in [{}, {}]", key, shown(*value), min, max));
    return fallback;
  }
  return number;
}

bool ConfigReader::optional_bool(const std::string& key, bool fallback) {
  const json* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) {
    fail(invalid_argument("{} is {}; it must be true or false", key, shown(*value)));
    return fallback;
  }
  return value->get<bool>();
}

std::string ConfigReader::optional_string(const std::string& key, std::string_view fallback) {
  const json* value = find(key);
  if (value == nullptr) return std::string(fallback);
  if (!value->is_string()) {
    fail(invalid_argument("{} is {}; it must be a string", key, shown(*value)));
    return std::string(fallback);
  }
  return value->get<std::string>();
}

std::vector<std::string> ConfigReader::optional_strings(const std::string& key, size_t max_items) {
  const json* value = find(key);
  std::vector<std::string> strings;
  if (value == nullptr) return strings;
  bool good = value->is_array() && value->size() <= max_items;
  if (good) {
    for (const json& item : *value) good = good && item.is_string();
  }
  if (!good) {
    fail(invalid_argument("{} is {}; it must be a list of at most {} strings", key, shown(*value), max_items));
    return strings;
  }
  for (const json& item : *value) strings.push_back(item.get<std::string>());
  return strings;
}

std::vector<int64_t> ConfigReader::int_or_list(const std::string& key, int64_t min, int64_t max,
                                               size_t max_items) {
  const json* value = find(key);
  std::vector<int64_t> numbers;
  if (value == nullptr) return numbers;
  if (!value->is_array()) {
    numbers.push_back(to_int(key, *value, min, min, max));
    return numbers;
  }
  if (value->size() > max_items) {
    fail(invalid_argument("{} has {} items; at most {} are allowed", key, value->size(), max_items));
    return numbers;
  }
  for (const json& item : *value) numbers.push_back(to_int(key, item, min, min, max));
  return numbers;
}

const json* ConfigReader::optional_object(const std::string& key) {
  const json* value = find(key);
  if (value != nullptr && !value->is_object()) {
    fail(invalid_argument("{} is {}; it must be an object", key, shown(*value)));
    return nullptr;
  }
  return value;
}

void ConfigReader::ignore(std::initializer_list<const char*> keys) {
  for (const char* key : keys) read_.insert(key);
}

void ConfigReader::refuse(const std::string& key, std::string_view why) {
  const json* value = find(key);
  if (value == nullptr) return;
  bool off = (value->is_boolean() && !value->get<bool>()) || (value->is_number() && value->get<double>() == 0) ||
             ((value->is_structured() || value->is_string()) && value->empty());
  if (!off) fail(unimplemented("{} is {}: {}", key, shown(*value), why));
}

std::vector<std::string> ConfigReader::unread_keys() const {
  std::vector<std::string> keys;
  for (const auto& [key, value] : object_.items()) {
    if (!value.is_null() && read_.count(key) == 0) keys.push_back(key);
  }
  return keys;
}

Status parse_json_object(std::string_view text, std::string_view context, json* object) {
  try {
    *object = json::parse(text);
  } catch (const json::exception& error) {
    return invalid_argument("{}: no valid JSON: {}", context, error.what());
  }
  if (!object->is_object()) {
    return invalid_argument("{}: it must hold a JSON object, not {}", context, object->type_name());
  }
  return {};
}

}  // namespace baton
