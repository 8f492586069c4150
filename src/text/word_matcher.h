#pragma once

#include <string_view>
#include <vector>

#include "text/regex.h"

namespace baton {

/// Splits a text into the matches of one well known pre-tokenizer pattern, several times faster than
/// a regular expression engine. These patterns match at every position, so the spans cover the
/// text without gaps. The text is valid UTF-8. Appends to `spans`.
using WordMatcher = void (*)(std::string_view text, std::vector<TextSpan>& spans);

/// The hand-written matcher of exactly this pattern; null when there is none.
/// Tests hold each equal to the Regex of the same pattern.
WordMatcher find_word_matcher(std::string_view pattern);

/// All patterns that have one.
std::vector<std::string_view> word_matcher_patterns();

/// The pattern of GPT-2, which the ByteLevel pre-tokenizer applies with use_regex.
extern const std::string_view kGpt2Pattern;

}  // namespace baton
