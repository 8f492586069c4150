#include "transfer/ucx/library.h"

#include <dlfcn.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/log.h"

namespace baton::transfer::ucx {
namespace {

constexpr std::pair<unsigned, unsigned> kFirstSound = {1, 18};

/// libucs takes SIGSEGV and others for its own backtraces as soon as it is loaded. They belong to the program.
class SignalKeeper {
 public:
  SignalKeeper() {
    for (int number = 1; number < kSignals; ++number) {
      known_[static_cast<size_t>(number)] = ::sigaction(number, nullptr, &actions_[static_cast<size_t>(number)]) == 0;
    }
  }
  ~SignalKeeper() {
    for (int number = 1; number < kSignals; ++number) {
      if (number == SIGKILL || number == SIGSTOP) continue;
      struct sigaction now{};
      const struct sigaction& before = actions_[static_cast<size_t>(number)];
      if (!known_[static_cast<size_t>(number)] || ::sigaction(number, nullptr, &now) != 0) continue;
      if (now.sa_handler != before.sa_handler) (void)::sigaction(number, &before, nullptr);
    }
  }
  SignalKeeper(const SignalKeeper&) = delete;
  SignalKeeper& operator=(const SignalKeeper&) = delete;

 private:
  static constexpr int kSignals = 32;
  std::array<struct sigaction, kSignals> actions_{};
  std::array<bool, kSignals> known_{};
};

Result<Library> load_once() {
  void* handle = nullptr;
  {
    SignalKeeper keeper;
    (void)::setenv("UCX_LOG_FILE", "stderr", /*overwrite=*/0);
    handle = ::dlopen("libucp.so.0", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  }
  if (handle == nullptr) {
    return unavailable("UCX is not installed: {} (the package is libucx0)", ::dlerror());
  }
  Library library;
#define BATON_UCX_FIND(name)                                                             \
  library.name = reinterpret_cast<decltype(library.name)>(::dlsym(handle, #name));       \
  if (library.name == nullptr) return unavailable("libucp.so.0 has no {}: too old", #name);
  BATON_UCX_FUNCTIONS(BATON_UCX_FIND)
#undef BATON_UCX_FIND
  unsigned major = 0, minor = 0, release = 0;
  library.ucp_get_version(&major, &minor, &release);
  library.ends_handshakes = std::pair(major, minor) >= kFirstSound;
  if (library.ends_handshakes) {
    library.tcp_prefix = "TCP_";
  } else {
    log_warning("transfer: UCX {}.{} aborts when a writer dies while it connects; {}.{} does not", major, minor,
                kFirstSound.first, kFirstSound.second);
  }
  return library;
}

}  // namespace

Result<const Library*> Library::load() {
  static const Result<Library> loaded = load_once();
  BATON_RETURN_IF_ERROR(loaded.status());
  return &*loaded;
}

}  // namespace baton::transfer::ucx
