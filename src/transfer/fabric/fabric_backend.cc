#include "transfer/fabric/fabric_backend.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>

#include "base/check.h"
#include "base/log.h"
#include "transfer/descriptors.h"
#include "transfer/fabric/fabric_backend_impl.h"

namespace baton::transfer {
namespace fabric {
namespace {

/// Asleep at once after an event, the next one costs a wake-up: 32 µs for a small message instead of 13, and in the middle of
/// a large one the socket fills meanwhile.
constexpr int64_t kAwakeNs = 200'000;
constexpr int64_t kControlEveryNs = 20'000;
/// While there are reads: their words go that way (54 µs for a block of 4 KiB otherwise).
constexpr int64_t kControlOfReadsEveryNs = 3'000;
/// Long enough for an answer to the message, which says it quicker to whoever waits for that.
constexpr int64_t kConfirmAfterNs = 60'000;
constexpr int64_t kGreetAgainNs = 500'000;
/// Endpoints of writers that went away before they greeted. When the writer's end is known to be closed, the end of a half-open
/// connection is here in no time; otherwise (a stopped process, a rail that is cut) it may take for ever.
constexpr size_t kMaxDoomed = 256;
constexpr int64_t kDoomedNs = 300'000'000;

/// A socket to this host holds whatever it is given, and what it holds leaves the cache before it is read: 3.6 GB/s with
/// 32 MiB under way, 5.3 with this much (docs/performance.md, "TCP on one host").
constexpr uint64_t kLocalTcpMessageBytes = 512u << 10;
constexpr uint64_t kLocalTcpBytes = 512u << 10;
constexpr uint32_t kLocalTcpMessages = 2;

}  // namespace

FabricBackend::FabricBackend(std::shared_ptr<BackendContext> context, std::string transport)
    : context_(std::move(context)), transport_(std::move(transport)), provider_name_(transport_) {
  set_library_defaults();
  const bool tcp = transport_ == "tcp";
  ControlPlane::Options options;
  options.epoch = context_->epoch;
  options.name = context_->agent_name;
  options.writer_must_confirm = !tcp;
  control_ = std::make_unique<ControlPlane>(options, static_cast<ControlPlane::Delegate&>(*this), *context_->clock);
  limits_.plan = {.max_message_bytes = 4u << 20,
                  .max_segments = tcp ? 4u : 1u,
                  .max_packed_segment_bytes = tcp ? 128u << 10 : 0u};
}

FabricBackend::~FabricBackend() { BATON_CHECK(links_.empty()) << "links must be closed before their backend"; }

Status FabricBackend::open(bool open_now) {
  BATON_ASSIGN_OR_RETURN(std::vector<std::string> ips, local_addresses(context_->config.bind_address));
  // Control runs over the first address; RDMA devices have names instead of addresses.
  const std::string& ip = ips.front();
  BATON_RETURN_IF_ERROR(control_->listen(ip.find(':') != std::string::npos ? fmt::format("tcp:[{}]", ip) : "tcp:" + ip));
  if (transport_ == "tcp") {
    addresses_ = std::move(ips);
  } else {
    BATON_ASSIGN_OR_RETURN(addresses_, choose_devices(transport_, context_->config.rails));
  }
  const auto count = static_cast<uint32_t>(addresses_.size());
  limits_.max_inflight_messages = count * context_->config.max_inflight_per_rail;
  limits_.max_inflight_bytes = count * kRailBytes;
  // With several rails the last messages decide when a transfer ends: smaller ones end closer together.
  if (count > 1) limits_.plan.max_message_bytes = transport_ == "tcp" ? 256u << 10 : 1u << 20;
  return open_now ? ensure_open() : Status();
}

Status FabricBackend::ensure_open() {
  if (!rails_.empty()) return {};
  const int64_t start_ns = now_ns();
  std::vector<std::shared_ptr<Rail>> rails;
  for (uint32_t i = 0; i < addresses_.size(); ++i) {
    BATON_ASSIGN_OR_RETURN(std::shared_ptr<Rail> rail,
                           Rail::open({transport_, addresses_[i], i, context_->config.max_inflight_per_rail}));
    const Provider& provider = rail->provider();
    limits_.plan.max_segments = std::min<uint32_t>(provider.max_segments, HeldMessage::kMaxSegments);
    limits_.plan.max_message_bytes =
        std::min<uint64_t>(limits_.plan.max_message_bytes, provider.info->ep_attr->max_msg_size);
    rails.push_back(std::move(rail));
  }
  rails_ = std::move(rails);
  BATON_ASSIGN_OR_RETURN(greeting_region_, FabricRegion::open(greeting_memory_, rails_));
  const Rail& first = *rails_.front();
  provider_name_ = first.provider().name;
  log_info("transfer {}: opened {} on {}: provider {}, {}, {} endpoint{}, {}, {:.1f} ms", agent_name(), transport_,
           fmt::join(addresses_, ", "), provider_name_,
           first.provider().delivery_complete ? "completion means delivered" : "completion as the device gives it",
           first.provider().endpoint_per_peer ? "one" : "a shared",
           first.provider().endpoint_per_peer ? " per peer, rail and direction" : "",
           first.wait_fd() >= 0 ? "sleeps on a descriptor" : "has to be polled",
           static_cast<double>(now_ns() - start_ns) * 1e-6);
  return {};
}

std::string FabricBackend::describe() const {
  const std::string where = addresses_.empty() ? "" : fmt::format(" on {}", fmt::join(addresses_, ", "));
  if (rails_.empty()) return fmt::format("{}{} (opened when the first peer needs it)", transport_, where);
  size_t endpoints = 0;
  for (const auto& rail : rails_) endpoints += rail->shared_endpoint() ? 1 : 0;
  if (endpoints == 0) endpoints = (links_.size() + inbound_.size()) * rails_.size();
  std::string text = fmt::format("{}{} (libfabric {}.{} provider {}, {} endpoints)", transport_, where, FI_MAJOR(fi_version()),
                                 FI_MINOR(fi_version()), provider_name_, endpoints);
  if (rails_.size() == 1) return text;
  text += fmt::format(", {} rail failures", rail_failures_);
  for (const auto& [id, link] : links_) text += fmt::format("; to '{}': {}", link->peer_name(), link->describe());
  return text;
}

Result<std::unique_ptr<BackendRegion>> FabricBackend::register_memory(std::span<std::byte> memory, MemoryKind kind) {
  if (kind != MemoryKind::kHost) return unimplemented("{} moves host memory only", transport_);
  BATON_RETURN_IF_ERROR(ensure_open());
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<FabricRegion> region, FabricRegion::open(memory, rails_));
  return std::unique_ptr<BackendRegion>(std::move(region));
}

BackendLimits FabricBackend::limits_for(const std::string& address) const {
  BackendLimits limits = limits_;
  const std::string own = control_->address();
  const bool this_host = address.substr(0, address.rfind(':')) == own.substr(0, own.rfind(':'));
  if (transport_ != "tcp" || addresses_.size() > 1 || !this_host) return limits;
  limits.plan.max_message_bytes = std::min(limits.plan.max_message_bytes, kLocalTcpMessageBytes);
  limits.plan.max_packed_segment_bytes = kLocalTcpMessageBytes / 2;
  limits.max_inflight_bytes = kLocalTcpBytes;
  limits.min_inflight_messages = kLocalTcpMessages;
  return limits;
}

Result<std::unique_ptr<Link>> FabricBackend::open_link(const Metadata& peer, const Metadata::Offer& offer) {
  if (!offer.address.starts_with("tcp:")) {
    return invalid_argument("'{}' offers {} with a damaged address", peer.name, transport_);
  }
  BATON_RETURN_IF_ERROR(ensure_open());
  BATON_RETURN_IF_ERROR(check_room());
  BATON_ASSIGN_OR_RETURN(ControlPlane::Id id, control_->connect(offer.address, peer.epoch, peer.serial));
  auto link = std::make_unique<FabricLink>(*this, id, peer.name);
  links_.emplace(id, link.get());
  return std::unique_ptr<Link>(std::move(link));
}

size_t FabricBackend::progress(BackendEvents& events) {
  size_t count = 0;
  // While awake the queues are looked at all the time; the control connections cost a system call.
  const int64_t begin_ns = now_ns();
  if (slept_ || begin_ns - control_seen_ns_ >= (control_->reads_going_on() ? kControlOfReadsEveryNs : kControlEveryNs)) {
    control_seen_ns_ = begin_ns;
    count = control_->progress();
  }
  // Entries of closed endpoints are all in the queue by now; after this pass their slots are free.
  const size_t orphans = orphans_.size();
  queue_empty_ = drain_all();
  if (queue_empty_) recycle_orphans(orphans);
  if (!unconfirmed_.empty()) confirm(kConfirmAfterNs);
  if (!greeting_.empty()) {
    for (FabricLink* link : std::exchange(greeting_, {})) {
      if (link->greet()) add_greeting(*link);
    }
  }
  if (rails_.size() > 1) {
    const int64_t now = now_ns();
    for (const auto& [id, link] : links_) count += link->tick(now);
  }
  count += arrivals_.size() + done_.size() + std::exchange(opened_rails_, 0);
  for (uint32_t tag : arrivals_) events.on_arrived(tag, 1);
  arrivals_.clear();
  for (auto& [link, cookie, status] : std::exchange(done_, {})) events.on_posted_done(*link, cookie, status);
  for (auto& [link, status] : std::exchange(failed_, {})) events.on_link_failed(*link, status);
  // A wake-up is an event, too: of a message without a tag the owner sees nothing else, and its data is still coming in.
  if (std::exchange(slept_, false) || count > 0) last_event_ns_ = now_ns();
  return count;
}

int64_t FabricBackend::prepare_wait(std::vector<pollfd>& fds) {
  const int64_t longest_ns = longest_wait_ns(fds);
  slept_ = longest_ns > 0;
  return longest_ns;
}

int64_t FabricBackend::longest_wait_ns(std::vector<pollfd>& fds) {
  fds.push_back({control_->poll_fd(), POLLIN, 0});
  int64_t longest_ns = control_->wants_time() ? 1'000'000'000 : INT64_MAX;
  if (rails_.empty()) return longest_ns;
  // What was left in the queue makes no descriptor readable.
  if (!queue_empty_ || !arrivals_.empty() || !done_.empty() || !failed_.empty() || !unconfirmed_.empty()) return 0;
  if (now_ns() - last_event_ns_ < kAwakeNs) return 0;
  if (!greeting_.empty()) longest_ns = std::min(longest_ns, kGreetAgainNs);
  for (const InboundRail& rail : doomed_) {
    if (rail.peer != nullptr) longest_ns = std::min(longest_ns, kDoomedNs / 4);
  }
  if (rails_.size() > 1) {
    constexpr int64_t kTickNs = 50'000'000;
    // The owner looks now and then, too: a signal that gets lost among so many queues costs that long and no more.
    bool wanted = !inbound_.empty();
    for (const auto& [id, link] : links_) wanted = wanted || link->wants_tick();
    if (wanted) longest_ns = std::min(longest_ns, kTickNs);
  }
  bool poll = false;
  for (const auto& rail : rails_) {
    if (rail->wait_fd() < 0) {
      poll = true;
      continue;
    }
    fid* fids[] = {&rail->waited_on()->fid};
    if (fi_trywait(rail->fabric(), fids, 1) != FI_SUCCESS) return 0;
    fds.push_back({rail->wait_fd(), POLLIN, 0});
  }
  // With several rails, asking whether it may be slept may have completed something in a queue that nobody waits on.
  if (rails_.size() > 1) {
    queue_empty_ = drain_all();
    if (!queue_empty_ || !arrivals_.empty() || !done_.empty() || !failed_.empty()) return 0;
  }
  // No descriptor to sleep on: poll hard for a moment after each event, then more and more slowly.
  if (!poll || (links_.empty() && inbound_.empty())) return longest_ns;
  const int64_t quiet_ns = now_ns() - last_event_ns_;
  if (quiet_ns < 200'000) return 0;
  return quiet_ns < 10'000'000 ? 50'000 : 1'000'000;
}

// --- the owner of the memory ---

/// An endpoint of its own listens, and has a socket later; when there is no descriptor for that libfabric says nothing, and
/// the writes wait for their deadlines.
Status FabricBackend::check_room() const {
  if (!rails_.front()->provider().endpoint_per_peer) return {};
  constexpr size_t kOthers = 8;  // that are on their way to be connected
  return check_descriptors(control_->poll_fd(), 2 * rails_.size() + kOthers, "a peer over " + transport_);
}

Status FabricBackend::open_inbound_rail(uint32_t index, InboundRail* inbound, std::string* address) {
  inbound->index = index;
  Rail& rail = *rails_[index];
  if (!rail.provider().endpoint_per_peer) {
    BATON_ASSIGN_OR_RETURN(*address, rail.endpoint_name(rail.shared_endpoint().get()));
    return {};
  }
  if (rails_.size() > 1) {
    BATON_ASSIGN_OR_RETURN(inbound->queue, rail.open_queue());
  }
  BATON_ASSIGN_OR_RETURN(inbound->endpoint,
                         rail.open_endpoint(inbound->queue ? inbound->queue.get() : rail.queue()));
  BATON_ASSIGN_OR_RETURN(*address, rail.endpoint_name(inbound->endpoint.get()));
  constexpr uint32_t kTags = ~kFirstReservedTag + 1;
  do {
    inbound->greeting_tag = kFirstReservedTag + next_greeting_++ % kTags;
  } while (ungreeted_.contains(inbound->greeting_tag));
  return {};
}

/// Nothing comes in over it after this, and what had come in has been counted.
void FabricBackend::release_inbound_rail(InboundRail& inbound) {
  inbound.endpoint.reset();
  if (!inbound.queue) return;
  const bool empty = drain(inbound.queue.get(), &inbound.arrived);
  CompletionQueueHandle queue = std::move(inbound.queue);
  if (empty) rails_[inbound.index]->reuse_queue(std::move(queue));
}

void FabricBackend::close_inbound_rail(InboundRail inbound, std::shared_ptr<FileDescriptor> peer) {
  if (!inbound.endpoint || inbound.greeted) return release_inbound_rail(inbound);
  inbound.peer = std::move(peer);
  doomed_.push_back(std::move(inbound));
  if (doomed_.size() <= kMaxDoomed) return;
  ungreeted_.erase(doomed_.front().greeting_tag);
  release_inbound_rail(doomed_.front());
  doomed_.pop_front();
}

void FabricBackend::close_doomed() {
  const int64_t now = now_ns();
  for (InboundRail& rail : doomed_) {
    if (rail.queue) drain(rail.queue.get(), nullptr);
    if (rail.peer != nullptr && rail.close_at_ns == INT64_MAX) {
      pollfd poll_fd{rail.peer->get(), POLLRDHUP, 0};
      if (::poll(&poll_fd, 1, 0) != 0) rail.close_at_ns = now + kDoomedNs;
    }
    if (!rail.greeted && now < rail.close_at_ns) continue;
    ungreeted_.erase(rail.greeting_tag);
    release_inbound_rail(rail);
  }
  std::erase_if(doomed_, [](const InboundRail& rail) { return !rail.endpoint; });
}

void FabricBackend::on_greeting(uint32_t tag) {
  auto it = ungreeted_.find(tag);
  if (it == ungreeted_.end()) return;
  if (auto inbound = inbound_.find(it->second); inbound != inbound_.end()) {
    for (InboundRail& rail : inbound->second.rails) rail.greeted = rail.greeted || rail.greeting_tag == tag;
  }
  // Closed once the queues are empty: it may be this queue that is being read.
  for (InboundRail& rail : doomed_) rail.greeted = rail.greeted || rail.greeting_tag == tag;
  ungreeted_.erase(it);
}

Result<Welcome> FabricBackend::on_inbound(ControlPlane::Id id, const Hello& hello) {
  BATON_RETURN_IF_ERROR(ensure_open());
  BATON_RETURN_IF_ERROR(check_room());
  Inbound inbound;
  inbound.name = hello.name;
  inbound.rails.resize(rails_.size());
  Welcome welcome;
  welcome.rails.resize(rails_.size());
  for (uint32_t i = 0; i < rails_.size(); ++i) {
    InboundRail& rail = inbound.rails[i];
    if (Status opened = open_inbound_rail(i, &rail, &welcome.rails[i]); !opened.ok()) {
      for (const InboundRail& other : inbound.rails) ungreeted_.erase(other.greeting_tag);
      return opened;
    }
    if (!rail.endpoint) continue;
    ungreeted_.emplace(rail.greeting_tag, id);
    const FabricRegion::OnRail& target = greeting_region_->rails[i];
    Welcome::Pool greeting;
    greeting.id = rail.greeting_tag;
    greeting.rail = static_cast<uint16_t>(i);
    greeting.base = target.remote_base;
    greeting.key = target.remote_key;
    welcome.pools.push_back(std::move(greeting));
  }
  size_t pools = 0;
  for (const LocalPool& pool : context_->pools()) {
    Result<const BackendRegion*> region = context_->backend_region(pool, *this);
    if (!region.ok()) {
      log_warning("transfer {}: pool {} is not reachable over {}: {}", agent_name(), pool.id, transport_,
                  region.status().to_string());
      continue;
    }
    ++pools;
    const auto& on_rails = static_cast<const FabricRegion*>(*region)->rails;
    for (uint32_t i = 0; i < on_rails.size(); ++i) {
      Welcome::Pool entry;
      entry.id = pool.id;
      entry.rail = static_cast<uint16_t>(i);
      entry.base = on_rails[i].remote_base;
      entry.key = on_rails[i].remote_key;
      welcome.pools.push_back(std::move(entry));
    }
  }
  inbound_.emplace(id, std::move(inbound));
  log_info("transfer {}: '{}' can write into this process over {} ({} pools, {} rails)", agent_name(), hello.name, transport_,
           pools, rails_.size());
  return welcome;
}

void FabricBackend::on_inbound_closed(ControlPlane::Id id, int socket) {
  // What it delivered before counts: its entries are in the queues, take them out first.
  drain_all();
  auto it = inbound_.find(id);
  if (it == inbound_.end()) return;
  std::vector<InboundRail> rails = std::move(it->second.rails);
  inbound_.erase(it);
  std::shared_ptr<FileDescriptor> peer;
  if (std::any_of(rails.begin(), rails.end(), [](const InboundRail& rail) { return rail.endpoint && !rail.greeted; })) {
    // The writer sees our end close as ever; that its own end closes is seen here.
    peer = std::make_shared<FileDescriptor>(::fcntl(socket, F_DUPFD_CLOEXEC, 0));
    (void)::shutdown(peer->get(), SHUT_WR);
  }
  for (InboundRail& rail : rails) close_inbound_rail(std::move(rail), peer);
  context_->wake();
}

void FabricBackend::on_inbound_rail(ControlPlane::Id id, const RailNote& note) {
  auto it = inbound_.find(id);
  if (it == inbound_.end() || note.rail >= it->second.rails.size() || rails_.size() < 2 ||
      !rails_[note.rail]->provider().endpoint_per_peer) {
    return;
  }
  InboundRail& inbound = it->second.rails[note.rail];
  RailNote answer{RailNote::Kind::kCount, note.rail, note.generation, 0, {}};
  if (note.kind == RailNote::Kind::kDown) {
    if (inbound.queue) {
      drain(inbound.queue.get(), &inbound.arrived);
      if (inbound.greeted) inbound.endpoint.reset();  // nothing comes in any more; before the greeting nothing did
      drain(inbound.queue.get(), &inbound.arrived);
      log_warning("transfer {}: '{}' has given up rail {} ({}) after {} messages", agent_name(), it->second.name, note.rail,
                  addresses_[note.rail], inbound.arrived);
    }
    answer.count = inbound.arrived;
    close_inbound_rail(std::exchange(inbound, {}), nullptr);
  } else if (note.kind == RailNote::Kind::kOpen) {
    answer.kind = RailNote::Kind::kReady;
    close_inbound_rail(std::exchange(inbound, {}), nullptr);
    if (Status opened = open_inbound_rail(note.rail, &inbound, &answer.address); !opened.ok()) {
      log_warning("transfer {}: rail {} for '{}': {}", agent_name(), note.rail, it->second.name, opened.to_string());
      answer.address.clear();
    } else {
      ungreeted_.emplace(inbound.greeting_tag, id);
      answer.count = inbound.greeting_tag;
    }
  } else {
    return;
  }
  (void)control_->send_rail_note(id, answer);  // a connection that has gone is noticed by itself
}

// --- the writer ---

void FabricBackend::on_welcome(ControlPlane::Id id, Welcome welcome) {
  auto it = links_.find(id);
  if (it == links_.end()) return;
  if (Status opened = it->second->open(welcome); !opened.ok()) report_failure(*it->second, opened);
}

void FabricBackend::on_outbound_rail(ControlPlane::Id id, const RailNote& note) {
  if (auto it = links_.find(id); it != links_.end()) it->second->on_note(note);
}

void FabricBackend::on_outbound_closed(ControlPlane::Id id, const Status& why) {
  if (auto it = links_.find(id); it != links_.end()) report_failure(*it->second, why);
}

void FabricBackend::report_failure(FabricLink& link, const Status& status) {
  link.die();
  failed_.emplace_back(&link, status);
}

void FabricBackend::forget(FabricLink& link) {
  links_.erase(link.id());
  std::erase_if(failed_, [&](const auto& entry) { return entry.first == &link; });
  std::erase_if(done_, [&](const auto& entry) { return entry.link == &link; });
  std::erase(greeting_, &link);
  std::erase(unconfirmed_, &link);
  control_->close_outbound(link.id());
}

// --- operations and completions ---

Operation* FabricBackend::take_operation() {
  if (free_operations_.empty()) {
    operations_.emplace_back();
    free_operations_.push_back(&operations_.back());
  }
  Operation* operation = free_operations_.back();
  free_operations_.pop_back();
  operation->in_use = true;
  return operation;
}

void FabricBackend::release(Operation* operation) {
  // Twice in the list it would be posted twice at a time, and one of the two messages would never end.
  BATON_CHECK(operation->in_use);
  operation->link = nullptr;
  operation->in_use = false;
  operation->greeting = false;
  operation->confirms = false;
  operation->sent = false;
  free_operations_.push_back(operation);
}

void FabricBackend::orphan(Operation* operation) {
  operation->link = nullptr;
  orphans_.push_back(operation);
}

void FabricBackend::complete(Operation* operation, const Status& status) {
  if (operation->link != nullptr) {
    if (!operation->link->on_completed(*operation, status)) return;
  } else {
    std::erase(orphans_, operation);
  }
  release(operation);
}

bool FabricBackend::drain_all() {
  bool empty = true;
  for (const auto& rail : rails_) {
    empty = drain(rail->queue(), nullptr) && empty;
    rail->tidy();
  }
  if (!doomed_.empty()) close_doomed();
  if (rails_.size() < 2) return empty;
  for (auto& [id, inbound] : inbound_) {
    for (InboundRail& rail : inbound.rails) {
      if (rail.queue) empty = drain(rail.queue.get(), &rail.arrived) && empty;
    }
  }
  return empty;
}

bool FabricBackend::drain(fid_cq* queue, uint64_t* arrived) {
  // A bound, so that one busy fabric does not keep the thread from everything else. (Errors come singly.)
  for (int round = 0; round < 64; ++round) {
    fi_cq_data_entry entries[64];
    ssize_t n = fi_cq_read(queue, entries, 64);
    if (n == -FI_EAGAIN) return true;
    if (n == -FI_EAVAIL) {
      read_error(queue);
      continue;
    }
    if (n < 0) {
      log_error("transfer {}: fi_cq_read({}): {}", agent_name(), provider_name_, fi_strerror(static_cast<int>(-n)));
      return false;
    }
    for (ssize_t i = 0; i < n; ++i) {
      if ((entries[i].flags & FI_REMOTE_CQ_DATA) != 0) {
        const auto tag = static_cast<uint32_t>(entries[i].data);
        if (tag >= kFirstReservedTag) {
          on_greeting(tag);
          continue;
        }
        arrivals_.push_back(tag);
        if (arrived != nullptr) ++*arrived;
      } else if (entries[i].op_context != nullptr) {
        complete(static_cast<Operation*>(entries[i].op_context), Status());
      }
    }
    // Asking again would cost as much as a turn. It may hold an error still: those come alone.
    if (n < 64) return false;
  }
  return false;
}

void FabricBackend::read_error(fid_cq* queue) {
  fi_cq_err_entry error{};
  ssize_t n = fi_cq_readerr(queue, &error, 0);
  if (n != 1) return;
  bool ours = (error.flags & (FI_REMOTE_WRITE | FI_REMOTE_CQ_DATA | FI_RECV)) == 0;
  if (!ours || error.op_context == nullptr) {
    // A writer went away in the middle of a message: it was not counted, and its blocks are quarantined.
    log_debug("transfer {}: an incoming write over {} failed: {}", agent_name(), provider_name_, fi_strerror(error.err));
    return;
  }
  auto* operation = static_cast<Operation*>(error.op_context);
  char text[256] = "";
  const char* detail = fi_cq_strerror(queue, error.prov_errno, error.err_data, text, sizeof(text));
  complete(operation, unavailable("fi_writemsg on rail {}: {} ({}, provider error {})", operation->rail,
                                  fi_strerror(error.err), detail != nullptr ? detail : "", error.prov_errno));
}

void FabricBackend::recycle_orphans(size_t count) {
  // With an endpoint of their own, gone since before the queue was emptied, no completion can come any
  // more. On a shared endpoint a link is closed only when nothing is outstanding.
  for (size_t i = 0; i < count && !orphans_.empty(); ++i) {
    release(orphans_.front());
    orphans_.erase(orphans_.begin());
  }
}

}  // namespace fabric

#if defined(__SANITIZE_ADDRESS__)
/// libfabric 1.17 forgets some entries of lists (24 bytes each) when a queue is closed, and a few names in fi_getinfo().
extern "C" __attribute__((weak)) const char* __lsan_default_suppressions() {
  return "leak:libfabric.so\nleak:libucs.so";  // UCX: 56 bytes of a worker that is kept (ucx/inbound.h)
}
#endif

Result<std::unique_ptr<Backend>> create_fabric_backend(std::shared_ptr<BackendContext> context,
                                                       const std::string& transport, bool open_now) {
  auto backend = std::make_unique<fabric::FabricBackend>(std::move(context), transport);
  BATON_RETURN_IF_ERROR(backend->open(open_now));
  return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace baton::transfer
