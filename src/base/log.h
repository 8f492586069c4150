#pragma once

#include <fmt/format.h>

#include <atomic>
#include <functional>
#include <string>
#include <string_view>

namespace baton {

enum class LogLevel : int { kDebug = 0, kInfo = 1, kWarning = 2, kError = 3 };

/// One line on stderr per call: "2026-01-31T12:00:00.123Z I prefill-0 message". Safe from any thread.
/// The part that detects a failure logs it; callers only pass the Status on.
void log_line(LogLevel level, std::string_view message);

/// Lines below `level` are dropped before they are formatted. Default: info.
void set_log_level(LogLevel level);
LogLevel log_level();
/// "debug", "info", "warning" or "error"; false when it is none of them.
bool parse_log_level(std::string_view name, LogLevel* level);

/// Shown in every line, so that the lines of several processes can be told apart ("decode-1").
void set_log_process_name(std::string name);

/// Replaces stderr, for tests that assert on (the absence of) errors. Pass nullptr to restore.
void set_log_sink(std::function<void(LogLevel, std::string_view)> sink);

namespace internal {
extern std::atomic<int> g_log_level;
}

template <typename... Args>
void log(LogLevel level, fmt::format_string<Args...> format, Args&&... args) {
  if (static_cast<int>(level) < internal::g_log_level.load(std::memory_order_relaxed)) return;
  log_line(level, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_debug(fmt::format_string<Args...> format, Args&&... args) {
  log(LogLevel::kDebug, format, std::forward<Args>(args)...);
}
template <typename... Args>
void log_info(fmt::format_string<Args...> format, Args&&... args) {
  log(LogLevel::kInfo, format, std::forward<Args>(args)...);
}
template <typename... Args>
void log_warning(fmt::format_string<Args...> format, Args&&... args) {
  log(LogLevel::kWarning, format, std::forward<Args>(args)...);
}
template <typename... Args>
void log_error(fmt::format_string<Args...> format, Args&&... args) {
  log(LogLevel::kError, format, std::forward<Args>(args)...);
}

}  // namespace baton
