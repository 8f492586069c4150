#include "kv/block_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

namespace baton {
namespace {

constexpr std::string_view kMagic = "baton-kv";
constexpr size_t kMaxFingerprintBytes = 4096;
constexpr size_t kMaxModelIdBytes = 1024;

/// Keeps the line one line of space-separated fields, whatever a model is called.
std::string escape(std::string_view text) {
  std::string out;
  for (char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte <= ' ' || byte == '%' || byte == '=' || byte == 0x7f) {
      out += fmt::format("%{:02x}", byte);
    } else {
      out += c;
    }
  }
  return out;
}

using Fields = std::vector<std::pair<std::string_view, std::string_view>>;

/// "baton-kv a=1 b=2" -> {{a, 1}, {b, 2}}, views into `text`.
Result<Fields> parse(std::string_view text) {
  if (text.size() > kMaxFingerprintBytes) {
    return invalid_argument("a KV layout fingerprint of {} bytes; at most {} are allowed", text.size(),
                            kMaxFingerprintBytes);
  }
  Fields fields;
  bool first = true;
  while (!text.empty()) {
    const size_t end = std::min(text.find(' '), text.size());
    const std::string_view word = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (first) {
      if (word != kMagic) {
        return failed_precondition("not a KV layout fingerprint: it starts with \"{}\" instead of \"{}\"",
                                   escape(word.substr(0, 32)), kMagic);
      }
      first = false;
      continue;
    }
    const size_t equals = word.find('=');
    if (equals == std::string_view::npos) {
      return failed_precondition("KV layout fingerprint: \"{}\" is not of the form field=value",
                                 escape(word.substr(0, 64)));
    }
    fields.emplace_back(word.substr(0, equals), word.substr(equals + 1));
  }
  if (first) return failed_precondition("the peer's KV layout fingerprint is empty");
  return fields;
}

std::string_view find(const Fields& fields, std::string_view name) {
  for (const auto& [key, value] : fields) {
    if (key == name) return value;
  }
  return "(none)";
}

}  // namespace

Status BlockLayout::validate() const {
  if (model_id.empty() || model_id.size() > kMaxModelIdBytes) {
    return invalid_argument("KV layout: a model id of {} bytes; 1 to {} are allowed", model_id.size(),
                            kMaxModelIdBytes);
  }
  const auto in_range = [](std::string_view name, int64_t value, int64_t max) -> Status {
    if (value >= 1 && value <= max) return {};
    return invalid_argument("KV layout: {} = {} is outside [1, {}]", name, value, max);
  };
  BATON_RETURN_IF_ERROR(in_range("layers", layers, 4096));
  BATON_RETURN_IF_ERROR(in_range("kv_heads", kv_heads, 4096));
  BATON_RETURN_IF_ERROR(in_range("head_dim", head_dim, 4096));
  BATON_RETURN_IF_ERROR(in_range("block_tokens", block_tokens, 4096));
  BATON_RETURN_IF_ERROR(in_range("element_bytes", element_bytes, 8));
  const int32_t expected = dtype == "f32" ? 4 : dtype == "bf16" || dtype == "f16" ? 2 : dtype == "f8" ? 1 : 0;
  if (expected == 0) {
    return invalid_argument("KV layout: dtype \"{}\" is none of f32, bf16, f16, f8", escape(dtype));
  }
  if (element_bytes != expected) {
    return invalid_argument("KV layout: an element of {} has {} bytes, not {}", dtype, expected, element_bytes);
  }
  // Each factor fits, but their product might not be a size anybody can hold.
  constexpr int64_t kMaxBlockBytes = int64_t{1} << 34;
  const double bytes = 2.0 * layers * kv_heads * head_dim * block_tokens * element_bytes;
  if (bytes > static_cast<double>(kMaxBlockBytes)) {
    return invalid_argument("KV layout: a block of {:.0f} bytes; at most {} are allowed, use a smaller block_tokens",
                            bytes, kMaxBlockBytes);
  }
  return {};
}

std::string BlockLayout::fingerprint() const {
  return fmt::format(
      "{} version={} order=layer,kv,head,{} dtype={} element_bytes={} layers={} kv_heads={} head_dim={} "
      "block_tokens={} model={}",
      kMagic, kVersion, escape(order), escape(dtype), element_bytes, layers, kv_heads, head_dim, block_tokens, escape(model_id));
}

Status BlockLayout::check_compatible(const std::string& other_fingerprint) const {
  const std::string own = fingerprint();
  if (own == other_fingerprint) return {};
  BATON_ASSIGN_OR_RETURN(const Fields ours, parse(own));
  BATON_ASSIGN_OR_RETURN(const Fields theirs, parse(other_fingerprint));

  constexpr size_t kMaxShown = 4;
  std::string differences;
  size_t count = 0;
  const auto differ = [&](std::string_view name, std::string_view here, std::string_view there) {
    if (++count > kMaxShown) return;
    differences += fmt::format("{}{} is {} here and {} there", count > 1 ? "; " : "", name, here,
                               escape(there.substr(0, 256)));
  };
  for (const auto& [name, value] : ours) {
    const std::string_view other = find(theirs, name);
    if (other != value) differ(name, value, other);
  }
  for (const auto& [name, value] : theirs) {
    if (find(ours, name) == "(none)") differ(escape(name.substr(0, 64)), "(none)", value);
  }
  if (count == 0) differ("the order of fields", own, other_fingerprint);
  if (count > kMaxShown) differences += fmt::format("; and {} more", count - kMaxShown);
  return failed_precondition("KV layouts differ, blocks cannot be moved as they are: {}", differences);
}

}  // namespace baton
