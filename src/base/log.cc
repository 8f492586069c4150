#include "base/log.h"

#include <poll.h>
#include <unistd.h>

#include <chrono>
#include <ctime>
#include <cstdint>
#include <mutex>

namespace baton {

namespace internal {
std::atomic<int> g_log_level{static_cast<int>(LogLevel::kInfo)};
}

namespace {

constexpr size_t kMaxLineBytes = 4096;  // PIPE_BUF on Linux

struct LogState {
  std::mutex mutex;
  std::string process_name;
  std::function<void(LogLevel, std::string_view)> sink;
  uint64_t dropped_lines = 0;
};

// Never destroyed: threads may still log while static objects go away.
LogState& state() {
  static LogState* instance = new LogState;
  return *instance;
}

std::string timestamp() {
  auto now = std::chrono::system_clock::now();
  auto since_epoch_ms =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count();
  std::time_t seconds = since_epoch_ms / 1000;
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z", utc.tm_year + 1900,
                     utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec,
                     since_epoch_ms % 1000);
}

}  // namespace

void log_line(LogLevel level, std::string_view message) {
  static constexpr char kLetters[] = {'D', 'I', 'W', 'E'};
  LogState& log_state = state();
  std::lock_guard lock(log_state.mutex);
  if (log_state.sink) {
    log_state.sink(level, message);
    return;
  }
  std::string line = fmt::format("{} {} {}{}{}\n", timestamp(), kLetters[static_cast<int>(level)],
                                 log_state.process_name, log_state.process_name.empty() ? "" : " ",
                                 message);
  // Nobody may read what we write (a full pipe, a stopped terminal): a line is dropped rather than the process stopped.
  pollfd writable{STDERR_FILENO, POLLOUT, 0};
  if (::poll(&writable, 1, 0) != 1 || (writable.revents & POLLOUT) == 0) {
    ++log_state.dropped_lines;
    return;
  }
  // A pipe that is writable takes PIPE_BUF bytes without blocking; one write per line also keeps the lines of several
  // processes on one terminal whole.
  if (log_state.dropped_lines > 0) {
    line.insert(0, fmt::format("({} lines of log were dropped: nobody read them)\n", log_state.dropped_lines));
    log_state.dropped_lines = 0;
  }
  if (line.size() > kMaxLineBytes) line.replace(kMaxLineBytes - 5, std::string::npos, " ...\n");
  [[maybe_unused]] ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
}

void set_log_level(LogLevel level) { internal::g_log_level = static_cast<int>(level); }

LogLevel log_level() { return static_cast<LogLevel>(internal::g_log_level.load()); }

bool parse_log_level(std::string_view name, LogLevel* level) {
  static constexpr std::string_view kNames[] = {"debug", "info", "warning", "error"};
  for (int i = 0; i < 4; ++i) {
    if (name == kNames[i]) {
      *level = static_cast<LogLevel>(i);
      return true;
    }
  }
  return false;
}

void set_log_process_name(std::string name) {
  std::lock_guard lock(state().mutex);
  state().process_name = std::move(name);
}

void set_log_sink(std::function<void(LogLevel, std::string_view)> sink) {
  std::lock_guard lock(state().mutex);
  state().sink = std::move(sink);
}

}  // namespace baton
