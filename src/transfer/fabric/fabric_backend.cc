#include "transfer/fabric/fabric_backend.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <unordered_map>

#include "base/check.h"
#include "base/log.h"
#include "base/random.h"
#include "transfer/control.h"
#include "transfer/fabric/provider.h"

namespace baton::transfer {
namespace {

using namespace fabric;

class FabricBackend;
class FabricLink;

/// The objects that everything else hangs on. Shared with the regions, which may outlive the backend.
struct FabricObjects {
  Provider provider;
  FabricHandle fabric;
  DomainHandle domain;
  AddressVectorHandle addresses;
  CompletionQueueHandle queue;
  CompletionQueueHandle bell;  // tcp: a queue that nothing is bound to, to wait on
  int wait_fd = -1;  // of `waited_on`; -1: the provider has none and must be polled
  fid_cq* waited_on = nullptr;

  bool wants(uint64_t mr_mode_bit) const {
    return (static_cast<uint64_t>(provider.info->domain_attr->mr_mode) & mr_mode_bit) != 0;
  }
};

class FabricRegion final : public BackendRegion {
 public:
  std::shared_ptr<FabricObjects> objects;
  MemoryHandle memory;
};

/// One posted write. The provider keeps a pointer to it until its completion has been read.
struct Operation {
  fi_context2 context;  // first, so that the provider's pointer is ours
  FabricLink* link = nullptr;
  uint64_t cookie = 0;
  bool in_use = false;
};

class FabricLink final : public Link {
 public:
  FabricLink(FabricBackend& backend, ControlPlane::Id id, std::string peer_name)
      : backend_(backend), id_(id), peer_name_(std::move(peer_name)) {}
  ~FabricLink() override;

  Result<PostResult> post(const BackendMessage& message) override;
  bool ready() const override { return endpoint_ != nullptr && !dead_; }
  bool late_writes_possible() const override { return true; }
  bool closable() const override { return own_endpoint_ || outstanding_ == 0; }

  FabricBackend& backend_;
  const ControlPlane::Id id_;
  const std::string peer_name_;
  EndpointHandle own_endpoint_;
  fid_ep* endpoint_ = nullptr;
  fi_addr_t address_ = FI_ADDR_UNSPEC;
  bool dead_ = false;
  size_t outstanding_ = 0;
  std::unordered_map<uint32_t, Welcome::Pool> pools_;
};

class FabricBackend final : public Backend, private ControlPlane::Delegate {
 public:
  FabricBackend(std::shared_ptr<BackendContext> context, std::string transport)
      : context_(std::move(context)), transport_(std::move(transport)), provider_name_(transport_) {
    bool tcp = transport_ == "tcp";
    ControlPlane::Options options;
    options.epoch = context_->epoch;
    options.name = context_->agent_name;
    options.writer_must_confirm = !tcp;
    control_ = std::make_unique<ControlPlane>(options, static_cast<ControlPlane::Delegate&>(*this),
                                              *context_->clock);
    limits_.plan = {.max_message_bytes = 4u << 20,
                    .max_segments = tcp ? 4u : 1u,
                    .max_packed_segment_bytes = tcp ? 128u << 10 : 0u};
    limits_.max_inflight_messages = context_->config.max_inflight_per_rail;
  }
  ~FabricBackend() override {
    BATON_CHECK(links_.empty()) << "links must be closed before their backend";
  }

  Status open(bool open_now) {
    BATON_ASSIGN_OR_RETURN(ip_, local_address(context_->config.bind_address));
    bool v6 = ip_.find(':') != std::string::npos;
    BATON_RETURN_IF_ERROR(control_->listen(v6 ? fmt::format("tcp:[{}]", ip_) : "tcp:" + ip_));
    return open_now ? ensure_open() : Status();
  }

  const std::string& transport() const override { return transport_; }
  const std::string& provider() const override { return provider_name_; }
  const BackendLimits& limits() const override { return limits_; }
  std::string describe() const override {
    if (!objects_) return fmt::format("{} on {} (opened when the first peer needs it)", transport_, ip_);
    return fmt::format("{} on {} (libfabric {}.{} provider {}, {} endpoints)", transport_, ip_,
                       FI_MAJOR(fi_version()), FI_MINOR(fi_version()), provider_name_,
                       links_.size() + inbound_.size() + (shared_endpoint_ ? 1 : 0));
  }

  Result<std::unique_ptr<BackendRegion>> register_memory(std::span<std::byte> memory,
                                                         MemoryKind kind) override {
    if (kind != MemoryKind::kHost) return unimplemented("{} moves host memory only", transport_);
    BATON_RETURN_IF_ERROR(ensure_open());
    auto region = std::make_unique<FabricRegion>();
    region->objects = objects_;
    region->data = memory.data();
    // Where the key is ours, let it be one that cannot be guessed.
    size_t key_bits = 8 * objects_->provider.info->domain_attr->mr_key_size;
    uint64_t key = 0;
    if (!objects_->wants(FI_MR_PROV_KEY)) {
      key = random_id();
      if (key_bits < 64) key &= (uint64_t{1} << key_bits) - 1;
    }
    fid_mr* memory_fid = nullptr;
    int ret = fi_mr_reg(objects_->domain.get(), memory.data(), memory.size(), FI_WRITE | FI_REMOTE_WRITE,
                        0, key, 0, &memory_fid, nullptr);
    if (ret != 0) {
      return resource_exhausted("fi_mr_reg of {} bytes with {}: {} (is the memlock limit high enough?)",
                                memory.size(), provider_name_, fi_strerror(-ret));
    }
    region->memory.reset(memory_fid);
    if (objects_->wants(FI_MR_ENDPOINT)) {
      ret = fi_mr_bind(memory_fid, &shared_endpoint_->fid, 0);
      if (ret == 0) ret = fi_mr_enable(memory_fid);
      if (ret != 0) return internal_error("binding memory to the endpoint: {}", fi_strerror(-ret));
    }
    region->remote_key = fi_mr_key(memory_fid);
    region->remote_base =
        objects_->wants(FI_MR_VIRT_ADDR) ? reinterpret_cast<uint64_t>(memory.data()) : 0;
    if (objects_->wants(FI_MR_LOCAL)) region->local_descriptor = fi_mr_desc(memory_fid);
    return std::unique_ptr<BackendRegion>(std::move(region));
  }

  std::string address() const override { return control_->address(); }

  Result<std::unique_ptr<Link>> open_link(const Metadata& peer, const Metadata::Offer& offer) override {
    if (!offer.address.starts_with("tcp:")) {
      return invalid_argument("'{}' offers {} with a damaged address", peer.name, transport_);
    }
    BATON_RETURN_IF_ERROR(ensure_open());
    BATON_ASSIGN_OR_RETURN(ControlPlane::Id id, control_->connect(offer.address, peer.epoch, peer.serial));
    auto link = std::make_unique<FabricLink>(*this, id, peer.name);
    links_.emplace(id, link.get());
    return std::unique_ptr<Link>(std::move(link));
  }

  Status fence(Epoch peer, uint64_t serial) override { return control_->fence(peer, serial); }

  size_t progress(BackendEvents& events) override {
    size_t count = control_->progress();
    // Entries of closed endpoints are all in the queue by now; after this pass their slots are free.
    size_t orphans = orphans_.size();
    queue_empty_ = drain_queue();
    if (queue_empty_) recycle_orphans(orphans);
    count += arrivals_.size() + done_.size();
    for (uint32_t tag : arrivals_) events.on_arrived(tag, 1);
    arrivals_.clear();
    for (auto& [link, cookie, status] : std::exchange(done_, {})) {
      events.on_posted_done(*link, cookie, status);
    }
    for (auto& [link, status] : std::exchange(failed_, {})) events.on_link_failed(*link, status);
    if (count > 0) last_event_ns_ = context_->clock->now_ns();
    return count;
  }

  int64_t prepare_wait(std::vector<pollfd>& fds) override {
    fds.push_back({control_->poll_fd(), POLLIN, 0});
    int64_t longest_ns = control_->wants_time() ? 1'000'000'000 : INT64_MAX;
    if (!objects_) return longest_ns;
    // What was left in the queue makes no descriptor readable.
    if (!queue_empty_ || !arrivals_.empty() || !done_.empty() || !failed_.empty()) return 0;
    if (objects_->wait_fd >= 0) {
      fid* fids[] = {&objects_->waited_on->fid};
      if (fi_trywait(objects_->fabric.get(), fids, 1) != FI_SUCCESS) return 0;
      fds.push_back({objects_->wait_fd, POLLIN, 0});
      return longest_ns;
    }
    // No descriptor to sleep on: poll hard for a moment after each event, then more and more slowly.
    if (links_.empty() && inbound_.empty()) return longest_ns;
    int64_t quiet_ns = context_->clock->now_ns() - last_event_ns_;
    if (quiet_ns < 200'000) return 0;
    return quiet_ns < 10'000'000 ? 50'000 : 1'000'000;
  }
  uint64_t inbound_peers() const override { return control_->inbound(); }

 private:
  friend class FabricLink;

  Status ensure_open();
  Result<EndpointHandle> open_endpoint();
  Result<std::string> endpoint_name(fid_ep* endpoint);
  bool drain_queue();
  void complete(Operation* operation, const Status& status);
  void read_error();
  void recycle_orphans(size_t count);

  Result<Welcome> on_inbound(ControlPlane::Id id, const Hello& hello) override;
  void on_inbound_closed(ControlPlane::Id id) override {
    // What it delivered before counts: its entries are in the queue, take them out first.
    if (objects_) drain_queue();
    inbound_.erase(id);
    context_->wake();
  }
  void on_inbound_arrived(ControlPlane::Id, const Arrival&) override {}
  void on_welcome(ControlPlane::Id id, Welcome welcome) override;
  void on_outbound_closed(ControlPlane::Id id, const Status& why) override;

  Operation* take_operation() {
    if (free_operations_.empty()) {
      operations_.emplace_back();
      free_operations_.push_back(&operations_.back());
    }
    Operation* operation = free_operations_.back();
    free_operations_.pop_back();
    operation->in_use = true;
    return operation;
  }
  void release(Operation* operation) {
    operation->link = nullptr;
    operation->in_use = false;
    free_operations_.push_back(operation);
  }

  struct Done {
    FabricLink* link;
    uint64_t cookie;
    Status status;
  };

  std::shared_ptr<BackendContext> context_;
  const std::string transport_;
  std::string provider_name_;
  std::string ip_;
  BackendLimits limits_;
  std::unique_ptr<ControlPlane> control_;
  std::shared_ptr<FabricObjects> objects_;
  EndpointHandle shared_endpoint_;
  std::unordered_map<ControlPlane::Id, EndpointHandle> inbound_;
  std::unordered_map<ControlPlane::Id, FabricLink*> links_;
  std::deque<Operation> operations_;
  std::vector<Operation*> free_operations_;
  std::vector<Operation*> orphans_;  // of links that were closed before their completions were read
  std::vector<uint32_t> arrivals_;
  std::vector<Done> done_;
  std::vector<std::pair<FabricLink*, Status>> failed_;
  bool queue_empty_ = true;
  int64_t last_event_ns_ = 0;
};

Status FabricBackend::ensure_open() {
  if (objects_) return Status();
  int64_t start_ns = context_->clock->now_ns();
  auto objects = std::make_shared<FabricObjects>();
  BATON_ASSIGN_OR_RETURN(objects->provider, find_provider(transport_, ip_));
  if (open_observer != nullptr) open_observer->on_provider(objects->provider);
  fi_info* info = objects->provider.info.get();
  info->tx_attr->size = std::min<size_t>(info->tx_attr->size, limits_.max_inflight_messages);

  fid_fabric* fabric_fid = nullptr;
  int ret = fi_fabric(info->fabric_attr, &fabric_fid, nullptr);
  if (ret != 0) return unavailable("fi_fabric({}): {}", objects->provider.name, fi_strerror(-ret));
  objects->fabric.reset(fabric_fid);
  if (open_observer != nullptr) open_observer->on_fabric(fabric_fid);
  fid_domain* domain_fid = nullptr;
  ret = fi_domain(fabric_fid, info, &domain_fid, nullptr);
  if (ret != 0) return unavailable("fi_domain({}): {}", objects->provider.name, fi_strerror(-ret));
  objects->domain.reset(domain_fid);
  fi_av_attr av_attr{};
  av_attr.type = info->domain_attr->av_type;
  fid_av* av_fid = nullptr;
  ret = fi_av_open(domain_fid, &av_attr, &av_fid, nullptr);
  if (ret != 0) return unavailable("fi_av_open({}): {}", objects->provider.name, fi_strerror(-ret));
  objects->addresses.reset(av_fid);

  fi_cq_attr cq_attr{};
  cq_attr.format = FI_CQ_FORMAT_DATA;
  cq_attr.size = std::max<size_t>(1024, 2 * limits_.max_inflight_messages);
  auto open_queue = [&](fi_wait_obj wait, CompletionQueueHandle& queue) {
    cq_attr.wait_obj = wait;
    fid_cq* fid = nullptr;
    int error = fi_cq_open(domain_fid, &cq_attr, &fid, nullptr);
    if (error == 0) queue.reset(fid);
    return error;
  };
  // libfabric 1.17's tcp never takes back the signal that a completion gives to its queue's descriptor,
  // so that waiting on it would spin. A second queue, which nothing is bound to, gets no signals but has
  // the sockets in its wait set all the same: that one is waited on. (And completions cost one system
  // call less.)
  bool tcp = transport_ == "tcp";
  ret = open_queue(tcp ? FI_WAIT_NONE : FI_WAIT_FD, objects->queue);
  if (ret != 0 && !tcp) ret = open_queue(FI_WAIT_NONE, objects->queue);
  if (ret != 0) return unavailable("fi_cq_open({}): {}", objects->provider.name, fi_strerror(-ret));
  if (open_observer != nullptr) open_observer->on_queue(objects->queue.get());
  objects->waited_on = cq_attr.wait_obj == FI_WAIT_FD ? objects->queue.get() : nullptr;
  if (tcp && open_queue(FI_WAIT_FD, objects->bell) == 0) objects->waited_on = objects->bell.get();
  if (objects->waited_on != nullptr &&
      fi_control(&objects->waited_on->fid, FI_GETWAIT, &objects->wait_fd) != FI_SUCCESS) {
    objects->wait_fd = -1;
  }

  limits_.plan.max_segments = objects->provider.max_segments;
  limits_.plan.max_message_bytes =
      std::min<uint64_t>(limits_.plan.max_message_bytes, info->ep_attr->max_msg_size);
  provider_name_ = objects->provider.name;
  objects_ = std::move(objects);
  if (!objects_->provider.endpoint_per_peer) {
    Result<EndpointHandle> endpoint = open_endpoint();
    if (!endpoint.ok()) {
      objects_.reset();
      return endpoint.status();
    }
    shared_endpoint_ = std::move(*endpoint);
  }
  log_info("transfer {}: opened {} on {}: provider {}, {}, {} endpoint{}, {}, {:.1f} ms", context_->agent_name,
           transport_, ip_, provider_name_,
           objects_->provider.delivery_complete ? "completion means delivered"
                                                : "completion as the device gives it",
           objects_->provider.endpoint_per_peer ? "one" : "a shared",
           objects_->provider.endpoint_per_peer ? " per peer and direction" : "",
           objects_->wait_fd >= 0 ? "sleeps on a descriptor" : "has to be polled",
           static_cast<double>(context_->clock->now_ns() - start_ns) * 1e-6);
  return Status();
}

Result<EndpointHandle> FabricBackend::open_endpoint() {
  fid_ep* fid = nullptr;
  int ret = fi_endpoint(objects_->domain.get(), objects_->provider.info.get(), &fid, nullptr);
  if (ret != 0) return unavailable("fi_endpoint({}): {}", provider_name_, fi_strerror(-ret));
  EndpointHandle endpoint(fid);
  if (open_observer != nullptr) open_observer->on_endpoint(fid);
  ret = fi_ep_bind(fid, &objects_->addresses->fid, 0);
  if (ret == 0) ret = fi_ep_bind(fid, &objects_->queue->fid, FI_TRANSMIT | FI_RECV);
  if (ret == 0) ret = fi_enable(fid);
  if (ret != 0) return unavailable("enabling an endpoint of {}: {}", provider_name_, fi_strerror(-ret));
  return endpoint;
}

Result<std::string> FabricBackend::endpoint_name(fid_ep* endpoint) {
  std::string name(256, '\0');
  size_t size = name.size();
  int ret = fi_getname(&endpoint->fid, name.data(), &size);
  if (ret == -FI_ETOOSMALL) {
    name.resize(size);
    ret = fi_getname(&endpoint->fid, name.data(), &size);
  }
  if (ret != 0) return unavailable("fi_getname({}): {}", provider_name_, fi_strerror(-ret));
  name.resize(size);
  return name;
}

Result<Welcome> FabricBackend::on_inbound(ControlPlane::Id id, const Hello& hello) {
  BATON_RETURN_IF_ERROR(ensure_open());
  EndpointHandle endpoint;
  if (objects_->provider.endpoint_per_peer) {
    BATON_ASSIGN_OR_RETURN(endpoint, open_endpoint());
  }
  Welcome welcome;
  BATON_ASSIGN_OR_RETURN(std::string name,
                         endpoint_name(endpoint ? endpoint.get() : shared_endpoint_.get()));
  welcome.rails.push_back(std::move(name));
  for (const LocalPool& pool : context_->pools()) {
    Result<const BackendRegion*> region = context_->backend_region(pool, *this);
    if (!region.ok()) {
      log_warning("transfer {}: pool {} is not reachable over {}: {}", context_->agent_name, pool.id,
                  transport_, region.status().to_string());
      continue;
    }
    welcome.pools.push_back({pool.id, (*region)->remote_base, (*region)->remote_key});
  }
  inbound_.emplace(id, std::move(endpoint));
  log_info("transfer {}: '{}' can write into this process over {} ({} pools)", context_->agent_name,
           hello.name, transport_, welcome.pools.size());
  return welcome;
}

void FabricBackend::on_welcome(ControlPlane::Id id, Welcome welcome) {
  auto it = links_.find(id);
  if (it == links_.end()) return;
  FabricLink& link = *it->second;
  auto fail = [&](const Status& status) {
    link.dead_ = true;
    failed_.emplace_back(&link, status);
  };
  if (welcome.rails.size() != 1) {
    fail(invalid_argument("'{}' has {} rails, this build drives one", link.peer_name_, welcome.rails.size()));
    return;
  }
  if (objects_->provider.endpoint_per_peer) {
    Result<EndpointHandle> endpoint = open_endpoint();
    if (!endpoint.ok()) {
      fail(endpoint.status());
      return;
    }
    link.own_endpoint_ = std::move(*endpoint);
  }
  // The provider reads as many bytes as its address format has; the peer's may be fewer.
  std::string& name = welcome.rails.front();
  name.resize(std::max<size_t>(name.size(), 256), '\0');
  int ret = fi_av_insert(objects_->addresses.get(), name.data(), 1, &link.address_, 0, nullptr);
  if (ret != 1) {
    fail(unavailable("fi_av_insert({}) for '{}': {}", provider_name_, link.peer_name_,
                     fi_strerror(ret < 0 ? -ret : FI_EINVAL)));
    return;
  }
  for (const Welcome::Pool& pool : welcome.pools) link.pools_[pool.id] = pool;
  link.endpoint_ = link.own_endpoint_ ? link.own_endpoint_.get() : shared_endpoint_.get();
}

void FabricBackend::on_outbound_closed(ControlPlane::Id id, const Status& why) {
  auto it = links_.find(id);
  if (it == links_.end()) return;
  it->second->dead_ = true;
  failed_.emplace_back(it->second, why);
}

FabricLink::~FabricLink() {
  for (Operation& operation : backend_.operations_) {
    if (operation.in_use && operation.link == this) {
      operation.link = nullptr;
      backend_.orphans_.push_back(&operation);
    }
  }
  // The endpoint first: the peer may reuse its memory as soon as the control connection is closed.
  own_endpoint_.reset();
  if (address_ != FI_ADDR_UNSPEC) {
    (void)fi_av_remove(backend_.objects_->addresses.get(), &address_, 1, 0);
  }
  backend_.links_.erase(id_);
  std::erase_if(backend_.failed_, [this](const auto& entry) { return entry.first == this; });
  std::erase_if(backend_.done_, [this](const auto& entry) { return entry.link == this; });
  backend_.control_->close_outbound(id_);
}

Result<PostResult> FabricLink::post(const BackendMessage& message) {
  if (!ready()) return PostResult::kAgain;
  auto pool = pools_.find(message.remote_pool);
  if (pool == pools_.end()) {
    return failed_precondition("'{}' did not open pool {} for {}", peer_name_, message.remote_pool,
                               backend_.transport_);
  }
  constexpr size_t kMaxSegments = 4;
  size_t count = message.segments.size();
  BATON_CHECK(count > 0 && count <= kMaxSegments);
  iovec local[kMaxSegments];
  fi_rma_iov remote[kMaxSegments];
  void* descriptors[kMaxSegments];
  for (size_t i = 0; i < count; ++i) {
    const Segment& segment = message.segments[i];
    local[i] = {message.local->data + segment.local_offset, segment.bytes};
    remote[i] = {pool->second.base + segment.remote_offset, segment.bytes, pool->second.key};
    descriptors[i] = message.local->local_descriptor;
  }
  Operation* operation = backend_.take_operation();
  operation->link = this;
  operation->cookie = message.cookie;
  fi_msg_rma write{};
  write.msg_iov = local;
  write.desc = descriptors;
  write.iov_count = count;
  write.addr = address_;
  write.rma_iov = remote;
  write.rma_iov_count = count;
  write.context = &operation->context;
  write.data = static_cast<uint32_t>(message.tag);
  uint64_t flags = FI_COMPLETION;
  if (backend_.objects_->provider.delivery_complete) flags |= FI_DELIVERY_COMPLETE;
  if (message.tag != Tag::kNone) flags |= FI_REMOTE_CQ_DATA;
  ssize_t ret = fi_writemsg(endpoint_, &write, flags);
  if (ret == 0) {
    ++outstanding_;
    return PostResult::kPosted;
  }
  backend_.release(operation);
  if (ret == -FI_EAGAIN) return PostResult::kAgain;
  return unavailable("fi_writemsg: {}", fi_strerror(static_cast<int>(-ret)));
}

void FabricBackend::complete(Operation* operation, const Status& status) {
  if (operation->link != nullptr) {
    --operation->link->outstanding_;
    done_.push_back({operation->link, operation->cookie, status});
  } else {
    std::erase(orphans_, operation);
  }
  release(operation);
}

bool FabricBackend::drain_queue() {
  if (!objects_) return true;
  // A bound, so that one busy fabric does not keep the thread from everything else. (Errors come singly.)
  for (int round = 0; round < 64; ++round) {
    fi_cq_data_entry entries[64];
    ssize_t n = fi_cq_read(objects_->queue.get(), entries, 64);
    if (n == -FI_EAGAIN) return true;
    if (n == -FI_EAVAIL) {
      read_error();
      continue;
    }
    if (n < 0) {
      log_error("transfer {}: fi_cq_read({}): {}", context_->agent_name, provider_name_,
                fi_strerror(static_cast<int>(-n)));
      return false;
    }
    for (ssize_t i = 0; i < n; ++i) {
      if ((entries[i].flags & FI_REMOTE_CQ_DATA) != 0) {
        arrivals_.push_back(static_cast<uint32_t>(entries[i].data));
      } else if (entries[i].op_context != nullptr) {
        complete(static_cast<Operation*>(entries[i].op_context), Status());
      }
    }
  }
  return false;
}

void FabricBackend::read_error() {
  fi_cq_err_entry error{};
  ssize_t n = fi_cq_readerr(objects_->queue.get(), &error, 0);
  if (n != 1) return;
  bool ours = (error.flags & (FI_REMOTE_WRITE | FI_REMOTE_CQ_DATA | FI_RECV)) == 0;
  if (!ours || error.op_context == nullptr) {
    // A writer went away in the middle of a message: it was not counted, and its blocks are quarantined.
    log_debug("transfer {}: an incoming write over {} failed: {}", context_->agent_name, provider_name_,
              fi_strerror(error.err));
    return;
  }
  auto* operation = static_cast<Operation*>(error.op_context);
  char text[256] = "";
  const char* detail = fi_cq_strerror(objects_->queue.get(), error.prov_errno, error.err_data, text, sizeof(text));
  complete(operation, unavailable("fi_writemsg: {} ({}, provider error {})", fi_strerror(error.err),
                                  detail != nullptr ? detail : "", error.prov_errno));
}

void FabricBackend::recycle_orphans(size_t count) {
  // With an endpoint of their own, gone since before the queue was emptied, no completion can come any
  // more. On a shared endpoint a link is closed only when nothing is outstanding.
  for (size_t i = 0; i < count && !orphans_.empty(); ++i) {
    release(orphans_.front());
    orphans_.erase(orphans_.begin());
  }
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
/// libfabric 1.17's tcp forgets one fi_info (0.6 KiB) per endpoint that is closed.
extern "C" __attribute__((weak)) const char* __lsan_default_suppressions() { return "leak:libfabric.so"; }
#endif

Result<std::unique_ptr<Backend>> create_fabric_backend(std::shared_ptr<BackendContext> context,
                                                       const std::string& transport, bool open_now) {
  auto backend = std::make_unique<FabricBackend>(std::move(context), transport);
  BATON_RETURN_IF_ERROR(backend->open(open_now));
  return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace baton::transfer
