#include "transfer/cuda/cuda_backend.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <unordered_map>

#include "base/check.h"
#include "base/log.h"
#include "base/unique_handle.h"
#include "transfer/control.h"
#include "transfer/copied_messages.h"
#include "transfer/cuda/copy_engine.h"
#include "transfer/cuda/device.h"
#include "transfer/cuda/read_back.h"
#include "transfer/process_handle.h"
#include "transfer/wire.h"

namespace baton::transfer {
namespace {

using namespace cuda;

constexpr size_t kUuidBytes = 16;
constexpr size_t kMaxDevices = 64;
/// After the last event the progress thread keeps looking for so long, and only then sleeps: between the pieces of a
/// handoff a wake-up would cost more than the copy.
constexpr int64_t kSpinNs = 200'000;
/// A copy of a few blocks ends within microseconds of its launch: one turn of the progress thread stays with it.
constexpr uint64_t kSmallCopyBytes = 512u << 10;
constexpr int64_t kSmallCopySpinNs = 12'000;
/// How often a caller's event is looked at after that.
constexpr int64_t kEventPollNs = 20'000;
/// When a copy has not ended for so long the driver is asked whether the GPU still works.
constexpr int64_t kHealthCheckNs = 50'000'000;
/// What a writer sends last: everything of it has ended.
constexpr Arrival kGoodbye{0, 0};

/// One allocation of an owner, as it describes it in its Welcome.
struct Allocation {
  std::string handle;  // CUipcMemHandle
  std::string uuid;    // of its device
  uint64_t base = 0;   // the owner's address
  uint64_t bytes = 0;
};

std::string encode_allocation(const Allocation& allocation) {
  WireWriter out;
  out.put_string(allocation.handle);
  out.put_string(allocation.uuid);
  out.put(allocation.base);
  out.put(allocation.bytes);
  return out.take();
}

Result<Allocation> parse_allocation(std::string_view bytes) {
  WireReader in(bytes);
  Allocation allocation;
  allocation.handle = in.get_string(sizeof(CUipcMemHandle));
  allocation.uuid = in.get_string(kUuidBytes);
  allocation.base = in.get<uint64_t>();
  allocation.bytes = in.get<uint64_t>();
  if (!in.ok() || !in.at_end() || allocation.handle.size() != sizeof(CUipcMemHandle) ||
      allocation.uuid.size() != kUuidBytes) {
    return invalid_argument("a damaged description of GPU memory");
  }
  return allocation;
}

/// A GPU of this process with its engine.
struct LocalDevice {
  std::shared_ptr<const Device> device;
  std::unique_ptr<CopyEngine> engine;
  struct Copy {
    uint64_t sequence;
    class CudaLink* link;
    uint64_t cookie;
    Tag tag;
    uint64_t bytes;
  };
  uint64_t bytes_under_way = 0;
  std::array<std::deque<Copy>, CopyEngine::kStreams> copies;  // under way, in order
  int64_t last_end_ns = 0;
  Status broken;
  std::unique_ptr<ReadBack> read_back;  // integrity mode
};

class CudaRegion final : public BackendRegion {
 public:
  LocalDevice* device = nullptr;  // lives as long as the backend
  Allocation allocation;
};

/// A peer's allocation in this process's address space of one device.
class Mapping {
 public:
  Mapping(std::shared_ptr<const Device> device, CUdeviceptr address, bool opened)
      : device_(std::move(device)), address_(address), opened_(opened) {}
  ~Mapping() {
    if (!opened_) return;
    CurrentDevice current(*device_);
    (void)device_->driver().ipc_close_handle(address_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  CUdeviceptr address() const { return address_; }

 private:
  const std::shared_ptr<const Device> device_;
  const CUdeviceptr address_;
  const bool opened_;
};

class CudaBackend;

class CudaLink final : public Link {
 public:
  CudaLink(CudaBackend& backend, ControlPlane::Id id, bool same_process, std::string peer_name)
      : backend_(backend), id_(id), same_process_(same_process), peer_name_(std::move(peer_name)) {}
  ~CudaLink() override;

  Result<PostResult> post(const BackendMessage& message) override;
  bool ready() const override { return ready_ && !dead_; }
  bool late_writes_possible() const override { return false; }
  bool closable() const override { return under_way_ == 0; }
  CheckChannel::Connection connection() const override { return id_; }

  struct Pool {
    size_t allocation = 0;
    uint64_t offset = 0;
  };
  void tell_copied();

  CudaBackend& backend_;
  const ControlPlane::Id id_;
  const bool same_process_;
  const std::string peer_name_;
  bool ready_ = false;
  bool dead_ = false;
  size_t under_way_ = 0;
  std::vector<Allocation> allocations_;
  std::unordered_map<uint32_t, Pool> pools_;
  std::map<std::pair<size_t, const LocalDevice*>, std::shared_ptr<Mapping>> mappings_;
  CopiedMessages copied_;
};

class CudaBackend final : public Backend, private ControlPlane::Delegate {
 public:
  CudaBackend(std::shared_ptr<BackendContext> context, std::shared_ptr<const Driver> driver)
      : context_(std::move(context)),
        driver_(std::move(driver)),
        control_({.epoch = context_->epoch, .name = context_->agent_name, .writer_must_confirm = true}, *this,
                 *context_->clock) {
    // Two messages keep both streams of the engine busy; a third hides what happens between them.
    constexpr uint64_t kMessageBytes = 64u << 20;
    limits_.plan = {.max_message_bytes = kMessageBytes,
                    .max_segments = CopyEngine::kMaxListPieces,
                    .max_packed_segment_bytes = kMessageBytes,
                    // Smaller ones: neighbours joined are worth more. Larger ones are few, and so many warps that fetch
                    // one number each from the host would wait for each other.
                    .min_listed_bytes = 4096,
                    .max_listed_bytes = CopyEngine::kMaxPieceBytes};
    limits_.max_inflight_messages = context_->config.max_inflight_per_rail;
    limits_.max_inflight_bytes = 4 * kMessageBytes;
    limits_.max_burst_bytes = 4 * kMessageBytes;
  }

  Status open() { return control_.listen("unix:"); }

  const std::string& transport() const override { return transport_; }
  const std::string& provider() const override { return provider_; }
  const BackendLimits& limits() const override { return limits_; }
  bool moves(MemoryKind from, MemoryKind to) const override {
    return from == MemoryKind::kCuda && to == MemoryKind::kCuda;
  }
  std::string describe() const override {
    std::string names;
    for (const auto& [ordinal, local] : devices_) names += (names.empty() ? "" : ", ") + local->device->name();
    return fmt::format("cuda_ipc (CUDA {}.{}, {}, {} writers at {})", driver_->version / 1000,
                       driver_->version % 1000 / 10, names.empty() ? "no GPU memory yet" : names, control_.inbound(),
                       control_.address());
  }

  Result<std::unique_ptr<BackendRegion>> register_memory(std::span<std::byte> memory, MemoryKind kind) override;
  std::string address() const override;
  Result<std::unique_ptr<Link>> open_link(const Metadata& peer, const Metadata::Offer& offer) override;
  Status fence(Epoch peer, uint64_t serial) override;
  Status shut_out() override { return control_.fence_all(); }
  size_t progress(BackendEvents& events) override;
  int64_t prepare_wait(std::vector<pollfd>& fds) override;
  uint64_t inbound_peers() const override { return control_.inbound(); }
  CheckChannel& checks() override { return control_; }
  ReadChannel& reads() override { return control_; }
  Result<std::span<const std::byte>> read_back(const BackendRegion& region, uint64_t offset, uint64_t bytes) override;

 private:
  friend class CudaLink;

  struct Inbound {
    Epoch epoch = Epoch::kNone;
    std::string name;
    int pid = 0;
    std::optional<ProcessHandle> process;  // none: this very process
    bool said_goodbye = false;
  };

  Result<LocalDevice*> local_device(int ordinal);
  Status check_reachable(const Metadata& peer, std::span<const std::string> uuids) const;
  Result<std::shared_ptr<Mapping>> map(const Allocation& allocation, const LocalDevice& local, bool same_process,
                                       const std::string& peer_name);
  size_t collect(LocalDevice& local, BackendEvents& events);
  bool forget_the_dead();

  Result<Welcome> on_inbound(ControlPlane::Id id, const Hello& hello) override;
  void on_inbound_closed(ControlPlane::Id id, int socket) override;
  void on_inbound_arrived(ControlPlane::Id id, const Arrival& arrival) override;
  void on_welcome(ControlPlane::Id id, Welcome welcome) override;
  void on_outbound_closed(ControlPlane::Id id, const Status& why) override;
  void saw_event() { last_event_ns_ = context_->clock->now_ns(); }

  const std::shared_ptr<BackendContext> context_;
  const std::shared_ptr<const Driver> driver_;
  const std::string transport_ = "cuda_ipc";
  const std::string provider_ = "copy kernel";
  BackendLimits limits_;
  std::map<int, std::unique_ptr<LocalDevice>> devices_;  // by ordinal
  ControlPlane control_;
  std::unordered_map<ControlPlane::Id, CudaLink*> links_;
  std::unordered_map<ControlPlane::Id, Inbound> inbound_;
  std::vector<Inbound> dying_;  // gone without a goodbye, and the kernel is not done with them
  std::vector<Arrival> arrivals_;
  std::vector<std::pair<CudaLink*, Status>> failed_;
  /// By handle and device: two links to one peer, and to one allocation, share a mapping.
  std::map<std::pair<std::string, const LocalDevice*>, std::weak_ptr<Mapping>> mappings_;
  int64_t last_event_ns_ = 0;
  bool waits_for_event_ = false;  // a caller's event held a message back
};

Result<LocalDevice*> CudaBackend::local_device(int ordinal) {
  auto it = devices_.find(ordinal);
  if (it != devices_.end()) return it->second.get();
  auto local = std::make_unique<LocalDevice>();
  BATON_ASSIGN_OR_RETURN(local->device, Device::open(driver_, ordinal));
  BATON_ASSIGN_OR_RETURN(local->engine,
                         CopyEngine::create(local->device, {.max_ctas = context_->config.cuda_max_ctas}));
  log_info("transfer {}: cuda_ipc uses {}", context_->agent_name, local->device->name());
  return devices_.emplace(ordinal, std::move(local)).first->second.get();
}

Result<std::unique_ptr<BackendRegion>> CudaBackend::register_memory(std::span<std::byte> memory, MemoryKind kind) {
  if (kind != MemoryKind::kCuda) return unimplemented("cuda_ipc moves GPU memory only");
  const Driver& cu = *driver_;
  auto address = reinterpret_cast<CUdeviceptr>(memory.data());
  BATON_ASSIGN_OR_RETURN(int ordinal, find_device(cu, address));
  auto region = std::make_unique<CudaRegion>();
  BATON_ASSIGN_OR_RETURN(region->device, local_device(ordinal));
  const Device& device = *region->device->device;
  CurrentDevice current(device);
  CUdeviceptr base = 0;
  size_t bytes = 0;
  BATON_RETURN_IF_ERROR(cu.check(cu.memory_range(&base, &bytes, address), "cuMemGetAddressRange"));
  if (address - base + memory.size() > bytes) {
    return invalid_argument("{} bytes from {:#x} are more than the allocation on {} holds ({} bytes from {:#x})",
                            memory.size(), address, device.name(), bytes, base);
  }
  CUipcMemHandle handle{};
  Status exported = cu.check(cu.ipc_get_handle(&handle, base), "cuIpcGetMemHandle");
  if (!exported.ok()) {
    int capable = 0;
    (void)cu.pointer_attribute(&capable, kPointerLegacyIpcCapable, address);
    return failed_precondition("{} bytes at {:#x} on {} cannot be given to other processes{}: {}", memory.size(), address,
                               device.name(),
                               capable != 0 ? "" : " (memory of cuMemMap or of a memory pool; use cuMemAlloc or cudaMalloc)",
                               exported.message());
  }
  region->allocation = {std::string(handle.bytes, sizeof(handle.bytes)), device.uuid(), base, bytes};
  region->data = memory.data();
  region->remote_base = address - base;
  return std::unique_ptr<BackendRegion>(std::move(region));
}

Result<std::span<const std::byte>> CudaBackend::read_back(const BackendRegion& region, uint64_t offset, uint64_t bytes) {
  LocalDevice& local = *static_cast<const CudaRegion&>(region).device;
  if (!local.broken.ok()) return local.broken;
  if (local.read_back == nullptr) {
    BATON_ASSIGN_OR_RETURN(local.read_back, ReadBack::create(local.device));
  }
  return local.read_back->read(reinterpret_cast<CUdeviceptr>(region.data) + offset, bytes);
}

std::string CudaBackend::address() const {
  WireWriter out;
  out.put_string(control_.address());
  out.put(static_cast<uint16_t>(devices_.size()));
  for (const auto& [ordinal, local] : devices_) out.put_string(local->device->uuid());
  return out.take();
}

Status CudaBackend::check_reachable(const Metadata& peer, std::span<const std::string> uuids) const {
  if (devices_.empty()) return failed_precondition("no GPU memory is registered here");
  std::map<std::string, int> visible;
  for (int i = 0; i < driver_->devices; ++i) {
    BATON_ASSIGN_OR_RETURN(std::string uuid, device_uuid(*driver_, i));
    visible.emplace(std::move(uuid), i);
  }
  for (const std::string& uuid : uuids) {
    auto remote = visible.find(uuid);
    // CUDA IPC also reaches a GPU that CUDA_VISIBLE_DEVICES hides from this process.
    if (remote == visible.end()) continue;
    for (const auto& [ordinal, local] : devices_) {
      if (local->device->uuid() == uuid) continue;
      int can = 0;
      CUdevice from = 0, to = 0;
      BATON_RETURN_IF_ERROR(driver_->check(driver_->device_get(&from, ordinal), "cuDeviceGet"));
      BATON_RETURN_IF_ERROR(driver_->check(driver_->device_get(&to, remote->second), "cuDeviceGet"));
      BATON_RETURN_IF_ERROR(driver_->check(driver_->device_can_access_peer(&can, from, to), "cuDeviceCanAccessPeer"));
      if (can == 0) {
        return unavailable("{} has no peer access to GPU {}, where the memory of '{}' is", local->device->name(),
                           remote->second, peer.name);
      }
    }
  }
  return Status();
}

Result<std::unique_ptr<Link>> CudaBackend::open_link(const Metadata& peer, const Metadata::Offer& offer) {
  WireReader in(offer.address);
  std::string socket(in.get_string(256));
  size_t count = in.get<uint16_t>();
  std::vector<std::string> uuids;
  for (size_t i = 0; i < std::min(count, kMaxDevices); ++i) uuids.emplace_back(in.get_string(kUuidBytes));
  if (!in.ok() || !in.at_end() || count > kMaxDevices || !socket.starts_with("unix:")) {
    return invalid_argument("'{}' offers cuda_ipc with a damaged address", peer.name);
  }
  BATON_RETURN_IF_ERROR(check_reachable(peer, uuids));
  BATON_ASSIGN_OR_RETURN(ControlPlane::Id id, control_.connect(socket, peer.epoch, peer.serial));
  int pid = control_.remote_pid(id);
  if (pid <= 0) {
    control_.close_outbound(id);
    return unavailable("'{}' lives in another pid namespace", peer.name);
  }
  auto link = std::make_unique<CudaLink>(*this, id, pid == ::getpid(), peer.name);
  links_.emplace(id, link.get());
  return link;
}

Status CudaBackend::fence(Epoch peer, uint64_t serial) {
  BATON_RETURN_IF_ERROR(control_.fence(peer, serial));
  forget_the_dead();
  for (const Inbound& dying : dying_) {
    if (dying.epoch != peer) continue;
    return unavailable("'{}' (pid {}) is going without having said that its copies have ended, and the kernel has not "
                       "taken it down yet", dying.name, dying.pid);
  }
  return Status();
}

bool CudaBackend::forget_the_dead() {
  return std::erase_if(dying_, [](const Inbound& dying) { return dying.process->ended(); }) > 0;
}

Result<Welcome> CudaBackend::on_inbound(ControlPlane::Id id, const Hello& hello) {
  Inbound inbound;
  inbound.epoch = hello.from;
  inbound.name = hello.name;
  inbound.pid = control_.remote_pid(id);
  if (inbound.pid != ::getpid()) {
    if (inbound.pid <= 0) return unavailable("'{}' lives in another pid namespace", hello.name);
    BATON_ASSIGN_OR_RETURN(inbound.process, ProcessHandle::open(inbound.pid));
    // Still connected: so it was that process, and not one that was given its pid afterwards.
    if (!control_.still_connected(id)) return unavailable("'{}' is gone", hello.name);
  }
  Welcome welcome;
  std::map<uint64_t, uint64_t> indexes;  // of allocations, by their base
  for (const LocalPool& pool : context_->pools()) {
    if (pool.region.impl() == nullptr) continue;
    Result<const BackendRegion*> found = context_->backend_region(pool, *this);
    if (!found.ok()) continue;  // host memory: not reachable this way, the writer will be told
    const auto& region = static_cast<const CudaRegion&>(**found);
    auto [index, fresh] = indexes.emplace(region.allocation.base, welcome.rails.size());
    if (fresh) welcome.rails.push_back(encode_allocation(region.allocation));
    welcome.pools.push_back({pool.id, region.remote_base, index->second});
  }
  log_info("transfer {}: '{}' can write into this process's GPU memory over cuda_ipc ({} pools)", context_->agent_name,
           hello.name, welcome.pools.size());
  inbound_.emplace(id, std::move(inbound));
  saw_event();
  return welcome;
}

void CudaBackend::on_inbound_closed(ControlPlane::Id id, int) {
  auto node = inbound_.extract(id);
  if (!node.empty() && !node.mapped().said_goodbye && node.mapped().process) {
    dying_.push_back(std::move(node.mapped()));
    forget_the_dead();
  }
  context_->wake();
}

void CudaBackend::on_inbound_arrived(ControlPlane::Id id, const Arrival& arrival) {
  if (arrival.tag == kGoodbye.tag && arrival.count == kGoodbye.count) {
    inbound_[id].said_goodbye = true;
  } else {
    arrivals_.push_back(arrival);
  }
}

void CudaBackend::on_welcome(ControlPlane::Id id, Welcome welcome) {
  auto it = links_.find(id);
  if (it == links_.end()) return;
  CudaLink& link = *it->second;
  for (const std::string& bytes : welcome.rails) {
    Result<Allocation> allocation = parse_allocation(bytes);
    if (!allocation.ok()) {
      failed_.emplace_back(&link, allocation.status());
      return;
    }
    link.allocations_.push_back(std::move(*allocation));
  }
  for (const Welcome::Pool& pool : welcome.pools) {
    if (pool.key >= link.allocations_.size() || pool.base > link.allocations_[pool.key].bytes) {
      failed_.emplace_back(&link, invalid_argument("'{}' describes its pool {} wrongly", link.peer_name_, pool.id));
      return;
    }
    link.pools_[pool.id] = {static_cast<size_t>(pool.key), pool.base};
    // Mapping takes milliseconds, which the first write need not wait for. What fails here is tried again there, and told.
    for (const auto& [ordinal, local] : devices_) {
      Result<std::shared_ptr<Mapping>> mapping = map(link.allocations_[pool.key], *local, link.same_process_, link.peer_name_);
      if (mapping.ok()) link.mappings_[{pool.key, local.get()}] = *std::move(mapping);
    }
  }
  link.ready_ = true;
  saw_event();
}

void CudaBackend::on_outbound_closed(ControlPlane::Id id, const Status& why) {
  auto it = links_.find(id);
  if (it == links_.end()) return;
  it->second->dead_ = true;
  failed_.emplace_back(it->second, why);
}

Result<std::shared_ptr<Mapping>> CudaBackend::map(const Allocation& allocation, const LocalDevice& local,
                                                  bool same_process, const std::string& peer_name) {
  std::weak_ptr<Mapping>& known = mappings_[{allocation.handle, &local}];
  if (std::shared_ptr<Mapping> mapping = known.lock()) return mapping;
  CurrentDevice current(*local.device);
  const Driver& cu = *driver_;
  std::shared_ptr<Mapping> mapping;
  if (same_process) {
    for (const auto& [ordinal, other] : devices_) {
      if (other->device->uuid() != allocation.uuid || other.get() == &local) continue;
      CUresult enabled = cu.context_enable_peer_access(other->device->context(), 0);
      if (enabled != kPeerAccessAlreadyEnabled) BATON_RETURN_IF_ERROR(cu.check(enabled, "cuCtxEnablePeerAccess"));
    }
    mapping = std::make_shared<Mapping>(local.device, allocation.base, false);
  } else {
    CUipcMemHandle handle;
    std::memcpy(handle.bytes, allocation.handle.data(), sizeof(handle.bytes));
    CUdeviceptr address = 0;
    BATON_RETURN_IF_ERROR(cu.check(
        cu.ipc_open_handle(&address, handle, kIpcLazyEnablePeerAccess),
        fmt::format("mapping {} bytes of the GPU memory of '{}' on {} (cuIpcOpenMemHandle)", allocation.bytes, peer_name,
                    local.device->name())));
    mapping = std::make_shared<Mapping>(local.device, address, true);
  }
  known = mapping;
  return mapping;
}

size_t CudaBackend::collect(LocalDevice& local, BackendEvents& events) {
  size_t ended = 0;
  bool waiting = false;
  for (uint32_t i = 0; i < CopyEngine::kStreams; ++i) {
    auto& copies = local.copies[i];
    if (copies.empty()) continue;
    uint64_t finished = local.engine->finished(i);
    while (!copies.empty() && (copies.front().sequence <= finished || !local.broken.ok())) {
      LocalDevice::Copy copy = copies.front();
      copies.pop_front();
      --copy.link->under_way_;
      local.bytes_under_way -= copy.bytes;
      ++ended;
      // After a break nothing of it can be said to have arrived; the link's end accounts for it.
      if (local.broken.ok()) copy.link->copied_.add(copy.cookie, copy.tag);
    }
    waiting = waiting || !copies.empty();
  }
  int64_t now_ns = context_->clock->now_ns();
  if (ended > 0) local.last_end_ns = now_ns;
  if (waiting && now_ns - local.last_end_ns > kHealthCheckNs) {
    local.last_end_ns = now_ns;
    local.broken = local.engine->health();
    if (!local.broken.ok()) {
      log_error("transfer {}: {}", context_->agent_name, local.broken.to_string());
      for (auto& [id, link] : links_) events.on_link_failed(*link, local.broken);
      return ended + collect(local, events);
    }
  }
  return ended;
}

size_t CudaBackend::progress(BackendEvents& events) {
  size_t count = 0;
  for (auto& [ordinal, local] : devices_) {
    count += collect(*local, events);
    if (count > 0 || local->bytes_under_way == 0 || local->bytes_under_way > kSmallCopyBytes) continue;
    int64_t until_ns = context_->clock->now_ns() + kSmallCopySpinNs;
    while (count == 0 && !context_->has_news() && context_->clock->now_ns() < until_ns) count += collect(*local, events);
  }
  // A completion may make the agent close its link, so take them out first.
  std::vector<std::pair<CudaLink*, uint64_t>> done;
  for (auto& [id, link] : links_) {
    link->tell_copied();
    for (uint64_t cookie : link->copied_.take_told()) done.emplace_back(link, cookie);
  }
  for (auto& [link, cookie] : done) events.on_posted_done(*link, cookie, Status());
  count += control_.progress() + done.size();
  for (const Arrival& arrival : arrivals_) events.on_arrived(arrival.tag, arrival.count);
  arrivals_.clear();
  for (auto& [link, status] : std::exchange(failed_, {})) {
    if (links_.contains(link->id_)) events.on_link_failed(*link, status);
  }
  if (!dying_.empty() && forget_the_dead()) ++count;
  if (count > 0) saw_event();
  return count;
}

int64_t CudaBackend::prepare_wait(std::vector<pollfd>& fds) {
  if (!arrivals_.empty() || !failed_.empty()) return 0;
  for (const auto& [ordinal, local] : devices_) {
    for (const auto& copies : local->copies) {
      if (!copies.empty()) return 0;
    }
  }
  for (const auto& [id, link] : links_) {
    if (link->copied_.told()) return 0;
  }
  if (!links_.empty() || !inbound_.empty()) {
    if (context_->clock->now_ns() - last_event_ns_ < kSpinNs) return 0;
  }
  fds.push_back({control_.poll_fd(), POLLIN, 0});
  for (const Inbound& dying : dying_) fds.push_back({dying.process->fd(), POLLIN, 0});
  if (std::exchange(waits_for_event_, false)) return kEventPollNs;
  return control_.wants_time() ? 1'000'000'000 : INT64_MAX;
}

CudaLink::~CudaLink() {
  BATON_CHECK(under_way_ == 0) << "a link to '" << peer_name_ << "' closed with copies under way";
  backend_.links_.erase(id_);
  std::erase_if(backend_.failed_, [this](const auto& entry) { return entry.first == this; });
  mappings_.clear();
  std::erase_if(backend_.mappings_, [](const auto& entry) { return entry.second.expired(); });
  backend_.control_.close_outbound(id_, std::span(&kGoodbye, 1));
}

Result<PostResult> CudaLink::post(const BackendMessage& message) {
  if (!ready()) return PostResult::kAgain;
  auto pool = pools_.find(message.remote_pool);
  if (pool == pools_.end()) {
    return failed_precondition("'{}' did not open pool {} for cuda_ipc", peer_name_, message.remote_pool);
  }
  auto& local = *static_cast<const CudaRegion*>(message.local)->device;
  if (!local.broken.ok()) return local.broken;
  if (message.after != nullptr) {
    CurrentDevice current(*local.device);
    CUresult reached = backend_.driver_->event_query(static_cast<CUevent>(message.after));
    if (reached == kNotReady) {
      backend_.waits_for_event_ = true;
      return PostResult::kAgain;
    }
    BATON_RETURN_IF_ERROR(backend_.driver_->check(reached, "the event that a write waits for (cuEventQuery)"));
  }
  const Allocation& allocation = allocations_[pool->second.allocation];
  const uint64_t room = allocation.bytes - pool->second.offset;
  bool fits = message.remote_end <= room;
  for (const Segment& segment : message.segments) {
    fits = fits && segment.bytes <= room && segment.remote_offset <= room - segment.bytes;
  }
  if (!fits) {
    return failed_precondition("pool {} of '{}' is larger than the allocation that it says it lies in", message.remote_pool,
                               peer_name_);
  }
  std::shared_ptr<Mapping>& mapping = mappings_[{pool->second.allocation, &local}];
  if (mapping == nullptr) {
    BATON_ASSIGN_OR_RETURN(mapping, backend_.map(allocation, local, same_process_, peer_name_));
  }
  const auto from = reinterpret_cast<CUdeviceptr>(message.local->data);
  const CUdeviceptr to = mapping->address() + pool->second.offset;
  const bool within_device = allocation.uuid == local.device->uuid();
  BATON_ASSIGN_OR_RETURN(std::optional<CopyEngine::Ticket> ticket,
                         message.blocks.empty()
                             ? local.engine->start(from, to, message.segments, within_device)
                             : local.engine->start_blocks(from, to, message.blocks, message.range, within_device));
  if (!ticket) return PostResult::kAgain;
  bool was_idle = std::all_of(local.copies.begin(), local.copies.end(), [](const auto& one) { return one.empty(); });
  if (was_idle) local.last_end_ns = backend_.context_->clock->now_ns();
  local.copies[ticket->stream].push_back({ticket->sequence, this, message.cookie, message.tag, message.bytes});
  local.bytes_under_way += message.bytes;
  ++under_way_;
  return PostResult::kPosted;
}

void CudaLink::tell_copied() {
  if (!dead_) copied_.tell(backend_.control_, id_);
}

}  // namespace

Result<std::unique_ptr<Backend>> create_cuda_backend(std::shared_ptr<BackendContext> context) {
  BATON_ASSIGN_OR_RETURN(std::shared_ptr<const Driver> driver, Driver::load(context->config.cuda_library));
  auto backend = std::make_unique<CudaBackend>(std::move(context), std::move(driver));
  BATON_RETURN_IF_ERROR(backend->open());
  return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace baton::transfer
