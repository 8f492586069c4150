#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include "base/check.h"

/// For tests that need a second process to kill, stop and ask: the program starts itself as `--child ...` and talks to that in
/// lines, one in, one out, over pipes.
namespace baton::testing {

inline std::string to_hex(const std::string& bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (unsigned char c : bytes) {
    hex.push_back(kDigits[c >> 4]);
    hex.push_back(kDigits[c & 15]);
  }
  return hex;
}
inline std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

/// First of all in the child: it does not outlive its parent.
inline void die_with_parent() { ::prctl(PR_SET_PDEATHSIG, SIGKILL); }

class ChildProcess {
 public:
  explicit ChildProcess(const std::vector<std::string>& arguments) {
    int to_child[2], from_child[2];
    BATON_CHECK(::pipe2(to_child, O_CLOEXEC) == 0 && ::pipe2(from_child, O_CLOEXEC) == 0);
    // Made before fork(): the child of a process with threads may not allocate.
    std::string program = "child", flag = "--child";
    std::vector<std::string> copies = arguments;
    std::vector<char*> argv = {program.data(), flag.data()};
    for (std::string& copy : copies) argv.push_back(copy.data());
    argv.push_back(nullptr);
    pid_ = ::fork();
    BATON_CHECK(pid_ >= 0);
    if (pid_ == 0) {
      ::dup2(to_child[0], 0);
      ::dup2(from_child[1], 1);
      ::execv("/proc/self/exe", argv.data());
      ::_exit(127);
    }
    ::close(to_child[0]);
    ::close(from_child[1]);
    in_ = ::fdopen(to_child[1], "w");
    out_ = ::fdopen(from_child[0], "r");
  }
  ~ChildProcess() {
    kill();
    std::fclose(in_);
    std::fclose(out_);
  }
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  void tell(const std::string& line) {
    std::fprintf(in_, "%s\n", line.c_str());
    std::fflush(in_);
  }
  /// Empty when it is dead.
  std::string read_line() {
    std::string line;
    for (int c; (c = std::fgetc(out_)) != EOF && c != '\n';) line.push_back(static_cast<char>(c));
    return line;
  }
  std::string ask(const std::string& line) {
    tell(line);
    return read_line();
  }
  /// Stopped means: all of its threads.
  void stop() {
    ::kill(pid_, SIGSTOP);
    int status = 0;
    BATON_CHECK(::waitpid(pid_, &status, WUNTRACED) == pid_ && WIFSTOPPED(status)) << "status " << status;
  }
  void resume() { ::kill(pid_, SIGCONT); }
  /// After this nothing of it runs any more.
  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }
  /// Asks it to end; its wait status.
  int exit() {
    tell("exit");
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    return status;
  }

 private:
  pid_t pid_ = -1;
  FILE* in_ = nullptr;
  FILE* out_ = nullptr;
};

/// Without the trees that the topology's tests, which may run at the same time, keep there.
inline std::set<std::string> shared_memory_files() {
  std::set<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm", error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("baton-sysfs-")) names.insert(name);
  }
  return names;
}

inline size_t open_files() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

}  // namespace baton::testing
