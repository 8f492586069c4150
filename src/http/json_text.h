#pragma once

#include <string>
#include <string_view>

namespace baton::http {

/// Appends `text` as a JSON string with its quotes. Bytes that are not UTF-8 become U+FFFD, so that what we send
/// is always valid JSON.
void append_json_string(std::string& out, std::string_view text);
std::string json_string(std::string_view text);
/// A JSON number with no more digits than needed; infinities and NaN, which JSON lacks, become -9999 (as vLLM).
void append_json_number(std::string& out, float value);

}  // namespace baton::http
