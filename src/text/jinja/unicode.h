#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace baton::jinja {

/// The code point at `position`, which moves behind it. Invalid bytes read as U+FFFD, one each.
char32_t decode_utf8(std::string_view text, std::size_t& position);
void append_utf8(std::string& out, char32_t code);
bool is_valid_utf8(std::string_view text);

/// Code points in valid UTF-8.
std::size_t code_point_count(std::string_view text);
/// Byte offset of every code point and, last, of the end: count + 1 entries.
std::vector<std::size_t> code_point_offsets(std::string_view text);

/// As Python's str.isspace(), str.isprintable() and so on define them.
bool is_space(char32_t code);
bool is_printable(char32_t code);
bool is_alphabetic(char32_t code);
bool is_decimal(char32_t code);
bool is_upper(char32_t code);
bool is_lower(char32_t code);
bool is_cased(char32_t code);
/// What may stand inside a Python identifier.
bool is_identifier_part(char32_t code);

std::string to_upper(std::string_view text);
std::string to_lower(std::string_view text);
/// str.title(): every run of letters starts with a capital.
std::string to_title(std::string_view text);
std::string capitalized(std::string_view text);
std::string swap_case(std::string_view text);

std::string_view strip_left(std::string_view text);
std::string_view strip_right(std::string_view text);
/// Without the given characters at the ends, as str.strip(chars).
std::string_view strip_left(std::string_view text, std::string_view characters);
std::string_view strip_right(std::string_view text, std::string_view characters);

/// str.splitlines().
std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends);

}  // namespace baton::jinja
