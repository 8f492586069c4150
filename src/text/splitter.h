#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "text/regex.h"
#include "text/unicode.h"
#include "text/word_matcher.h"

namespace baton {

/// Finds what a pre-tokenizer, normalizer or decoder of tokenizer.json calls a match: a literal, a
/// regular expression, or any one character with a property. Immutable.
class Pattern {
 public:
  static Result<Pattern> regex(std::string_view oniguruma_pattern, bool allow_word_matcher = true);
  static Result<Pattern> literal(std::string text);
  static Pattern any_of(unicode::CharFlag flag);

  /// Replaces `matches` with all matches in `text`, in order and not overlapping.
  Status find(std::string_view text, std::vector<TextSpan>& matches, Regex::Scratch& scratch) const;
  /// `text` with every match replaced. Slower than find() for a regular expression.
  Result<std::string> replace_all(std::string_view text, std::string_view content) const;

 private:
  Pattern() = default;
  std::string literal_;
  std::optional<Regex> regex_;
  WordMatcher word_matcher_ = nullptr;
  unicode::CharFlag flag_ = unicode::kRustSpace;
};

/// What becomes of the matches; the names are those of tokenizer.json.
enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

/// Cuts [0, size) at `matches` and appends the pieces that are not empty, moved by `offset`.
/// `invert` takes what lies between matches for the matches.
void split_at(const std::vector<TextSpan>& matches, size_t size, SplitBehavior behavior, bool invert, uint32_t offset,
              std::vector<TextSpan>& pieces);

}  // namespace baton
