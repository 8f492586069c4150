#include "text/jinja/unicode.h"

#include <utf8proc.h>

#include <cstdint>

namespace baton::jinja {
namespace {

constexpr char32_t kReplacement = 0xfffd;

utf8proc_category_t category(char32_t code) { return utf8proc_category(static_cast<utf8proc_int32_t>(code)); }

bool is_line_break(char32_t code) {
  switch (code) {
    case '\n': case '\r': case 0x0b: case 0x0c: case 0x1c: case 0x1d: case 0x1e: case 0x85: case 0x2028: case 0x2029:
      return true;
    default: return false;
  }
}

/// The start of the code point that ends before `end`.
std::size_t previous(std::string_view text, std::size_t end) {
  std::size_t start = end - 1;
  while (start > 0 && end - start < 4 && (static_cast<unsigned char>(text[start]) & 0xc0) == 0x80) --start;
  return start;
}

bool contains(std::string_view characters, std::string_view one) {
  return characters.find(one) != std::string_view::npos;
}

void append_upper(std::string& out, char32_t code) {
  if (code == 0xdf) {  // the only letter in common use whose capital is two letters
    out += "SS";
    return;
  }
  append_utf8(out, static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(code))));
}

void append_lower(std::string& out, char32_t code) {
  append_utf8(out, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(code))));
}

void append_title(std::string& out, char32_t code) {
  if (code == 0xdf) {
    out += "Ss";
    return;
  }
  append_utf8(out, static_cast<char32_t>(utf8proc_totitle(static_cast<utf8proc_int32_t>(code))));
}

}  // namespace

char32_t decode_utf8(std::string_view text, std::size_t& position) {
  const auto lead = static_cast<unsigned char>(text[position]);
  if (lead < 0x80) {
    ++position;
    return lead;
  }
  utf8proc_int32_t code = -1;
  const auto length = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data() + position),
                                       static_cast<utf8proc_ssize_t>(text.size() - position), &code);
  if (length <= 0) {
    ++position;
    return kReplacement;
  }
  position += static_cast<std::size_t>(length);
  return static_cast<char32_t>(code);
}

void append_utf8(std::string& out, char32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
    return;
  }
  utf8proc_uint8_t buffer[4];
  const auto length = utf8proc_encode_char(static_cast<utf8proc_int32_t>(code), buffer);
  out.append(reinterpret_cast<const char*>(buffer), static_cast<std::size_t>(length));
}

bool is_valid_utf8(std::string_view text) {
  for (std::size_t position = 0; position < text.size();) {
    if (static_cast<unsigned char>(text[position]) < 0x80) {
      ++position;
      continue;
    }
    utf8proc_int32_t code = -1;
    const auto length = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data() + position),
                                         static_cast<utf8proc_ssize_t>(text.size() - position), &code);
    if (length <= 0) return false;
    position += static_cast<std::size_t>(length);
  }
  return true;
}

std::size_t code_point_count(std::string_view text) {
  std::size_t count = 0;
  for (const char c : text) count += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  return count;
}

std::vector<std::size_t> code_point_offsets(std::string_view text) {
  std::vector<std::size_t> offsets;
  offsets.reserve(text.size() + 1);
  for (std::size_t i = 0; i < text.size(); ++i) {
    if ((static_cast<unsigned char>(text[i]) & 0xc0) != 0x80) offsets.push_back(i);
  }
  offsets.push_back(text.size());
  return offsets;
}

bool is_space(char32_t code) {
  return (code >= 0x09 && code <= 0x0d) || (code >= 0x1c && code <= 0x20) || code == 0x85 || code == 0xa0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 ||
         code == 0x202f || code == 0x205f || code == 0x3000;
}

bool is_printable(char32_t code) {
  if (code >= 0x20 && code < 0x7f) return true;
  switch (category(code)) {
    case UTF8PROC_CATEGORY_CC: case UTF8PROC_CATEGORY_CF: case UTF8PROC_CATEGORY_CS: case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN: case UTF8PROC_CATEGORY_ZL: case UTF8PROC_CATEGORY_ZP: case UTF8PROC_CATEGORY_ZS:
      return false;
    default: return true;
  }
}

bool is_alphabetic(char32_t code) {
  switch (category(code)) {
    case UTF8PROC_CATEGORY_LU: case UTF8PROC_CATEGORY_LL: case UTF8PROC_CATEGORY_LT: case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return true;
    default: return false;
  }
}

bool is_decimal(char32_t code) { return category(code) == UTF8PROC_CATEGORY_ND; }
bool is_upper(char32_t code) { return category(code) == UTF8PROC_CATEGORY_LU; }
bool is_lower(char32_t code) { return category(code) == UTF8PROC_CATEGORY_LL; }
bool is_cased(char32_t code) {
  return is_upper(code) || is_lower(code) || category(code) == UTF8PROC_CATEGORY_LT;
}

bool is_identifier_part(char32_t code) {
  switch (category(code)) {
    case UTF8PROC_CATEGORY_MN: case UTF8PROC_CATEGORY_MC: case UTF8PROC_CATEGORY_ND: case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default: return is_alphabetic(code);
  }
}

std::string to_upper(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t position = 0; position < text.size();) append_upper(out, decode_utf8(text, position));
  return out;
}

std::string to_lower(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t position = 0; position < text.size();) append_lower(out, decode_utf8(text, position));
  return out;
}

std::string to_title(std::string_view text) {
  std::string out;
  bool inside_word = false;
  for (std::size_t position = 0; position < text.size();) {
    const char32_t code = decode_utf8(text, position);
    if (inside_word) {
      append_lower(out, code);
    } else {
      append_title(out, code);
    }
    inside_word = is_cased(code);
  }
  return out;
}

std::string capitalized(std::string_view text) {
  std::string out;
  for (std::size_t position = 0; position < text.size();) {
    const bool first = position == 0;
    const char32_t code = decode_utf8(text, position);
    if (first) {
      append_title(out, code);
    } else {
      append_lower(out, code);
    }
  }
  return out;
}

std::string swap_case(std::string_view text) {
  std::string out;
  for (std::size_t position = 0; position < text.size();) {
    const char32_t code = decode_utf8(text, position);
    if (is_upper(code)) {
      append_lower(out, code);
    } else {
      append_upper(out, code);
    }
  }
  return out;
}

std::string_view strip_left(std::string_view text) {
  for (std::size_t position = 0; position < text.size();) {
    const std::size_t start = position;
    if (!is_space(decode_utf8(text, position))) return text.substr(start);
  }
  return {};
}

std::string_view strip_right(std::string_view text) {
  std::size_t end = text.size();
  while (end > 0) {
    std::size_t start = previous(text, end);
    const std::size_t next = start;
    if (!is_space(decode_utf8(text, start))) break;
    end = next;
  }
  return text.substr(0, end);
}

std::string_view strip_left(std::string_view text, std::string_view characters) {
  for (std::size_t position = 0; position < text.size();) {
    const std::size_t start = position;
    decode_utf8(text, position);
    if (!contains(characters, text.substr(start, position - start))) return text.substr(start);
  }
  return {};
}

std::string_view strip_right(std::string_view text, std::string_view characters) {
  std::size_t end = text.size();
  while (end > 0) {
    const std::size_t start = previous(text, end);
    if (!contains(characters, text.substr(start, end - start))) break;
    end = start;
  }
  return text.substr(0, end);
}

std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  std::size_t start = 0;
  for (std::size_t position = 0; position < text.size();) {
    const std::size_t line_end = position;
    const char32_t code = decode_utf8(text, position);
    if (!is_line_break(code)) continue;
    if (code == '\r' && position < text.size() && text[position] == '\n') ++position;
    lines.push_back(text.substr(start, (keep_ends ? position : line_end) - start));
    start = position;
  }
  if (start < text.size()) lines.push_back(text.substr(start));
  return lines;
}

}  // namespace baton::jinja
