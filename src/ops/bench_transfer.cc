#include "ops/bench_transfer.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <type_traits>

#include "base/clock.h"
#include "base/log.h"
#include "base/mapped_memory.h"
#include "base/random.h"
#include "ops/bench_serve.h"
#include "ops/bench_transfer_common.h"
#include "ops/bench_transfer_latency.h"
#include "ops/bench_transfer_wire.h"
#include "ops/raw_fabric.h"
#include "ops/raw_gpu.h"
#include "ops/raw_memory.h"
#include "ops/raw_socket.h"

extern char** environ;

namespace baton::ops {

namespace {

using transfer::BlockPair;
using transfer::BlockRead;
using transfer::BlockWrite;
using transfer::Peer;
using transfer::PoolId;
using transfer::Transfer;

constexpr uint64_t kDefaultTransferBytes = 32u << 20, kDefaultGpuTransferBytes = 256u << 20;
constexpr int64_t kGpuSpinNs = 1'000'000'000;
constexpr size_t kWindow = 256;  // AgentConfig's max_inflight_per_rail

int64_t now_ns() { return SteadyClock::instance().now_ns(); }
double ms_since(int64_t begin_ns) { return static_cast<double>(now_ns() - begin_ns) * 1e-6; }

/// The target as a process of its own: this program again, with one end of a socket pair. Killed with this process.
class TargetProcess {
 public:
  static Result<TargetProcess> start(FileDescriptor* channel, const BenchTransferOptions& options) {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return unavailable("socketpair: {}", std::strerror(errno));
    FileDescriptor ours(ends[0]), theirs(ends[1]);
    // What this command got from the environment is not meant for the target: it is told all it needs.
    std::vector<char*> environment;
    for (char** entry = environ; *entry != nullptr; ++entry) {
      if (!std::string_view(*entry).starts_with("BATON_")) environment.push_back(*entry);
    }
    environment.push_back(nullptr);
    std::vector<std::string> words = {"baton", "--log-level", "error", "bench", "transfer", "--role", "target", "--fd",
                                      std::to_string(theirs.get()), "--pool-bytes", std::to_string(options.pool_bytes)};
    if (!options.cuda_library.empty()) words.insert(words.end(), {"--cuda-library", options.cuda_library});
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    pid_t parent = ::getpid();
    pid_t pid = ::fork();
    if (pid < 0) return unavailable("fork: {}", std::strerror(errno));
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(127);
      ::fcntl(theirs.get(), F_SETFD, 0);
      ::execve("/proc/self/exe", arguments.data(), environment.data());
      ::_exit(127);
    }
    *channel = std::move(ours);
    return TargetProcess(pid);
  }
  TargetProcess(TargetProcess&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}
  TargetProcess& operator=(TargetProcess&&) = delete;
  ~TargetProcess() {
    if (pid_ < 0) return;
    // After a goodbye it is about to end by itself; after a failure it may hang.
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  pid_t pid() const { return pid_; }

 private:
  explicit TargetProcess(pid_t pid) : pid_(pid) {}
  pid_t pid_;
};

/// Blocks to move: `count` different ones of `total` on each side.
class BlockPicker {
 public:
  BlockPicker(uint64_t total, uint64_t seed) : local_(total), remote_(total), random_(seed) {
    std::iota(local_.begin(), local_.end(), 0u);
    std::iota(remote_.begin(), remote_.end(), 0u);
  }
  std::vector<BlockPair> scattered(uint64_t count) {
    std::vector<BlockPair> pairs;
    pairs.reserve(count);
    for (uint64_t i = 0; i < count; ++i) {
      std::swap(local_[i], local_[i + random_.below(local_.size() - i)]);
      std::swap(remote_[i], remote_[i + random_.below(remote_.size() - i)]);
      pairs.push_back({local_[i], remote_[i]});
    }
    return pairs;
  }
  std::vector<BlockPair> contiguous(uint64_t count) {
    auto local = static_cast<uint32_t>(random_.below(local_.size() - count + 1));
    auto remote = static_cast<uint32_t>(random_.below(remote_.size() - count + 1));
    std::vector<BlockPair> pairs;
    for (uint32_t i = 0; i < count; ++i) pairs.push_back({local + i, remote + i});
    return pairs;
  }

 private:
  std::vector<uint32_t> local_, remote_;
  Random random_;
};

/// Seconds of each run, and what all of them took of both processors.
struct Series {
  std::vector<double> seconds;
  uint64_t here_cpu_ns = 0, there_cpu_ns = 0;
};

struct Baseline {
  std::string name;
  std::function<Result<double>(std::span<const BlockPair>, uint64_t block_bytes)> run;
  Series series = {};
};

class Initiator {
 public:
  explicit Initiator(const BenchTransferOptions& options) : options_(options) { result_.options = options; }

  Result<BenchTransferResult> run() {
    BATON_RETURN_IF_ERROR(connect());
    if (on_gpu()) {
      Result<GpuPool> pool = GpuPool::open(options_.cuda_library, options_.device, options_.pool_bytes);
      if (!pool.ok()) return pool.status().with_context("--memory cuda");
      gpu_.emplace(std::move(*pool));
      result_.device = gpu_->gpu()->name();
    }
    BATON_ASSIGN_OR_RETURN(pool_, MappedMemory::create_private(options_.pool_bytes));
    fill_words(pool_.span(), options_.seed);
    if (gpu_) BATON_RETURN_IF_ERROR(gpu_->upload(pool_.span()));
    for (const std::string& transport : options_.transports) {
      BATON_RETURN_IF_ERROR(measure_transport(transport).with_context(fmt::format("transport {}", transport)));
    }
    BATON_RETURN_IF_ERROR(call({.command = BenchCommand::kBye}).status());
    return std::move(result_);
  }

 private:
  Status connect() {
    FileDescriptor socket;
    if (options_.connect.empty()) {
      BATON_ASSIGN_OR_RETURN(TargetProcess process, TargetProcess::start(&socket, options_));
      process_.emplace(std::move(process));
    } else {
      BATON_ASSIGN_OR_RETURN(HostPort address, parse_host_port(options_.connect, false));
      BATON_ASSIGN_OR_RETURN(socket, connect_tcp(address, options_.timeout_ms));
    }
    channel_.emplace(std::move(socket));
    BATON_ASSIGN_OR_RETURN(BenchReply hello, call({.command = BenchCommand::kHello}));
    same_host_ = hello.host_id == host_id() && !hello.host_id.empty();
    ip_ = channel_->local_ip();
    target_ip_ = channel_->remote_ip();
    if (ip_.empty()) ip_ = target_ip_ = "127.0.0.1";
    result_.target = process_ ? fmt::format("process {} on this host", process_->pid())
                              : fmt::format("{} ({} host)", options_.connect, same_host_ ? "this" : "another");
    return {};
  }

  Result<BenchReply> receive() {
    BATON_ASSIGN_OR_RETURN(std::string frame, channel_->receive(options_.timeout_ms));
    BATON_ASSIGN_OR_RETURN(BenchReply reply, parse_bench_reply(frame));
    if (!reply.status().ok()) return reply.status().with_context("the target");
    return reply;
  }
  Result<BenchReply> call(const BenchRequest& request) {
    BATON_RETURN_IF_ERROR(channel_->send(encode(request)));
    return receive();
  }

  Status measure_transport(const std::string& asked) {
    BenchPath path;
    path.asked = asked;
    BenchRequest open{.command = BenchCommand::kOpen};
    open.transport = asked;
    open.shared_memory = options_.memory == "shared";
    open.gpu_memory = on_gpu();
    open.device = static_cast<uint32_t>(options_.peer_device >= 0 ? options_.peer_device : -options_.device - 1);
    open.pool_bytes = options_.pool_bytes;
    open.block_sizes = options_.block_bytes;
    BATON_ASSIGN_OR_RETURN(BenchReply opened, call(open));
    result_.target_device = opened.device;

    BenchRequest fill{.command = BenchCommand::kFill};
    fill.count = options_.seed + (uint64_t{1} << 32);
    if (reads()) BATON_RETURN_IF_ERROR(call(fill).status());
    uint64_t resident_before = resident_bytes();
    int64_t begin_ns = now_ns();
    transfer::AgentConfig config;
    config.name = "initiator";
    config.transport = asked;
    config.bind_address = ip_;
    config.default_timeout_ms = options_.timeout_ms;
    config.integrity = options_.integrity;
    config.cuda_library = options_.cuda_library;
    BATON_ASSIGN_OR_RETURN(agent_, gpu_ ? BenchAgent::open(config, gpu_->span(), transfer::MemoryKind::kCuda, options_.block_bytes)
                                        : BenchAgent::open(config, pool_.span(), transfer::MemoryKind::kHost, options_.block_bytes));
    path.agent_ms = ms_since(begin_ns);
    begin_ns = now_ns();
    BATON_ASSIGN_OR_RETURN(peer_, agent_.agent->connect(opened.text));
    uint64_t smallest = *std::min_element(options_.block_bytes.begin(), options_.block_bytes.end());
    BATON_RETURN_IF_ERROR(move({{0, 0}}, smallest, smallest).status());
    path.connect_ms = ms_since(begin_ns);
    uint64_t resident_after = resident_bytes();
    path.initiator_bytes = resident_after - std::min(resident_after, resident_before);
    BATON_ASSIGN_OR_RETURN(BenchReply usage, call({.command = BenchCommand::kUsage}));
    path.target_bytes = usage.resident_bytes - std::min(usage.resident_bytes, opened.resident_bytes);
    transfer::PathInfo info = peer_.path();
    path.transport = info.transport;
    path.provider = info.provider;
    path.reason = info.reason;

    // Everything after this is about a pair that has been at work for a while.
    uint64_t largest = *std::max_element(options_.block_bytes.begin(), options_.block_bytes.end());
    BATON_RETURN_IF_ERROR(first_pass(path, largest));

    std::vector<Baseline> baselines;
    if (options_.baseline) open_baselines(path, baselines);
    LatencyBench latency{options_, agent_, peer_, *channel_, raw_copy_ ? &*raw_copy_ : nullptr, raw_fabric_.get(), raw_socket_ ? &*raw_socket_ : nullptr};
    if (options_.pings > 0 && reads()) {
      const auto read_one = [this](uint64_t block_bytes, uint64_t bytes) { return move({{0, 0}}, block_bytes, bytes); };
      BATON_RETURN_IF_ERROR(measure_read_latency(latency, read_one, path));
    } else if (options_.pings > 0 && !options_.integrity) {
      BATON_RETURN_IF_ERROR(measure_notifications(latency, path));
    }
    for (uint64_t block_bytes : options_.block_bytes) {
      for (uint64_t blocks : block_counts(options_, block_bytes)) {
        for (const char* order : {"scattered", "contiguous"}) {
          if (options_.order != order && options_.order != "both") continue;
          BATON_RETURN_IF_ERROR(measure_row(path, block_bytes, blocks, order, baselines));
        }
      }
    }
    BATON_ASSIGN_OR_RETURN(usage, call({.command = BenchCommand::kUsage}));
    path.initiator_resident_bytes = resident_bytes();
    path.target_resident_bytes = usage.resident_bytes;
    result_.paths.push_back(std::move(path));
    raw_fabric_.reset();
    raw_socket_.reset();
    raw_copy_.reset();
    raw_gpu_.reset();
    Status closed = peer_.close();
    peer_ = Peer();
    agent_ = {};
    if (!closed.ok()) log_warning("bench transfer: closing the path: {}", closed.to_string());
    return call({.command = BenchCommand::kClose}).status();
  }

  /// One transfer of ours, waited for. Nanoseconds.
  Result<int64_t> move(std::vector<BlockPair> blocks, uint64_t block_bytes, uint64_t bytes) {
    BATON_ASSIGN_OR_RETURN(PoolId pool, agent_.pool_of(block_bytes));
    int64_t begin_ns = 0;
    const auto start = [&](auto operation) {
      operation.local_pool = pool;
      operation.remote_pool = pool;
      operation.blocks = std::move(blocks);
      operation.length_bytes = bytes;
      begin_ns = now_ns();
      if constexpr (std::is_same_v<decltype(operation), BlockRead>) {
        return peer_.read(std::move(operation));
      } else {
        return peer_.write(std::move(operation));
      }
    };
    BATON_ASSIGN_OR_RETURN(Transfer transfer, reads() ? start(BlockRead()) : start(BlockWrite()));
    // As cuStreamSynchronize() does beside it: waking a thread can take longer than a copy between GPUs.
    while (gpu_ && !transfer.done() && now_ns() - begin_ns < kGpuSpinNs) {
    }
    BATON_RETURN_IF_ERROR(transfer.wait());
    return now_ns() - begin_ns;
  }
  bool reads() const { return options_.operation == "read"; }

  /// In transfers of up to 256 MiB, since each has a deadline.
  Status first_pass(BenchPath& path, uint64_t block_bytes) {
    uint64_t count = pool_.bytes() / block_bytes, at_once = std::max<uint64_t>((256u << 20) / block_bytes, 1);
    int64_t all_ns = 0;
    for (uint64_t block = 0; block < count;) {
      std::vector<BlockPair> pairs;
      for (uint64_t i = 0; i < at_once && block < count; ++i, ++block) pairs.push_back({static_cast<uint32_t>(block), static_cast<uint32_t>(block)});
      BATON_ASSIGN_OR_RETURN(int64_t ns, move(std::move(pairs), block_bytes, block_bytes));
      all_ns += ns;
    }
    path.first_pass_bytes_per_s = static_cast<double>(count * block_bytes) * 1e9 / static_cast<double>(all_ns);
    return {};
  }

  /// A baseline that cannot be had here is left out, with the reason in the log; ours is measured all the same.
  void open_baselines(const BenchPath& path, std::vector<Baseline>& baselines) {
    auto add = [&](const char* name, const Status& status, auto run) {
      if (status.ok()) {
        baselines.push_back({name, std::move(run)});
      } else {
        log_warning("bench transfer: without the baseline '{}': {}", name, status.to_string());
      }
    };
    if (gpu_) {
      const bool into_host = path.transport != "cuda_ipc";
      const Status opened = open_raw_gpu(into_host);
      add(into_host ? "bulk to host" : "bulk", opened, [this](std::span<const BlockPair> pairs, uint64_t block_bytes) {
        return raw_gpu_->bulk(pairs.size() * block_bytes);
      });
      add(into_host ? "each to host" : "each", opened, [this](std::span<const BlockPair> pairs, uint64_t block_bytes) {
        return raw_gpu_->each(pairs, block_bytes);
      });
      return;
    }
    if (path.transport == "shm") {
      add("memcpy", open_raw_memory(), [this](std::span<const BlockPair> pairs, uint64_t block_bytes) -> Result<double> {
        return reads() ? raw_copy_->copy_back(pool_.data(), pairs, block_bytes) : raw_copy_->copy(pool_.data(), pairs, block_bytes);
      });
      add(reads() ? "process_vm_readv" : "process_vm_writev", raw_write_ ? Status() : unavailable("the pool's address is not known"),
          [this](std::span<const BlockPair> pairs, uint64_t block_bytes) {
            return reads() ? raw_write_->copy_back(pool_.data(), pairs, block_bytes) : raw_write_->copy(pool_.data(), pairs, block_bytes);
          });
      return;
    }
    if (path.transport == "sim") return;
    add("libfabric", open_raw_fabric(path.provider), [this](std::span<const BlockPair> pairs, uint64_t block_bytes) -> Result<double> {
      BATON_RETURN_IF_ERROR(channel_->send(encode(BenchRequest{.command = BenchCommand::kRawFabricRun})));
      Result<double> seconds = reads() ? raw_fabric_->read(pairs, block_bytes, kWindow, options_.timeout_ms)
                                       : raw_fabric_->write(pairs, block_bytes, kWindow, options_.timeout_ms);
      BATON_RETURN_IF_ERROR(stop_raw_fabric());
      return seconds;
    });
    if (path.transport == "tcp" && !reads()) {
      add("socket", open_raw_socket(), [this](std::span<const BlockPair> pairs, uint64_t block_bytes) -> Result<double> {
        BenchRequest request{.command = BenchCommand::kRawSocketRun};
        request.bytes = pairs.size() * block_bytes;
        BATON_RETURN_IF_ERROR(channel_->send(encode(request)));
        BATON_ASSIGN_OR_RETURN(double seconds, raw_socket_->stream(pool_.data(), pairs, block_bytes));
        BATON_RETURN_IF_ERROR(receive().status());
        return seconds;
      });
    }
  }

  bool on_gpu() const { return options_.memory == "cuda"; }

  /// Staged transfers are bound by the way out of a GPU into page-locked host memory.
  Status open_raw_gpu(bool into_host) {
    if (into_host) {
      uint64_t largest = 0;
      for (uint64_t bytes : options_.block_bytes) {
        for (uint64_t blocks : block_counts(options_, bytes)) largest = std::max(largest, bytes * blocks);
      }
      BATON_ASSIGN_OR_RETURN(raw_gpu_, RawGpuCopy::into_host(*gpu_, largest));
      return {};
    }
    BATON_ASSIGN_OR_RETURN(BenchReply where, call({.command = BenchCommand::kRawMemory}));
    BATON_ASSIGN_OR_RETURN(raw_gpu_, RawGpuCopy::into_peer(*gpu_, where.text, where.bytes));
    return {};
  }

  Status open_raw_memory() {
    if (!same_host_) return failed_precondition("the target is on another host");
    BATON_ASSIGN_OR_RETURN(BenchReply where, call({.command = BenchCommand::kRawMemory}));
    if (where.bytes != pool_.bytes()) return failed_precondition("the target's pool has {} bytes, this one {}", where.bytes, pool_.bytes());
    raw_write_.emplace(where.pid, where.address);
    BATON_ASSIGN_OR_RETURN(RawSharedCopy copy, RawSharedCopy::open(where.pid, where.fd, where.bytes));
    raw_copy_.emplace(std::move(copy));
    return {};
  }

  Status open_raw_fabric(const std::string& provider) {
    BenchRequest open{.command = BenchCommand::kRawFabricOpen};
    open.transport = provider;
    BATON_ASSIGN_OR_RETURN(BenchReply where, call(open));
    BATON_ASSIGN_OR_RETURN(raw_fabric_, RawFabric::open(provider, ip_, pool_.span()));
    BATON_RETURN_IF_ERROR(channel_->send(encode(BenchRequest{.command = BenchCommand::kRawFabricRun})));
    Status connected = raw_fabric_->connect(where.text, where.address, where.key, options_.timeout_ms);
    BATON_RETURN_IF_ERROR(stop_raw_fabric());
    return connected;
  }
  /// The run ends when the target sees the next request: two answers come.
  Status stop_raw_fabric() {
    BATON_RETURN_IF_ERROR(channel_->send(encode(BenchRequest{.command = BenchCommand::kStop})));
    Status run = receive().status();
    Status stop = receive().status();
    return run.ok() ? stop : run;
  }

  Status open_raw_socket() {
    BATON_ASSIGN_OR_RETURN(BenchReply where, call({.command = BenchCommand::kRawSocketOpen}));
    BATON_ASSIGN_OR_RETURN(RawSocketInitiator socket, RawSocketInitiator::connect(target_ip_, where.port, options_.timeout_ms));
    raw_socket_.emplace(std::move(socket));
    return {};
  }

  Status measure_row(const BenchPath& path, uint64_t block_bytes, uint64_t blocks, const std::string& order, std::vector<Baseline>& baselines) {
    BlockPicker picker(options_.pool_bytes / block_bytes, options_.seed);
    Series ours;
    for (Baseline& baseline : baselines) baseline.series = {};
    BATON_ASSIGN_OR_RETURN(uint64_t retries_before, retries());
    for (int32_t run = 0; run <= options_.runs; ++run) {
      bool counts = run > 0;  // the first warms up
      // Everybody takes turns at being the first, with blocks of their own: what one leaves in a cache helps nobody.
      size_t contestants = baselines.size() + 1;
      for (size_t turn = 0; turn < contestants; ++turn) {
        size_t who = (turn + static_cast<size_t>(run)) % contestants;
        std::vector<BlockPair> pairs = order == "scattered" ? picker.scattered(blocks) : picker.contiguous(blocks);
        if (who > 0) {
          Baseline& baseline = baselines[who - 1];
          BATON_RETURN_IF_ERROR(measure(baseline.series, counts, [&] { return baseline.run(pairs, block_bytes); }).with_context(baseline.name));
          continue;
        }
        if (options_.verify) BATON_RETURN_IF_ERROR(prepare(pairs, block_bytes));
        BATON_RETURN_IF_ERROR(measure(ours, counts, [&]() -> Result<double> {
          if (gpu_) {
            // The agents' threads have gone to sleep over the talk with the target. Waking them would take as long as the copy.
            BATON_RETURN_IF_ERROR(move({pairs.front()}, block_bytes, sizeof(uint64_t)).status());
          }
          BATON_ASSIGN_OR_RETURN(int64_t ns, move(pairs, block_bytes, block_bytes));
          return static_cast<double>(ns) * 1e-9;
        }));
        if (options_.verify) BATON_RETURN_IF_ERROR(check(pairs, block_bytes));
      }
    }
    BATON_ASSIGN_OR_RETURN(uint64_t retries_after, retries());

    auto bytes = static_cast<double>(block_bytes * blocks);
    double gigabytes = bytes * 1e-9 * options_.runs;
    auto rates = [&](const Series& series) {
      std::vector<double> values;
      for (double seconds : series.seconds) values.push_back(bytes / seconds);
      return values;
    };
    BenchTransferRow row;
    row.transport = path.transport;
    row.order = order;
    row.block_bytes = block_bytes;
    row.blocks = blocks;
    row.bytes_per_s = spread_of(rates(ours));
    row.ms = describe(ours.seconds).p50 * 1e3;
    row.initiator_cpu_s_per_gb = static_cast<double>(ours.here_cpu_ns) * 1e-9 / gigabytes;
    row.target_cpu_s_per_gb = static_cast<double>(ours.there_cpu_ns) * 1e-9 / gigabytes;
    row.retries = retries_after - retries_before;
    for (const Baseline& baseline : baselines) {
      std::vector<double> ratios;
      for (size_t i = 0; i < ours.seconds.size(); ++i) ratios.push_back(baseline.series.seconds[i] / ours.seconds[i]);
      row.baselines.push_back({baseline.name, spread_of(rates(baseline.series)), describe(ratios).p50,
                               static_cast<double>(baseline.series.here_cpu_ns + baseline.series.there_cpu_ns) * 1e-9 / gigabytes});
    }
    if (options_.progress) {
      fmt::print(stderr, "{} {} x {} {}: {:.2f} GB/s\n", row.transport, row.blocks, format_bytes(row.block_bytes), row.order,
                 row.bytes_per_s.median * 1e-9);
    }
    result_.rows.push_back(std::move(row));
    return {};
  }

  template <typename Run>
  Status measure(Series& series, bool counts, Run run) {
    BATON_ASSIGN_OR_RETURN(BenchReply before, call({.command = BenchCommand::kUsage}));
    if (gpu_) BATON_RETURN_IF_ERROR(gpu_->take_turn());
    uint64_t cpu_ns = process_cpu_ns();
    Result<double> seconds = run();
    cpu_ns = process_cpu_ns() - cpu_ns;
    if (!seconds.ok()) return seconds.status();
    BATON_ASSIGN_OR_RETURN(BenchReply after, call({.command = BenchCommand::kUsage}));
    if (!counts) return {};
    series.seconds.push_back(*seconds);
    series.here_cpu_ns += cpu_ns;
    series.there_cpu_ns += after.cpu_ns - std::min(after.cpu_ns, before.cpu_ns);
    return {};
  }

  Result<uint64_t> retries() {
    BATON_ASSIGN_OR_RETURN(BenchReply usage, call({.command = BenchCommand::kUsage}));
    return usage.retries + agent_.agent->stats().retries;
  }

  BenchRequest about_blocks(BenchCommand command, std::span<const BlockPair> pairs, uint64_t block_bytes) {
    BenchRequest request{.command = command};
    request.block_bytes = block_bytes;
    for (const BlockPair& pair : pairs) request.blocks.push_back(pair.remote_block);
    return request;
  }
  /// So that only what is moved is right afterwards.
  Status prepare(std::span<const BlockPair> pairs, uint64_t block_bytes) {
    if (reads()) {
      for (const BlockPair& pair : pairs) {
        if (gpu_) BATON_RETURN_IF_ERROR(gpu_->fill(pair.local_block * block_bytes, block_bytes, 0xee));
        if (!gpu_) std::memset(pool_.data() + pair.local_block * block_bytes, 0xee, block_bytes);
      }
      return {};
    }
    return call(about_blocks(BenchCommand::kPrepare, pairs, block_bytes)).status();
  }
  Status check(std::span<const BlockPair> pairs, uint64_t block_bytes) {
    BenchRequest request = about_blocks(BenchCommand::kCheck, pairs, block_bytes);
    for (const BlockPair& pair : pairs) {
      if (gpu_ && reads()) {
        BATON_RETURN_IF_ERROR(gpu_->download(pair.local_block * block_bytes, pool_.span().subspan(pair.local_block * block_bytes, block_bytes)));
      }
      request.hashes.push_back(hash_block(pool_.span().subspan(pair.local_block * block_bytes, block_bytes)));
    }
    BATON_ASSIGN_OR_RETURN(BenchReply reply, call(request));
    if (reply.bad_blocks > 0) {
      return data_loss("{} of {} blocks of {} bytes are wrong in {} memory", reply.bad_blocks, pairs.size(), block_bytes,
                       reads() ? "this process's" : "the target's");
    }
    result_.verified_blocks += pairs.size();
    return {};
  }

  const BenchTransferOptions options_;
  BenchTransferResult result_;
  std::optional<TargetProcess> process_;
  std::optional<BenchChannel> channel_;
  bool same_host_ = false;
  std::string ip_, target_ip_;
  MappedMemory pool_;           // with gpu_ what that holds, for comparing
  std::optional<GpuPool> gpu_;  // --memory cuda
  std::unique_ptr<RawGpuCopy> raw_gpu_;
  std::optional<RawSharedCopy> raw_copy_;
  std::optional<RawProcessWrite> raw_write_;
  std::unique_ptr<RawFabric> raw_fabric_;
  std::optional<RawSocketInitiator> raw_socket_;
  BenchAgent agent_;
  Peer peer_;
};

}  // namespace

Status BenchTransferOptions::validate() const {
  if (transports.empty()) return invalid_argument("--transport names no transport");
  if (block_bytes.empty() || block_bytes.size() > kMaxBenchSizes) {
    return invalid_argument("--block-bytes has {} sizes; 1 to {} are possible", block_bytes.size(), kMaxBenchSizes);
  }
  if (pool_bytes == 0 || pool_bytes % 8 != 0) return invalid_argument("--pool-bytes is {}; it must be a positive multiple of 8", pool_bytes);
  if (operation != "write" && operation != "read") return invalid_argument("--operation is '{}'; there are write and read", operation);
  if (order != "scattered" && order != "contiguous" && order != "both") {
    return invalid_argument("--order is '{}'; there are scattered, contiguous and both", order);
  }
  if (memory != "shared" && memory != "private" && memory != "cuda") {
    return invalid_argument("--memory is '{}'; there are shared, private and cuda", memory);
  }
  if (device < 0 || device > 1023 || peer_device > 1023) {
    return invalid_argument("--device {} and --peer-device {} must name GPUs from 0 on", device, peer_device);
  }
  if (runs < 1 || runs > 10'000) return invalid_argument("--runs is {}; 1 to 10000 are possible", runs);
  if (pings < 0 || pings > 1'000'000) return invalid_argument("--pings is {}; 0 to 1000000 are possible", pings);
  if (timeout_ms < 1) return invalid_argument("--timeout-ms is {}; it must be positive", timeout_ms);
  for (uint64_t bytes : block_bytes) {
    if (bytes < 8 || bytes % 8 != 0) return invalid_argument("--block-bytes has {}; blocks are a multiple of 8 bytes", bytes);
    for (uint64_t count : block_counts(*this, bytes)) {
      if (count < 1 || count > kMaxBenchBlocks) {
        return invalid_argument("a transfer of {} blocks; 1 to {} are possible (--blocks)", count, kMaxBenchBlocks);
      }
      if (bytes > pool_bytes || count > pool_bytes / bytes) {
        return invalid_argument("{} blocks of {} bytes do not fit into a pool of {} bytes (--pool-bytes)", count, bytes, pool_bytes);
      }
    }
  }
  return {};
}

std::vector<uint64_t> block_counts(const BenchTransferOptions& options, uint64_t block_bytes) {
  if (!options.blocks.empty()) return options.blocks;
  const uint64_t bytes = options.memory == "cuda" ? std::min(kDefaultGpuTransferBytes, options.pool_bytes) : kDefaultTransferBytes;
  uint64_t count = bytes / std::max<uint64_t>(block_bytes, 1);
  return {std::clamp<uint64_t>(count, 1, kMaxBenchBlocks)};
}

Spread spread_of(std::vector<double> values) {
  if (values.empty()) return {};
  auto [min, max] = std::minmax_element(values.begin(), values.end());
  Spread spread{0, *min, *max};
  spread.median = describe(std::move(values)).p50;
  return spread;
}

Result<BenchTransferResult> run_bench_transfer(const BenchTransferOptions& options) {
  BATON_RETURN_IF_ERROR(options.validate());
  return Initiator(options).run();
}

}  // namespace baton::ops
