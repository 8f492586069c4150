#include "transfer/cuda/staged_backend.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

#include "base/check.h"
#include "base/log.h"
#include "transfer/cuda/staged_backend_impl.h"
#include "transfer/descriptors.h"
#include "transfer/fabric/provider.h"

namespace baton::transfer {
namespace staged {
namespace {

/// As with cuda_ipc: between the pieces of a handoff a wake-up would cost more than a copy.
constexpr int64_t kSpinNs = 200'000;
/// How often a caller's event is looked at after that, and a host transport that had said "not now".
constexpr int64_t kAgainNs = 20'000;
/// How often the sockets are looked at while nobody uses this path: four system calls are a lot to somebody else's message.
constexpr int64_t kIdlePollNs = 200'000;

}  // namespace

/// What the host backend gets to see: this agent, with the slots as its only pool.
class StagedBackend::SlotContext final : public BackendContext {
 public:
  SlotContext(const BackendContext& outer, BackendContext& agent, StagedInbound& inbound)
      : BackendContext(outer), agent_(agent), inbound_(inbound) {}
  std::vector<LocalPool> pools() const override {
    Result<SlotMemory*> memory = inbound_.memory();
    if (!memory.ok()) {
      log_error("transfer {}: no memory for staging: {}", agent_name, memory.status().to_string());
      return {};
    }
    return {{0, (*memory)->region(), kSlots * kSlotStride, 1}};
  }
  Result<const BackendRegion*> backend_region(const LocalPool& pool, Backend& backend) override {
    return pool.region.impl()->with(backend);
  }
  uint64_t serial() const override { return agent_.serial(); }
  bool has_news() const override { return agent_.has_news(); }
  void wake() override { agent_.wake(); }

 private:
  BackendContext& agent_;
  StagedInbound& inbound_;
};

StagedBackend::StagedBackend(std::shared_ptr<BackendContext> context, std::string transport)
    : context_(std::move(context)),
      transport_(std::move(transport)),
      control_({.epoch = context_->epoch, .name = context_->agent_name}, *this, *context_->clock),
      inbound_(*context_, *this, control_) {}

StagedBackend::~StagedBackend() { BATON_CHECK(links_.empty()) << "links must be closed before their backend"; }

Status StagedBackend::open(const HostBackendFactory& open_host, std::shared_ptr<UnusedSockets> unused) {
  unused_ = std::move(unused);
  for (uint32_t slot = kSlots; slot > 0; --slot) free_.push_back(slot - 1);
  const std::string host = staged_over(transport_);
  slot_context_ = std::make_shared<SlotContext>(*context_, *context_, inbound_);
  slot_context_->config.transport = host;
  BATON_ASSIGN_OR_RETURN(inner_, open_host(slot_context_, host));
  inbound_.set_host_transport(*inner_);
  provider_ = fmt::format("staged over {}", inner_->provider());
  limits_ = limits_for({});
  std::string address = "unix:";
  if (host != "shm" && host != "sim") {
    BATON_ASSIGN_OR_RETURN(std::vector<std::string> ips, fabric::local_addresses(context_->config.bind_address));
    address = ips.front().find(':') != std::string::npos ? fmt::format("tcp:[{}]", ips.front()) : "tcp:" + ips.front();
  }
  BATON_RETURN_IF_ERROR(control_.listen(address));
  BATON_RETURN_IF_ERROR(unused_->watch(control_.poll_fd()));
  std::vector<pollfd> fds;
  (void)inner_->prepare_wait(fds);
  for (const pollfd& fd : fds) BATON_RETURN_IF_ERROR(unused_->watch(fd.fd));
  return Status();
}

BackendLimits StagedBackend::limits_for(const std::string& address) const {
  const Result<Address> peer = parse_address(address);
  const BackendLimits inner = peer.ok() ? inner_->limits_for(peer->inner) : inner_->limits();
  uint64_t data_bytes = kDataBytes;
  uint32_t pieces = kMaxPieces;
  if (peer.ok()) {
    data_bytes = std::min(data_bytes, peer->data_bytes);
    pieces = std::min(pieces, peer->max_pieces);
  }
  // Many small pieces must not leave nothing of a short message.
  while (descriptor_bytes(pieces) > inner.plan.max_message_bytes / 8 && pieces > 1) pieces /= 2;
  BackendLimits limits;
  // Ours over shm may be longer than its own: at most a descriptor goes that way, or one copy like any other.
  const uint64_t longest = inner_->transport() == "shm" ? kSlotStride : inner.plan.max_message_bytes;
  limits.plan.max_message_bytes = std::min(data_bytes, longest - descriptor_bytes(pieces));
  limits.plan.max_segments = pieces;
  limits.plan.max_packed_segment_bytes = limits.plan.max_message_bytes;
  limits.max_inflight_messages = kSlots;
  limits.max_inflight_bytes = kSlots * kDataBytes;
  limits.max_burst_bytes = 2 * kDataBytes;  // host memory is copied while the others wait
  return limits;
}

std::string StagedBackend::describe() const {
  if (devices_.empty() && links_.empty() && inbound_.writers() == 0) return fmt::format("{} (not used)", transport_);
  std::string names;
  for (const auto& [ordinal, local] : devices_) names += (names.empty() ? "" : ", ") + local->device->name();
  return fmt::format("{} ({}, {} writers, {} links, {:.1f} MB gathered and sent, {:.1f} of it "
                     "straight into slots of the receivers, {:.1f} MB received and scattered, {} times "
                     "a writer found no slot)", transport_, names.empty() ? "no GPU memory" : names, inbound_.writers(),
                     links_.size(), static_cast<double>(sent_bytes_) * 1e-6,
                     static_cast<double>(straight_bytes_) * 1e-6, static_cast<double>(inbound_.bytes()) * 1e-6,
                     inbound_.waits());
}

Result<StagedDevice*> StagedBackend::open_device(int ordinal) {
  auto it = devices_.find(ordinal);
  if (it != devices_.end()) return it->second.get();
  auto local = std::make_unique<StagedDevice>();
  BATON_ASSIGN_OR_RETURN(local->device, cuda::Device::open(driver_, ordinal));
  cuda::Stager::Options options{.copies = kSlots, .copy_bytes = kDataBytes};
  if (context_->config.cuda_max_ctas != 0) options.max_ctas = std::min(options.max_ctas, context_->config.cuda_max_ctas);
  BATON_ASSIGN_OR_RETURN(local->stager, cuda::Stager::create(local->device, options));
  return devices_.emplace(ordinal, std::move(local)).first->second.get();
}

Result<std::unique_ptr<BackendRegion>> StagedBackend::register_memory(std::span<std::byte> memory, MemoryKind kind) {
  auto region = std::make_unique<StagedRegion>();
  region->data = memory.data();
  if (kind == MemoryKind::kHost) return std::unique_ptr<BackendRegion>(std::move(region));
  if (driver_ == nullptr) {
    BATON_ASSIGN_OR_RETURN(driver_, cuda::Driver::load(context_->config.cuda_library));
  }
  const auto first = reinterpret_cast<cuda::CUdeviceptr>(memory.data());
  BATON_ASSIGN_OR_RETURN(int ordinal, cuda::find_device(*driver_, first));
  BATON_ASSIGN_OR_RETURN(int last_ordinal, cuda::find_device(*driver_, first + memory.size() - 1));
  if (ordinal != last_ordinal) return invalid_argument("{} bytes from {:#x} lie on two GPUs", memory.size(), first);
  BATON_ASSIGN_OR_RETURN(region->device, open_device(ordinal));
  return std::unique_ptr<BackendRegion>(std::move(region));
}

std::string StagedBackend::address() const {
  return encode_address({control_.address(), inner_->address(), kDataBytes, kMaxPieces});
}

Status StagedBackend::open_out() {
  if (out_ != nullptr) return Status();
  for (const LocalPool& pool : context_->pools()) ignore_status(context_->backend_region(pool, *this).status());
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<SlotMemory> memory,
                         SlotMemory::create("baton-staging-out", devices_.empty() ? nullptr : devices_.begin()->second->device));
  // Opens the host transport as well, so its limits are the final ones.
  BATON_RETURN_IF_ERROR(memory->region().impl()->with(*inner_).status());
  out_ = std::move(memory);
  return Status();
}

uint32_t StagedBackend::take_slot() {
  const uint32_t slot = free_.back();
  free_.pop_back();
  return slot;
}

Result<std::unique_ptr<Link>> StagedBackend::open_link(const Metadata& peer, const Metadata::Offer& offer) {
  Result<Address> address = parse_address(offer.address);
  if (!address.ok()) return address.status().with_context(fmt::format("'{}' offers {}", peer.name, transport_));
  used_ = true;
  // Over shm most links need none.
  if (inner_->transport() != "shm") BATON_RETURN_IF_ERROR(open_out());
  provider_ = fmt::format("staged over {}", inner_->provider());
  const Metadata::Offer inner_offer{inner_->transport(), inner_->provider(), address->inner};
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Link> inner, inner_->open_link(peer, inner_offer));
  BATON_ASSIGN_OR_RETURN(ControlPlane::Id id, control_.connect(address->control, peer.epoch, peer.serial));
  auto link = std::make_unique<StagedLink>(*this, id, peer.name, std::move(inner), inner_->limits_for(address->inner));
  links_.emplace(id, link.get());
  return std::unique_ptr<Link>(std::move(link));
}

Result<std::span<const std::byte>> StagedBackend::read_back(const BackendRegion& region, uint64_t offset, uint64_t bytes) {
  StagedDevice* const device = static_cast<const StagedRegion&>(region).device;
  if (device == nullptr) return std::span<const std::byte>(region.data + offset, bytes);
  if (!device->broken.ok()) return device->broken;
  if (device->read_back == nullptr) {
    BATON_ASSIGN_OR_RETURN(device->read_back, cuda::ReadBack::create(device->device));
  }
  return device->read_back->read(reinterpret_cast<cuda::CUdeviceptr>(region.data) + offset, bytes);
}

Result<bool> StagedBackend::event_reached(const StagedDevice& device, void* event) {
  if (event == nullptr) return true;
  cuda::CurrentDevice current(*device.device);
  const cuda::CUresult reached = driver_->event_query(static_cast<cuda::CUevent>(event));
  if (reached == cuda::kNotReady) {
    waits_for_event_ = true;
    return false;
  }
  BATON_RETURN_IF_ERROR(driver_->check(reached, "the event that a write waits for (cuEventQuery)"));
  return true;
}

Status StagedBackend::fence(Epoch peer, uint64_t serial) {
  BATON_RETURN_IF_ERROR(control_.fence(peer, serial));  // at once: what lies in its slots stays there
  BATON_RETURN_IF_ERROR(inner_->fence(peer, serial));
  return inbound_.settle(peer);
}

Status StagedBackend::shut_out() {
  BATON_RETURN_IF_ERROR(control_.fence_all());
  BATON_RETURN_IF_ERROR(inner_->shut_out());
  return inbound_.settle_all();
}

void StagedBackend::on_posted_done(Link& link, uint64_t cookie, const Status& status) {
  static_cast<StagedLink*>(link.owner)->on_sent(static_cast<uint32_t>(cookie), status);
}

void StagedBackend::on_link_failed(Link& link, const Status& status) {
  static_cast<StagedLink*>(link.owner)->die(status);
}

void StagedBackend::on_welcome(ControlPlane::Id id, Welcome welcome) {
  if (auto it = links_.find(id); it != links_.end()) it->second->on_welcome(welcome);
}

void StagedBackend::on_outbound_arrived(ControlPlane::Id id, const Arrival& arrival) {
  if (auto it = links_.find(id); it != links_.end()) it->second->on_note(arrival);
}

void StagedBackend::on_outbound_closed(ControlPlane::Id id, const Status& why) {
  if (auto it = links_.find(id); it != links_.end()) it->second->die(why);
}

void StagedBackend::forget(StagedLink& link) {
  links_.erase(link.id());
  std::erase_if(failed_, [&](const auto& entry) { return entry.first == &link; });
  std::erase_if(done_, [&](const auto& entry) { return entry.first == &link; });
  control_.close_outbound(link.id());
}

size_t StagedBackend::progress(BackendEvents& events) {
  const int64_t begin_ns = now_ns();
  // A socket of ours that has something to say keeps the thread awake until then.
  if (!used_ && begin_ns - seen_ns_ < kIdlePollNs) return 0;
  seen_ns_ = begin_ns;
  size_t count = control_.progress();
  // Before slots are granted: the last words of a writer that was shut out still name a slot that is free then.
  count += inner_->progress(*this);
  count += inbound_.progress(events);
  for (auto& [id, link] : links_) count += link->advance();
  count += done_.size() + failed_.size();
  // A completion may make the agent close its link, so both are taken out first.
  for (auto& [link, cookie] : std::exchange(done_, {})) events.on_posted_done(*link, cookie, Status());
  for (auto& [link, status] : std::exchange(failed_, {})) events.on_link_failed(*link, status);
  if (std::exchange(slept_, false) && (!links_.empty() || inbound_.writers() > 0)) last_event_ns_ = begin_ns;
  if (count > 0) last_event_ns_ = now_ns();
  return count;
}

int64_t StagedBackend::prepare_wait(std::vector<pollfd>& fds) {
  if (unused_->is_mine(this)) fds.push_back({unused_->poll_fd(), POLLIN, 0});
  if (!used_) return std::numeric_limits<int64_t>::max();
  int64_t longest_ns = std::min(inner_->prepare_wait(fds), inbound_.longest_wait_ns());
  fds.push_back({control_.poll_fd(), POLLIN, 0});
  if (control_.wants_time()) longest_ns = std::min<int64_t>(longest_ns, 1'000'000'000);
  if (!done_.empty() || !failed_.empty()) longest_ns = 0;
  for (const auto& [id, link] : links_) {
    if (link->gathers()) longest_ns = 0;
    if (link->held_back()) longest_ns = std::min(longest_ns, kAgainNs);
  }
  if (std::exchange(waits_for_event_, false)) longest_ns = std::min(longest_ns, kAgainNs);
  if ((!links_.empty() || inbound_.writers() > 0) && now_ns() - last_event_ns_ < kSpinNs) longest_ns = 0;
  slept_ = longest_ns > 0;
  return longest_ns;
}

}  // namespace staged

Result<std::shared_ptr<UnusedSockets>> UnusedSockets::create() {
  auto sockets = std::make_shared<UnusedSockets>();
  sockets->epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!sockets->epoll_) return descriptor_error("epoll_create1", errno);
  return sockets;
}

Status UnusedSockets::watch(int fd) {
  epoll_event event{};
  event.events = EPOLLIN;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0) return Status();
  return watch_error("epoll_ctl", errno);
}

Result<std::unique_ptr<Backend>> create_staged_backend(std::shared_ptr<BackendContext> context,
                                                       const std::string& transport, const HostBackendFactory& open_host,
                                                       std::shared_ptr<UnusedSockets> unused) {
  auto backend = std::make_unique<staged::StagedBackend>(std::move(context), transport);
  BATON_RETURN_IF_ERROR(backend->open(open_host, std::move(unused)));
  return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace baton::transfer
