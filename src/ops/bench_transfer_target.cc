#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>

#include "base/clock.h"
#include "base/log.h"
#include "base/mapped_memory.h"
#include "ops/bench_transfer.h"
#include "ops/bench_transfer_common.h"
#include "ops/bench_transfer_wire.h"
#include "ops/raw_fabric.h"
#include "ops/raw_gpu.h"
#include "ops/raw_memory.h"
#include "ops/raw_socket.h"

namespace baton::ops {

namespace {

using transfer::Agent;
using transfer::BlockWrite;
using transfer::Peer;
using transfer::PoolId;
using transfer::Tag;

/// Answers every message to `mine` with one block to `theirs`. Runs on the agent's progress thread; at most one message
/// is under way at a time, so neither side gets ahead of the other.
class Echo {
 public:
  Echo(Agent& agent, Peer peer, PoolId pool, uint64_t block_bytes, Tag theirs)
      : agent_(agent), peer_(std::move(peer)), pool_(pool), block_bytes_(block_bytes), theirs_(theirs) {}
  ~Echo() {
    if (mine_) agent_.close_inbox(*mine_);
  }
  Result<Tag> start() {
    BATON_ASSIGN_OR_RETURN(Tag tag, agent_.open_inbox());
    mine_ = tag;
    BATON_RETURN_IF_ERROR(wait_for_next());
    return tag;
  }

 private:
  Status wait_for_next() {
    ++expected_;
    return agent_.expect(*mine_, expected_, [this] { answer(); });
  }
  void answer() {
    BlockWrite write;
    write.local_pool = pool_;
    write.remote_pool = pool_;
    write.blocks = {{0, 0}};
    write.length_bytes = block_bytes_;
    write.tag = theirs_;
    Status next = wait_for_next();
    Status status = peer_.write(std::move(write)).status();
    if (!status.ok() || !next.ok()) log_error("bench transfer: answering: {}", (status.ok() ? next : status).to_string());
  }

  Agent& agent_;
  const Peer peer_;
  const PoolId pool_;
  const uint64_t block_bytes_;
  const Tag theirs_;
  std::optional<Tag> mine_;
  uint64_t expected_ = 0;
};

/// The other half of a conversation: waits for a block, writes one back, all by the thread that calls run().
class Pong {
 public:
  static Result<std::unique_ptr<Pong>> open(Agent& agent, Peer peer, PoolId pool, uint32_t block, uint64_t bytes, Tag theirs) {
    BATON_ASSIGN_OR_RETURN(Tag mine, agent.open_inbox());
    return std::unique_ptr<Pong>(new Pong(agent, std::move(peer), pool, block, bytes, theirs, mine));
  }
  ~Pong() { agent_.close_inbox(mine_); }
  Tag mine() const { return mine_; }

  Status run(uint64_t count, int64_t timeout_ms) {
    for (uint64_t i = 0; i < count; ++i) {
      BATON_RETURN_IF_ERROR(agent_.wait(mine_, ++arrived_, Deadline::after_ms(SteadyClock::instance(), timeout_ms)));
      BlockWrite write;
      write.local_pool = pool_;
      write.remote_pool = pool_;
      write.blocks = {{block_, block_}};
      write.length_bytes = bytes_;
      write.tag = theirs_;
      BATON_RETURN_IF_ERROR(peer_.write(std::move(write)).status());
    }
    return {};
  }

 private:
  Pong(Agent& agent, Peer peer, PoolId pool, uint32_t block, uint64_t bytes, Tag theirs, Tag mine)
      : agent_(agent), peer_(std::move(peer)), pool_(pool), block_(block), bytes_(bytes), theirs_(theirs), mine_(mine) {}

  Agent& agent_;
  const Peer peer_;
  const PoolId pool_;
  const uint32_t block_;
  const uint64_t bytes_;
  const Tag theirs_, mine_;
  uint64_t arrived_ = 0;
};

class Target {
 public:
  Target(BenchChannel channel, const BenchTransferTargetOptions& options) : channel_(std::move(channel)), options_(options) {
    ip_ = channel_.local_ip();
    if (ip_.empty()) ip_ = "127.0.0.1";
  }
  ~Target() { close(); }

  Status serve() {
    while (true) {
      // An initiator may think for as long as it likes; when it goes, its socket closes.
      BATON_ASSIGN_OR_RETURN(std::string frame, channel_.receive(-1));
      Result<BenchRequest> request = parse_bench_request(frame);
      BenchReply reply;
      Status status = request.ok() ? handle(*request, reply) : request.status();
      reply.code = status.code();
      reply.message = status.message();
      BATON_RETURN_IF_ERROR(channel_.send(encode(reply)));
      if (!request.ok()) return request.status();
      if (request->command == BenchCommand::kBye) return {};
    }
  }

 private:
  Status handle(const BenchRequest& request, BenchReply& reply) {
    switch (request.command) {
      case BenchCommand::kHello:
        reply.host_id = host_id();
        reply.pid = static_cast<uint64_t>(::getpid());
        return {};
      case BenchCommand::kOpen: return open(request, reply);
      case BenchCommand::kAttach: return attach(request, reply);
      case BenchCommand::kEcho: return echo(request, reply);
      case BenchCommand::kEchoStop:
        echo_.reset();
        pong_.reset();
        return {};
      case BenchCommand::kPongOpen: return pong_open(request, reply);
      case BenchCommand::kPongRun:
        if (!pong_) return failed_precondition("there is no conversation");
        return pinned([&] { return pong_->run(request.count, options_.timeout_ms); });
      case BenchCommand::kRawMemoryPong:
        if (!pool_ || (pool_.fd() < 0 && !raw_pool_)) return failed_precondition("there is no shared pool");
        return pinned([&] { return RawBounce((pool_.fd() >= 0 ? pool_ : raw_pool_).span()).pong(request.bytes, request.count, options_.timeout_ms); });
      case BenchCommand::kRawFabricAttach:
        if (!raw_fabric_) return failed_precondition("the raw endpoint is not open");
        return raw_fabric_->connect(request.metadata, request.bytes, request.count, options_.timeout_ms);
      case BenchCommand::kRawFabricPong:
        if (!raw_fabric_) return failed_precondition("the raw endpoint is not open");
        return pinned([&] { return raw_fabric_->pong(request.bytes, request.count, options_.timeout_ms); });
      case BenchCommand::kFill:
        if (gpu_) {
          BATON_ASSIGN_OR_RETURN(MappedMemory words, MappedMemory::create_private(gpu_->bytes()));
          fill_words(words.span(), request.count);
          return gpu_->upload(words.span());
        }
        if (!pool_) return failed_precondition("there is no pool");
        fill_words(pool_.span(), request.count);
        return {};
      case BenchCommand::kPrepare:
        return for_each_block(request, [this](uint64_t offset, size_t) -> Status {
          if (gpu_) return gpu_->fill(offset, block_bytes_, 0xee);
          std::memset(pool_.data() + offset, 0xee, block_bytes_);
          return {};
        });
      case BenchCommand::kCheck:
        if (request.hashes.size() != request.blocks.size()) return invalid_argument("as many hashes as blocks are needed");
        return for_each_block(request, [&](uint64_t offset, size_t i) -> Status {
          std::span<std::byte> block;
          if (gpu_) {
            downloaded_.resize(block_bytes_);
            block = downloaded_;
            BATON_RETURN_IF_ERROR(gpu_->download(offset, block));
          } else {
            block = pool_.span().subspan(offset, block_bytes_);
          }
          if (hash_block(block) != request.hashes[i]) ++reply.bad_blocks;
          return {};
        });
      case BenchCommand::kUsage:
        reply.cpu_ns = process_cpu_ns();
        reply.resident_bytes = resident_bytes();
        if (agent_) reply.retries = agent_->agent->stats().retries;
        return {};
      case BenchCommand::kRawMemory: return raw_memory(reply);
      case BenchCommand::kRawFabricOpen: return raw_fabric_open(request, reply);
      case BenchCommand::kRawFabricRun:
        if (!raw_fabric_) return failed_precondition("the raw endpoint is not open");
        return raw_fabric_->progress_until([this] { return channel_.readable(); });
      case BenchCommand::kRawSocketOpen: {
        Result<RawSocketTarget> socket = RawSocketTarget::listen(ip_, options_.timeout_ms);
        if (!socket.ok()) return socket.status();
        raw_socket_.emplace(std::move(*socket));
        reply.port = raw_socket_->port();
        return {};
      }
      case BenchCommand::kRawSocketRun:
        if (!raw_socket_ || !pool_) return failed_precondition("the raw socket is not open");
        return raw_socket_->read_stream(pool_.span(), request.bytes);
      case BenchCommand::kRawSocketEcho:
        if (!raw_socket_ || !pool_) return failed_precondition("the raw socket is not open");
        return raw_socket_->echo(pool_.span(), request.bytes, request.count);
      case BenchCommand::kStop:
      case BenchCommand::kBye: return {};
      case BenchCommand::kClose: close(); return {};
    }
    return invalid_argument("an unknown command");
  }

  Status open(const BenchRequest& request, BenchReply& reply) {
    if (agent_) return failed_precondition("an agent is open already");
    if (request.pool_bytes == 0 || request.pool_bytes > options_.max_pool_bytes) {
      return invalid_argument("a pool of {} bytes was asked for; this target gives up to {} (--pool-bytes)", request.pool_bytes,
                              options_.max_pool_bytes);
    }
    if (request.gpu_memory) {
      pool_ = MappedMemory();
      if (!gpu_ || gpu_->bytes() != request.pool_bytes) {
        gpu_.reset();
        BATON_ASSIGN_OR_RETURN(GpuPool pool, GpuPool::open(options_.cuda_library, static_cast<int32_t>(request.device), request.pool_bytes));
        gpu_.emplace(std::move(pool));
      }
      BATON_RETURN_IF_ERROR(gpu_->fill(0, gpu_->bytes(), 1));
      reply.device = gpu_->gpu()->name();
    } else if (!pool_ || pool_.bytes() != request.pool_bytes || (pool_.fd() >= 0) != request.shared_memory) {
      gpu_.reset();
      pool_ = MappedMemory();
      BATON_ASSIGN_OR_RETURN(pool_, request.shared_memory ? MappedMemory::create_shared("baton-bench", request.pool_bytes)
                                                          : MappedMemory::create_private(request.pool_bytes));
      std::memset(pool_.data(), 1, pool_.bytes());
    }
    resident_before_ = resident_bytes();
    int64_t begin_ns = SteadyClock::instance().now_ns();
    transfer::AgentConfig config;
    config.name = "target";
    config.transport = request.transport;
    config.bind_address = ip_;
    config.default_timeout_ms = options_.timeout_ms;
    config.cuda_library = options_.cuda_library;
    BATON_ASSIGN_OR_RETURN(BenchAgent agent, gpu_ ? BenchAgent::open(config, gpu_->span(), transfer::MemoryKind::kCuda, request.block_sizes)
                                                  : BenchAgent::open(config, pool_.span(), transfer::MemoryKind::kHost, request.block_sizes));
    agent_ = std::make_unique<BenchAgent>(std::move(agent));
    reply.elapsed_ns = static_cast<uint64_t>(SteadyClock::instance().now_ns() - begin_ns);
    reply.text = agent_->agent->metadata();
    reply.resident_bytes = resident_before_;
    return {};
  }

  Status attach(const BenchRequest& request, BenchReply& reply) {
    if (!agent_) return failed_precondition("no agent is open");
    BATON_ASSIGN_OR_RETURN(peer_, agent_->agent->connect(request.metadata));
    reply.text = peer_.path().transport;
    return {};
  }

  Status echo(const BenchRequest& request, BenchReply& reply) {
    if (!agent_ || !peer_) return failed_precondition("no peer to answer to");
    BATON_ASSIGN_OR_RETURN(PoolId pool, agent_->pool_of(request.block_bytes));
    echo_ = std::make_unique<Echo>(*agent_->agent, peer_, pool, request.bytes, static_cast<Tag>(request.tag));
    BATON_ASSIGN_OR_RETURN(Tag tag, echo_->start());
    reply.tag = static_cast<uint32_t>(tag);
    return {};
  }

  /// The initiator takes the first CPU.
  template <typename Run>
  static Status pinned(Run run) {
    const PinnedThread pinned(1);
    return run();
  }

  Status pong_open(const BenchRequest& request, BenchReply& reply) {
    if (!agent_ || !peer_) return failed_precondition("no peer to answer to");
    BATON_ASSIGN_OR_RETURN(PoolId pool, agent_->pool_of(request.block_bytes));
    pong_.reset();
    BATON_ASSIGN_OR_RETURN(pong_, Pong::open(*agent_->agent, peer_, pool, static_cast<uint32_t>(std::min<uint64_t>(request.count, UINT32_MAX)), request.bytes,
                                            static_cast<Tag>(request.tag)));
    reply.tag = static_cast<uint32_t>(pong_->mine());
    return {};
  }

  template <typename Action>
  Status for_each_block(const BenchRequest& request, Action action) {
    if ((!pool_ && !gpu_) || request.block_bytes == 0) return failed_precondition("there is no pool");
    block_bytes_ = request.block_bytes;
    uint64_t count = (gpu_ ? gpu_->bytes() : pool_.bytes()) / block_bytes_;
    for (size_t i = 0; i < request.blocks.size(); ++i) {
      if (request.blocks[i] >= count) return invalid_argument("block {} of a pool with {}", request.blocks[i], count);
      BATON_RETURN_IF_ERROR(action(request.blocks[i] * block_bytes_, i));
    }
    return {};
  }

  Status raw_memory(BenchReply& reply) {
    if (gpu_) {
      BATON_ASSIGN_OR_RETURN(reply.text, gpu_->ipc_handle());
      reply.bytes = gpu_->bytes();
      return {};
    }
    if (!pool_) return failed_precondition("there is no pool");
    // The limit of copying between processes is that of mapped memory, wherever the agent's pool lies.
    if (pool_.fd() < 0 && !raw_pool_) {
      BATON_ASSIGN_OR_RETURN(raw_pool_, MappedMemory::create_shared("baton-bench-raw", pool_.bytes()));
      std::memset(raw_pool_.data(), 1, raw_pool_.bytes());
    }
    reply.pid = static_cast<uint64_t>(::getpid());
    reply.fd = static_cast<uint64_t>(pool_.fd() >= 0 ? pool_.fd() : raw_pool_.fd());
    reply.address = reinterpret_cast<uint64_t>(pool_.data());
    reply.bytes = pool_.bytes();
    return {};
  }

  Status raw_fabric_open(const BenchRequest& request, BenchReply& reply) {
    if (!pool_) return failed_precondition("there is no pool");
    raw_fabric_.reset();
    BATON_ASSIGN_OR_RETURN(raw_fabric_, RawFabric::open(request.transport, ip_, pool_.span()));
    reply.text = raw_fabric_->name();
    reply.address = raw_fabric_->remote_base();
    reply.key = raw_fabric_->remote_key();
    return {};
  }

  void close() {
    echo_.reset();
    pong_.reset();
    peer_ = Peer();
    agent_.reset();
    raw_fabric_.reset();
    raw_socket_.reset();
    raw_pool_ = MappedMemory();
  }

  const BenchChannel channel_;
  const BenchTransferTargetOptions options_;
  std::string ip_;
  MappedMemory pool_, raw_pool_;
  std::optional<GpuPool> gpu_;  // instead of pool_
  uint64_t block_bytes_ = 0;    // of the request that is being served
  std::vector<std::byte> downloaded_;
  std::unique_ptr<BenchAgent> agent_;
  Peer peer_;
  std::unique_ptr<Echo> echo_;
  std::unique_ptr<Pong> pong_;
  std::unique_ptr<RawFabric> raw_fabric_;
  std::optional<RawSocketTarget> raw_socket_;
  uint64_t resident_before_ = 0;
};

}  // namespace

Status run_bench_transfer_target(const BenchTransferTargetOptions& options, const std::function<void(uint16_t)>& on_listening) {
  if (options.fd >= 0) return Target(BenchChannel(FileDescriptor(options.fd)), options).serve();
  BATON_ASSIGN_OR_RETURN(HostPort address, parse_host_port(options.listen, true));
  uint16_t port = 0;
  BATON_ASSIGN_OR_RETURN(FileDescriptor listener, listen_tcp(address, &port));
  if (on_listening) on_listening(port);
  BATON_ASSIGN_OR_RETURN(FileDescriptor socket, accept_tcp(listener.get(), -1));
  listener.reset();
  return Target(BenchChannel(std::move(socket)), options).serve();
}

}  // namespace baton::ops
