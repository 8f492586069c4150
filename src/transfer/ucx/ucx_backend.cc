#include "transfer/ucx/ucx_backend.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "base/unique_handle.h"
#include "transfer/control.h"
#include "transfer/descriptors.h"
#include "transfer/fabric/provider.h"
#include "transfer/ucx/inbound.h"
#include "transfer/ucx/link.h"
#include "transfer/ucx/messages.h"
#include "transfer/ucx/worker.h"

namespace baton::transfer {
namespace {

using namespace ucx;

constexpr std::string_view kName = "ucx";
/// Turns of one worker before the others have theirs.
constexpr int kProgressRounds = 16;

class UcxBackend final : public Backend, private ControlPlane::Delegate, private LinkHost {
 public:
  UcxBackend(std::shared_ptr<BackendContext> context, std::string transport, TransportChoice choice, std::string ip)
      : context_(std::move(context)), transport_(std::move(transport)), choice_(std::move(choice)), ip_(std::move(ip)) {
    ControlPlane::Options options;
    options.epoch = context_->epoch;
    options.name = context_->agent_name;
    // By RDMA the writer's device writes, whatever the owner closes.
    options.writer_must_confirm = choice_.one_sided;
    control_ = std::make_unique<ControlPlane>(options, static_cast<ControlPlane::Delegate&>(*this), *context_->clock);
    limits_ = choice_.one_sided ? PutLink::limits() : MessageLink::limits();
    limits_.max_inflight_messages = context_->config.max_inflight_per_rail;
  }
  ~UcxBackend() override {
    BATON_CHECK(links_.empty()) << "links must be closed before their backend";
    for (auto& [id, inbound] : inbound_) {
      if (inbound) forget(inbound->worker());
    }
  }

  Status open() {
    bells_.reset(::epoll_create1(EPOLL_CLOEXEC));
    if (!bells_) return descriptor_error("epoll_create1", errno);
    BATON_ASSIGN_OR_RETURN(ucx_, Context::create(choice_, context_->agent_name));
    provider_ = fmt::format("ucx-{}{}{}", ucx_->version(), choice_.tls.empty() ? "" : " ", choice_.tls);
    if (choice_.one_sided) {
      BATON_ASSIGN_OR_RETURN(shared_worker_, open_worker());
      BATON_RETURN_IF_ERROR(shared_worker_->on_message(kNoticeMessage, &UcxBackend::on_notice, this));
    }
    bool v6 = ip_.find(':') != std::string::npos;
    return control_->listen(v6 ? fmt::format("tcp:[{}]", ip_) : "tcp:" + ip_);
  }

  const std::string& transport() const override { return transport_; }
  const std::string& provider() const override { return provider_; }
  const BackendLimits& limits() const override { return limits_; }
  std::string describe() const override {
    return fmt::format("{} on {} (UCX {}, transports {}, {} workers)", transport_, ip_, ucx_->version(),
                       choice_.tls.empty() ? "by UCX_TLS" : choice_.tls, workers_.size());
  }

  Result<std::unique_ptr<BackendRegion>> register_memory(std::span<std::byte> memory, MemoryKind kind) override {
    if (kind != MemoryKind::kHost) return unimplemented("{} moves host memory only", transport_);
    return Region::create(ucx_, memory);
  }

  std::string address() const override { return control_->address(); }

  Result<std::unique_ptr<Link>> open_link(const Metadata& peer, const Metadata::Offer& offer) override {
    if (!offer.address.starts_with("tcp:")) {
      return invalid_argument("'{}' offers {} with a damaged address", peer.name, transport_);
    }
    BATON_ASSIGN_OR_RETURN(ControlPlane::Id id, control_->connect(offer.address, peer.epoch, peer.serial));
    LinkHost& host = *this;
    std::unique_ptr<UcxLink> link;
    if (choice_.one_sided) {
      link = std::make_unique<PutLink>(host, id, peer.name);
    } else {
      link = std::make_unique<MessageLink>(host, id, peer.name);
    }
    links_.emplace(id, link.get());
    return std::unique_ptr<Link>(std::move(link));
  }

  Status fence(Epoch peer, uint64_t serial) override { return control_->fence(peer, serial); }
  Status shut_out() override { return control_->fence_all(); }

  size_t progress(BackendEvents& events) override;
  int64_t prepare_wait(std::vector<pollfd>& fds) override;
  uint64_t inbound_peers() const override { return control_->inbound(); }
  CheckChannel& checks() override { return *control_; }
  ReadChannel& reads() override { return *control_; }

 private:
  struct Done {
    UcxLink* link;
    uint64_t cookie;
    Status status;
  };

  Result<std::unique_ptr<Worker>> open_worker();
  static ucs_status_t on_notice(void* backend, const void* header, size_t header_bytes, void* data, size_t bytes,
                                const ucp_am_recv_param_t* parameters);

  Result<Welcome> on_inbound(ControlPlane::Id id, const Hello& hello) override;
  void on_inbound_closed(ControlPlane::Id id, int socket) override;
  void on_inbound_arrived(ControlPlane::Id, const Arrival&) override {}
  void on_outbound_arrived(ControlPlane::Id id, const Arrival& arrival) override {
    auto it = links_.find(id);
    if (it != links_.end()) it->second->on_placed(arrival.tag, arrival.count);
  }
  void on_welcome(ControlPlane::Id id, Welcome welcome) override;
  void on_outbound_closed(ControlPlane::Id id, const Status& why) override;

  void wake(Worker& worker) override {
    if (!std::exchange(worker.awake, true)) awake_.push_back(&worker);
  }
  void forget(Worker& worker) override;
  void on_message_done(UcxLink& link, uint64_t cookie, const Status& status) override {
    done_.push_back({&link, cookie, status});
  }
  void on_link_dead(UcxLink& link, const Status& status) override { failed_.emplace_back(&link, status); }
  void on_link_gone(UcxLink& link) override;
  ControlPlane& control() override { return *control_; }
  const std::string& transport_name() const override { return transport_; }

  std::shared_ptr<BackendContext> context_;
  const std::string transport_;
  const TransportChoice choice_;
  const std::string ip_;
  std::string provider_;
  BackendLimits limits_;
  std::unique_ptr<ControlPlane> control_;
  std::shared_ptr<Context> ucx_;
  FileDescriptor bells_;               // epoll over the workers' descriptors; the event's data is the worker
  std::vector<Worker*> workers_;
  std::vector<Worker*> awake_;         // those that are not armed
  std::vector<Arrival> arrivals_;
  std::unique_ptr<Worker> shared_worker_;
  std::unordered_map<ControlPlane::Id, std::unique_ptr<Inbound>> inbound_;  // null where one worker serves all
  std::unordered_map<ControlPlane::Id, UcxLink*> links_;
  std::vector<Done> done_;
  std::vector<std::pair<UcxLink*, Status>> failed_;
  int64_t last_event_ns_ = 0;
};

Result<std::unique_ptr<Worker>> UcxBackend::open_worker() {
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Worker> worker, Worker::create(ucx_));
  if (worker->wait_fd() >= 0) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = worker.get();
    if (::epoll_ctl(bells_.get(), EPOLL_CTL_ADD, worker->wait_fd(), &event) != 0) {
      return watch_error("epoll_ctl of a UCX worker's descriptor", errno);
    }
  }
  workers_.push_back(worker.get());
  wake(*worker);
  return worker;
}

void UcxBackend::forget(Worker& worker) {
  if (worker.wait_fd() >= 0) (void)::epoll_ctl(bells_.get(), EPOLL_CTL_DEL, worker.wait_fd(), nullptr);
  std::erase(workers_, &worker);
  std::erase(awake_, &worker);
}

ucs_status_t UcxBackend::on_notice(void* backend, const void*, size_t, void* data, size_t bytes,
                                   const ucp_am_recv_param_t* parameters) {
  auto& self = *static_cast<UcxBackend*>(backend);
  bool whole = (parameters->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
  if (!whole || !parse_notice({static_cast<const char*>(data), bytes}, self.arrivals_)) {
    log_warning("transfer {}: a notice of {} bytes over {} is damaged", self.context_->agent_name, bytes,
                self.transport_);
  }
  return UCS_OK;
}

Result<Welcome> UcxBackend::on_inbound(ControlPlane::Id id, const Hello& hello) {
  Welcome welcome;
  std::unordered_map<uint32_t, Inbound::Pool> pools;
  for (const LocalPool& pool : context_->pools()) {
    Result<const BackendRegion*> region = context_->backend_region(pool, *this);
    if (!region.ok()) {
      log_warning("transfer {}: pool {} is not reachable over {}: {}", context_->agent_name, pool.id, transport_,
                  region.status().to_string());
      continue;
    }
    const auto& ours = static_cast<const Region&>(**region);
    welcome.pools.push_back({pool.id, ours.remote_base, 0, choice_.one_sided ? ours.packed_key() : ""});
    pools[pool.id] = {ours.data, pool.stride_bytes * pool.count};
  }
  std::unique_ptr<Inbound> inbound;
  if (!shared_worker_) {
    BATON_ASSIGN_OR_RETURN(std::unique_ptr<Worker> worker, open_worker());
    Worker* opened = worker.get();
    Result<std::unique_ptr<Inbound>> created =
        Inbound::create(std::move(worker), hello.name, std::move(pools), arrivals_);
    if (!created.ok()) {
      forget(*opened);
      return created.status();
    }
    inbound = std::move(*created);
  }
  Result<std::string> address = (inbound ? inbound->worker() : *shared_worker_).address();
  if (!address.ok()) {
    if (inbound) forget(inbound->worker());
    return address.status();
  }
  welcome.rails.push_back(std::move(*address));
  inbound_.emplace(id, std::move(inbound));
  log_info("transfer {}: '{}' can write into this process over {} ({} pools)", context_->agent_name, hello.name,
           transport_, welcome.pools.size());
  return welcome;
}

void UcxBackend::on_inbound_closed(ControlPlane::Id id, int) {
  auto it = inbound_.find(id);
  if (it != inbound_.end()) {
    if (it->second) forget(it->second->worker());
    inbound_.erase(it);
  }
  context_->wake();
}

void UcxBackend::on_welcome(ControlPlane::Id id, Welcome welcome) {
  auto it = links_.find(id);
  if (it == links_.end()) return;
  UcxLink& link = *it->second;
  Status status;
  std::unique_ptr<Worker> own;
  if (!shared_worker_) {
    Result<std::unique_ptr<Worker>> opened = open_worker();
    status = opened.status();
    if (status.ok()) own = std::move(*opened);
  }
  if (status.ok()) status = link.open(welcome, std::move(own), shared_worker_.get());
  if (!status.ok()) {
    link.mark_dead();
    failed_.emplace_back(&link, status);
  }
}

void UcxBackend::on_outbound_closed(ControlPlane::Id id, const Status& why) {
  auto it = links_.find(id);
  if (it == links_.end()) return;
  it->second->mark_dead();
  failed_.emplace_back(it->second, why);
}

void UcxBackend::on_link_gone(UcxLink& link) {
  links_.erase(link.id());
  std::erase_if(failed_, [&](const auto& entry) { return entry.first == &link; });
  std::erase_if(done_, [&](const Done& entry) { return entry.link == &link; });
}

size_t UcxBackend::progress(BackendEvents& events) {
  size_t count = control_->progress();
  epoll_event rung[64];
  int n = ::epoll_wait(bells_.get(), rung, 64, 0);
  for (int i = 0; i < n; ++i) wake(*static_cast<Worker*>(rung[i].data.ptr));
  for (size_t i = 0; i < awake_.size(); ++i) {
    if (!awake_[i]->held) count += awake_[i]->progress(kProgressRounds);
  }
  for (auto& [id, inbound] : inbound_) {
    if (inbound && inbound->unconfirmed()) inbound->worker().held = !inbound->confirm(*control_, id);
  }
  for (auto& [id, link] : links_) count += link->advance();
  count += arrivals_.size();
  for (const Arrival& arrival : std::exchange(arrivals_, {})) events.on_arrived(arrival.tag, arrival.count);
  for (auto& [link, cookie, status] : std::exchange(done_, {})) events.on_posted_done(*link, cookie, status);
  for (auto& [link, status] : std::exchange(failed_, {})) events.on_link_failed(*link, status);
  if (count > 0) last_event_ns_ = context_->clock->now_ns();
  return count;
}

int64_t UcxBackend::prepare_wait(std::vector<pollfd>& fds) {
  if (!arrivals_.empty() || !done_.empty() || !failed_.empty()) return 0;
  for (const auto& [id, link] : links_) {
    if (link->has_work()) return 0;
  }
  fds.push_back({control_->poll_fd(), POLLIN, 0});
  fds.push_back({bells_.get(), POLLIN, 0});
  std::erase_if(awake_, [](Worker* worker) {
    worker->awake = worker->held || !worker->prepare_sleep();
    return !worker->awake;
  });
  bool busy = std::any_of(awake_.begin(), awake_.end(),
                          [](const Worker* worker) { return !worker->held && worker->wait_fd() >= 0; });
  if (busy) return 0;
  int64_t longest_ns = control_->wants_time() ? 1'000'000'000 : INT64_MAX;
  if (awake_.empty() || (links_.empty() && inbound_.empty())) return longest_ns;
  // No descriptor to sleep on: poll hard for a moment after each event, then more and more slowly.
  int64_t quiet_ns = context_->clock->now_ns() - last_event_ns_;
  if (quiet_ns < 200'000) return 0;
  return quiet_ns < 10'000'000 ? 50'000 : 1'000'000;
}

}  // namespace

Result<std::unique_ptr<Backend>> create_ucx_backend(std::shared_ptr<BackendContext> context,
                                                    const std::string& transport) {
  std::string selection = transport.size() > kName.size() ? transport.substr(kName.size() + 1) : "";
  const char* environment = std::getenv("UCX_TLS");
  const std::string& bind_address = context->config.bind_address;
  BATON_ASSIGN_OR_RETURN(std::string ip, fabric::local_address(bind_address));
  BATON_ASSIGN_OR_RETURN(TransportChoice choice,
                         choose_transports(selection, environment != nullptr ? environment : "", bind_address,
                                           fabric::has_rdma_device()));
  return create_ucx_backend_with(std::move(context), transport, std::move(choice), std::move(ip));
}

Result<std::unique_ptr<Backend>> create_ucx_backend_with(std::shared_ptr<BackendContext> context,
                                                         const std::string& transport, TransportChoice choice,
                                                         std::string ip) {
  auto backend = std::make_unique<UcxBackend>(std::move(context), transport, std::move(choice), std::move(ip));
  BATON_RETURN_IF_ERROR(backend->open());
  return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace baton::transfer
