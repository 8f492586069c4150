#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json_fwd.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace baton {

/// Reads the fields of one JSON object with bounds, remembers which ones were read, and keeps the first error,
/// so that a list of fields reads as a list. null counts as absent, as in transformers. After an error
/// every getter returns its fallback; check status() once at the end.
class ConfigReader {
 public:
  /// `object` must be a JSON object and outlive the reader; `context` begins every message ("config.json").
  ConfigReader(const nlohmann::json& object, std::string context);

  bool has(const std::string& key) const;
  /// As has(), but null counts too: for the few fields where transformers' default is not "none".
  bool has_key(const std::string& key) const;
  int64_t required_int(const std::string& key, int64_t min, int64_t max);
  int64_t optional_int(const std::string& key, int64_t fallback, int64_t min, int64_t max);
  double optional_number(const std::string& key, double fallback, double min, double max);
  bool optional_bool(const std::string& key, bool fallback);
  std::string optional_string(const std::string& key, std::string_view fallback);
  /// Empty when absent. At most `max_items` items.
  std::vector<std::string> optional_strings(const std::string& key, size_t max_items);
  /// A number or a list of numbers; empty when absent.
  std::vector<int64_t> int_or_list(const std::string& key, int64_t min, int64_t max, size_t max_items);
  /// The object under `key`; fails when it is there and no object, null when absent.
  const nlohmann::json* optional_object(const std::string& key);

  /// These say nothing about how to run the model.
  void ignore(std::initializer_list<const char*> keys);
  /// Fails when `key` is there with a value that turns something on: not null, false, 0, empty.
  void refuse(const std::string& key, std::string_view why);
  /// Keys that nobody read, ignored or refused.
  std::vector<std::string> unread_keys() const;

  /// Keeps `status` when it is the first failure, with the context in front.
  void fail(const Status& status);
  const Status& status() const { return status_; }
  const std::string& context() const { return context_; }

 private:
  const nlohmann::json* find(const std::string& key);
  int64_t to_int(const std::string& key, const nlohmann::json& value, int64_t fallback, int64_t min,
                 int64_t max);

  const nlohmann::json& object_;
  std::string context_;
  std::set<std::string> read_;
  Status status_;
};

/// Parses text as a JSON object without throwing. Errors name `context` and the position.
Status parse_json_object(std::string_view text, std::string_view context, nlohmann::json* object);

}  // namespace baton
