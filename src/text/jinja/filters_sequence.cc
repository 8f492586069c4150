#include <algorithm>
#include <array>
#include <charconv>
#include <unordered_set>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/unicode.h"

// Filters on sequences and mappings, and `default`.

namespace baton::jinja {
namespace {

struct Entry {
  std::string_view name;
  FilterFunction function;
};

/// "a.b.0" as a path of keys, for filters that take an attribute.
class AttributePath {
 public:
  explicit AttributePath(const Value& attribute) {
    if (attribute.is_none() || attribute.is_undefined()) return;
    if (!attribute.is_string()) {
      parts_.push_back(attribute);
      return;
    }
    std::string_view rest = attribute.as_string();
    while (true) {
      const std::size_t dot = rest.find('.');
      parts_.push_back(part(rest.substr(0, dot)));
      if (dot == std::string_view::npos) break;
      rest = rest.substr(dot + 1);
    }
  }

  Value get(Interpreter& interpreter, Value value, const Value* fallback = nullptr) const {
    for (const Value& part : parts_) {
      value = interpreter.item(value, part);
      if (fallback != nullptr && value.is_undefined()) value = *fallback;
    }
    return value;
  }

 private:
  static Value part(std::string_view text) {
    std::int64_t index = 0;
    const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), index);
    const bool number = code == std::errc() && end == text.data() + text.size() && !text.starts_with('-');
    return number ? Value::integer(index) : Value::string(std::string(text));
  }

  std::vector<Value> parts_;
};

/// What is compared when case doesn't count.
Value without_case(Interpreter& interpreter, Value value) {
  return value.is_string() ? interpreter.string(to_lower(value.as_string())) : value;
}

void require_defined(const Value& value) {
  if (value.is_undefined()) fail("{}", value.undefined_reason());
}

Value default_filter(Interpreter&, const Value& input, Arguments& arguments) {
  const Parameters parameters("default", arguments, {"default_value", "boolean"});
  if (!input.is_undefined() && !(parameters.boolean(1, false) && !truthy(input))) return input;
  return parameters.has(0) ? parameters[0] : Value::string("");
}

Value length(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("length", arguments, {});
  return Value::integer(static_cast<std::int64_t>(interpreter.length(input)));
}

Value list(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("list", arguments, {});
  return interpreter.list(interpreter.elements(input));
}

Value first(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("first", arguments, {});
  if (input.is(Kind::sequence) && input.as_sequence().kind == SequenceKind::iterator) {
    Sequence& sequence = input.as_sequence();  // takes one, and leaves the rest
    if (sequence.position < sequence.items.size()) return sequence.items[sequence.position++];
  } else if (const std::vector<Value> items = interpreter.elements(input); !items.empty()) {
    return items.front();
  }
  return Value::undefined("there is no first item, the sequence was empty");
}

Value last(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("last", arguments, {});
  if (input.is(Kind::sequence) && input.as_sequence().kind == SequenceKind::iterator) fail("'generator' object is not reversible");
  const std::vector<Value> items = interpreter.elements(input);
  return items.empty() ? Value::undefined("there is no last item, the sequence was empty") : items.back();
}

Value reverse(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("reverse", arguments, {});
  if (input.is_string()) {
    const std::string& text = input.as_string();
    const std::vector<std::size_t> offsets = code_point_offsets(text);
    interpreter.budget().charge_bytes(offsets.size() * sizeof offsets[0]);
    std::string out;
    for (std::size_t i = offsets.size() - 1; i-- > 0;) out.append(text, offsets[i], offsets[i + 1] - offsets[i]);
    return interpreter.string(std::move(out));
  }
  std::vector<Value> items = interpreter.elements(input);
  std::reverse(items.begin(), items.end());
  const bool one_shot = input.is(Kind::sequence) && input.as_sequence().kind == SequenceKind::iterator;
  return one_shot ? interpreter.list(std::move(items)) : interpreter.iterator(std::move(items));
}

Value join(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("join", arguments, {"d", "attribute"});
  const std::string separator = parameters.has(0) ? interpreter.text(parameters[0]) : "";
  const AttributePath path(parameters[1]);
  std::string out;
  bool is_first = true;
  for (const Value& item : interpreter.elements(input)) {
    if (!is_first) out += separator;
    is_first = false;
    append_text(out, path.get(interpreter, item), interpreter.budget());
    interpreter.budget().check_size(out.size());
  }
  return interpreter.string(std::move(out));
}

Value items_filter(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("items", arguments, {});
  if (input.is_undefined()) return interpreter.iterator({});
  if (!input.is(Kind::dict)) fail("items needs a mapping, not '{}'", type_name(input));
  std::vector<Value> pairs;
  interpreter.budget().charge(input.as_dict().entries.size());
  for (const auto& [key, value] : input.as_dict().entries) pairs.push_back(interpreter.tuple({key, value}));
  return interpreter.iterator(std::move(pairs));
}

/// Sorted by keys that are computed once; stable, also in reverse.
std::vector<Value> sorted(Interpreter& interpreter, const std::vector<Value>& items, const std::vector<Value>& keys, bool reverse) {
  std::vector<std::size_t> order(items.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  Budget& budget = interpreter.budget();
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return reverse ? less_than(keys[b], keys[a], budget) : less_than(keys[a], keys[b], budget);
  });
  std::vector<Value> result;
  result.reserve(items.size());
  for (const std::size_t i : order) result.push_back(items[i]);
  return result;
}

Value sort(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("sort", arguments, {"reverse", "case_sensitive", "attribute"});
  const bool case_sensitive = parameters.boolean(1, false);
  std::vector<AttributePath> paths;  // "a,b": by a, then by b
  if (parameters[2].is_string()) {
    std::string_view rest = parameters[2].as_string();
    while (true) {
      const std::size_t comma = rest.find(',');
      paths.emplace_back(Value::string(std::string(rest.substr(0, comma))));
      if (comma == std::string_view::npos) break;
      rest = rest.substr(comma + 1);
    }
  } else {
    paths.emplace_back(parameters[2]);
  }
  const std::vector<Value> items = interpreter.elements(input);
  std::vector<Value> keys;
  keys.reserve(items.size());
  for (const Value& item : items) {
    std::vector<Value> key;
    for (const AttributePath& path : paths) {
      Value part = path.get(interpreter, item);
      key.push_back(case_sensitive ? std::move(part) : without_case(interpreter, std::move(part)));
    }
    keys.push_back(interpreter.list(std::move(key)));
  }
  return interpreter.list(sorted(interpreter, items, keys, parameters.integer(0, 0) != 0));
}

Value dictsort(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("dictsort", arguments, {"case_sensitive", "by", "reverse"});
  require_defined(input);
  if (!input.is(Kind::dict)) fail("dictsort needs a mapping, not '{}'", type_name(input));
  const std::string by = parameters.has(1) ? parameters.string(1) : "key";
  if (by != "key" && by != "value") fail("dictsort can sort by 'key' or by 'value'");
  std::vector<Value> pairs, keys;
  for (const auto& [key, value] : input.as_dict().entries) {
    pairs.push_back(interpreter.tuple({key, value}));
    const Value& part = by == "key" ? key : value;
    keys.push_back(parameters.boolean(0, false) ? part : without_case(interpreter, part));
  }
  return interpreter.list(sorted(interpreter, pairs, keys, parameters.integer(2, 0) != 0));
}

Value unique(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("unique", arguments, {"case_sensitive", "attribute"});
  const AttributePath path(parameters[1]);
  const bool case_sensitive = parameters.boolean(0, false);
  std::vector<Value> result;
  std::unordered_set<std::string> seen_text;
  std::vector<Value> seen;
  for (const Value& item : interpreter.elements(input)) {
    Value key = path.get(interpreter, item);
    if (!case_sensitive) key = without_case(interpreter, std::move(key));
    if (!hashable(key)) fail("unique cannot compare values of type '{}'", type_name(key));
    bool fresh = false;
    if (key.is_string()) {
      fresh = seen_text.insert(key.as_string()).second;
    } else {
      fresh = std::none_of(seen.begin(), seen.end(), [&](const Value& known) { return equals(known, key, interpreter.budget()); });
      if (fresh) seen.push_back(key);
    }
    if (fresh) result.push_back(item);
  }
  return interpreter.iterator(std::move(result));
}

template <bool Max>
Value extreme(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters(Max ? "max" : "min", arguments, {"case_sensitive", "attribute"});
  const AttributePath path(parameters[1]);
  Value best, best_key;
  bool any = false;
  for (const Value& item : interpreter.elements(input)) {
    Value key = path.get(interpreter, item);
    if (!parameters.boolean(0, false)) key = without_case(interpreter, std::move(key));
    if (!any || (Max ? less_than(best_key, key, interpreter.budget()) : less_than(key, best_key, interpreter.budget()))) {
      best = item;
      best_key = std::move(key);
    }
    any = true;
  }
  return any ? best : Value::undefined("there is no item, the sequence was empty");
}

Value sum(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("sum", arguments, {"attribute", "start"});
  const AttributePath path(parameters[0]);
  Value total = parameters.has(1) ? parameters[1] : Value::integer(0);
  if (total.is_string()) fail("sum cannot add strings; use join");
  for (const Value& item : interpreter.elements(input)) {
    total = interpreter.binary(BinaryOperator::add, total, path.get(interpreter, item));
  }
  return total;
}

Value batch(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("batch", arguments, {"linecount", "fill_with"}, 1);
  const std::int64_t size = parameters.integer(0, 1);
  const bool fills = parameters.has(1) && !parameters[1].is_none();
  std::vector<Value> batches, current;
  for (const Value& item : interpreter.elements(input)) {
    if (static_cast<std::int64_t>(current.size()) == size) {
      batches.push_back(interpreter.list(std::move(current)));
      current.clear();
    }
    current.push_back(item);
  }
  if (!current.empty()) {
    if (fills && static_cast<std::int64_t>(current.size()) < size) {
      interpreter.budget().charge(static_cast<std::uint64_t>(size));
      current.resize(static_cast<std::size_t>(size), parameters[1]);
    }
    batches.push_back(interpreter.list(std::move(current)));
  }
  return interpreter.iterator(std::move(batches));
}

Value slice(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("slice", arguments, {"slices", "fill_with"}, 1);
  const std::int64_t slices = parameters.integer(0, 1);
  if (slices == 0) fail("slice needs at least one slice");
  const std::vector<Value> items = interpreter.elements(input);
  std::vector<Value> result;
  if (slices > 0) {
    interpreter.budget().charge(static_cast<std::uint64_t>(slices));
    const auto count = static_cast<std::size_t>(slices);
    const std::size_t each = items.size() / count;
    const std::size_t larger = items.size() % count;
    std::size_t position = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t size = each + (i < larger ? 1 : 0);
      std::vector<Value> part(items.begin() + static_cast<std::ptrdiff_t>(position),
                              items.begin() + static_cast<std::ptrdiff_t>(position + size));
      position += size;
      if (parameters.has(1) && !parameters[1].is_none() && i >= larger) part.push_back(parameters[1]);
      result.push_back(interpreter.list(std::move(part)));
    }
  }
  return interpreter.iterator(std::move(result));
}

Value groupby(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("groupby", arguments, {"attribute", "default", "case_sensitive"}, 1);
  const AttributePath path(parameters[0]);
  const Value* fallback = parameters.has(1) && !parameters[1].is_none() ? &parameters[1] : nullptr;
  const bool case_sensitive = parameters.boolean(2, false);
  const auto key_of = [&](const Value& item) {
    Value key = path.get(interpreter, item, fallback);
    return case_sensitive ? key : without_case(interpreter, std::move(key));
  };
  std::vector<Value> items = interpreter.elements(input);
  std::vector<Value> keys;
  keys.reserve(items.size());
  for (const Value& item : items) keys.push_back(key_of(item));
  items = sorted(interpreter, items, keys, false);
  std::vector<Value> groups;
  for (std::size_t i = 0; i < items.size();) {
    const Value key = key_of(items[i]);
    const Value shown = path.get(interpreter, items[i], fallback);
    std::vector<Value> members;
    for (; i < items.size() && equals(key_of(items[i]), key, interpreter.budget()); ++i) members.push_back(items[i]);
    groups.push_back(make_sequence(SequenceKind::group, {shown, interpreter.list(std::move(members))}, interpreter.budget()));
  }
  return interpreter.list(std::move(groups));
}

Value map(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  std::vector<Value> result;
  if (!truthy(input)) return interpreter.iterator({});
  if (arguments.positional.empty()) {
    const Parameters parameters("map", arguments, {"attribute", "default"}, 1);
    const AttributePath path(parameters[0]);
    const Value* fallback = parameters.has(1) && !parameters[1].is_none() ? &parameters[1] : nullptr;
    for (const Value& item : interpreter.elements(input)) result.push_back(path.get(interpreter, item, fallback));
    return interpreter.iterator(std::move(result));
  }
  if (!arguments.positional[0].is_string()) fail("map needs the name of a filter");
  const std::string name = arguments.positional[0].as_string();
  for (const Value& item : interpreter.elements(input)) {
    Arguments rest;
    rest.positional.assign(arguments.positional.begin() + 1, arguments.positional.end());
    rest.keyword = arguments.keyword;
    result.push_back(interpreter.apply_filter(name, item, rest));
  }
  return interpreter.iterator(std::move(result));
}

/// select, reject, selectattr, rejectattr.
template <bool Keep, bool ByAttribute>
Value select(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  std::vector<Value> result;
  if (!truthy(input)) return interpreter.iterator({});
  const std::size_t first_argument = ByAttribute ? 1 : 0;
  if (arguments.positional.size() < first_argument) fail("selectattr and rejectattr need the name of an attribute");
  const AttributePath path(ByAttribute ? arguments.positional[0] : Value::none());
  const bool has_test = arguments.positional.size() > first_argument;
  std::string name;
  if (has_test) {
    if (!arguments.positional[first_argument].is_string()) fail("a selection needs the name of a test");
    name = arguments.positional[first_argument].as_string();
  }
  for (const Value& item : interpreter.elements(input)) {
    const Value value = path.get(interpreter, item);
    bool passes = false;
    if (has_test) {
      Arguments rest;
      rest.positional.assign(arguments.positional.begin() + static_cast<std::ptrdiff_t>(first_argument) + 1, arguments.positional.end());
      rest.keyword = arguments.keyword;
      passes = interpreter.apply_test(name, value, rest);
    } else {
      passes = truthy(value);
    }
    if (passes == Keep) result.push_back(item);
  }
  return interpreter.iterator(std::move(result));
}

Value attr(Interpreter& interpreter, const Value& input, Arguments& arguments) {
  const Parameters parameters("attr", arguments, {"name"}, 1);
  const std::string& name = parameters.string(0);
  if (input.is(Kind::dict) && find_method(input, name) == nullptr) {
    return Value::undefined(fmt::format("'{}' has no attribute '{}'", describe_type(input), name));
  }
  return interpreter.attribute(input, name);
}

constexpr std::array kFilters = {
    Entry{"default", default_filter},
    Entry{"d", default_filter},
    Entry{"length", length},
    Entry{"count", length},
    Entry{"list", list},
    Entry{"first", first},
    Entry{"last", last},
    Entry{"reverse", reverse},
    Entry{"join", join},
    Entry{"items", items_filter},
    Entry{"sort", sort},
    Entry{"dictsort", dictsort},
    Entry{"unique", unique},
    Entry{"min", extreme<false>},
    Entry{"max", extreme<true>},
    Entry{"sum", sum},
    Entry{"batch", batch},
    Entry{"slice", slice},
    Entry{"groupby", groupby},
    Entry{"map", map},
    Entry{"select", select<true, false>},
    Entry{"reject", select<false, false>},
    Entry{"selectattr", select<true, true>},
    Entry{"rejectattr", select<false, true>},
    Entry{"attr", attr},
};

}  // namespace

FilterFunction find_sequence_filter(std::string_view name) {
  const auto found = std::find_if(kFilters.begin(), kFilters.end(), [&](const Entry& entry) { return entry.name == name; });
  return found == kFilters.end() ? nullptr : found->function;
}

}  // namespace baton::jinja
