#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace baton::transfer {

/// Reads small files of /sys and /proc below a root of choice. Whatever lies there, nothing blocks and
/// nothing is read without bound: only regular files are opened for reading, and never waited for.
/// Everything that is missing, unreadable or of another kind is simply not there.
class SysfsReader {
 public:
  explicit SysfsReader(std::string root = "/") : root_(std::move(root)) {}

  /// The file without white space at its ends; at most `max_bytes` of it.
  std::optional<std::string> text(const std::string& path, size_t max_bytes = 4096) const;
  /// Decimal, or hexadecimal with 0x in front; nothing when it is no number or does not fit.
  std::optional<int64_t> number(const std::string& path) const;
  /// Where a symbolic link points, as written. Links are never followed by name from here.
  std::optional<std::string> link(const std::string& path) const;
  /// Names in a directory, sorted; those that are no plain device name (printable, at most 64 characters)
  /// are left out. `truncated` (optional) turns true when there are more than `max_entries`.
  std::vector<std::string> list(const std::string& path, size_t max_entries, bool* truncated = nullptr) const;
  bool exists(const std::string& path) const;

 private:
  std::string full(const std::string& path) const { return root_ + "/" + path; }
  const std::string root_;
};

std::optional<int64_t> parse_number(std::string_view text);
std::string_view trim(std::string_view text);
/// What stands behind the last slash.
std::string_view last_component(std::string_view path);

}  // namespace baton::transfer
