#include "transfer/fabric/rail.h"

#include <algorithm>

#include "base/random.h"

namespace baton::transfer::fabric {
namespace {

/// libfabric's tcp (1.17 and later ones) never drops an address that an accepted connection came from, about 160 bytes each,
/// and closing an endpoint looks at every address. So its vectors are used for so many endpoints and close with the last.
constexpr uint32_t kEndpointsPerAddressVector = 1024;

/// 1.17's queues keep an entry for every connection that was ever bound to them, by its address, and lose these when they
/// are closed: queues that are used again keep a few.
constexpr size_t kFreeQueues = 16;

}  // namespace

Result<std::shared_ptr<Rail>> Rail::open(const Config& config) {
  std::shared_ptr<Rail> rail(new Rail(config));
  Status status = rail->open();
  if (!status.ok()) {
    return status.with_context(config.address.empty() ? fmt::format("rail {}", config.index)
                                                      : fmt::format("rail {} ({})", config.index, config.address));
  }
  return rail;
}

int Rail::make_queue(fi_wait_obj wait, CompletionQueueHandle& queue) {
  fi_cq_attr attr{};
  attr.format = FI_CQ_FORMAT_DATA;
  attr.size = std::max<size_t>(1024, 2 * config_.max_inflight_messages);
  attr.wait_obj = wait;
  fid_cq* fid = nullptr;
  int ret = fi_cq_open(domain_.get(), &attr, &fid, nullptr);
  if (ret == 0) {
    queue.reset(fid);
    if (open_observer != nullptr && wait == FI_WAIT_NONE) open_observer->on_queue(fid);
  }
  return ret;
}

Status Rail::open() {
  BATON_ASSIGN_OR_RETURN(provider_, find_provider(config_.transport, config_.address));
  if (open_observer != nullptr) open_observer->on_provider(provider_);
  fi_info* info = provider_.info.get();
  info->tx_attr->size = std::min<size_t>(info->tx_attr->size, config_.max_inflight_messages);

  fid_fabric* fabric = nullptr;
  int ret = fi_fabric(info->fabric_attr, &fabric, &forgotten_);
  if (ret != 0) return unavailable("fi_fabric({}): {}", provider_.name, fi_strerror(-ret));
  fabric_.reset(fabric);
  if (open_observer != nullptr) open_observer->on_fabric(fabric);
  const bool forgets = ForgottenInfos::needed(*info);
  if (forgets) forgotten_.watch(fabric);
  fid_domain* domain = nullptr;
  ret = fi_domain(fabric, info, &domain, &forgotten_);
  if (ret != 0) return unavailable("fi_domain({}): {}", provider_.name, fi_strerror(-ret));
  domain_.reset(domain);
  if (forgets) forgotten_.watch(domain);
  BATON_RETURN_IF_ERROR(open_addresses());

  // libfabric 1.17's tcp never takes back the signal that a completion gives to its queue's descriptor,
  // so that waiting on it would spin. A second queue, which nothing is bound to, gets no signals but has
  // the sockets in its wait set all the same: that one is waited on. (And completions cost one system
  // call less.)
  const bool tcp = config_.transport == "tcp";
  ret = make_queue(tcp ? FI_WAIT_NONE : FI_WAIT_FD, queue_);
  if (ret == 0 && !tcp) waited_on_ = queue_.get();
  if (ret != 0 && !tcp) ret = make_queue(FI_WAIT_NONE, queue_);
  if (ret != 0) return unavailable("fi_cq_open({}): {}", provider_.name, fi_strerror(-ret));
  if (tcp && make_queue(FI_WAIT_FD, bell_) == 0) waited_on_ = bell_.get();
  if (waited_on_ != nullptr && fi_control(&waited_on_->fid, FI_GETWAIT, &wait_fd_) != FI_SUCCESS) wait_fd_ = -1;

  if (!provider_.endpoint_per_peer) {
    BATON_ASSIGN_OR_RETURN(shared_endpoint_, open_endpoint(queue_.get()));
  }
  return {};
}

Status Rail::open_addresses() {
  fi_av_attr attr{};
  attr.type = provider_.info->domain_attr->av_type;
  fid_av* fid = nullptr;
  int ret = fi_av_open(domain_.get(), &attr, &fid, nullptr);
  if (ret != 0) return unavailable("fi_av_open({}): {}", provider_.name, fi_strerror(-ret));
  addresses_ = std::make_shared<AddressVector>(AddressVectorHandle(fid));
  endpoints_opened_ = 0;
  return {};
}

Result<CompletionQueueHandle> Rail::open_queue() {
  CompletionQueueHandle queue;
  if (!free_queues_.empty()) {
    queue = std::move(free_queues_.back());
    free_queues_.pop_back();
    return queue;
  }
  int ret = make_queue(FI_WAIT_NONE, queue);
  if (ret != 0) return unavailable("fi_cq_open({}): {}", provider_.name, fi_strerror(-ret));
  return queue;
}

void Rail::reuse_queue(CompletionQueueHandle queue) {
  if (free_queues_.size() < kFreeQueues) free_queues_.push_back(std::move(queue));
}

Result<Endpoint> Rail::open_endpoint(fid_cq* queue) {
  if (endpoints_opened_++ == kEndpointsPerAddressVector) BATON_RETURN_IF_ERROR(open_addresses());
  fid_ep* fid = nullptr;
  int ret = fi_endpoint(domain_.get(), provider_.info.get(), &fid, nullptr);
  if (ret != 0) return unavailable("fi_endpoint({}): {}", provider_.name, fi_strerror(-ret));
  Endpoint endpoint;
  endpoint.addresses = addresses_;
  endpoint.handle.reset(fid);
  tidy();
  if (open_observer != nullptr) open_observer->on_endpoint(fid);
  ret = fi_ep_bind(fid, &addresses_->get()->fid, 0);
  if (ret == 0) ret = fi_ep_bind(fid, &queue->fid, FI_TRANSMIT | FI_RECV);
  if (ret == 0) ret = fi_enable(fid);
  if (ret != 0) return unavailable("enabling an endpoint of {}: {}", provider_.name, fi_strerror(-ret));
  return endpoint;
}

Result<std::string> Rail::endpoint_name(fid_ep* endpoint) const {
  std::string name(256, '\0');
  size_t size = name.size();
  int ret = fi_getname(&endpoint->fid, name.data(), &size);
  if (ret == -FI_ETOOSMALL) {
    name.resize(size);
    ret = fi_getname(&endpoint->fid, name.data(), &size);
  }
  if (ret != 0) return unavailable("fi_getname({}): {}", provider_.name, fi_strerror(-ret));
  name.resize(size);
  return name;
}

Result<fi_addr_t> AddressVector::add(std::string name) {
  // The provider reads as many bytes as its address format has; the peer's may be fewer.
  name.resize(std::max<size_t>(name.size(), 256), '\0');
  fi_addr_t address = FI_ADDR_UNSPEC;
  int ret = fi_av_insert(handle_.get(), name.data(), 1, &address, 0, nullptr);
  if (ret != 1) return unavailable("fi_av_insert: {}", fi_strerror(ret < 0 ? -ret : FI_EINVAL));
  return address;
}

void AddressVector::remove(fi_addr_t address) {
  if (address != FI_ADDR_UNSPEC) (void)fi_av_remove(handle_.get(), &address, 1, 0);
}

Result<std::unique_ptr<FabricRegion>> FabricRegion::open(std::span<std::byte> memory,
                                                         const std::vector<std::shared_ptr<Rail>>& rails) {
  auto region = std::make_unique<FabricRegion>();
  region->data = memory.data();
  for (const std::shared_ptr<Rail>& rail : rails) {
    OnRail on_rail;
    on_rail.rail = rail;
    // Where the key is ours, let it be one that cannot be guessed.
    const size_t key_bits = 8 * rail->provider().info->domain_attr->mr_key_size;
    uint64_t key = 0;
    if (!rail->wants(FI_MR_PROV_KEY)) {
      key = random_id();
      if (key_bits < 64) key &= (uint64_t{1} << key_bits) - 1;
    }
    fid_mr* fid = nullptr;
    int ret = fi_mr_reg(rail->domain(), memory.data(), memory.size(), FI_WRITE | FI_REMOTE_WRITE, 0, key, 0, &fid, nullptr);
    if (ret != 0) {
      return resource_exhausted("fi_mr_reg of {} bytes with {}: {} (is the memlock limit high enough?)", memory.size(),
                                rail->provider().name, fi_strerror(-ret));
    }
    on_rail.memory.reset(fid);
    if (rail->wants(FI_MR_ENDPOINT)) {
      ret = fi_mr_bind(fid, &rail->shared_endpoint().get()->fid, 0);
      if (ret == 0) ret = fi_mr_enable(fid);
      if (ret != 0) return internal_error("binding memory to the endpoint: {}", fi_strerror(-ret));
    }
    on_rail.remote_key = fi_mr_key(fid);
    on_rail.remote_base = rail->wants(FI_MR_VIRT_ADDR) ? reinterpret_cast<uint64_t>(memory.data()) : 0;
    if (rail->wants(FI_MR_LOCAL)) on_rail.descriptor = fi_mr_desc(fid);
    region->rails.push_back(std::move(on_rail));
  }
  return region;
}

}  // namespace baton::transfer::fabric
