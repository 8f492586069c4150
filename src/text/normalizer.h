#pragma once

#include <array>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/status.h"
#include "text/splitter.h"
#include "text/unicode.h"

namespace baton {

/// No step may make a text longer than this; positions are 32 bits.
inline constexpr size_t kMaxNormalizedBytes = size_t{512} << 20;

/// A stretch of text on its way through the tokenizer.
struct TextPart {
  std::string_view text;
  /// How many bytes at its start stem from the first character of the whole input (Metaspace's
  /// prepend_scheme "first" asks for it); 0 when the part begins elsewhere.
  size_t origin_bytes = 0;
};

/// The normalizer of a tokenizer.json, flattened from its Sequences. Immutable.
class Normalizer {
 public:
  struct UnicodeForm { unicode::Form form; };
  struct Lowercase {};
  struct StripAccents {};
  struct Strip { bool left, right; };
  struct Prepend { std::string text; };
  struct Replace { Pattern pattern; std::string content; };
  struct ByteLevel {};
  struct Bert { bool clean_text, handle_chinese_chars, strip_accents, lowercase; };
  using Step = std::variant<UnicodeForm, Lowercase, StripAccents, Strip, Prepend, Replace, ByteLevel, Bert>;

  Normalizer() = default;
  explicit Normalizer(std::vector<Step> steps) : steps_(std::move(steps)) {}

  bool empty() const { return steps_.empty(); }

  /// Normalizes `part`. The result's text is part.text itself when nothing changes, else `buffer`.
  Result<TextPart> apply(TextPart part, std::string& buffer, Regex::Scratch& scratch) const;

 private:
  std::vector<Step> steps_;
};

/// The printable character that stands for each byte in byte-level vocabularies (GPT-2's table).
const std::array<char32_t, 256>& byte_level_alphabet();
/// The byte that `c` stands for, or -1.
int byte_of_level_char(char32_t c);
/// Each byte of `text` replaced by its printable character.
std::string to_byte_level(std::string_view text);

}  // namespace baton
