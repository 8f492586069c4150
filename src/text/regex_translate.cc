// Oniguruma's syntax (its own default, as the `onig` crate uses it) into PCRE2's.
//
// Where they differ and it matters here:
//   \s \w \b     other code points: written out as ranges of our own table
//   \h \v        a hex digit and one control character, not white space classes
//   (?m)         lets the dot match a newline; ^ and $ are at every line anyway
//   x{1,3}+      repeats the repetition (not possessive); x{3}? makes it optional; x{,3} is x{0,3}
//   [a[bc]&&[^d]] nested classes and intersections

#include <fmt/format.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/regex.h"
#include "text/unicode.h"

namespace baton {
namespace {

constexpr size_t kMaxPatternBytes = 16 * 1024;
constexpr int kMaxNesting = 32;
constexpr std::string_view kHexDigits = "0-9A-Fa-f";

std::string hex_escape(char32_t c) { return fmt::format("\\x{{{:X}}}", static_cast<uint32_t>(c)); }

class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  Result<std::string> run() {
    std::vector<Group> groups{{0, 0}};
    while (!done()) {
      const char c = in_[at_];
      switch (c) {
        case '\\': {
          atom_ = out_.size();
          BATON_RETURN_IF_ERROR(escape());
          break;
        }
        case '[': {
          atom_ = out_.size();
          BATON_ASSIGN_OR_RETURN(std::string set, char_class(0));
          out_ += set;
          break;
        }
        case '(':
          groups.push_back({out_.size(), 0});
          BATON_RETURN_IF_ERROR(open_group(groups));
          break;
        case ')':
          if (groups.size() == 1) return fail("unmatched )");
          out_.append(groups.back().isolated_options, ')');
          atom_ = groups.back().begin;
          groups.pop_back();
          out_ += c;
          ++at_;
          break;
        case '{':
          interval();
          break;
        default: {
          if (c != '*' && c != '+' && c != '?') atom_ = out_.size();
          const uint32_t length = unicode::sequence_length(c);
          out_.append(in_.substr(at_, length));
          at_ += length;
        }
      }
    }
    if (groups.size() > 1) return fail("unmatched (");
    out_.append(groups.back().isolated_options, ')');
    return std::move(out_);
  }

 private:
  struct Group {
    size_t begin;             // in out_
    size_t isolated_options;  // (?i) without a colon reaches to the end of the group: closed with it
  };

  bool done() const { return at_ >= in_.size(); }
  char peek(size_t ahead = 0) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }
  Status fail(std::string_view why) const {
    return invalid_argument("regular expression \"{}\": {} (near byte {})", in_.substr(0, 200), why, at_);
  }

  // A set that may stand inside brackets, for \s \w \d \h and their complements; none for others.
  static std::optional<std::string> shorthand(char letter) {
    switch (letter) {
      case 's': return unicode::class_ranges(unicode::kRegexSpace, true);
      case 'S': return unicode::class_ranges(unicode::kRegexSpace, false);
      case 'w': return unicode::class_ranges(unicode::kRegexWord, true);
      case 'W': return unicode::class_ranges(unicode::kRegexWord, false);
      case 'd': return "\\p{Nd}";
      case 'D': return "\\P{Nd}";
      case 'h': return std::string(kHexDigits);
      case 'H': return "\\x{0}-/:-@G-`g-\\x{10FFFF}";
      default: return std::nullopt;
    }
  }

  // One character written as an escape: at_ is behind the backslash. None when it is no character.
  std::optional<char32_t> character_escape() {
    const auto hex = [&](size_t from, size_t max_digits, size_t& digits) {
      char32_t value = 0;
      digits = 0;
      while (digits < max_digits && from + digits < in_.size() && is_hex(in_[from + digits])) {
        value = value * 16 + hex_value(in_[from + digits]);
        ++digits;
      }
      return value;
    };
    const char letter = peek();
    size_t digits = 0;
    switch (letter) {
      case 'n': ++at_; return '\n';
      case 'r': ++at_; return '\r';
      case 't': ++at_; return '\t';
      case 'f': ++at_; return '\f';
      case 'v': ++at_; return '\v';
      case 'a': ++at_; return '\a';
      case 'e': ++at_; return 0x1B;
      case 'x':
        if (peek(1) == '{') {
          const char32_t value = hex(at_ + 2, 6, digits);
          if (digits == 0 || at_ + 2 + digits >= in_.size() || in_[at_ + 2 + digits] != '}' || !is_scalar(value)) return std::nullopt;
          at_ += digits + 3;
          return value;
        } else {
          const char32_t value = hex(at_ + 1, 2, digits);
          if (digits == 0 || value >= 0x80) return std::nullopt;  // a byte of a character, not a character
          at_ += digits + 1;
          return value;
        }
      case 'u': {
        const char32_t value = hex(at_ + 1, 4, digits);
        if (digits != 4 || !is_scalar(value)) return std::nullopt;
        at_ += 5;
        return value;
      }
      default: break;
    }
    const auto byte = static_cast<unsigned char>(letter);
    const bool alphanumeric = (byte >= '0' && byte <= '9') || ((byte | 0x20) >= 'a' && (byte | 0x20) <= 'z');
    if (at_ >= in_.size() || alphanumeric) return std::nullopt;
    const auto [c, length] = unicode::decode(in_.data() + at_);
    at_ += length;
    return c;
  }

  static bool is_hex(char c) { return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'f'); }
  static char32_t hex_value(char c) { return static_cast<char32_t>(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10); }
  static bool is_scalar(char32_t c) { return c < 0x110000 && (c < 0xD800 || c > 0xDFFF); }

  // \p{...}, \P{...}: at_ is at the p. Category and script names are common to both.
  Result<std::string> property() {
    const size_t end = in_.find('}', at_);
    if (peek(1) != '{' || end == std::string_view::npos || end - at_ > 64) return fail("\\p needs {name}");
    std::string name(in_.substr(at_ + 2, end - at_ - 2));
    bool negated = peek() == 'P';
    at_ = end + 1;
    if (!name.empty() && name.front() == '^') {
      negated = !negated;
      name.erase(0, 1);
    }
    std::string key;
    for (char c : name) {
      if (c != ' ' && c != '_' && c != '-') key += static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
    }
    // Long names that PCRE2 10.42 doesn't have.
    static constexpr std::pair<std::string_view, std::string_view> kLong[] = {
        {"letter", "L"}, {"uppercaseletter", "Lu"}, {"lowercaseletter", "Ll"}, {"titlecaseletter", "Lt"},
        {"modifierletter", "Lm"}, {"otherletter", "Lo"}, {"mark", "M"}, {"nonspacingmark", "Mn"},
        {"spacingmark", "Mc"}, {"enclosingmark", "Me"}, {"number", "N"}, {"decimalnumber", "Nd"},
        {"letternumber", "Nl"}, {"othernumber", "No"}, {"punctuation", "P"}, {"symbol", "S"},
        {"separator", "Z"}, {"other", "C"}, {"control", "Cc"}};
    for (const auto& [from, to] : kLong) {
      if (key == from) name = to;
    }
    // Oniguruma's POSIX-like names follow other tables than PCRE2's: those we have, the rest refused.
    if (key == "space" || key == "whitespace") return unicode::class_ranges(unicode::kRegexSpace, !negated);
    if (key == "word") return unicode::class_ranges(unicode::kRegexWord, !negated);
    if (key == "alpha" || key == "alnum" || key == "punct" || key == "graph" || key == "print" || key == "xposixpunct" ||
        key == "emoji" || key == "assigned" || key == "alphabetic" || key == "lower" || key == "upper" || key == "blank" ||
        key == "cntrl" || key == "ascii") {
      return fail(fmt::format("the property {} is not supported; use a general category or script", name));
    }
    return fmt::format("\\{}{{{}}}", negated ? 'P' : 'p', name);
  }

  Status escape() {
    ++at_;
    if (done()) return fail("it ends in a backslash");
    const char letter = peek();
    if (auto set = shorthand(letter)) {
      ++at_;
      out_ += fmt::format("[{}]", *set);
      return {};
    }
    switch (letter) {
      case 'p':
      case 'P': {
        BATON_ASSIGN_OR_RETURN(std::string text, property());
        out_ += text.starts_with("\\p{") || text.starts_with("\\P{") ? text : fmt::format("[{}]", text);
        return {};
      }
      case 'b':
      case 'B': {
        const std::string word = fmt::format("[{}]", unicode::class_ranges(unicode::kRegexWord, true));
        out_ += letter == 'b' ? fmt::format("(?:(?<={0})(?!{0})|(?<!{0})(?={0}))", word)
                              : fmt::format("(?:(?<={0})(?={0})|(?<!{0})(?!{0}))", word);
        ++at_;
        return {};
      }
      case 'A':
      case 'Z':
      case 'z':
      case 'G':
      case 'R':
        out_ += '\\';
        out_ += letter;
        ++at_;
        return {};
      default: break;
    }
    if (auto c = character_escape()) {
      out_ += hex_escape(*c);
      return {};
    }
    return fail(fmt::format("the escape \\{} is not supported", letter));
  }

  Status open_group(std::vector<Group>& groups) {
    if (groups_seen_++ > 1000) return fail("more than 1000 groups");
    if (peek(1) != '?') {
      out_ += "(?:";  // captures are never asked for, and cost time
      ++at_;
      return {};
    }
    const char kind = peek(2);
    if (kind == ':' || kind == '=' || kind == '!' || kind == '>') {
      out_.append(in_.substr(at_, 3));
      at_ += 3;
      return {};
    }
    if (kind == '<' && (peek(3) == '=' || peek(3) == '!')) {
      out_.append(in_.substr(at_, 4));
      at_ += 4;
      return {};
    }
    std::string flags;
    size_t end = at_ + 2;
    while (end < in_.size() && (in_[end] == 'i' || in_[end] == 'm' || in_[end] == '-')) {
      flags += in_[end] == 'm' ? 's' : in_[end];
      ++end;
    }
    if (end == in_.size() || end == at_ + 2 || (in_[end] != ')' && in_[end] != ':')) {
      return fail("this kind of group is not supported");
    }
    out_ += fmt::format("(?{}:", flags);
    at_ = end + 1;
    if (in_[end] == ')') {
      // a(?i)b|c is a(?i:b|c): it stays open until the group around it ends.
      groups.pop_back();
      ++groups.back().isolated_options;
    }
    return {};
  }

  void interval() {
    size_t end = at_ + 1;
    std::string low, high;
    bool comma = false;
    while (end < in_.size() && ((in_[end] >= '0' && in_[end] <= '9') || (in_[end] == ',' && !comma))) {
      if (in_[end] == ',') {
        comma = true;
      } else {
        (comma ? high : low) += in_[end];
      }
      ++end;
    }
    if (end >= in_.size() || in_[end] != '}' || (low.empty() && high.empty())) {
      atom_ = out_.size();
      out_ += "\\{";  // not an interval: a brace
      ++at_;
      return;
    }
    at_ = end + 1;
    const std::string text = comma ? fmt::format("{{{},{}}}", low.empty() ? "0" : low, high) : fmt::format("{{{}}}", low);
    out_ += text;
    if (peek() == '+' || (peek() == '?' && !comma)) {
      out_.insert(atom_, "(?:");
      out_ += ')';
    }
  }

  // From a '[' to behind its ']'. What comes back matches one character and is a single atom.
  Result<std::string> char_class(int depth) {
    if (depth > kMaxNesting) return fail("character classes nested too deeply");
    ++at_;
    const bool negated = peek() == '^';
    if (negated) ++at_;
    std::vector<std::string> factors;  // of the && intersection
    std::string set;                   // members of a plain bracket
    std::vector<std::string> others;   // nested classes that are no plain set
    const auto close_factor = [&] {
      std::string text;
      if (others.empty()) {
        text = set.empty() ? "(?!)" : fmt::format("[{}]", set);
      } else {
        text = "(?:";
        if (!set.empty()) text += fmt::format("[{}]|", set);
        for (size_t i = 0; i < others.size(); ++i) text += (i ? "|" : "") + others[i];
        text += ")";
      }
      factors.push_back(std::move(text));
      set.clear();
      others.clear();
    };

    bool first = true;
    while (true) {
      if (done()) return fail("unmatched [");
      const char c = peek();
      if (c == ']' && !first) {
        ++at_;
        break;
      }
      if (c == '&' && peek(1) == '&') {
        at_ += 2;
        close_factor();
        first = false;
        continue;
      }
      if (c == '[') {
        if (peek(1) == ':') return fail("POSIX brackets are not supported; use \\p{...}");
        BATON_ASSIGN_OR_RETURN(std::string nested, char_class(depth + 1));
        others.push_back(std::move(nested));
        first = false;
        continue;
      }
      first = false;
      std::optional<char32_t> low;
      if (c == '\\') {
        ++at_;
        if (auto shorthand_set = shorthand(peek())) {
          ++at_;
          set += *shorthand_set;
          continue;
        }
        if (peek() == 'p' || peek() == 'P') {
          BATON_ASSIGN_OR_RETURN(std::string text, property());
          set += text;
          continue;
        }
        if (peek() == 'b') {
          ++at_;
          low = 0x08;
        } else {
          low = character_escape();
          if (!low) return fail("this escape is not supported in a character class");
        }
      } else {
        const auto [code_point, length] = unicode::decode(in_.data() + at_);
        low = code_point;
        at_ += length;
      }
      set += hex_escape(*low);
      // A range, unless the dash is the last thing in the class or stands before a set.
      if (peek() == '-' && peek(1) != ']' && peek(1) != '[' && at_ + 1 < in_.size()) {
        const size_t dash = at_++;
        std::optional<char32_t> high;
        if (peek() == '\\') {
          ++at_;
          if (!shorthand(peek()) && peek() != 'p' && peek() != 'P') high = character_escape();
        } else {
          const auto [code_point, length] = unicode::decode(in_.data() + at_);
          high = code_point;
          at_ += length;
        }
        if (high) {
          if (*high < *low) return fail("an empty range in a character class");
          set += '-';
          set += hex_escape(*high);
        } else {
          at_ = dash + 1;
          set += hex_escape('-');
        }
      }
    }

    if (factors.empty() && others.empty()) {
      if (set.empty()) return fail("an empty character class");
      return fmt::format("[{}{}]", negated ? "^" : "", set);
    }
    close_factor();
    std::string text = factors.back();
    for (size_t i = 0; i + 1 < factors.size(); ++i) text = fmt::format("(?={}){}", factors[i], text);
    return negated ? fmt::format("(?:(?!{})[\\x{{0}}-\\x{{10FFFF}}])", text) : fmt::format("(?:{})", text);
  }

  std::string_view in_;
  size_t at_ = 0;
  std::string out_;
  size_t atom_ = 0;  // where the last atom begins in out_
  int groups_seen_ = 0;
};

}  // namespace

Result<std::string> translate_oniguruma(std::string_view pattern) {
  if (pattern.size() > kMaxPatternBytes) {
    return invalid_argument("a regular expression has {} bytes, at most {} are accepted", pattern.size(), kMaxPatternBytes);
  }
  if (unicode::valid_prefix(pattern) != pattern.size()) return invalid_argument("a regular expression is not valid UTF-8");
  return Translator(pattern).run();
}

}  // namespace baton
