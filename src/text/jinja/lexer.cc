#include "text/jinja/lexer.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <optional>

#include "text/jinja/unicode.h"
#include "text/jinja/value.h"

namespace baton::jinja {
namespace {

/// Longest first, so that "**" is not two "*".
constexpr std::array<std::string_view, 26> kOperators = {
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[",
    "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ",", ";"};

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// Where the identifier at `position` ends; `position` itself when there is none.
std::size_t name_end(std::string_view source, std::size_t position) {
  if (position < source.size() && is_digit(source[position])) return position;
  while (position < source.size()) {
    std::size_t next = position;
    if (!is_identifier_part(decode_utf8(source, next))) break;
    position = next;
  }
  return position;
}

/// One kind of newline, and without the last one.
std::string normalize_newlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (std::size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      out += source[i];
      continue;
    }
    out += '\n';
    if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(normalize_newlines(source)) {}

  std::vector<Token> run() {
    while (position_ < source_.size()) lex_text();
    add(TokenKind::end, "");
    return std::move(tokens_);
  }

 private:
  enum class Tag { variable, block, comment };

  [[noreturn]] void error(std::string message) const { throw TemplateError{std::move(message), line_}; }
  char at(std::size_t position) const { return position < source_.size() ? source_[position] : '\0'; }
  bool starts_with(std::string_view text) const { return std::string_view(source_).substr(position_).starts_with(text); }

  void add(TokenKind kind, std::string text) { tokens_.push_back(Token{kind, line_, std::move(text)}); }

  void advance_to(std::size_t position) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<std::ptrdiff_t>(position_),
                                         source_.begin() + static_cast<std::ptrdiff_t>(position), '\n'));
    position_ = position;
    line_starting_ = position > 0 && source_[position - 1] == '\n';
  }

  void skip_space() {
    const std::string_view rest = std::string_view(source_).substr(position_);
    advance_to(position_ + (rest.size() - strip_left(rest).size()));
  }

  /// Text up to the next tag, and that tag.
  void lex_text() {
    std::size_t open = position_;
    while (true) {
      open = source_.find('{', open);
      if (open == std::string::npos || open + 1 >= source_.size()) {
        add_data(std::string_view(source_).substr(position_));
        position_ = source_.size();
        return;
      }
      const char next = source_[open + 1];
      if (next == '{' || next == '%' || next == '#') break;
      ++open;
    }
    const Tag tag = source_[open + 1] == '{' ? Tag::variable : source_[open + 1] == '%' ? Tag::block : Tag::comment;
    const char sign = at(open + 2);
    add_text_before(open, tag, sign);
    advance_to(open + (sign == '-' || sign == '+' ? 3 : 2));
    switch (tag) {
      case Tag::comment: lex_comment(); break;
      case Tag::variable: lex_tag(TokenKind::variable_begin, TokenKind::variable_end); break;
      case Tag::block:
        if (!lex_raw()) lex_tag(TokenKind::block_begin, TokenKind::block_end);
        break;
    }
  }

  void add_data(std::string_view text) {
    if (!text.empty()) add(TokenKind::data, std::string(text));
  }

  /// The text before a tag, stripped as the tag's sign and lstrip_blocks ask for.
  void add_text_before(std::size_t open, Tag tag, char sign) {
    std::string_view text = std::string_view(source_).substr(position_, open - position_);
    if (sign == '-') {
      text = strip_right(text);
    } else if (sign != '+' && tag != Tag::variable) {
      const std::size_t newline = text.rfind('\n');
      const std::size_t line = newline == std::string_view::npos ? 0 : newline + 1;
      if ((line > 0 || line_starting_) && strip_left(text.substr(line)).empty()) text = text.substr(0, line);
    }
    add_data(text);
  }

  /// After "-%}" all space goes, after "%}" one newline, after "+%}" nothing.
  void after_block_end(char sign) {
    if (sign == '-') {
      skip_space();
    } else if (sign != '+' && at(position_) == '\n') {
      advance_to(position_ + 1);
    }
  }

  void lex_comment() {
    const std::size_t end = source_.find("#}", position_);
    if (end == std::string::npos) error("a comment {# is never closed with #}");
    const char before = end > position_ ? source_[end - 1] : '\0';
    advance_to(end + 2);
    after_block_end(before);
  }

  /// {% raw %}...{% endraw %}: text in which nothing is special. False when this isn't one.
  bool lex_raw() {
    std::size_t position = position_;
    const auto skip = [&] { position = source_.size() - strip_left(std::string_view(source_).substr(position)).size(); };
    skip();
    if (source_.compare(position, 3, "raw") != 0) return false;
    position += 3;
    skip();
    const bool strips = at(position) == '-';
    if (source_.compare(position, strips ? 3 : 2, strips ? "-%}" : "%}") != 0) return false;
    advance_to(position + (strips ? 3 : 2));
    if (strips) skip_space();

    for (std::size_t open = source_.find("{%", position_); open != std::string::npos; open = source_.find("{%", open + 2)) {
      position = open + 2;
      const char sign = at(position);
      if (sign == '-' || sign == '+') ++position;
      skip();
      if (source_.compare(position, 6, "endraw") != 0) continue;
      position += 6;
      skip();
      const char end_sign = at(position);
      if (end_sign == '-' || end_sign == '+') ++position;
      if (source_.compare(position, 2, "%}") != 0) continue;
      add_text_before(open, Tag::block, sign);
      advance_to(position + 2);
      after_block_end(end_sign);
      return true;
    }
    error("{% raw %} is never closed with {% endraw %}");
  }

  /// The tokens inside {{ }} or {% %}, and the end of the tag.
  void lex_tag(TokenKind begin, TokenKind end) {
    add(begin, "");
    const bool block = begin == TokenKind::block_begin;
    const std::string_view close = block ? "%}" : "}}";
    std::vector<char> open;  // brackets that must be closed before the tag may be
    while (true) {
      skip_space();
      if (position_ >= source_.size()) error(block ? "a tag {% is never closed with %}" : "a tag {{ is never closed with }}");
      if (open.empty()) {
        const char sign = at(position_);
        const bool has_sign = (sign == '-' || (block && sign == '+')) &&
                              source_.compare(position_ + 1, 2, close) == 0;
        if (has_sign || starts_with(close)) {
          add(end, "");
          advance_to(position_ + (has_sign ? 3 : 2));
          if (block) {
            after_block_end(has_sign ? sign : '\0');
          } else if (has_sign) {
            skip_space();
          }
          return;
        }
      }
      lex_token(open);
    }
  }

  void lex_token(std::vector<char>& open) {
    const char c = source_[position_];
    if (is_digit(c)) return lex_number();
    if (const std::size_t stop = name_end(source_, position_); stop > position_) {
      add(TokenKind::name, source_.substr(position_, stop - position_));
      return advance_to(stop);
    }
    if (c == '"' || c == '\'') return lex_string(c);
    const auto* symbol = std::find_if(kOperators.begin(), kOperators.end(), [&](auto s) { return starts_with(s); });
    if (symbol == kOperators.end()) {
      std::size_t next = position_;
      decode_utf8(source_, next);
      error(fmt::format("unexpected character '{}'", source_.substr(position_, next - position_)));
    }
    check_brackets(c, open);
    add(TokenKind::op, std::string(*symbol));
    advance_to(position_ + symbol->size());
  }

  void check_brackets(char c, std::vector<char>& open) const {
    if (c == '(') open.push_back(')');
    if (c == '[') open.push_back(']');
    if (c == '{') open.push_back('}');
    if (c != ')' && c != ']' && c != '}') return;
    if (open.empty()) error(fmt::format("unexpected '{}'", c));
    if (open.back() != c) error(fmt::format("unexpected '{}', expected '{}'", c, open.back()));
    open.pop_back();
  }

  /// Digits with single "_" between them, from `position`; where they end.
  std::size_t digits_end(std::size_t position, bool (*accepts)(char)) const {
    while (accepts(at(position)) || (at(position) == '_' && accepts(at(position + 1)))) ++position;
    return position;
  }

  void add_number(TokenKind kind, std::size_t end) {
    std::string text = source_.substr(position_, end - position_);
    std::erase(text, '_');
    add(kind, std::move(text));
    advance_to(end);
  }

  void lex_number() {
    const std::size_t whole = digits_end(position_, is_digit);
    const bool after_dot = position_ > 0 && source_[position_ - 1] == '.';
    if (!after_dot) {
      std::size_t end = whole;
      if (at(end) == '.' && is_digit(at(end + 1))) end = digits_end(end + 1, is_digit);
      std::size_t exponent = end + 1;
      if (at(exponent) == '+' || at(exponent) == '-') ++exponent;
      if ((at(end) == 'e' || at(end) == 'E') && is_digit(at(exponent))) end = digits_end(exponent, is_digit);
      if (end != whole) return add_number(TokenKind::real, end);
    }
    if (at(position_) == '0') {
      const char base = static_cast<char>(std::tolower(static_cast<unsigned char>(at(position_ + 1))));
      bool (*accepts)(char) = nullptr;
      if (base == 'x') accepts = [](char c) { return std::isxdigit(static_cast<unsigned char>(c)) != 0; };
      if (base == 'o') accepts = [](char c) { return c >= '0' && c <= '7'; };
      if (base == 'b') accepts = [](char c) { return c == '0' || c == '1'; };
      if (accepts != nullptr) {
        const std::size_t end = digits_end(position_ + 2, accepts);
        if (end > position_ + 2) return add_number(TokenKind::integer, end);
      }
      return add_number(TokenKind::integer, digits_end(position_, [](char c) { return c == '0'; }));
    }
    add_number(TokenKind::integer, whole);
  }

  void lex_string(char quote) {
    std::size_t end = position_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) error("a string is never closed");
    add(TokenKind::string, unescape(std::string_view(source_).substr(position_ + 1, end - position_ - 1)));
    advance_to(end + 1);
  }

  /// Python's escapes; an unknown one stays as it is written.
  std::string unescape(std::string_view text) const {
    std::string out;
    out.reserve(text.size());
    for (std::size_t i = 0; i < text.size(); ++i) {
      if (text[i] != '\\' || i + 1 >= text.size()) {
        out += text[i];
        continue;
      }
      const char c = text[++i];
      switch (c) {
        case '\n': break;
        case '\\': case '\'': case '"': out += c; break;
        case 'a': out += '\a'; break;
        case 'b': out += '\b'; break;
        case 'f': out += '\f'; break;
        case 'n': out += '\n'; break;
        case 'r': out += '\r'; break;
        case 't': out += '\t'; break;
        case 'v': out += '\v'; break;
        case 'x': append_code(out, hex(text, i, 2)); break;
        case 'u': append_code(out, hex(text, i, 4)); break;
        case 'U': append_code(out, hex(text, i, 8)); break;
        case 'N': error("\\N{...} in a string is not supported; write the character itself");
        default:
          if (c >= '0' && c <= '7') {
            char32_t code = 0;
            const std::size_t stop = std::min(i + 3, text.size());
            for (; i < stop && text[i] >= '0' && text[i] <= '7'; ++i) code = code * 8 + static_cast<char32_t>(text[i] - '0');
            --i;
            append_code(out, code);
          } else {
            out += '\\';
            out += c;
          }
      }
    }
    return out;
  }

  char32_t hex(std::string_view text, std::size_t& i, std::size_t count) const {
    char32_t code = 0;
    for (std::size_t n = 0; n < count; ++n) {
      ++i;
      if (i >= text.size() || std::isxdigit(static_cast<unsigned char>(text[i])) == 0) error("a string has a truncated \\x, \\u or \\U escape");
      const char c = static_cast<char>(std::tolower(static_cast<unsigned char>(text[i])));
      code = code * 16 + static_cast<char32_t>(is_digit(c) ? c - '0' : c - 'a' + 10);
    }
    return code;
  }

  void append_code(std::string& out, char32_t code) const {
    if (code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) error("a string escape is not a Unicode character");
    append_utf8(out, code);
  }

  std::string source_;
  std::size_t position_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  ///< nothing but what was dropped stands before this on its line
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) { return Lexer(source).run(); }

std::string describe(const Token& token) {
  switch (token.kind) {
    case TokenKind::data: return "text";
    case TokenKind::variable_begin: return "{{";
    case TokenKind::variable_end: return "}}";
    case TokenKind::block_begin: return "{%";
    case TokenKind::block_end: return "%}";
    case TokenKind::string: return fmt::format("string '{}'", token.text);
    case TokenKind::end: return "end of template";
    default: return fmt::format("'{}'", token.text);
  }
}

}  // namespace baton::jinja
