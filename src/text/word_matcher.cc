#include "text/word_matcher.h"

#include <array>
#include <cstdint>

#include "text/unicode.h"

namespace baton {

const std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

// Classes that the patterns speak of, as bits.
enum Class : uint8_t {
  kLetter = 1,     // \p{L}
  kNumber = 2,     // \p{N}
  kMark = 4,       // \p{M}
  kSpace = 8,      // \s
  kNewline = 16,   // [\r\n]
  kUpperish = 32,  // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
  kLowerish = 64,  // [\p{Ll}\p{Lm}\p{Lo}\p{M}]
  kPunctSymbol = 128,  // [\p{P}\p{S}]
};

constexpr std::array<uint8_t, 32> kClassOfCategory = [] {
  std::array<uint8_t, 32> out{};
  for (int c : {unicode::kLu, unicode::kLt}) out[c] = kLetter | kUpperish;
  out[unicode::kLl] = kLetter | kLowerish;
  for (int c : {unicode::kLm, unicode::kLo}) out[c] = kLetter | kUpperish | kLowerish;
  for (int c : {unicode::kMn, unicode::kMc, unicode::kMe}) out[c] = kMark | kUpperish | kLowerish;
  for (int c : {unicode::kNd, unicode::kNl, unicode::kNo}) out[c] = kNumber;
  for (int c = unicode::kPc; c <= unicode::kSo; ++c) out[c] = kPunctSymbol;
  return out;
}();

struct Classified {
  uint8_t classes;
  uint32_t length;
};

// A text with the classes of its characters.
class Classes {
 public:
  Classes(std::string_view text) : text_(text.data()), size_(text.size()), table_(unicode::CharTable::instance()) {}  // NOLINT

  size_t size() const { return size_; }
  char byte(size_t at) const { return text_[at]; }
  // REQUIRES: at < size()
  Classified at(size_t at) const {
    const auto lead = static_cast<unsigned char>(text_[at]);
    if (lead < 0x80) return {ascii()[lead], 1};
    const auto [c, length] = unicode::decode(text_ + at);
    const uint16_t properties = table_[c];
    return {static_cast<uint8_t>(kClassOfCategory[properties & 31] | ((properties & unicode::kRegexSpace) ? kSpace : 0)), length};
  }
  // End of the run of characters that have one of `wanted`.
  size_t run(size_t from, uint8_t wanted) const {
    while (from < size_) {
      const auto [classes, length] = at(from);
      if ((classes & wanted) == 0) break;
      from += length;
    }
    return from;
  }
  // End of the run of characters that have none of `unwanted`.
  size_t run_without(size_t from, uint8_t unwanted) const {
    while (from < size_) {
      const auto [classes, length] = at(from);
      if ((classes & unwanted) != 0) break;
      from += length;
    }
    return from;
  }
  size_t run_newlines(size_t from, bool or_slash) const {
    while (from < size_ && (text_[from] == '\r' || text_[from] == '\n' || (or_slash && text_[from] == '/'))) ++from;
    return from;
  }
  // \p{N}{1,limit}
  size_t run_numbers(size_t from, int limit) const {
    for (int i = 0; i < limit && from < size_; ++i) {
      const auto [classes, length] = at(from);
      if ((classes & kNumber) == 0) break;
      from += length;
    }
    return from;
  }

 private:
  static const std::array<uint8_t, 128>& ascii() {
    static constexpr std::array<uint8_t, 128> table = [] {
      std::array<uint8_t, 128> out{};
      for (int c = 0x21; c < 0x7F; ++c) out[c] = kPunctSymbol;
      for (int c = '0'; c <= '9'; ++c) out[c] = kNumber;
      for (int c = 'A'; c <= 'Z'; ++c) out[c] = kLetter | kUpperish;
      for (int c = 'a'; c <= 'z'; ++c) out[c] = kLetter | kLowerish;
      for (int c : {'\t', '\v', '\f', ' '}) out[c] = kSpace;
      for (int c : {'\n', '\r'}) out[c] = kSpace | kNewline;
      return out;
    }();
    return table;
  }

  const char* text_;
  size_t size_;
  const unicode::CharTable& table_;
};

// End of 's 't 're 've 'm 'll 'd behind the apostrophe at `at`, in any case; 0 when there is none.
// U+017F is an s in any case.
size_t contraction(const Classes& text, size_t at, bool any_case) {
  if (at >= text.size() || text.byte(at) != '\'') return 0;
  const auto letter = [&](size_t i) -> char {
    if (i >= text.size()) return '\0';
    const char c = text.byte(i);
    return any_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  };
  switch (letter(at + 1)) {
    case 's':
    case 't':
    case 'm':
    case 'd': return at + 2;
    case 'r':
    case 'v': return letter(at + 2) == 'e' ? at + 3 : 0;
    case 'l': return letter(at + 2) == 'l' ? at + 3 : 0;
    case '\xC5': return any_case && letter(at + 2) == '\xBF' ? at + 3 : 0;
    default: return 0;
  }
}

// \s+(?!\S)|\s+  : all of a run at the end of the text, else all but its last character.
size_t trailing_space(const Classes& text, size_t at) {
  size_t last = at, end = at;
  while (end < text.size()) {
    const auto [classes, length] = text.at(end);
    if ((classes & kSpace) == 0) break;
    last = end;
    end += length;
  }
  return end == text.size() || last == at ? end : last;
}

// \s*[\r\n]+|\s+(?!\S)|\s+  : up to the last newline of the run when it has one.
size_t space_with_newlines(const Classes& text, size_t at) {
  size_t last = at, end = at, behind_newline = 0;
  while (end < text.size()) {
    const auto [classes, length] = text.at(end);
    if ((classes & kSpace) == 0) break;
    last = end;
    end += length;
    if (classes & kNewline) behind_newline = end;
  }
  if (behind_newline != 0) return behind_newline;
  return end == text.size() || last == at ? end : last;
}

void match_gpt2(std::string_view view, std::vector<TextSpan>& spans) {
  const Classes text(view);
  for (size_t at = 0; at < text.size();) {
    size_t end = contraction(text, at, false);
    if (end == 0) {
      const size_t body = text.byte(at) == ' ' && at + 1 < text.size() ? at + 1 : at;
      const auto [classes, length] = text.at(body);
      if (classes & kLetter) {
        end = text.run(body + length, kLetter);
      } else if (classes & kNumber) {
        end = text.run(body + length, kNumber);
      } else if ((classes & kSpace) == 0) {
        end = text.run_without(body + length, kLetter | kNumber | kSpace);
      } else {
        end = trailing_space(text, at);
      }
    }
    spans.push_back({static_cast<uint32_t>(at), static_cast<uint32_t>(end)});
    at = end;
  }
}

// The cl100k family: Llama 3 (three digits), Qwen2 and Qwen3 (one digit), and with marks in words.
template <int kDigits, bool kMarks>
void match_cl100k(std::string_view view, std::vector<TextSpan>& spans) {
  constexpr uint8_t kWord = kMarks ? kLetter | kMark : kLetter;
  const Classes text(view);
  for (size_t at = 0; at < text.size();) {
    size_t end = contraction(text, at, true);
    if (end == 0) {
      const auto [classes, length] = text.at(at);
      const size_t next = at + length;
      if (classes & kWord) {
        end = text.run(next, kWord);
      } else if (classes & kNumber) {
        end = text.run_numbers(next, kDigits - 1);
      } else if ((classes & kNewline) == 0 && next < text.size() && (text.at(next).classes & kWord)) {
        end = text.run(next, kWord);
      } else {
        const size_t body = text.byte(at) == ' ' ? next : at;
        end = text.run_without(body, kWord | kNumber | kSpace);
        end = end > body ? text.run_newlines(end, false) : space_with_newlines(text, at);
      }
    }
    spans.push_back({static_cast<uint32_t>(at), static_cast<uint32_t>(end)});
    at = end;
  }
}

// U*W+ from `at` (upperish, then lowerish; many characters are both); `at` when it doesn't match.
size_t cased_word(const Classes& text, size_t at) {
  size_t end = at, behind_both = at;
  while (end < text.size()) {
    const auto [classes, length] = text.at(end);
    if ((classes & kUpperish) == 0) break;
    end += length;
    if (classes & kLowerish) behind_both = end;
  }
  const size_t lower_end = text.run(end, kLowerish);
  return lower_end > end ? lower_end : behind_both;
}

// U+W* from `at`; `at` when it doesn't match.
size_t upper_word(const Classes& text, size_t at) {
  const size_t end = text.run(at, kUpperish);
  return end > at ? text.run(end, kLowerish) : at;
}

// o200k: GPT-4o, gpt-oss, Llama 4.
void match_o200k(std::string_view view, std::vector<TextSpan>& spans) {
  const Classes text(view);
  for (size_t at = 0; at < text.size();) {
    const auto [classes, length] = text.at(at);
    const size_t next = at + length;
    const bool prefix = (classes & (kNewline | kLetter | kNumber)) == 0;
    size_t end = at;
    for (auto* word : {&cased_word, &upper_word}) {
      const size_t with_prefix = prefix ? word(text, next) : next;
      end = with_prefix > next ? with_prefix : word(text, at);
      if (end > at) break;
    }
    if (end > at) {
      if (const size_t behind = contraction(text, end, true)) end = behind;
    } else if (classes & kNumber) {
      end = text.run_numbers(next, 2);
    } else {
      const size_t body = text.byte(at) == ' ' ? next : at;
      end = text.run_without(body, kLetter | kNumber | kSpace);
      end = end > body ? text.run_newlines(end, true) : space_with_newlines(text, at);
    }
    spans.push_back({static_cast<uint32_t>(at), static_cast<uint32_t>(end)});
    at = end;
  }
}

struct Known {
  std::string_view pattern;
  WordMatcher matcher;
};

const Known kKnown[] = {
    {kGpt2Pattern, match_gpt2},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     match_cl100k<3, false>},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     match_cl100k<1, false>},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     match_cl100k<1, true>},
    {R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     match_o200k},
};

}  // namespace

WordMatcher find_word_matcher(std::string_view pattern) {
  for (const Known& known : kKnown) {
    if (known.pattern == pattern) return known.matcher;
  }
  return nullptr;
}

std::vector<std::string_view> word_matcher_patterns() {
  std::vector<std::string_view> out;
  for (const Known& known : kKnown) out.push_back(known.pattern);
  return out;
}

}  // namespace baton
