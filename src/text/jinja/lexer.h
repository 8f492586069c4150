#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace baton::jinja {

enum class TokenKind : std::uint8_t {
  data,  ///< text between tags, whitespace control already applied
  variable_begin,
  variable_end,
  block_begin,
  block_end,
  name,  ///< also keywords: which of them are depends on the place
  string,
  integer,
  real,
  op,
  end,
};

struct Token {
  TokenKind kind = TokenKind::end;
  int line = 1;
  std::string text;  ///< unescaped for strings, without "_" for numbers

  bool is_op(std::string_view symbol) const { return kind == TokenKind::op && text == symbol; }
  bool is_name(std::string_view name) const { return kind == TokenKind::name && text == name; }
};

/// The whole template as tokens, ending in one `end`. Whitespace control is that of an environment
/// with trim_blocks and lstrip_blocks and without keep_trailing_newline, which is how transformers
/// sets Jinja up: a newline after a block is dropped, and so is blank space from the start of a line
/// up to a block. Throws TemplateError.
std::vector<Token> tokenize(std::string_view source);

/// How messages name a token.
std::string describe(const Token& token);

}  // namespace baton::jinja
