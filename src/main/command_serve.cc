#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "base/cuda/driver.h"
#include "base/log.h"
#include "base/unique_handle.h"
#include "main/cli.h"
#include "main/options.h"
#include "tensor/thread_pool.h"

namespace baton::cli {

namespace {

struct ServeCommand {
  ModelFlags model;
  EngineFlags engine;
  TransferFlags transfer;
  RouterFlags router;
  int prefill_workers = 1;
  int decode_workers = 1;
  bool aggregated = false;
  std::string log_level = "warning";
};

/// A child process of `baton serve`; started again when it dies.
struct Child {
  std::string name;
  std::vector<std::string> arguments;
  int pass_fd = -1;       ///< kept open in the child
  pid_t pid = -1;
  int64_t started_ns = 0;
  int64_t restart_at_ns = 0;  ///< while it is down
  int64_t backoff_ms = 0;
  int early_deaths = 0;       ///< before everything was ready for the first time
};

/// A folder for the workers' sockets, gone with the process that made it. A process that is killed leaves its folder
/// behind; whoever starts next removes it: a live folder's `lock` is locked.
class SocketFolder {
 public:
  static Result<SocketFolder> create() {
    std::string tried;
    for (const std::string& base : places()) {
      remove_stale(base);
      std::string path = base + "/baton-XXXXXX";
      if (mkdtemp(path.data()) == nullptr) {
        tried += fmt::format("{}{}: {}", tried.empty() ? "" : "; ", base, std::strerror(errno));
        continue;
      }
      SocketFolder folder;
      folder.path_ = path;
      // Locked before it has its name: nobody ever finds an unlocked "lock" of a living process.
      std::string lock = path + "/lock", unnamed = path + "/lock.new";
      folder.lock_.reset(::open(unnamed.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
      if (!folder.lock_ || flock(folder.lock_.get(), LOCK_EX | LOCK_NB) != 0 || ::rename(unnamed.c_str(), lock.c_str()) != 0) {
        return unavailable("cannot lock {}: {}", lock, std::strerror(errno));
      }
      return folder;
    }
    return unavailable("cannot make a folder for sockets in XDG_RUNTIME_DIR, TMPDIR or /tmp ({})", tried);
  }
  SocketFolder() = default;
  SocketFolder(SocketFolder&& other) noexcept
      : path_(std::exchange(other.path_, {})), lock_(std::move(other.lock_)) {}
  SocketFolder& operator=(SocketFolder&&) = delete;
  ~SocketFolder() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
  }
  std::string socket(const std::string& name) const { return "unix:" + path_ + "/" + name + ".sock"; }

 private:
  static std::vector<std::string> places() {
    std::vector<std::string> result;
    for (const char* variable : {"XDG_RUNTIME_DIR", "TMPDIR"}) {
      const char* value = std::getenv(variable);
      // The path of a Unix socket has room for 107 bytes.
      if (value != nullptr && value[0] == '/' && std::strlen(value) < 64) result.emplace_back(value);
    }
    result.emplace_back("/tmp");
    return result;
  }

  /// Removes folders of ours whose process is dead. One without a lock file is left alone for a minute: its process may
  /// be about to make it.
  static void remove_stale(const std::string& base) {
    std::error_code error;
    for (std::filesystem::directory_iterator it(base, error), end; !error && it != end; it.increment(error)) {
      const std::filesystem::path& path = it->path();
      std::string name = path.filename().string();
      struct stat info {};
      if (!name.starts_with("baton-") || name.size() != 12 || lstat(path.c_str(), &info) != 0) continue;
      if (!S_ISDIR(info.st_mode) || info.st_uid != geteuid() || (info.st_mode & 0777) != 0700) continue;
      FileDescriptor lock(::open((path / "lock").c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW));
      bool dead = lock ? flock(lock.get(), LOCK_EX | LOCK_NB) == 0 : std::time(nullptr) - info.st_mtime > 60 && only_sockets(path);
      std::error_code ignored;
      if (dead) std::filesystem::remove_all(path, ignored);
    }
  }
  static bool only_sockets(const std::filesystem::path& folder) {
    std::error_code error;
    for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
      if (!it->is_socket(error)) return false;
    }
    return !error;
  }

  std::string path_;
  FileDescriptor lock_;  // locked as long as this process lives; children don't inherit it
};

/// The environment without BATON_*: what `serve` makes of those variables it passes on as options, and the rest is
/// not meant for every child alike.
std::vector<char*> child_environment() {
  std::vector<char*> result;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (!std::string_view(*entry).starts_with("BATON_")) result.push_back(*entry);
  }
  result.push_back(nullptr);
  return result;
}

constexpr int kMaxEarlyDeaths = 5;

class Supervisor {
 public:
  explicit Supervisor(std::vector<Child> children) : children_(std::move(children)) {}

  Status start_all() {
    for (Child& child : children_) BATON_RETURN_IF_ERROR(start(child));
    return {};
  }

  /// Notices ended children and starts them again, a little later each time they end soon after their start. A child
  /// that ends by itself before `ready` has something wrong: that is an error.
  Status reap(bool ready, bool stopping) {
    int wait_status = 0;
    for (pid_t pid; (pid = waitpid(-1, &wait_status, WNOHANG)) > 0;) {
      auto child = std::find_if(children_.begin(), children_.end(), [&](const Child& c) { return c.pid == pid; });
      if (child == children_.end()) continue;
      child->pid = -1;
      std::string how = WIFSIGNALED(wait_status) ? fmt::format("killed by signal {}", WTERMSIG(wait_status))
                                                 : fmt::format("exit code {}", WEXITSTATUS(wait_status));
      if (stopping) continue;
      if (!ready && WIFEXITED(wait_status)) {
        return unavailable("{} ended while starting ({}); its message is above", child->name, how);
      }
      if (!ready && ++child->early_deaths >= kMaxEarlyDeaths) {
        return unavailable("{} died {} times while starting (the last time {})", child->name, kMaxEarlyDeaths, how);
      }
      int64_t now = SteadyClock::instance().now_ns();
      bool short_life = now - child->started_ns < 10'000'000'000;
      child->backoff_ms = short_life ? std::min<int64_t>(std::max<int64_t>(child->backoff_ms * 2, 100), 10'000) : 100;
      child->restart_at_ns = now + child->backoff_ms * 1'000'000;
      log_error("{} is gone ({}); starting it again in {} ms", child->name, how, child->backoff_ms);
    }
    return {};
  }

  Status start_due() {
    int64_t now = SteadyClock::instance().now_ns();
    for (Child& child : children_) {
      if (child.pid > 0 || now < child.restart_at_ns) continue;
      BATON_RETURN_IF_ERROR(start(child));
    }
    return {};
  }

  /// Milliseconds to the next start; -1 when all run.
  int next_start_ms() const {
    int64_t now = SteadyClock::instance().now_ns();
    int64_t wait_ms = -1;
    for (const Child& child : children_) {
      if (child.pid > 0) continue;
      int64_t left = std::max<int64_t>(0, (child.restart_at_ns - now) / 1'000'000 + 1);
      wait_ms = wait_ms < 0 ? left : std::min(wait_ms, left);
    }
    return static_cast<int>(wait_ms);
  }

  /// The next start of `name` gets this value for `flag`.
  void set_argument(const std::string& name, const std::string& flag, const std::string& value) {
    for (Child& child : children_) {
      if (child.name != name) continue;
      auto it = std::find(child.arguments.begin(), child.arguments.end(), flag);
      if (it == child.arguments.end()) {
        child.arguments.insert(child.arguments.end(), {flag, value});
      } else if (++it != child.arguments.end()) {
        *it = value;
      }
    }
  }

  void signal_child(const std::string& name, int signal) {
    for (Child& child : children_) {
      if (child.name == name && child.pid > 0) ::kill(child.pid, signal);
    }
  }
  void signal_all(int signal) {
    for (Child& child : children_) {
      if (child.pid > 0) ::kill(child.pid, signal);
    }
  }
  bool running(const std::string& name) const {
    return std::any_of(children_.begin(), children_.end(), [&](const Child& c) { return c.name == name && c.pid > 0; });
  }
  bool any_running() const {
    return std::any_of(children_.begin(), children_.end(), [](const Child& c) { return c.pid > 0; });
  }

 private:
  Status start(Child& child) {
    std::vector<char*> argv;
    for (std::string& argument : child.arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    std::vector<char*> environment = child_environment();
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid < 0) return resource_exhausted("cannot start {}: {}", child.name, std::strerror(errno));
    if (pid == 0) {
      // A child never outlives its supervisor, however that ends.
      prctl(PR_SET_PDEATHSIG, SIGTERM);
      if (getppid() != parent) _exit(0);
      setpgid(0, 0);  // Ctrl-C goes to the supervisor, which stops the children in order
      sigset_t none;
      sigemptyset(&none);
      sigprocmask(SIG_SETMASK, &none, nullptr);
      if (child.pass_fd >= 0) fcntl(child.pass_fd, F_SETFD, 0);
      execve("/proc/self/exe", argv.data(), environment.data());
      _exit(127);
    }
    child.pid = pid;
    child.started_ns = SteadyClock::instance().now_ns();
    return {};
  }

  std::vector<Child> children_;
};

void append(std::vector<std::string>& to, const std::vector<std::string>& from) { to.insert(to.end(), from.begin(), from.end()); }

/// The device of each worker: those that were named, or all GPUs, or the CPU, in turn. Workers that share a GPU share its memory.
std::vector<EngineFlags> deal_devices(const EngineFlags& engine, int workers) {
  std::vector<std::string> devices;
  for (size_t begin = 0; begin <= engine.device.size();) {
    const size_t end = std::min(engine.device.find(',', begin), engine.device.size());
    devices.push_back(engine.device.substr(begin, end - begin));
    begin = end + 1;
  }
  if (devices.size() == 1 && (devices[0] == "auto" || devices[0] == "cuda")) {
    const auto driver = cuda::Driver::load("");
    const int gpus = driver.ok() ? (*driver)->devices : 0;
    if (gpus > 0) devices.clear();
    for (int i = 0; i < gpus; ++i) devices.push_back(fmt::format("cuda:{}", i));
    if (gpus == 0 && devices[0] == "auto") devices[0] = "cpu";
  }
  std::vector<EngineFlags> out(static_cast<size_t>(workers), engine);
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t device = i % devices.size();
    out[i].device = devices[device];
    const size_t sharing = (out.size() - device + devices.size() - 1) / devices.size();
    out[i].gpu_memory_utilization = engine.gpu_memory_utilization / static_cast<double>(sharing);
  }
  return out;
}

std::vector<Child> plan_children(const ServeCommand& command, const SocketFolder& sockets, int notify_fd) {
  std::vector<Child> children;
  std::vector<std::string> addresses;
  int workers = command.aggregated ? command.decode_workers : command.prefill_workers + command.decode_workers;
  EngineFlags engine = command.engine;
  if (engine.threads == 0) engine.threads = std::max(1, usable_cpus() / workers);
  const std::vector<EngineFlags> dealt = deal_devices(engine, workers);
  ModelFlags model = command.model;
  model.served_model_name = command.model.name();
  auto add_worker = [&](const std::string& role, int index) {
    Child child;
    child.name = fmt::format("{}-{}", role == "both" ? "worker" : role, index);
    addresses.push_back(sockets.socket(child.name));
    child.arguments = {"baton", "--log-level", command.log_level, "worker", "--role", role, "--name", child.name,
                       "--listen", addresses.back()};
    append(child.arguments, model.arguments());
    append(child.arguments, dealt[addresses.size() - 1].arguments());
    append(child.arguments, command.transfer.arguments());
    children.push_back(std::move(child));
  };
  if (!command.aggregated) {
    for (int i = 0; i < command.prefill_workers; ++i) add_worker("prefill", i);
  }
  for (int i = 0; i < command.decode_workers; ++i) add_worker(command.aggregated ? "both" : "decode", i);

  Child router;
  router.name = "router";
  router.arguments = {"baton", "--log-level", command.log_level, "router", "--notify-fd", std::to_string(notify_fd)};
  append(router.arguments, model.arguments());
  append(router.arguments, command.router.arguments());
  for (const std::string& address : addresses) append(router.arguments, {"--worker", address});
  router.pass_fd = notify_fd;
  children.push_back(std::move(router));
  return children;
}

/// What a person wants to know once it runs: the URL, the paths in use, and a line to try.
void print_ready(const ServeCommand& command, int port, const std::string& health_text, double seconds) {
  nlohmann::json health = nlohmann::json::parse(health_text, nullptr, false);
  std::string host = command.router.host;
  if (host == "0.0.0.0") host = "127.0.0.1";
  if (host == "::" || host == "[::]") host = "[::1]";
  if (host.find(':') != std::string::npos && !host.starts_with('[')) host = "[" + host + "]";
  std::string url = fmt::format("http://{}:{}", host, port);
  std::string model = command.model.name();
  fmt::print("\nBaton is ready after {:.1f} s: {}/v1   model {}\n", seconds, url, model);
  std::string transports;
  if (health.is_object()) {
    for (const auto& worker : health["workers"]) {
      fmt::print("  {:<12} {:<8} {} KV blocks\n", worker.value("name", ""), worker.value("role", ""),
                 worker["kv_blocks"].value("total", int64_t{0}));
      for (const auto& pair : worker["pairs"]) {
        if (!pair.value("ready", false)) continue;
        transports += fmt::format("  {} -> {}: {} ({}, {})\n", pair.value("prefill", ""), worker.value("name", ""),
                                  pair.value("transport", ""), pair.value("provider", ""), pair.value("reason", ""));
      }
    }
  }
  if (!transports.empty()) fmt::print("KV cache transport:\n{}", transports);
  if (command.aggregated) fmt::print("aggregated: each worker prefills and decodes\n");
  fmt::print("Try:\n  curl {}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{{\"model\": \"{}\", "
             "\"messages\": [{{\"role\": \"user\", \"content\": \"What is the capital of France?\"}}]}}'\n"
             "Health: {}/health   metrics: {}/metrics   stop: Ctrl-C\n\n", url, model, url, url);
  std::fflush(stdout);
}

Status run(const ServeCommand& command) {
  BATON_ASSIGN_OR_RETURN(std::filesystem::path folder, command.model.path());
  if (command.decode_workers < 1 || (!command.aggregated && command.prefill_workers < 1)) {
    return invalid_argument("--prefill and --decode must be at least 1 (or use --aggregated)");
  }
  int64_t begin_ns = SteadyClock::instance().now_ns();
  set_log_process_name("serve");

  sigset_t signals;
  sigemptyset(&signals);
  for (int signal : {SIGINT, SIGTERM, SIGHUP, SIGCHLD}) sigaddset(&signals, signal);
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  FileDescriptor signal_fd(signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  int pipe_fds[2];
  if (!signal_fd || pipe2(pipe_fds, O_CLOEXEC) != 0) return resource_exhausted("cannot open descriptors: {}", std::strerror(errno));
  FileDescriptor notify_read(pipe_fds[0]), notify_write(pipe_fds[1]);

  BATON_ASSIGN_OR_RETURN(SocketFolder sockets, SocketFolder::create());
  std::vector<Child> children = plan_children(command, sockets, notify_write.get());
  fmt::print("starting {} processes for {} ({})\n", children.size(), command.model.name(), folder.string());
  std::fflush(stdout);
  Supervisor supervisor(std::move(children));
  BATON_RETURN_IF_ERROR(supervisor.start_all());

  Status result;
  bool ready = false, stopping = false;
  int port = 0;
  int64_t kill_at_ns = 0;
  std::string notes;
  while (supervisor.any_running() || !stopping) {
    int timeout_ms = 1000;
    if (!stopping && supervisor.next_start_ms() >= 0) timeout_ms = std::min(timeout_ms, supervisor.next_start_ms());
    pollfd fds[2] = {{signal_fd.get(), POLLIN, 0}, {notify_read.get(), POLLIN, 0}};
    ::poll(fds, 2, timeout_ms);
    auto stop = [&] {
      // The router first: it finishes what clients wait for, and needs the workers for that.
      if (stopping) return;
      stopping = true;
      kill_at_ns = SteadyClock::instance().now_ns() + (command.router.drain_timeout_ms + 5'000) * 1'000'000;
      supervisor.signal_child("router", SIGTERM);
    };
    signalfd_siginfo info;
    while (::read(signal_fd.get(), &info, sizeof(info)) == sizeof(info)) {
      if (info.ssi_signo == SIGCHLD) continue;
      if (stopping) supervisor.signal_all(SIGKILL);  // asked twice
      fmt::print("stopping\n");
      std::fflush(stdout);
      stop();
    }
    if (Status status = supervisor.reap(ready, stopping); !status.ok() && !stopping) {
      result = status;
      stop();
    }
    if (stopping) {
      if (!supervisor.running("router")) supervisor.signal_all(SIGTERM);
      if (SteadyClock::instance().now_ns() > kill_at_ns) supervisor.signal_all(SIGKILL);
      continue;
    }
    BATON_RETURN_IF_ERROR(supervisor.start_due());
    if ((fds[1].revents & POLLIN) != 0) {
      char buffer[4096];
      ssize_t got = ::read(notify_read.get(), buffer, sizeof(buffer));
      if (got > 0) notes.append(buffer, static_cast<size_t>(got));
      for (size_t end; (end = notes.find('\n')) != std::string::npos; notes.erase(0, end + 1)) {
        std::string note = notes.substr(0, end);
        if (note.starts_with("listening ")) {
          port = std::atoi(note.c_str() + 10);
          // With --port 0 a router that is started again keeps the port that clients know.
          supervisor.set_argument("router", "--port", std::to_string(port));
        }
        if (note.starts_with("ready ") && !ready) {
          ready = true;
          print_ready(command, port, note.substr(6), static_cast<double>(SteadyClock::instance().now_ns() - begin_ns) * 1e-9);
        }
      }
    }
  }
  return result;
}

}  // namespace

void add_serve(CommandLine& line) {
  auto command = std::make_shared<ServeCommand>();
  CLI::App* app = line.app.add_subcommand("serve", "Everything on this machine: a router, prefill and decode workers, each its own process.");
  command->model.add_to(*app);
  command->router.add_to(*app);
  command->engine.add_to(*app);
  command->transfer.add_to(*app);
  app->add_option("--prefill", command->prefill_workers, "prefill workers")->capture_default_str()->group("Workers");
  app->add_option("--decode", command->decode_workers, "decode workers")->capture_default_str()->group("Workers");
  app->add_flag("--aggregated", command->aggregated, "no disaggregation: --decode workers that do both phases")->group("Workers");
  app->add_option("--worker-log-level", command->log_level, "of router and workers")->capture_default_str()->group("Workers");
  app->callback([&line, command] {
    line.action = [command] {
      Status status = run(*command);
      return status.ok() ? 0 : fail("serve", status);
    };
  });
}

}  // namespace baton::cli
