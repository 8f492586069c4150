#include <algorithm>
#include <cmath>
#include <numeric>

#include "text/jinja/builtins.h"
#include "text/jinja/unicode.h"

// json.dumps: the same bytes as Python's, since a model was trained on those.

namespace baton::jinja {
namespace {

class JsonWriter {
 public:
  JsonWriter(const JsonOptions& options, Budget& budget) : options_(options), budget_(budget) {}

  std::string run(const Value& value) {
    write(value, 0);
    return std::move(out_);
  }

 private:
  void write(const Value& value, int level) {
    budget_.charge(1);
    budget_.check_size(out_.size());
    switch (value.kind()) {
      case Kind::none: out_ += "null"; return;
      case Kind::boolean: out_ += value.as_bool() ? "true" : "false"; return;
      case Kind::integer: out_ += fmt::format("{}", value.as_integer()); return;
      case Kind::big_integer: out_ += value.as_string(); return;
      case Kind::real: write_real(value.as_real()); return;
      case Kind::string: write_string(value.as_string()); return;
      case Kind::sequence:
        if (value.as_sequence().is_tuple() || value.as_sequence().kind == SequenceKind::list) {
          write_list(value.as_sequence(), level);
          return;
        }
        break;
      case Kind::dict: write_dict(value.as_dict(), level); return;
      default: break;
    }
    fail("an object of type '{}' cannot be written as JSON", type_name(value));
  }

  void write_real(double value) {
    if (std::isnan(value)) out_ += "NaN";
    else if (std::isinf(value)) out_ += value < 0 ? "-Infinity" : "Infinity";
    else out_ += real_repr(value);
  }

  void write_string(std::string_view text) {
    budget_.charge_bytes(text.size());
    budget_.check_size(out_.size() + text.size());
    out_ += '"';
    std::size_t plain = 0;  // start of what needs no escape
    for (std::size_t position = 0; position < text.size();) {
      const auto byte = static_cast<unsigned char>(text[position]);
      const bool escape = byte < 0x20 || byte == '"' || byte == '\\' || (options_.ensure_ascii && byte >= 0x7f);
      if (!escape) {
        ++position;
        continue;
      }
      out_ += text.substr(plain, position - plain);
      write_escape(decode_utf8(text, position));
      plain = position;
    }
    out_ += text.substr(plain);
    out_ += '"';
  }

  void write_escape(char32_t code) {
    switch (code) {
      case '"': out_ += "\\\""; return;
      case '\\': out_ += "\\\\"; return;
      case '\n': out_ += "\\n"; return;
      case '\r': out_ += "\\r"; return;
      case '\t': out_ += "\\t"; return;
      case '\b': out_ += "\\b"; return;
      case '\f': out_ += "\\f"; return;
      default: break;
    }
    auto unit = static_cast<unsigned>(code);
    if (unit > 0xffff) {
      unit -= 0x10000;
      out_ += fmt::format("\\u{:04x}", 0xd800 + (unit >> 10));
      unit = 0xdc00 + (unit & 0x3ff);
    }
    out_ += fmt::format("\\u{:04x}", unit);
  }

  void new_line(int level) {
    if (!options_.indent) return;
    budget_.check_size(out_.size() + static_cast<std::size_t>(level) * options_.indent->size());
    out_ += '\n';
    for (int i = 0; i < level; ++i) out_ += *options_.indent;
  }

  void write_list(const Sequence& list, int level) {
    if (list.items.empty()) {
      out_ += "[]";
      return;
    }
    out_ += '[';
    for (std::size_t i = 0; i < list.items.size(); ++i) {
      if (i > 0) out_ += options_.item_separator;
      new_line(level + 1);
      write(list.items[i], level + 1);
    }
    new_line(level);
    out_ += ']';
  }

  void write_dict(const Dict& dict, int level) {
    if (dict.entries.empty()) {
      out_ += "{}";
      return;
    }
    std::vector<std::size_t> order(dict.entries.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    if (options_.sort_keys) {
      std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return less_than(dict.entries[a].first, dict.entries[b].first, budget_);
      });
    }
    out_ += '{';
    bool first = true;
    for (const std::size_t i : order) {
      if (!first) out_ += options_.item_separator;
      first = false;
      new_line(level + 1);
      write_key(dict.entries[i].first);
      out_ += options_.key_separator;
      write(dict.entries[i].second, level + 1);
    }
    new_line(level);
    out_ += '}';
  }

  void write_key(const Value& key) {
    if (key.is_string()) return write_string(key.as_string());
    if (!key.is_none() && !key.is_number() && !key.is(Kind::big_integer)) fail("JSON keys must be strings, not '{}'", type_name(key));
    out_ += '"';
    write(key, 0);
    out_ += '"';
  }

  const JsonOptions& options_;
  Budget& budget_;
  std::string out_;
};

}  // namespace

std::string dump_json(const Value& value, const JsonOptions& options, Budget& budget) {
  std::string text = JsonWriter(options, budget).run(value);
  budget.check_size(text.size());
  return text;
}

}  // namespace baton::jinja
