#include <sys/eventfd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>

#include "base/check.h"
#include "base/log.h"
#include "transfer/agent_impl.h"
#include "transfer/cuda/cuda_backend.h"
#include "transfer/cuda/staged_backend.h"
#include "transfer/descriptors.h"
#include "transfer/fabric/fabric_backend.h"
#include "transfer/fabric/provider.h"
#include "transfer/shm/shm_backend.h"
#include "transfer/ucx/ucx_backend.h"

namespace baton::transfer {
namespace {

constexpr std::array<std::string_view, 13> kTransports = {
    "auto",     "shm",        "tcp",        "efa",        "verbs",        "ucx",
    "cuda_ipc", "staged:shm", "staged:tcp", "staged:efa", "staged:verbs", "sim", "staged:sim"};

/// Hashing happens under the agent's lock.
constexpr uint64_t kMaxHashedBurstBytes = 4u << 20;

std::string_view kind_name(MemoryKind kind) { return kind == MemoryKind::kCuda ? "GPU" : "host"; }

std::string kinds_name(MemoryKind from, MemoryKind to) {
  return from == to ? std::string(kind_name(from)) : fmt::format("{} to {}", kind_name(from), kind_name(to));
}

/// The backend of a transport that moves host memory.
Result<std::unique_ptr<Backend>> open_host_backend(std::shared_ptr<BackendContext> context, const std::string& transport,
                                                   bool open_now) {
  if (transport == "shm") return create_shm_backend(std::move(context));
  if (is_ucx_transport(transport)) return create_ucx_backend(std::move(context), transport);
  return create_fabric_backend(std::move(context), transport, open_now);
}

/// Identifies the running kernel: the same for all containers of a host, new after every boot.
std::string read_host_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id.substr(0, kMaxNameBytes);
}

}  // namespace

Status AgentConfig::validate() const {
  if (name.empty() || name.size() > kMaxNameBytes) {
    return invalid_argument("agent name of {} bytes; 1 to {} are possible", name.size(), kMaxNameBytes);
  }
  if (std::find(kTransports.begin(), kTransports.end(), transport) == kTransports.end() &&
      !is_ucx_transport(transport)) {
    return invalid_argument("unknown transport '{}'; there are: {}", transport, fmt::join(kTransports, ", "));
  }
  if (max_inflight_per_rail == 0 || max_inflight_per_rail > 65536) {
    return invalid_argument("max_inflight_per_rail is {}; 1 to 65536 are possible", max_inflight_per_rail);
  }
  if (max_queued_transfers == 0 || default_timeout_ms <= 0 || stall_timeout_ms <= 0) {
    return invalid_argument("max_queued_transfers ({}), default_timeout_ms ({}) and stall_timeout_ms ({}) must be "
                            "positive", max_queued_transfers, default_timeout_ms, stall_timeout_ms);
  }
  if (poll_us < 0 || poll_us > 10'000'000) return invalid_argument("poll_us is {}; 0 to 10,000,000 are possible", poll_us);
  return Status();
}

struct AgentCore::Context final : BackendContext {
  explicit Context(AgentCore& agent) : agent_(agent) {
    agent_name = agent.config_.name;
    epoch = agent.epoch_;
    clock = &agent.clock_;
    config = agent.config_;
  }
  std::vector<LocalPool> pools() const override {
    std::lock_guard lock(agent_.handover_mutex_);
    return agent_.pools_;
  }
  Result<const BackendRegion*> backend_region(const LocalPool& pool, Backend& backend) override {
    return pool.region.impl()->with(backend);
  }
  uint64_t serial() const override { return agent_.serial_; }
  bool has_news() const override { return agent_.work_.load(std::memory_order_relaxed); }
  void wake() override { agent_.wake(); }

  AgentCore& agent_;
};

AgentCore::AgentCore(AgentConfig config, const Clock& clock)
    : config_(std::move(config)),
      clock_(clock),
      epoch_(new_epoch()),
      host_id_(read_host_id()),
      inboxes_(static_cast<uint32_t>(mix_bits(static_cast<uint64_t>(epoch_)))) {}

AgentCore::~AgentCore() { stop(); }

Status AgentCore::start(const BackendFactory& factory) {
  doorbell_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!doorbell_) return descriptor_error("eventfd", errno);
  context_ = std::make_shared<Context>(*this);
  BATON_RETURN_IF_ERROR(open_backends(factory));
  log_info("transfer {}: epoch {:016x}, offers {}", config_.name, static_cast<uint64_t>(epoch_), describe());
  if (config_.integrity) {
    log_info("transfer {}: integrity mode: every block that is written is hashed here and where it arrives", config_.name);
  }
  if (!config_.manual_progress) thread_ = std::thread([this] { run(); });
  return Status();
}

Status AgentCore::open_backends(const BackendFactory& factory) {
  auto add = [this](Result<std::unique_ptr<Backend>> backend) -> Status {
    if (!backend.ok()) return backend.status();
    backends_.push_back(std::move(*backend));
    return Status();
  };
  if (factory) return add(factory(context_));
  const std::string& transport = config_.transport;
  if (transport.ends_with("sim")) {
    return invalid_argument("transport '{}' is made with create_sim_agent()", transport);
  }
  BATON_ASSIGN_OR_RETURN(std::shared_ptr<UnusedSockets> unused, UnusedSockets::create());
  auto add_staged = [&](const std::string& name) {
    auto open_host = [](std::shared_ptr<BackendContext> host_context, const std::string& host) {
      return open_host_backend(std::move(host_context), host, false);
    };
    return add(create_staged_backend(context_, name, open_host, unused));
  };
  if (transport == "cuda_ipc") return add(create_cuda_backend(context_));
  if (is_staged_transport(transport)) return add_staged(transport);
  if (transport != "auto") return add(open_host_backend(context_, transport, true));

  // auto: what each of these can do is decided per peer, in choose_path().
  if (Status shm = add(create_shm_backend(context_)); !shm.ok()) {
    log_warning("transfer {}: no shm: {}", config_.name, shm.to_string());
  }
  bool rdma = fabric::has_rdma_device();
  if (rdma) {
    // UCX where libfabric cannot use the device: it opens every device it likes, libfabric the one that is asked for.
    for (const char* name : {"efa", "verbs", "ucx"}) {
      Status status = add(open_host_backend(context_, name, true));
      if (status.ok()) break;
      log_info("transfer {}: no {}: {}", config_.name, name, status.message());
    }
  }
  if (config_.allow_tcp || !rdma) {
    if (Status tcp = add(create_fabric_backend(context_, "tcp", false)); !tcp.ok()) {
      log_warning("transfer {}: no tcp: {}", config_.name, tcp.to_string());
    }
  }
  if (backends_.empty()) return unavailable("no transport could be opened; the log says why");
  // Behind all of these: only GPU memory takes it, and only where there is nothing better.
  const size_t host_backends = backends_.size();
  for (size_t i = 0; i < host_backends; ++i) {
    const std::string name = fmt::format("{}{}", kStagedPrefix, backends_[i]->transport());
    if (Status staged = add_staged(name); !staged.ok()) {
      log_warning("transfer {}: no {}: {}", config_.name, name, staged.to_string());
    }
  }
  return Status();
}

/// Under the lock. With "auto" the driver is not touched before somebody has GPU memory.
Status AgentCore::need_cuda_backend() {
  if (config_.transport != "auto") {
    if (backends_.front()->moves(MemoryKind::kCuda, MemoryKind::kCuda)) return Status();
    return invalid_argument("transport '{}' moves host memory only; GPU memory needs 'auto', 'cuda_ipc' or 'staged:{}'",
                            config_.transport, config_.transport);
  }
  if (backends_.front()->transport() == "cuda_ipc") return Status();
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, create_cuda_backend(context_));
  log_info("transfer {}: offers {} as well", config_.name, backend->describe());
  backends_.insert(backends_.begin(), std::move(backend));
  wake();  // the progress thread may be asleep without the new one's descriptor
  return Status();
}

void AgentCore::stop() {
  if (stopping_.exchange(true)) return;
  wake();
  if (thread_.joinable()) thread_.join();
  // A shared endpoint may still be at work for a peer: give it the time that close() gives.
  int64_t deadline_ns = SteadyClock::instance().now_ns() + 1'000'000'000;
  while (true) {
    bool open = false;
    Status inbound;
    {
      std::lock_guard lock(mutex_);
      take_incoming();
      readers_.clear();
      // The memory goes back to its owner: nobody may write into it any more.
      for (const auto& backend : backends_) {
        if (Status shut = backend->shut_out(); !shut.ok()) inbound = shut;
      }
      std::vector<std::shared_ptr<PeerCore>> peers = peers_;
      for (const auto& peer : peers) {
        fail_peer(*peer, cancelled("the agent '{}' was closed", config_.name));
        close_link(*peer);
        open = open || peer->state != PeerCore::State::kClosed;
      }
      if (open || !inbound.ok()) {
        for (const auto& backend : backends_) backend->progress(*this);
        failed_.clear();
      }
    }
    run_callbacks();
    if (!open && inbound.ok()) break;
    if (!open && SteadyClock::instance().now_ns() > deadline_ns) {
      log_warning("transfer {}: closed, but {}", config_.name, inbound.message());
      break;
    }
    if (SteadyClock::instance().now_ns() > deadline_ns) {
      // Leaking the endpoint is the lesser evil: freeing it now could free memory that is being read.
      log_error("transfer {}: a device did not end its operations; its endpoint is left open", config_.name);
      for (auto& backend : backends_) (void)backend.release();
      for (const auto& peer : peers_) (void)peer->link.release();
      break;
    }
    std::this_thread::yield();
  }
  std::lock_guard lock(mutex_);
  incoming_checks_.clear();
  unsent_answers_.clear();
  unsent_read_answers_.clear();
  open_reads_.clear();
  unused_paths_.clear();
  busy_.clear();
  peers_.clear();
  backends_.clear();
  std::lock_guard handover(handover_mutex_);
  pools_.clear();
}

Result<const BackendRegion*> MemoryRegion::Impl::with(Backend& backend) {
  for (const auto& [owner, region] : registrations_) {
    if (owner == &backend) return region.get();
  }
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<BackendRegion> region, backend.register_memory(memory_, kind_));
  registrations_.emplace_back(&backend, std::move(region));
  return registrations_.back().second.get();
}

std::byte* MemoryRegion::data() const { return impl_ ? impl_->memory().data() : nullptr; }
size_t MemoryRegion::bytes() const { return impl_ ? impl_->memory().size() : 0; }

Result<MemoryRegion> AgentCore::register_memory(std::span<std::byte> memory, MemoryKind kind) {
  if (memory.empty()) return invalid_argument("registering no memory");
  auto impl = std::make_shared<MemoryRegion::Impl>(memory, kind);
  // With one transport it is certain to be needed; with several, when the first peer comes.
  if (config_.transport != "auto" || kind == MemoryKind::kCuda) {
    std::lock_guard lock(mutex_);
    if (kind == MemoryKind::kCuda) BATON_RETURN_IF_ERROR(need_cuda_backend());
    for (const auto& backend : backends_) {
      if (config_.transport != "auto" || backend->transport() == "cuda_ipc") {
        BATON_RETURN_IF_ERROR(impl->with(*backend).status());
      }
    }
  }
  std::lock_guard lock(handover_mutex_);
  has_cuda_memory_ = has_cuda_memory_ || kind == MemoryKind::kCuda;
  ++registered_regions_;
  registered_bytes_ += memory.size();
  return MemoryRegion(std::move(impl));
}

Result<PoolId> AgentCore::add_pool(PoolConfig pool) {
  if (!pool.region) return invalid_argument("a pool needs a registered region");
  if (pool.stride_bytes == 0 || pool.count == 0 ||
      pool.count > std::numeric_limits<uint64_t>::max() / pool.stride_bytes ||
      pool.count * pool.stride_bytes > pool.region.bytes()) {
    return invalid_argument("a pool of {} blocks of {} bytes does not fit its region of {} bytes", pool.count,
                            pool.stride_bytes, pool.region.bytes());
  }
  std::lock_guard lock(handover_mutex_);
  if (pools_.size() >= kMaxPools) return resource_exhausted("more than {} pools", kMaxPools);
  auto id = static_cast<uint32_t>(pools_.size());
  pools_.push_back({id, pool.region, pool.stride_bytes, pool.count});
  return static_cast<PoolId>(id);
}

std::string AgentCore::metadata() const {
  std::lock_guard lock(mutex_);
  return metadata_now();
}

std::string AgentCore::metadata_now() const {
  Metadata metadata;
  metadata.name = config_.name;
  metadata.epoch = epoch_;
  metadata.host_id = host_id_;
  metadata.serial = serial_;
  {
    std::lock_guard handover(handover_mutex_);
    for (const LocalPool& pool : pools_) {
      metadata.pools.push_back({pool.id, pool.region.impl()->kind(), pool.stride_bytes, pool.count});
    }
  }
  for (const auto& backend : backends_) {
    metadata.offers.push_back({backend->transport(), backend->provider(), backend->address()});
  }
  return encode_metadata(metadata);
}

Result<AgentCore::PathChoice> AgentCore::choose_path(const Metadata& peer, MemoryKind from, MemoryKind to) {
  bool same_host = !host_id_.empty() && host_id_ == peer.host_id;
  bool automatic = config_.transport == "auto";
  std::string tried;
  for (const auto& backend : backends_) {
    if (!backend->moves(from, to)) continue;
    const std::string& transport = backend->transport();
    auto offer = std::find_if(peer.offers.begin(), peer.offers.end(),
                              [&](const Metadata::Offer& one) { return one.transport == transport; });
    auto skip = [&](std::string_view why) { tried += fmt::format("{}{}: {}", tried.empty() ? "" : "; ", transport, why); };
    if (offer == peer.offers.end()) {
      skip("the peer does not offer it");
      continue;
    }
    if ((transport == "shm" || transport == "cuda_ipc" || transport == "staged:shm") && !same_host) {
      skip("another host");
      continue;
    }
    Result<std::unique_ptr<Link>> link = backend->open_link(peer, *offer);
    if (!link.ok()) {
      skip(link.status().message());
      continue;
    }
    std::string reason = !automatic ? fmt::format("--transport {}", transport)
                         : same_host ? "same host" : "other host";
    if (!tried.empty()) reason += fmt::format(" ({})", tried);
    return PathChoice{backend.get(), std::move(*link), backend->limits_for(offer->address), std::move(reason)};
  }
  std::vector<std::string_view> offered;
  for (const Metadata::Offer& offer : peer.offers) offered.push_back(offer.transport);
  if (tried.empty()) tried = "no transport here moves it";
  return unavailable("no path for {} memory to '{}' (transport {}, {} host; it offers {}): {}", kinds_name(from, to), peer.name,
                     config_.transport, same_host ? "same" : "other", fmt::join(offered, ", "), tried);
}

Result<PeerPaths> AgentCore::connect(std::string_view bytes) {
  BATON_ASSIGN_OR_RETURN(Metadata metadata, parse_metadata(bytes, config_.max_metadata_bytes));
  std::lock_guard lock(mutex_);
  if (stopping_.load()) return unavailable("the agent is closed");
  PeerPaths paths;
  Status last;
  std::array<bool, 2> here{true, false};
  {
    std::lock_guard handover(handover_mutex_);
    here[1] = has_cuda_memory_;
    // Between kinds there is only a path where both sides have a use for it.
    here[0] = std::any_of(pools_.begin(), pools_.end(),
                          [](const LocalPool& pool) { return pool.region.impl()->kind() == MemoryKind::kHost; });
  }
  for (MemoryKind to : {MemoryKind::kHost, MemoryKind::kCuda}) {
    auto has_kind = [to](const Metadata::Pool& pool) { return pool.kind == to; };
    bool wanted = std::any_of(metadata.pools.begin(), metadata.pools.end(), has_kind) ||
                  (metadata.pools.empty() && to == MemoryKind::kHost);
    for (MemoryKind from : {to, to == MemoryKind::kHost ? MemoryKind::kCuda : MemoryKind::kHost}) {
      const size_t index = PeerPaths::index(from, to);
      if (!wanted) {
        paths.missing[index] = invalid_argument("'{}' has no pool of {} memory", metadata.name, kind_name(to));
        continue;
      }
      const bool usable = here[static_cast<size_t>(from)] || (from == to && from == MemoryKind::kHost);
      Result<std::shared_ptr<PeerCore>> path =
          usable ? open_path(metadata, from, to)
                 : failed_precondition("no path for {} memory to '{}': there is no {} memory here (it has to be registered "
                                       "before connect())", kinds_name(from, to), metadata.name, kind_name(from));
      if (path.ok()) {
        (*path)->wanted = true;
        paths.cores[index] = std::move(*path);
        continue;
      }
      paths.missing[index] = path.status();
      if (from == to) last = path.status();
    }
  }
  bool some = std::any_of(paths.cores.begin(), paths.cores.end(), [](const auto& core) { return core != nullptr; });
  if (!some) return last;
  if (!last.ok()) log_warning("transfer {}: {}", config_.name, last.to_string());
  wake();
  return paths;
}

Result<std::shared_ptr<PeerCore>> AgentCore::open_path(const Metadata& metadata, MemoryKind from,
                                                            MemoryKind to) {
  for (const auto& peer : peers_) {
    if (peer->from == from && peer->to == to && peer->metadata == metadata && peer->alive.load()) return peer;
  }
  BATON_ASSIGN_OR_RETURN(PathChoice path, choose_path(metadata, from, to));
  auto peer = std::make_shared<PeerCore>();
  peer->agent = weak_from_this();
  peer->metadata = metadata;
  peer->from = from;
  peer->to = to;
  peer->backend = path.backend;
  peer->transport = path.backend->transport();
  peer->provider = path.backend->provider();
  peer->rails = path.backend->rails();
  peer->posts_at_once = path.backend->posts_at_once();
  peer->limits = path.limits;
  if (config_.integrity) {
    peer->limits.max_burst_bytes = std::min(peer->limits.max_burst_bytes, kMaxHashedBurstBytes);
    peer->limits.plan.max_message_bytes = std::min(peer->limits.plan.max_message_bytes, kMaxHashedBurstBytes);
    peer->limits.plan.min_listed_bytes = 0;  // what is hashed are segments
  }
  peer->reason = std::move(path.reason);
  peer->link = std::move(path.link);
  peer->link->owner = peer.get();
  peers_.push_back(peer);
  log_info("transfer {}: path for {} memory to '{}' (epoch {:016x}): {} ({}), {}", config_.name, kinds_name(from, to),
           peer->metadata.name, static_cast<uint64_t>(peer->metadata.epoch), peer->transport, peer->provider,
           peer->reason);
  return peer;
}

Result<AgentCore::Ends> AgentCore::check_ends(const Metadata& peer, PoolId local, PoolId remote,
                                              std::span<const BlockPair> blocks, uint64_t offset_bytes, uint64_t length_bytes,
                                              const char* arrow) const {
  Ends ends;
  {
    std::lock_guard lock(handover_mutex_);
    if (static_cast<size_t>(local) >= pools_.size()) {
      return invalid_argument("there is no local pool {}", static_cast<uint32_t>(local));
    }
    ends.local = pools_[static_cast<size_t>(local)];
  }
  auto found = std::find_if(peer.pools.begin(), peer.pools.end(),
                            [&](const Metadata::Pool& pool) { return pool.id == static_cast<uint32_t>(remote); });
  if (found == peer.pools.end()) {
    return invalid_argument("'{}' has no pool {}", peer.name, static_cast<uint32_t>(remote));
  }
  ends.remote = *found;
  const uint64_t stride = std::min(ends.local.stride_bytes, ends.remote.stride_bytes);
  if (length_bytes == 0 || length_bytes > stride || offset_bytes > stride - length_bytes) {
    return invalid_argument("{} bytes from offset {} are outside of blocks of {} (here) and {} bytes ('{}')", length_bytes,
                            offset_bytes, ends.local.stride_bytes, ends.remote.stride_bytes, peer.name);
  }
  const BlockBounds bounds = bounds_of(blocks);
  ends.last_remote_block = bounds.remote;
  const bool outside = !blocks.empty() && (bounds.local >= ends.local.count || bounds.remote >= ends.remote.count);
  for (const BlockPair& pair : blocks) {
    if (!outside) break;
    if (pair.local_block >= ends.local.count || pair.remote_block >= ends.remote.count) {
      return invalid_argument("block {} {} {}: this pool has {} blocks, that of '{}' has {}", pair.local_block, arrow,
                              pair.remote_block, ends.local.count, peer.name, ends.remote.count);
    }
  }
  return ends;
}

Result<TransferPointer> AgentCore::write(const PeerPaths& paths, BlockWrite write,
                                         std::function<void(const Status&)> on_done, bool integrity, bool at_once) {
  BATON_ASSIGN_OR_RETURN(Ends ends, check_ends(paths.main().metadata, write.local_pool, write.remote_pool, write.blocks,
                                               write.offset_bytes, write.length_bytes, "->"));
  const MemoryKind kind = ends.local.region.impl()->kind();
  if (write.after != nullptr && kind != MemoryKind::kCuda) {
    return invalid_argument("'after' is an event of the GPU, and pool {} is host memory", ends.local.id);
  }
  const std::shared_ptr<PeerCore>& peer = paths.of(kind, ends.remote.kind);
  if (peer == nullptr) return paths.missing[PeerPaths::index(kind, ends.remote.kind)];
  PlanLimits limits = peer->limits.plan;
  if (integrity) {
    limits.max_message_bytes = std::min(limits.max_message_bytes, kMaxHashedBurstBytes);
    limits.min_listed_bytes = 0;  // what is hashed are segments
  }

  auto transfer = std::make_shared<Transfer::Impl>();
  transfer->agent = weak_from_this();
  transfer->peer = peer;
  transfer->block_count = write.blocks.size();
  transfer->remote_end = ends.last_remote_block * ends.remote.stride_bytes + write.offset_bytes + write.length_bytes;
  transfer->remote_pool = ends.remote.id;
  transfer->tag = write.tag;
  transfer->after = write.after;
  transfer->deadline_ns = deadline_ns(write.deadline);
  transfer->on_done = std::move(on_done);
  const uint64_t length_bytes = write.length_bytes;
  transfer->plan = plan_write(std::move(write), ends.local.stride_bytes, ends.remote.stride_bytes, limits);
  transfer->message_count = transfer->plan.messages.size();
  transfer->byte_count = transfer->plan.bytes;
  transfer->local_region = std::move(ends.local.region);
  if (integrity && transfer->message_count > 0) {
    transfer->check = std::make_unique<OutgoingCheck>(length_bytes);
    transfer->check->remote_stride_bytes = ends.remote.stride_bytes;
    transfer->check->block_count = transfer->block_count;
    transfer->counted_check = transfer->tag != Tag::kNone;
  }
  BATON_RETURN_IF_ERROR(enqueue(transfer, at_once));
  return transfer;
}

int64_t AgentCore::deadline_ns(Deadline deadline) const {
  return deadline == Deadline::never() ? clock_.now_ns() + config_.default_timeout_ms * 1'000'000 : deadline.at_ns;
}

Status AgentCore::enqueue(const TransferPointer& transfer, bool at_once) {
  PeerCore& peer = *transfer->peer;
  if (queued_.fetch_add(1) >= config_.max_queued_transfers) {
    queued_.fetch_sub(1);
    return resource_exhausted("{} transfers are queued, the limit is {} (max_queued_transfers)",
                              config_.max_queued_transfers, config_.max_queued_transfers);
  }
  if (at_once && post_at_once(transfer)) return Status();
  {
    std::lock_guard lock(peer.queue_mutex);
    if (!peer.down.ok()) {
      queued_.fetch_sub(1);
      return unavailable("{}", peer.down.message());
    }
    peer.incoming.push_back(transfer);
    if (peer.incoming.size() == 1) {
      std::lock_guard handover(handover_mutex_);
      fresh_.push_back(transfer->peer);
    }
  }
  wake();
  return Status();
}

void AgentCore::cancel(const TransferPointer& transfer) {
  {
    std::lock_guard lock(handover_mutex_);
    cancels_.push_back(transfer);
  }
  wake();
}

AgentStats AgentCore::stats() const {
  AgentStats stats;
  std::lock_guard lock(mutex_);
  std::set<Epoch> epochs;
  // Those that were closed since the last turn of progress are still in the list.
  for (const auto& peer : peers_) {
    if (peer->state != PeerCore::State::kClosed) epochs.insert(peer->metadata.epoch);
  }
  stats.peers = epochs.size();
  stats.retries = retries_;
  stats.failed_transfers = failed_transfers_;
  stats.fences = fences_;
  stats.checked_blocks = checked_blocks_;
  stats.corrupt_blocks = corrupt_blocks_;
  stats.served_reads = served_reads_;
  stats.refused_reads = refused_reads_;
  for (const auto& backend : backends_) stats.inbound_peers += backend->inbound_peers();
  stats.messages_sent = messages_sent_.load();
  stats.bytes_sent = bytes_sent_.load();
  stats.messages_received = inboxes_.messages();
  stats.stray_messages = inboxes_.stray_messages();
  std::lock_guard handover(handover_mutex_);
  stats.regions = registered_regions_;
  stats.registered_bytes = registered_bytes_;
  return stats;
}

std::string AgentCore::describe() const {
  std::lock_guard lock(mutex_);
  std::string text;
  for (const auto& backend : backends_) {
    if (!text.empty()) text += "; ";
    text += backend->describe();
  }
  return text;
}

// --- the public handles ---

class Peer::Impl {
 public:
  explicit Impl(PeerPaths paths) : paths_(std::move(paths)) {}
  std::shared_ptr<AgentCore> agent() const { return paths_.main().agent.lock(); }
  const PeerPaths paths_;
};

bool Transfer::done() const { return impl_->state.load(std::memory_order_acquire) == Impl::State::kDone; }
Status Transfer::status() const {
  BATON_CHECK(done()) << "Transfer::status() before done()";
  return impl_->status;
}
uint64_t Transfer::messages() const {
  return impl_->tag == Tag::kNone ? 0 : impl_->message_count + (impl_->counted_check ? 1 : 0);
}
uint64_t Transfer::bytes() const { return impl_->byte_count; }
Status Transfer::wait() const {
  if (std::shared_ptr<AgentCore> agent = impl_->agent.lock()) return agent->wait(*impl_);
  impl_->state.wait(Impl::State::kPending, std::memory_order_acquire);
  return impl_->status;
}
void Transfer::cancel() const {
  if (std::shared_ptr<AgentCore> agent = impl_->agent.lock()) agent->cancel(impl_);
}
bool Transfer::settled() const {
  BATON_CHECK(done()) << "Transfer::settled() before done()";
  return impl_->settled;
}

Epoch Peer::epoch() const { return impl_->paths_.main().metadata.epoch; }
const std::string& Peer::name() const { return impl_->paths_.main().metadata.name; }
bool Peer::alive() const {
  return std::all_of(impl_->paths_.cores.begin(), impl_->paths_.cores.end(),
                     [](const auto& core) { return core == nullptr || core->alive.load(); });
}
PathInfo Peer::path() const { return path(impl_->paths_.main().from, impl_->paths_.main().to); }
PathInfo Peer::path(MemoryKind from, MemoryKind to) const {
  const std::shared_ptr<PeerCore>& core = impl_->paths_.of(from, to);
  if (core == nullptr) return {{}, {}, 0, impl_->paths_.missing[PeerPaths::index(from, to)].message(), 0};
  PathInfo path{core->transport, core->provider, core->rails, core->reason, 0};
  double busy_s = static_cast<double>(core->busy_ns.load()) * 1e-9;
  if (busy_s > 0) path.bandwidth_bytes_per_s = static_cast<double>(core->bytes.load() + core->read_bytes.load()) / busy_s;
  return path;
}
PeerStats Peer::stats() const {
  PeerStats stats;
  for (const auto& core : impl_->paths_.cores) {
    if (core == nullptr) continue;
    stats.writes += core->writes.load();
    stats.messages += core->messages.load();
    stats.bytes += core->bytes.load();
    stats.failures += core->failures.load();
    stats.cancelled += core->cancelled.load();
    stats.reads += core->reads.load();
    stats.read_bytes += core->read_bytes.load();
    stats.busy_s += static_cast<double>(core->busy_ns.load()) * 1e-9;
  }
  return stats;
}
Result<Transfer> Peer::write(BlockWrite write, std::function<void(const Status&)> on_done) const {
  std::shared_ptr<AgentCore> agent = impl_->agent();
  if (agent == nullptr) return unavailable("the agent of this peer is closed");
  BATON_ASSIGN_OR_RETURN(TransferPointer transfer, agent->write(impl_->paths_, std::move(write), std::move(on_done),
                                                                agent->config().integrity, true));
  return Transfer(std::move(transfer));
}
Result<Transfer> Peer::read(BlockRead read, std::function<void(const Status&)> on_done) const {
  std::shared_ptr<AgentCore> agent = impl_->agent();
  if (agent == nullptr) return unavailable("the agent of this peer is closed");
  BATON_ASSIGN_OR_RETURN(TransferPointer transfer, agent->read(impl_->paths_, std::move(read), std::move(on_done)));
  return Transfer(std::move(transfer));
}
Status Peer::close() const {
  std::shared_ptr<AgentCore> agent = impl_->agent();
  return agent == nullptr ? Status() : agent->close_peer(impl_->paths_);
}

namespace {

class AgentHandle final : public Agent {
 public:
  explicit AgentHandle(std::shared_ptr<AgentCore> core) : core_(std::move(core)) {}
  ~AgentHandle() override { core_->stop(); }

  Epoch epoch() const override { return core_->epoch(); }
  Result<MemoryRegion> register_memory(std::span<std::byte> memory, MemoryKind kind) override {
    return core_->register_memory(memory, kind);
  }
  Result<PoolId> add_pool(PoolConfig config) override { return core_->add_pool(std::move(config)); }
  std::string metadata() const override { return core_->metadata(); }
  Result<Peer> connect(std::string_view metadata) override {
    BATON_ASSIGN_OR_RETURN(PeerPaths paths, core_->connect(metadata));
    return Peer(std::make_shared<Peer::Impl>(std::move(paths)));
  }
  Result<Tag> open_inbox() override { return core_->inboxes().open(); }
  Status expect(Tag tag, uint64_t messages, std::function<void()> on_complete) override {
    return core_->inboxes().expect(tag, messages, std::move(on_complete));
  }
  Status wait(Tag tag, uint64_t messages, Deadline deadline) override { return core_->wait(tag, messages, deadline); }
  uint64_t arrived(Tag tag) const override { return core_->inboxes().arrived(tag); }
  void close_inbox(Tag tag) override { core_->close_inbox(tag); }
  Status fence(Epoch peer) override { return core_->fence(peer); }
  size_t progress() override {
    BATON_CHECK(core_->config().manual_progress) << "progress() belongs to the agent's thread";
    return core_->progress();
  }
  AgentStats stats() const override { return core_->stats(); }
  std::string describe() const override { return core_->describe(); }

 private:
  const std::shared_ptr<AgentCore> core_;
};

}  // namespace

Result<std::unique_ptr<Agent>> create_agent_with(AgentConfig config, const Clock& clock,
                                                 const AgentCore::BackendFactory& factory) {
  BATON_RETURN_IF_ERROR(config.validate());
  auto core = std::make_shared<AgentCore>(std::move(config), clock);
  BATON_RETURN_IF_ERROR(core->start(factory));
  return std::unique_ptr<Agent>(std::make_unique<AgentHandle>(std::move(core)));
}

Result<std::unique_ptr<Agent>> Agent::create(AgentConfig config, const Clock& clock) {
  return create_agent_with(std::move(config), clock, {});
}

}  // namespace baton::transfer
