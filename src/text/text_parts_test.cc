// The parts of the tokenizer, each by itself: regular expressions, word matchers, Unicode, stop strings.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "text/normalizer.h"
#include "text/regex.h"
#include "text/splitter.h"
#include "text/stop_matcher.h"
#include "text/unicode.h"
#include "text/word_matcher.h"

namespace baton {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<std::string> split(const std::string& pattern, const std::string& text, SplitBehavior behavior = SplitBehavior::kIsolated,
                               bool invert = false) {
  auto compiled = Pattern::regex(pattern, false);
  EXPECT_TRUE(compiled.ok()) << compiled.status().to_string();
  Regex::Scratch scratch;
  std::vector<TextSpan> matches, spans;
  EXPECT_TRUE(compiled->find(text, matches, scratch).ok());
  split_at(matches, text.size(), behavior, invert, 0, spans);
  std::vector<std::string> out;
  for (const TextSpan& span : spans) out.push_back(text.substr(span.begin, span.end - span.begin));
  return out;
}

// Expected values are what `tokenizers` 0.23 (Oniguruma 6.9.10) answers.
TEST(Regex, MeansWhatOnigurumaMeans) {
  EXPECT_THAT(split("(?i:'s)", "a'ſb'Sc"), ElementsAre("a", "'ſ", "b", "'S", "c"));
  EXPECT_THAT(split("^a", "a\na\nba"), ElementsAre("a", "\n", "a", "\nba"));
  EXPECT_THAT(split("a$", "a\na\nba\n"), ElementsAre("a", "\n", "a", "\nb", "a", "\n"));
  EXPECT_THAT(split("\\p{N}{1,3}+", "1234567"), ElementsAre("1234567"));
  EXPECT_THAT(split("a{2}+", "aaaaa"), ElementsAre("aaaa", "a"));
  EXPECT_THAT(split(".", "a\nb\rc"), ElementsAre("a", "\n", "b", "\r", "c"));
  EXPECT_THAT(split("(?m:.)", "a\nb"), ElementsAre("a", "\n", "b"));
  EXPECT_THAT(split("\\h", "a g"), ElementsAre("a", " g"));
  EXPECT_THAT(split("[a[bc]]+", "abcd[]"), ElementsAre("abc", "d[]"));
  EXPECT_THAT(split("[\\w&&[^\\d]]+", "ab12c"), ElementsAre("ab", "12", "c"));
  EXPECT_THAT(split("[^\\S\\r\\n]+", "a \n b"), ElementsAre("a", " ", "\n", " ", "b"));
  EXPECT_THAT(split("(?<=a)b", "abcb"), ElementsAre("a", "b", "cb"));
  EXPECT_THAT(split("\\R", "a\r\nb\nc"), ElementsAre("a", "\r\n", "b", "\n", "c"));
  EXPECT_THAT(split("", "abc"), ElementsAre("a", "b", "c"));
  EXPECT_THAT(split("x*", "abxc"), ElementsAre("a", "b", "x", "c"));
  EXPECT_THAT(split("\\u0041", "ABC"), ElementsAre("A", "BC"));
  EXPECT_THAT(split("\\p{Letter}", "a1"), ElementsAre("a", "1"));
  EXPECT_THAT(split("\\bfoo\\b", "foo fooé foo"), ElementsAre("foo", " fooé ", "foo"));
  EXPECT_THAT(split("a(?i)b|c", "aBC"), ElementsAre("aB", "C"));
  EXPECT_THAT(split("\\s", "a\u180eb\u0085c"), ElementsAre("a\u180eb", "\u0085", "c"));
  EXPECT_THAT(split("[\\x{4e00}-\\x{9fa5}]", "一a"), ElementsAre("一", "a"));
}

TEST(Regex, SeesCharactersThatAreNewerThanPcre2) {
  // Garay digits and letters (Unicode 16), and a code point that is still unassigned.
  EXPECT_THAT(split("\\p{N}+", "a\U00010D40\U00010D41b"), ElementsAre("a", "\U00010D40\U00010D41", "b"));
  EXPECT_THAT(split("\\p{Lu}", "\u1C89\u1C8A"), ElementsAre("\u1C89", "\u1C8A"));
  EXPECT_THAT(split("\\p{Cn}", "a\U000E0080"), ElementsAre("a", "\U000E0080"));
}

TEST(Regex, RefusesWhatItCannotTranslate) {
  for (const char* pattern : {"(", ")", "[", "[]", "a\\", "\\X", "\\K", "(?~a)", "\\k<x>", "\\1", "[[:alpha:]]", "\\p{Alpha}", "\\p", "[z-a]", "(?<=a+)b"}) {
    const auto regex = Regex::compile(pattern);
    EXPECT_FALSE(regex.ok()) << pattern;
    EXPECT_EQ(regex.status().code(), StatusCode::kInvalidArgument) << pattern;
  }
  EXPECT_FALSE(Regex::compile(std::string(20'000, 'a')).ok());
  EXPECT_FALSE(Regex::compile("\xFF").ok());
}

TEST(Regex, GivesUpOnRunawayBacktracking) {
  const auto regex = Regex::compile("(?:a|a?)+[bc]");
  ASSERT_TRUE(regex.ok());
  Regex::Scratch scratch;
  std::vector<TextSpan> matches;
  const Status status = regex->find_all(std::string(5'000, 'a'), matches, scratch);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
}

TEST(Splitter, JoinsAsEachBehaviorSays) {
  EXPECT_THAT(split("-", "the-final--countdown", SplitBehavior::kRemoved), ElementsAre("the", "final", "countdown"));
  EXPECT_THAT(split("-", "the-final--countdown", SplitBehavior::kIsolated), ElementsAre("the", "-", "final", "-", "-", "countdown"));
  EXPECT_THAT(split("-", "the-final--countdown", SplitBehavior::kMergedWithPrevious), ElementsAre("the-", "final-", "-", "countdown"));
  EXPECT_THAT(split("-", "the-final--countdown", SplitBehavior::kMergedWithNext), ElementsAre("the", "-final", "-", "-countdown"));
  EXPECT_THAT(split("-", "the-final--countdown", SplitBehavior::kContiguous), ElementsAre("the", "-", "final", "--", "countdown"));
  EXPECT_THAT(split("-", "the-final--countdown", SplitBehavior::kRemoved, true), ElementsAre("-", "-", "-"));
}

// Random text that is rich in what the patterns distinguish.
std::string random_text(std::mt19937& random) {
  static const std::vector<std::string> kPieces = {
      "a", "Z", "é", "ß", "Ж", "ж", "ǅ", "ʰ", "中", "カ", "\u0301", "\u0903", "1", "٣", "½", "Ⅳ", " ", "  ", "\t", "\n", "\r", "\r\n", "\u00a0", "\u2028",
      "\u3000", "'", "'s", "'S", "'ſ", "'ll", "'LL", "'re", "'t", "'x", "\"", ".", ",", "/", "-", "_", "$", "\u20ac", "\x01", "\u200d", "\U0001F600",
      "\U00010D40", "\u1C89", "\uFFFF", "\U000E0080"};
  const unicode::CharTable& table = unicode::CharTable::instance();
  std::string out;
  for (uint32_t i = 0, n = random() % 24; i < n; ++i) {
    if (random() % 12 != 0) {
      out += kPieces[random() % kPieces.size()];
      continue;
    }
    char32_t c = random() % 0x110000;
    if (table.category(c) == unicode::kCn) c = random() % 0x3000;
    if (c < 0xD800 || c > 0xDFFF) unicode::append_utf8(out, c);
  }
  return out;
}

TEST(WordMatcher, EqualsTheRegularExpression) {
  std::mt19937 random(1);
  Regex::Scratch scratch;
  ASSERT_GE(word_matcher_patterns().size(), 5U);
  for (std::string_view pattern : word_matcher_patterns()) {
    SCOPED_TRACE(pattern);
    const auto regex = Regex::compile(pattern);
    ASSERT_TRUE(regex.ok()) << regex.status().to_string();
    const WordMatcher matcher = find_word_matcher(pattern);
    std::vector<TextSpan> expected, found;
    for (int i = 0; i < 20'000; ++i) {
      const std::string text = random_text(random);
      ASSERT_TRUE(regex->find_all(text, expected, scratch).ok());
      found.clear();
      matcher(text, found);
      ASSERT_EQ(found, expected) << text;
    }
  }
}

TEST(Unicode, NormalizesEverySyllableAndMark) {
  using unicode::Form;
  EXPECT_EQ(unicode::normalize("e\u0301\u0323", Form::kNfc), "\u1EB9\u0301");
  EXPECT_EQ(unicode::normalize("\u1EB9\u0301", Form::kNfd), "e\u0323\u0301");
  EXPECT_EQ(unicode::normalize("\u1112\u1161\u11AB", Form::kNfc), "한");
  EXPECT_EQ(unicode::normalize("한", Form::kNfd), "\u1112\u1161\u11AB");
  EXPECT_EQ(unicode::normalize("ﬁ①", Form::kNfkc), "fi1");
  EXPECT_EQ(unicode::normalize("\u0344", Form::kNfc), "\u0308\u0301");
  EXPECT_EQ(unicode::normalize("\u212B\u2126", Form::kNfc), "ÅΩ");
  EXPECT_EQ(unicode::normalize("\u0958", Form::kNfc), "\u0915\u093C");  // excluded from composition
  EXPECT_TRUE(unicode::is_normalized("plain, naïve, 한국어, ไทย", Form::kNfc));
  EXPECT_EQ(unicode::lowercase("ÀİẞΣ"), "ài\u0307ßσ");
  // NFC of anything decomposed is NFC of the thing itself, and both are stable.
  std::mt19937 random(2);
  for (int i = 0; i < 20'000; ++i) {
    const std::string text = random_text(random);
    const std::string nfc = unicode::normalize(text, Form::kNfc);
    ASSERT_EQ(unicode::normalize(nfc, Form::kNfc), nfc);
    ASSERT_EQ(unicode::normalize(unicode::normalize(text, Form::kNfd), Form::kNfc), nfc);
  }
}

TEST(Unicode, LossyTextReplacesMaximalParts) {
  const auto lossy = [](std::string_view text) {
    std::string out;
    unicode::append_lossy(out, text, false);
    return out;
  };
  EXPECT_EQ(lossy("a\xF0\x9F\x8E"), "a\uFFFD");
  EXPECT_EQ(lossy("\xF0\x9F\x41"), "\uFFFD\x41");
  EXPECT_EQ(lossy("\xC0\x80"), "\uFFFD\uFFFD");
  EXPECT_EQ(lossy("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(lossy("\x80\xBF"), "\uFFFD\uFFFD");
}

TEST(Normalizer, ByteLevelAlphabetIsABijection) {
  for (int b = 0; b < 256; ++b) EXPECT_EQ(byte_of_level_char(byte_level_alphabet()[static_cast<size_t>(b)]), b);
  EXPECT_EQ(to_byte_level(" \n"), "ĠĊ");
}

TEST(StopMatcher, HoldsBackOnlyWhatMayBecomeAStop) {
  StopMatcher stops({"</end>", "\n\n"}, false);
  EXPECT_EQ(stops.push("hello <").text, "hello ");
  EXPECT_EQ(stops.push("b>x</e").text, "<b>x");
  EXPECT_EQ(stops.push("n").text, "");
  const auto out = stops.push("d> more");
  EXPECT_TRUE(out.stopped);
  EXPECT_EQ(out.which, 0U);
  EXPECT_EQ(out.text, "");
  EXPECT_TRUE(stops.push("again").stopped);
  EXPECT_EQ(stops.push("again").text, "");
  EXPECT_EQ(stops.flush(), "");
}

TEST(StopMatcher, FindsOverlappingBeginnings) {
  StopMatcher stops({"aab"}, true);
  std::string text;
  for (char c : std::string("aaaab")) text += stops.push({&c, 1}).text;
  EXPECT_EQ(text, "aaaab");
  EXPECT_TRUE(stops.push("").stopped);
}

TEST(StopMatcher, LongerOfTwoThatEndTogetherWins) {
  StopMatcher stops({"b", "ab"}, false);
  const auto out = stops.push("xab");
  EXPECT_EQ(out.which, 1U);
  EXPECT_EQ(out.text, "x");
}

TEST(StopMatcher, FlushGivesBackAnUnfinishedStop) {
  StopMatcher stops({"STOP"}, false);
  EXPECT_EQ(stops.push("ST").text, "");
  EXPECT_EQ(stops.flush(), "ST");
}

TEST(StopMatcher, EqualsASearchInTheWholeText) {
  std::mt19937 random(3);
  for (int i = 0; i < 5'000; ++i) {
    std::string text;
    for (uint32_t n = 0, size = random() % 40; n < size; ++n) text += "ab\n"[random() % 3];
    std::vector<std::string> stops;
    for (uint32_t n = 0, count = 1 + random() % 3; n < count; ++n) {
      std::string stop;
      for (uint32_t k = 0, size = 1 + random() % 4; k < size; ++k) stop += "ab\n"[random() % 3];
      stops.push_back(stop);
    }
    size_t first_end = std::string::npos, longest = 0;
    for (const std::string& stop : stops) {
      const size_t at = text.find(stop);
      if (at == std::string::npos) continue;
      const size_t end = at + stop.size();
      if (end < first_end || (end == first_end && stop.size() > longest)) {
        first_end = end;
        longest = stop.size();
      }
    }
    const std::string expected = first_end == std::string::npos ? text : text.substr(0, first_end - longest);
    StopMatcher matcher(stops, false);
    std::string got;
    bool stopped = false;
    for (size_t at = 0; at < text.size();) {
      const size_t size = 1 + random() % 5;
      const auto out = matcher.push(std::string_view(text).substr(at, size));
      got += out.text;
      stopped = out.stopped;
      at += size;
    }
    got += matcher.flush();
    ASSERT_EQ(got, expected);
    ASSERT_EQ(stopped, first_end != std::string::npos);
  }
}

}  // namespace
}  // namespace baton
