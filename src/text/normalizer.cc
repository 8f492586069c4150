#include "text/normalizer.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

namespace baton {

const std::array<char32_t, 256>& byte_level_alphabet() {
  static const std::array<char32_t, 256> table = [] {
    std::array<char32_t, 256> out{};
    char32_t next = 256;
    for (char32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      out[b] = printable ? b : next++;
    }
    return out;
  }();
  return table;
}

int byte_of_level_char(char32_t c) {
  static const std::array<int16_t, 512> table = [] {
    std::array<int16_t, 512> out;
    out.fill(-1);
    for (int b = 0; b < 256; ++b) out[byte_level_alphabet()[static_cast<size_t>(b)]] = static_cast<int16_t>(b);
    return out;
  }();
  return c < table.size() ? table[c] : -1;
}

std::string to_byte_level(std::string_view text) {
  std::string out;
  out.reserve(text.size() * 2);
  for (char c : text) unicode::append_utf8(out, byte_level_alphabet()[static_cast<unsigned char>(c)]);
  return out;
}

namespace {

template <typename... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <typename... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

// Keeps the characters for which `keep(properties, code point)`.
template <typename Keep>
std::string filter(std::string_view text, const Keep& keep) {
  const unicode::CharTable& table = unicode::CharTable::instance();
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const auto [c, length] = unicode::decode(text.data() + at);
    if (keep(table[c], c)) out.append(text.substr(at, length));
    at += length;
  }
  return out;
}

bool is_chinese(char32_t c) {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x20000 && c <= 0x2A6DF) ||
         (c >= 0x2A700 && c <= 0x2B73F) || (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) ||
         (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

std::string bert(std::string text, const Normalizer::Bert& options) {
  const unicode::CharTable& table = unicode::CharTable::instance();
  if (options.clean_text) {
    std::string out;
    for (size_t at = 0; at < text.size();) {
      const auto [c, length] = unicode::decode(text.data() + at);
      if (!(table[c] & unicode::kBertControl)) {
        if (table[c] & unicode::kRustSpace) {
          out += ' ';
        } else {
          out.append(text, at, length);
        }
      }
      at += length;
    }
    text = std::move(out);
  }
  if (options.handle_chinese_chars) {
    std::string out;
    for (size_t at = 0; at < text.size();) {
      const auto [c, length] = unicode::decode(text.data() + at);
      const bool chinese = is_chinese(c);
      if (chinese) out += ' ';
      out.append(text, at, length);
      if (chinese) out += ' ';
      at += length;
    }
    text = std::move(out);
  }
  if (options.strip_accents) {
    text = filter(unicode::normalize(text, unicode::Form::kNfd),
                  [](uint16_t properties, char32_t) { return !(properties & unicode::kBertMark); });
  }
  return options.lowercase ? unicode::lowercase(text) : text;
}

bool is_space_at(std::string_view text, size_t at) {
  return unicode::CharTable::instance()[unicode::decode(text.data() + at).code_point] & unicode::kRustSpace;
}

std::string_view strip(std::string_view text, bool left, bool right) {
  size_t begin = 0, end = text.size();
  while (left && begin < end && is_space_at(text, begin)) begin += unicode::sequence_length(text[begin]);
  while (right && end > begin) {
    const size_t last = unicode::previous(text, end);
    if (!is_space_at(text, last)) break;
    end = last;
  }
  return text.substr(begin, end - begin);
}

}  // namespace

Result<TextPart> Normalizer::apply(TextPart part, std::string& buffer, Regex::Scratch& scratch) const {
  // One step: the new text, or none when it leaves the text as it is. `part` is updated to match.
  for (const Step& step : steps_) {
    Status status;
    const size_t first_bytes = part.text.empty() ? 0 : unicode::sequence_length(part.text.front());
    // Steps that map characters keep the origin at the first character of their result.
    const auto mapped = [&](std::string text, bool first_kept) {
      part.origin_bytes = part.origin_bytes == 0 || text.empty() || !first_kept
                              ? 0
                              : std::max<size_t>(unicode::sequence_length(text.front()),
                                                 part.origin_bytes == first_bytes ? 0 : std::min(part.origin_bytes, text.size()));
      return std::optional<std::string>(std::move(text));
    };
    std::optional<std::string> changed = std::visit(
        Overloaded{
            [&](const UnicodeForm& s) -> std::optional<std::string> {
              if (unicode::is_normalized(part.text, s.form)) return std::nullopt;
              return mapped(unicode::normalize(part.text, s.form), true);
            },
            [&](const Lowercase&) -> std::optional<std::string> { return mapped(unicode::lowercase(part.text), true); },
            [&](const StripAccents&) -> std::optional<std::string> {
              const auto keep = [](uint16_t properties, char32_t) { return !(properties & unicode::kCombiningMark); };
              const bool first = !part.text.empty() &&
                                 keep(unicode::CharTable::instance()[unicode::decode(part.text.data()).code_point], 0);
              return mapped(filter(part.text, keep), first);
            },
            [&](const Strip& s) -> std::optional<std::string> {
              const std::string_view text = strip(part.text, s.left, s.right);
              if (text.size() == part.text.size()) return std::nullopt;
              const auto skipped = static_cast<size_t>(text.data() - part.text.data());
              part.origin_bytes = part.origin_bytes > skipped ? std::min(part.origin_bytes - skipped, text.size()) : 0;
              return std::string(text);
            },
            [&](const Prepend& s) -> std::optional<std::string> {
              if (part.text.empty()) return std::nullopt;
              if (part.origin_bytes != 0) part.origin_bytes += s.text.size();
              return s.text + std::string(part.text);
            },
            [&](const Replace& s) -> std::optional<std::string> {
              std::vector<TextSpan> matches;
              status = s.pattern.find(part.text, matches, scratch);
              if (!status.ok() || matches.empty()) return std::nullopt;
              const size_t bound = part.text.size() + matches.size() * s.content.size();
              if (bound > kMaxNormalizedBytes) {
                status = resource_exhausted("a Replace normalizer would make {} bytes of text, the limit is {}", bound,
                                            kMaxNormalizedBytes);
                return std::nullopt;
              }
              std::string text;
              text.reserve(bound);
              size_t copied = 0, origin = part.origin_bytes;
              for (const TextSpan& match : matches) {
                text.append(part.text.substr(copied, match.begin - copied));
                text.append(s.content);
                copied = match.end;
                if (match.begin < part.origin_bytes) origin = origin + s.content.size() - (match.end - match.begin);
              }
              text.append(part.text.substr(copied));
              part.origin_bytes = std::min(origin, text.size());
              return text;
            },
            [&](const ByteLevel&) -> std::optional<std::string> {
              const size_t origin = to_byte_level(part.text.substr(0, part.origin_bytes)).size();
              part.origin_bytes = origin;
              return to_byte_level(part.text);
            },
            [&](const Bert& s) -> std::optional<std::string> { return mapped(bert(std::string(part.text), s), true); },
        },
        step);
    BATON_RETURN_IF_ERROR(status);
    if (changed && changed->size() > kMaxNormalizedBytes) {
      return resource_exhausted("the text has {} bytes when normalized, the limit is {}", changed->size(), kMaxNormalizedBytes);
    }
    if (changed) {
      buffer = std::move(*changed);
      part.text = buffer;
    }
  }
  return part;
}

}  // namespace baton
