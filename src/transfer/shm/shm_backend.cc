#include "transfer/shm/shm_backend.h"

#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <map>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

#include "base/check.h"
#include "base/log.h"
#include "transfer/control.h"
#include "transfer/copied_messages.h"
#include "transfer/shm/doorbell.h"
#include "transfer/shm/shared_pool.h"
#include "transfer/shm/stream_copy.h"
#include "transfer/wire.h"

namespace baton::transfer {
namespace {

/// One call takes up to 1024 pieces (IOV_MAX); half of that already hides the cost of the call.
constexpr uint32_t kMaxSegments = 512;
/// From here on a message is copied past the caches. Below, whoever is told of it finds it warm.
constexpr uint64_t kMinStreamBytes = 256u << 10;
/// And a piece of a read: below, what prefetching finds too late costs more than the stores gain (4 KiB: 4.8 GB/s, memcpy 6.2).
constexpr uint64_t kMinStreamReadBytes = 16u << 10;
/// After something has come in the next thing is often not far, and waking a thread takes 10 to 30 µs.
constexpr int64_t kAwakeNs = 20'000;
/// While awake the doorbells are looked at all the time; the control connections cost a system call. (With reads under way their words
/// go that way.)
constexpr int64_t kControlEveryNs = 20'000, kControlOfReadsEveryNs = 3'000;

/// A region, and how others can map it when it is shared memory.
class ShmRegion final : public BackendRegion {
 public:
  SharedSource source;  // no file: private memory
};

class ShmBackend;

class ShmLink final : public Link {
 public:
  ShmLink(ShmBackend& backend, ControlPlane::Id id, int pid, std::string peer_name)
      : backend_(backend), id_(id), pid_(pid), peer_name_(std::move(peer_name)) {}
  ~ShmLink() override;

  Result<PostResult> post(const BackendMessage& message) override;
  void flush() override;
  bool ready() const override { return ready_ && !dead_; }
  bool late_writes_possible() const override { return false; }
  std::span<std::byte> mapped_pool(uint32_t pool) const override {
    auto it = pools_.find(pool);
    if (it == pools_.end() || it->second.mapped == nullptr) return {};
    return {it->second.mapped->data(), it->second.mapped->bytes()};
  }
  CheckChannel::Connection connection() const override { return id_; }

  struct RemotePool {
    uint64_t base = 0;                    // in the peer's process
    MappedPool* mapped = nullptr;         // in this one; null: the kernel copies
  };
  void open_pool(const Welcome::Pool& pool);
  void open_doorbell(const Welcome::Pool& doorbell);
  Status copy_mapped(const BackendMessage& message, MappedPool& remote);
  Status copy_by_kernel(const BackendMessage& message, uint64_t remote_base);

  ShmBackend& backend_;
  const ControlPlane::Id id_;
  const int pid_;
  const std::string peer_name_;
  bool ready_ = false;
  bool dead_ = false;
  std::unordered_map<uint32_t, RemotePool> pools_;
  // Several pools may lie in the same memory: mapped once.
  std::map<std::tuple<uint64_t, uint64_t, uint64_t, uint64_t>, MappedPool> mappings_;
  CopiedMessages copied_;
  std::optional<Doorbell> doorbell_;  // none: the control connection carries every count
};

class ShmBackend final : public Backend, private ControlPlane::Delegate {
 public:
  explicit ShmBackend(std::shared_ptr<BackendContext> context)
      : context_(std::move(context)),
        control_({.epoch = context_->epoch, .name = context_->agent_name, .writer_must_confirm = true},
                 *this, *context_->clock),
        probe_(std::make_unique<uint64_t>(static_cast<uint64_t>(context_->epoch))) {
    limits_.plan = {.max_message_bytes = 2u << 20,
                    .max_segments = kMaxSegments,
                    .max_packed_segment_bytes = 512u << 10};
    limits_.max_inflight_messages = context_->config.max_inflight_per_rail;
    // A copy blocks the progress thread while it lasts; other peers get their turn after this much.
    limits_.max_burst_bytes = 4u << 20;
  }

  Status open() {
    allow_attach();
    if (Result<std::unique_ptr<Doorbells>> doorbells = Doorbells::create(); doorbells.ok()) {
      doorbells_ = std::move(*doorbells);
    } else {
      log_info("transfer {}: shm without doorbells, notifications go by socket: {}", context_->agent_name, doorbells.status().message());
    }
    return control_.listen("unix:");
  }

  const std::string& transport() const override { return transport_; }
  const std::string& provider() const override { return provider_; }
  const BackendLimits& limits() const override { return limits_; }
  std::string describe() const override {
    return fmt::format("shm (cross-memory attach, {} readers of our doorbell at {})", control_.inbound(),
                       control_.address());
  }

  Result<std::unique_ptr<BackendRegion>> register_memory(std::span<std::byte> memory,
                                                         MemoryKind kind) override {
    if (kind != MemoryKind::kHost) return unimplemented("shm moves host memory only");
    auto region = std::make_unique<ShmRegion>();
    region->data = memory.data();
    region->remote_base = reinterpret_cast<uint64_t>(memory.data());
    Result<SharedSource> source = find_shared_source(memory);
    if (source.ok()) region->source = std::move(*source);
    log_debug("transfer {}: shm: {} bytes at {}: {}", context_->agent_name, memory.size(), fmt::ptr(memory.data()),
              source.ok() ? "peers can map them" : "peers write through the kernel, " + source.status().message());
    return std::unique_ptr<BackendRegion>(std::move(region));
  }

  std::string address() const override {
    WireWriter out;
    out.put_string(control_.address());
    out.put(reinterpret_cast<uint64_t>(probe_.get()));
    return out.take();
  }

  Result<std::unique_ptr<Link>> open_link(const Metadata& peer, const Metadata::Offer& offer) override {
    WireReader in(offer.address);
    std::string socket(in.get_string(256));
    uint64_t probe_address = in.get<uint64_t>();
    if (!in.ok() || !in.at_end() || !socket.starts_with("unix:")) {
      return invalid_argument("'{}' offers shm with a damaged address", peer.name);
    }
    BATON_ASSIGN_OR_RETURN(ControlPlane::Id id, control_.connect(socket, peer.epoch, peer.serial));
    int pid = control_.remote_pid(id);
    Status reachable = pid > 0 ? probe(pid, probe_address, peer)
                               : unavailable("'{}' lives in another pid namespace", peer.name);
    if (!reachable.ok()) {
      control_.close_outbound(id);
      return reachable;
    }
    auto link = std::make_unique<ShmLink>(*this, id, pid, peer.name);
    links_.emplace(id, link.get());
    return link;
  }

  Status fence(Epoch peer, uint64_t serial) override { return control_.fence(peer, serial); }
  Status shut_out() override { return control_.fence_all(); }

  size_t progress(BackendEvents& events) override {
    if (doorbells_) doorbells_->wake();
    const int64_t now_ns = context_->clock->now_ns();
    size_t count = 0;
    if (slept_ || now_ns - control_seen_ns_ >= (control_.reads_going_on() ? kControlOfReadsEveryNs : kControlEveryNs)) {
      slept_ = false;
      control_seen_ns_ = now_ns;
      count = control_.progress();
    }
    if (doorbells_) take_doorbells();
    count += arrivals_.size();
    for (const Arrival& arrival : arrivals_) events.on_arrived(arrival.tag, arrival.count);
    arrivals_.clear();
    if (!failed_.empty()) {
      for (auto& [link, status] : std::exchange(failed_, {})) {
        if (links_.contains(link->id_)) events.on_link_failed(*link, status);
      }
    }
    count += finish_posted(events);
    if (count > 0) last_event_ns_ = now_ns;
    return count;
  }

  size_t finish_posted(BackendEvents& events) override {
    if (copying_.empty()) return 0;
    // A completion may make the agent close its link, so take them out first.
    std::vector<std::pair<ShmLink*, uint64_t>> done;
    for (ShmLink* link : copying_) {
      link->flush();
      for (uint64_t cookie : link->copied_.take_told()) done.emplace_back(link, cookie);
    }
    std::erase_if(copying_, [](const ShmLink* link) { return link->copied_.empty(); });
    for (auto& [link, cookie] : done) events.on_posted_done(*link, cookie, Status());
    return done.size();
  }
  bool posts_at_once() const override { return true; }

  int64_t prepare_wait(std::vector<pollfd>& fds) override {
    fds.push_back({control_.poll_fd(), POLLIN, 0});
    slept_ = true;  // whoever is next looks at the control connections
    if (!arrivals_.empty() || !failed_.empty()) return 0;
    for (const ShmLink* link : copying_) {
      if (link->copied_.told()) return 0;
    }
    if (doorbells_ && context_->clock->now_ns() - last_event_ns_ < std::min(kAwakeNs, context_->config.poll_us * 1000)) {
      slept_ = false;
      return 0;
    }
    return control_.wants_time() ? 1'000'000'000 : INT64_MAX;
  }
  bool rest() override { return !doorbells_ || doorbells_->sleep(); }
  uint64_t inbound_peers() const override { return control_.inbound(); }
  CheckChannel& checks() override { return control_; }
  ReadChannel& reads() override { return control_; }
  bool reads_directly() const override { return true; }

 private:
  friend class ShmLink;

  /// Ubuntu's default (Yama ptrace_scope 1) lets only ancestors attach unless the process itself makes an
  /// exception. Only processes of the same user can use it.
  void allow_attach() {
    std::ifstream file("/proc/sys/kernel/yama/ptrace_scope");
    int scope = 0;
    if (file >> scope && scope == 1 && ::geteuid() != 0) {
      (void)::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
      log_info("transfer {}: shm: Yama's ptrace_scope is 1; processes of this user may attach to this one",
               context_->agent_name);
    }
  }

  /// Does the kernel let us reach that process, and is it the one that wrote the metadata?
  static Status probe(int pid, uint64_t address, const Metadata& peer) {
    uint64_t value = 0;
    iovec local{&value, sizeof(value)};
    iovec remote{reinterpret_cast<void*>(address), sizeof(value)};
    ssize_t n = ::process_vm_readv(pid, &local, 1, &remote, 1, 0);
    if (n == sizeof(value) && value == static_cast<uint64_t>(peer.epoch)) return Status();
    if (n < 0 && errno == EPERM) {
      return unavailable("the kernel does not allow attaching to pid {} ('{}'): "
                         "kernel.yama.ptrace_scope, seccomp or a user namespace forbids it", pid, peer.name);
    }
    if (n < 0) return unavailable("reading pid {} ('{}'): {}", pid, peer.name, std::strerror(errno));
    return unavailable("pid {} is not the process that wrote the metadata of '{}'", pid, peer.name);
  }

  Result<Welcome> on_inbound(ControlPlane::Id id, const Hello& hello) override {
    Welcome welcome;
    for (const LocalPool& pool : context_->pools()) {
      Result<const BackendRegion*> region = context_->backend_region(pool, *this);
      if (!region.ok()) continue;  // device memory: not reachable this way, the writer will be told
      const SharedSource& source = static_cast<const ShmRegion&>(**region).source;
      Welcome::Pool opened;
      opened.id = pool.id;
      opened.base = (*region)->remote_base;
      if (source.file) opened.packed_key = encode_ticket(source.ticket);
      welcome.pools.push_back(std::move(opened));
    }
    log_info("transfer {}: '{}' can write into this process over shm ({} pools)", context_->agent_name,
             hello.name, welcome.pools.size());
    Welcome::Pool doorbell;
    doorbell.id = kDoorbellPoolId;
    if (!doorbells_) return welcome;
    if (Result<uint32_t> bell = doorbells_->add(&doorbell.packed_key); bell.ok()) {
      doorbell.base = *bell;
      bells_.emplace(id, *bell);
      welcome.pools.push_back(std::move(doorbell));
    } else {
      log_info("transfer {}: no doorbell for '{}', it notifies by socket: {}", context_->agent_name, hello.name, bell.status().message());
    }
    return welcome;
  }
  void on_inbound_closed(ControlPlane::Id id, int) override {
    if (auto bell = bells_.find(id); bell != bells_.end()) {
      // What it told before it went counts.
      if (Status damaged = doorbells_->remove(bell->second, arrivals_); !damaged.ok()) {
        log_error("transfer {}: a writer that has gone: {}", context_->agent_name, damaged.message());
      }
      bells_.erase(bell);
    }
    context_->wake();
  }
  void take_doorbells() {
    std::vector<Doorbells::Damaged> damaged;
    doorbells_->take(arrivals_, damaged);
    for (const Doorbells::Damaged& one : damaged) {
      auto writer = std::find_if(bells_.begin(), bells_.end(), [&](const auto& entry) { return entry.second == one.bell; });
      log_error("transfer {}: a writer is shut out: {}", context_->agent_name, one.why.message());
      control_.expel(writer->first);
    }
  }
  void on_inbound_arrived(ControlPlane::Id, const Arrival& arrival) override {
    arrivals_.push_back(arrival);
  }
  void on_welcome(ControlPlane::Id id, Welcome welcome) override {
    auto it = links_.find(id);
    if (it == links_.end()) return;
    ShmLink& link = *it->second;
    size_t mapped = 0;
    for (const Welcome::Pool& pool : welcome.pools) {
      if (pool.id == kDoorbellPoolId) {
        link.open_doorbell(pool);
        continue;
      }
      link.open_pool(pool);
      if (link.pools_[pool.id].mapped != nullptr) ++mapped;
    }
    link.ready_ = true;
    log_info("transfer {}: shm to '{}': {} of {} pools are mapped here, the others are written through the kernel (cma)",
             context_->agent_name, link.peer_name_, mapped, link.pools_.size());
  }
  void on_outbound_closed(ControlPlane::Id id, const Status& why) override {
    auto it = links_.find(id);
    if (it == links_.end()) return;
    it->second->dead_ = true;
    failed_.emplace_back(it->second, why);
  }

  std::shared_ptr<BackendContext> context_;
  const std::string transport_ = "shm";
  const std::string provider_ = "cma";
  BackendLimits limits_;
  ControlPlane control_;
  std::unique_ptr<uint64_t> probe_;  // what a peer reads to see that it has the right process
  std::unordered_map<ControlPlane::Id, ShmLink*> links_;
  std::vector<ShmLink*> copying_;  // those with something copied that is not done yet: idle peers cost nothing
  std::vector<Arrival> arrivals_;
  std::vector<std::pair<ShmLink*, Status>> failed_;
  std::unique_ptr<Doorbells> doorbells_;  // null: none can be had here
  std::unordered_map<ControlPlane::Id, uint32_t> bells_;
  int64_t last_event_ns_ = 0;
  int64_t control_seen_ns_ = 0;
  bool slept_ = true;
};

ShmLink::~ShmLink() {
  backend_.links_.erase(id_);
  std::erase(backend_.copying_, this);
  std::erase_if(backend_.failed_, [this](const auto& entry) { return entry.first == this; });
  backend_.control_.close_outbound(id_);
}

void ShmLink::open_pool(const Welcome::Pool& pool) {
  RemotePool& remote = pools_[pool.id];
  remote.base = pool.base;
  if (pool.packed_key.empty()) return;
  auto open = [&]() -> Result<MappedPool*> {
    BATON_ASSIGN_OR_RETURN(SharedTicket ticket, parse_ticket(pool.packed_key));
    auto key = std::tuple(ticket.device, ticket.inode, ticket.offset, ticket.bytes);
    auto known = mappings_.find(key);
    if (known == mappings_.end()) {
      BATON_ASSIGN_OR_RETURN(MappedPool mapping, MappedPool::open(pid_, ticket));
      known = mappings_.emplace(key, std::move(mapping)).first;
    }
    return &known->second;
  };
  Result<MappedPool*> mapped = open();
  if (mapped.ok()) {
    remote.mapped = *mapped;
  } else {
    log_warning("transfer: shm to '{}': pool {} is shared but cannot be mapped ({}); the kernel copies instead, which takes about "
                "twice as long", peer_name_, pool.id, mapped.status().message());
  }
}

void ShmLink::open_doorbell(const Welcome::Pool& doorbell) {
  Result<Doorbell> opened = Doorbell::open(pid_, doorbell.base, doorbell.packed_key);
  if (opened.ok()) {
    doorbell_.emplace(std::move(*opened));
  } else {
    log_info("transfer: shm to '{}': its doorbell cannot be opened, notifications go by socket: {}", peer_name_, opened.status().message());
  }
}

Result<PostResult> ShmLink::post(const BackendMessage& message) {
  if (!ready()) return PostResult::kAgain;
  auto pool = pools_.find(message.remote_pool);
  if (pool == pools_.end()) {
    return failed_precondition("'{}' did not open pool {} for shm", peer_name_, message.remote_pool);
  }
  // A pid can be given to another process once its owner is gone; the kernel closes the socket before.
  if (!backend_.control_.still_connected(id_)) {
    return unavailable("the process of '{}' (pid {}) is gone", peer_name_, pid_);
  }
  const RemotePool& remote = pool->second;
  BATON_RETURN_IF_ERROR(remote.mapped != nullptr ? copy_mapped(message, *remote.mapped) : copy_by_kernel(message, remote.base));
  if (copied_.empty()) backend_.copying_.push_back(this);
  copied_.add(message.cookie, message.tag);
  return PostResult::kPosted;
}

Status ShmLink::copy_mapped(const BackendMessage& message, MappedPool& remote) {
  // The agent checks against the metadata, which came another way than the mapping.
  for (const Segment& segment : message.segments) {
    if (segment.remote_offset > remote.bytes() || segment.bytes > remote.bytes() - segment.remote_offset) {
      return data_loss("'{}' announced a pool that ends behind its memory: {} bytes from offset {} of {}", peer_name_, segment.bytes,
                       segment.remote_offset, remote.bytes());
    }
  }
  bool stream = message.bytes >= kMinStreamBytes;
  for (const Segment& segment : message.segments) {
    remote.prepare(segment.remote_offset, segment.bytes);
    std::byte* to = remote.data() + segment.remote_offset;
    std::byte* from = message.local->data + segment.local_offset;
    if (message.read) std::swap(from, to);
    if (stream && (!message.read || segment.bytes >= kMinStreamReadBytes)) {
      stream_copy(to, from, segment.bytes);
    } else {
      std::memcpy(to, from, segment.bytes);
    }
  }
  if (stream) stream_fence();
  return Status();
}

Status ShmLink::copy_by_kernel(const BackendMessage& message, uint64_t remote_base) {
  iovec local[kMaxSegments];
  iovec remote[kMaxSegments];
  size_t count = message.segments.size();
  BATON_CHECK(count <= kMaxSegments);
  for (size_t i = 0; i < count; ++i) {
    const Segment& segment = message.segments[i];
    local[i] = {message.local->data + segment.local_offset, segment.bytes};
    remote[i] = {reinterpret_cast<void*>(remote_base + segment.remote_offset), segment.bytes};
  }
  size_t first = 0;
  while (first < count) {
    ssize_t n = (message.read ? ::process_vm_readv : ::process_vm_writev)(pid_, local + first, count - first, remote + first,
                                                                          count - first, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      int error = n == 0 ? EFAULT : errno;
      return unavailable("process_vm_{}v of '{}' (pid {}): {}", message.read ? "read" : "write", peer_name_, pid_,
                         std::strerror(error));
    }
    // A short count (a signal, or the end of a mapping) ends inside some piece: go on from there.
    auto left = static_cast<size_t>(n);
    while (first < count && left >= local[first].iov_len) left -= local[first++].iov_len;
    if (first < count && left > 0) {
      local[first] = {static_cast<std::byte*>(local[first].iov_base) + left, local[first].iov_len - left};
      remote[first] = {static_cast<std::byte*>(remote[first].iov_base) + left,
                       remote[first].iov_len - left};
    }
  }
  return Status();
}

void ShmLink::flush() {
  if (!dead_) copied_.tell(backend_.control_, id_, doorbell_ ? &*doorbell_ : nullptr);
}

}  // namespace

Result<std::unique_ptr<Backend>> create_shm_backend(std::shared_ptr<BackendContext> context) {
  auto backend = std::make_unique<ShmBackend>(std::move(context));
  BATON_RETURN_IF_ERROR(backend->open());
  return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace baton::transfer
