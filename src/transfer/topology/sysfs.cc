#include "transfer/topology/sysfs.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <memory>

#include "base/unique_handle.h"

namespace baton::transfer {
namespace {

constexpr size_t kMaxNameBytes = 64;

bool is_plain_name(std::string_view name) {
  if (name.empty() || name.size() > kMaxNameBytes || name[0] == '.') return false;
  return std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c < 0x7f && c != '/'; });
}

struct CloseDirectory {
  void operator()(DIR* directory) const { ::closedir(directory); }
};

}  // namespace

std::string_view trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n\v\f";
  size_t first = text.find_first_not_of(kSpace);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

std::string_view last_component(std::string_view path) {
  size_t slash = path.rfind('/');
  return slash == std::string_view::npos ? path : path.substr(slash + 1);
}

std::optional<int64_t> parse_number(std::string_view text) {
  text = trim(text);
  int base = 10;
  if (text.starts_with("0x") || text.starts_with("0X")) {
    base = 16;
    text.remove_prefix(2);
  }
  int64_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<std::string> SysfsReader::text(const std::string& path, size_t max_bytes) const {
  // A fifo would block and a device could do anything: O_NONBLOCK opens both harmlessly, fstat refuses them.
  FileDescriptor file(::open(full(path).c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW));
  if (!file) return std::nullopt;
  struct stat info {};
  if (::fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode)) return std::nullopt;
  std::string text(max_bytes, '\0');
  size_t size = 0;
  while (size < max_bytes) {
    ssize_t got = ::read(file.get(), text.data() + size, max_bytes - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return std::nullopt;  // `speed` of an interface that is down answers EINVAL
    if (got == 0) break;
    size += static_cast<size_t>(got);
  }
  text.resize(size);
  return std::string(trim(text));
}

std::optional<int64_t> SysfsReader::number(const std::string& path) const {
  std::optional<std::string> value = text(path, 64);
  return value ? parse_number(*value) : std::nullopt;
}

std::optional<std::string> SysfsReader::link(const std::string& path) const {
  char target[4096];
  ssize_t size = ::readlink(full(path).c_str(), target, sizeof(target));
  if (size <= 0 || static_cast<size_t>(size) == sizeof(target)) return std::nullopt;
  return std::string(target, static_cast<size_t>(size));
}

std::vector<std::string> SysfsReader::list(const std::string& path, size_t max_entries, bool* truncated) const {
  std::vector<std::string> names;
  std::unique_ptr<DIR, CloseDirectory> directory(::opendir(full(path).c_str()));
  if (!directory) return names;
  while (const dirent* entry = ::readdir(directory.get())) {
    if (!is_plain_name(entry->d_name)) continue;
    if (names.size() == max_entries) {
      if (truncated != nullptr) *truncated = true;
      break;
    }
    names.emplace_back(entry->d_name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool SysfsReader::exists(const std::string& path) const {
  struct stat info {};
  return ::lstat(full(path).c_str(), &info) == 0;
}

}  // namespace baton::transfer
