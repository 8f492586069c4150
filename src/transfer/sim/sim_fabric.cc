#include "transfer/sim/sim_fabric.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/check.h"
#include "transfer/agent_impl.h"
#include "transfer/cuda/staged_backend.h"
#include "transfer/backend.h"
#include "transfer/wire.h"

namespace baton::transfer {
namespace {
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
class SimBackend;
class SimLink;
}  // namespace

/// All agents and everything that is under way, under one lock. Lock order: an agent's, then this one.
class SimFabric::Network {
 public:
  explicit Network(SimOptions options) : options_(options), random_(options.seed) {}

  struct Event {
    enum class Kind { kDeliver, kComplete, kLinkFailed, kCheck, kCheckResult, kRead, kReadAnswer, kNudge } kind = Kind::kNudge;
    Epoch from = Epoch::kNone;
    Epoch to = Epoch::kNone;
    uint64_t link = 0;
    uint64_t cookie = 0;
    uint64_t serial = 0;  // of the metadata that the link was opened with
    uint32_t remote_pool = 0;
    Tag tag = Tag::kNone;
    std::vector<Segment> segments;
    const std::byte* local = nullptr;
    std::vector<std::byte> copy;  // of the bytes, once their owner is gone
    Status status;
    Check check;
    CheckResult result;
    ReadRequest read;
    ReadAnswer read_answer;
  };
  struct Node {
    SimBackend* backend = nullptr;
    BackendContext* context = nullptr;
    bool dead = false;
    bool stalled = false;
    std::unordered_map<Epoch, uint64_t> fenced;
    // For its next progress().
    std::vector<uint32_t> arrivals;
    std::vector<std::pair<uint64_t, Event>> outcomes;  // link, what happened
    std::vector<CheckChannel::Received> checks;
    std::vector<CheckChannel::Answer> check_results;
    std::vector<ReadChannel::Received> read_requests;
    std::vector<ReadChannel::Answer> read_answers;
    std::unordered_set<uint64_t> readers;  // links

    bool refuses(Epoch writer, uint64_t serial) const {
      auto it = fenced.find(writer);
      return it != fenced.end() && serial <= it->second;
    }
  };

  Node* find(Epoch epoch) {
    auto it = nodes_.find(epoch);
    return it == nodes_.end() ? nullptr : &it->second;
  }
  void schedule(int64_t due_ns, Event event) {
    events_.emplace(std::pair(due_ns, next_sequence_++), std::move(event));
  }
  int64_t delay_ns() {
    int64_t span = options_.max_delay_ns - options_.min_delay_ns;
    return options_.min_delay_ns + (span > 0 ? static_cast<int64_t>(random_.below(static_cast<uint64_t>(span) + 1)) : 0);
  }
  /// Words between the two ends of a link keep their order in each direction, as on a stream socket.
  int64_t control_due_ns(int64_t now_ns, uint64_t link, bool to_owner) {
    int64_t& last_ns = last_control_ns_[{link, to_owner}];
    return last_ns = std::max(last_ns, now_ns + delay_ns());
  }
  void wake(Node& node) {
    if (node.context != nullptr) node.context->wake();
  }
  size_t advance(int64_t now_ns);
  void deliver(Event& event, Node& to);
  void deliver_control(Event& event, const Node& from, Node& to);
  /// The sender's memory may go away: takes the bytes of what is on its way, or forgets it.
  template <typename Predicate>
  void detach(Predicate&& which);

  const SimOptions options_;
  mutable std::mutex mutex_;
  Random random_;
  std::map<std::pair<int64_t, uint64_t>, Event> events_;
  std::vector<Event> held_;  // of agents that are stalled
  std::unordered_map<Epoch, Node> nodes_;
  std::map<std::pair<Epoch, Epoch>, int64_t> last_due_ns_;
  std::map<std::pair<uint64_t, bool>, int64_t> last_control_ns_;
  uint64_t next_sequence_ = 0;
  uint64_t next_link_ = 1;
  uint64_t delivered_ = 0;
};

namespace {

using Network = SimFabric::Network;

class SimLink final : public Link {
 public:
  SimLink(SimBackend& backend, uint64_t id, Epoch peer, uint64_t serial)
      : backend_(backend), id_(id), peer_(peer), serial_(serial) {}
  ~SimLink() override;
  Result<PostResult> post(const BackendMessage& message) override;
  bool ready() const override { return true; }
  bool late_writes_possible() const override;
  CheckChannel::Connection connection() const override { return id_; }

  SimBackend& backend_;
  const uint64_t id_;
  const Epoch peer_;
  const uint64_t serial_;
};

class SimBackend final : public Backend, private CheckChannel, private ReadChannel {
 public:
  SimBackend(SimFabric& fabric, std::shared_ptr<BackendContext> context)
      : network_(fabric.network()), context_(std::move(context)) {
    limits_.plan.max_message_bytes = network_.options_.max_message_bytes;
    limits_.plan.max_segments = network_.options_.max_segments;
    limits_.plan.max_packed_segment_bytes = network_.options_.max_segments > 1 ? network_.options_.max_message_bytes : 0;
    limits_.max_inflight_messages = context_->config.max_inflight_per_rail;
    std::lock_guard lock(network_.mutex_);
    Network::Node& node = network_.nodes_[context_->epoch];
    node.backend = this;
    node.context = context_.get();
  }
  ~SimBackend() override {
    std::lock_guard lock(network_.mutex_);
    network_.detach([this](const Network::Event& event) { return event.from == context_->epoch; });
    Network::Node& node = network_.nodes_[context_->epoch];
    announce_death(node);
    node.backend = nullptr;
    node.context = nullptr;
  }

  const std::string& transport() const override { return transport_; }
  const std::string& provider() const override { return transport_; }
  const BackendLimits& limits() const override { return limits_; }
  std::string describe() const override { return "sim"; }
  Result<std::unique_ptr<BackendRegion>> register_memory(std::span<std::byte> memory, MemoryKind) override {
    auto region = std::make_unique<BackendRegion>();
    region->data = memory.data();
    return region;
  }
  std::string address() const override { return "sim"; }

  Result<std::unique_ptr<Link>> open_link(const Metadata& peer, const Metadata::Offer&) override {
    std::lock_guard lock(network_.mutex_);
    Network::Node* node = network_.find(peer.epoch);
    if (node == nullptr || node->dead) return unavailable("'{}' is not on this network", peer.name);
    if (node->refuses(context_->epoch, peer.serial)) {
      return failed_precondition("refused by the peer: '{}' was fenced", context_->agent_name);
    }
    auto link = std::make_unique<SimLink>(*this, network_.next_link_++, peer.epoch, peer.serial);
    links_.emplace(link->id_, link.get());
    return std::unique_ptr<Link>(std::move(link));
  }

  Status shut_out() override { return Status(); }  // the destructor does it
  Status fence(Epoch peer, uint64_t serial) override {
    std::lock_guard lock(network_.mutex_);
    Network::Node& self = network_.nodes_[context_->epoch];
    self.fenced[peer] = serial;  // from now on deliveries of its links are refused
    Network::Node* writer = network_.find(peer);
    if (writer != nullptr && writer->backend != nullptr) {
      for (const auto& [id, link] : writer->backend->links_) {
        if (link->peer_ == context_->epoch) {
          fail_link(*writer, peer, id, failed_precondition("fenced by the peer"), context_->clock->now_ns());
        }
      }
    }
    return Status();
  }

  size_t progress(BackendEvents& events) override {
    std::vector<uint32_t> arrivals;
    std::vector<std::pair<uint64_t, Network::Event>> outcomes;
    {
      std::lock_guard lock(network_.mutex_);
      network_.advance(context_->clock->now_ns());
      Network::Node& node = network_.nodes_[context_->epoch];
      if (node.dead || node.stalled) return 0;
      arrivals.swap(node.arrivals);
      outcomes.swap(node.outcomes);
    }
    for (uint32_t tag : arrivals) events.on_arrived(tag, 1);
    for (auto& [id, event] : outcomes) {
      auto it = links_.find(id);
      if (it == links_.end()) continue;
      if (event.kind == Network::Event::Kind::kComplete) {
        events.on_posted_done(*it->second, event.cookie, event.status);
      } else {
        events.on_link_failed(*it->second, event.status);
      }
    }
    return arrivals.size() + outcomes.size();
  }

  int64_t prepare_wait(std::vector<pollfd>&) override {
    std::lock_guard lock(network_.mutex_);
    Network::Node& node = network_.nodes_[context_->epoch];
    bool news = !node.arrivals.empty() || !node.outcomes.empty() || !node.checks.empty() || !node.check_results.empty() ||
                !node.read_requests.empty() || !node.read_answers.empty();
    if (!node.dead && !node.stalled && news) return 0;
    if (network_.events_.empty()) return kNever;
    return std::max<int64_t>(network_.events_.begin()->first.first - context_->clock->now_ns(), 0);
  }
  uint64_t inbound_peers() const override { return 0; }

  using Connection = uint64_t;
  CheckChannel& checks() override { return *this; }
  ReadChannel& reads() override { return *this; }
  std::unique_lock<std::mutex> hold_writes() override { return std::unique_lock(network_.mutex_); }
  bool send_check(Connection link, const Check& check) override;
  bool send_check_result(Connection link, const CheckResult& result) override;
  bool serves(Connection link) const override;
  void take_checks(std::vector<CheckChannel::Received>& checks) override { take(&Network::Node::checks, checks); }
  void take_check_results(std::vector<CheckChannel::Answer>& results) override { take(&Network::Node::check_results, results); }
  bool send_read_request(Connection link, const ReadRequest& request) override;
  bool send_read_answer(Connection link, const ReadAnswer& answer) override;
  void take_read_requests(std::vector<ReadChannel::Received>& requests) override { take(&Network::Node::read_requests, requests); }
  void take_read_answers(std::vector<ReadChannel::Answer>& answers) override { take(&Network::Node::read_answers, answers); }
  void take_gone_readers(std::vector<Connection>& gone) override {
    std::lock_guard lock(network_.mutex_);
    Network::Node& node = network_.nodes_[context_->epoch];
    if (node.dead || node.stalled) return;
    for (Connection link : node.readers) {
      if (served_link(link) == nullptr) gone.push_back(link);
    }
    for (Connection link : gone) node.readers.erase(link);
  }
  /// False when this node cannot say anything now. REQUIRES: the network's lock.
  bool send_control(Network::Event event, Epoch to, uint64_t link, bool to_owner) {
    const Network::Node& self = network_.nodes_[context_->epoch];
    if (self.dead || self.stalled) return false;
    event.from = context_->epoch;
    event.to = to;
    event.link = link;
    network_.schedule(network_.control_due_ns(context_->clock->now_ns(), link, to_owner), std::move(event));
    return true;
  }
  template <typename T>
  void take(std::vector<T> Network::Node::*from, std::vector<T>& to) {
    std::lock_guard lock(network_.mutex_);
    Network::Node& node = network_.nodes_[context_->epoch];
    if (!node.dead && !node.stalled) to = std::exchange(node.*from, {});
  }
  /// The link with that id if it leads here and is let in. REQUIRES: the network's lock.
  const SimLink* served_link(uint64_t id) const;

  void fail_link(Network::Node&, Epoch owner, uint64_t link, const Status& status, int64_t due_ns) {
    Network::Event event;
    event.kind = Network::Event::Kind::kLinkFailed;
    event.from = owner;
    event.to = owner;
    event.link = link;
    event.status = status;
    network_.schedule(due_ns, std::move(event));
  }
  /// Everybody with a link to this node learns of it after the notice time. REQUIRES: the network's lock.
  void announce_death(Network::Node& node) {
    if (std::exchange(node.dead, true)) return;
    int64_t due_ns = context_->clock->now_ns() + network_.options_.death_notice_ns;
    for (auto& [epoch, other] : network_.nodes_) {
      if (other.backend == nullptr || other.backend == this) continue;
      for (const auto& [id, link] : other.backend->links_) {
        if (link->peer_ == context_->epoch) {
          fail_link(other, epoch, id, unavailable("the simulated process is dead"), due_ns);
        }
      }
      network_.wake(other);
    }
  }

  Network& network_;
  std::shared_ptr<BackendContext> context_;
  const std::string transport_ = "sim";
  BackendLimits limits_;
  std::unordered_map<uint64_t, SimLink*> links_;  // under both locks when changed
};

SimLink::~SimLink() {
  std::lock_guard lock(backend_.network_.mutex_);
  backend_.links_.erase(id_);
  backend_.network_.last_control_ns_.erase({id_, false});
  backend_.network_.last_control_ns_.erase({id_, true});
  if (Network::Node* peer = backend_.network_.find(peer_)) backend_.network_.wake(*peer);
  backend_.network_.detach([this](const Network::Event& event) { return event.link == id_; });
}

bool SimLink::late_writes_possible() const { return backend_.network_.options_.late_writes; }

const SimLink* SimBackend::served_link(uint64_t id) const {
  const Network::Node& self = network_.nodes_[context_->epoch];
  for (const auto& [epoch, node] : network_.nodes_) {
    if (node.backend == nullptr || node.dead) continue;
    auto it = node.backend->links_.find(id);
    if (it == node.backend->links_.end() || it->second->peer_ != context_->epoch) continue;
    return self.refuses(epoch, it->second->serial_) ? nullptr : it->second;
  }
  return nullptr;
}

bool SimBackend::serves(Connection link) const {
  std::lock_guard lock(network_.mutex_);
  return served_link(link) != nullptr;
}

bool SimBackend::send_check(Connection link, const Check& check) {
  std::lock_guard lock(network_.mutex_);
  Network::Event event;
  event.kind = Network::Event::Kind::kCheck;
  event.check = check;
  return send_control(std::move(event), links_.at(link)->peer_, link, true);
}

bool SimBackend::send_read_request(Connection link, const ReadRequest& request) {
  std::lock_guard lock(network_.mutex_);
  Network::Event event;
  event.kind = Network::Event::Kind::kRead;
  event.read = request;
  return send_control(std::move(event), links_.at(link)->peer_, link, true);
}

bool SimBackend::send_check_result(Connection link, const CheckResult& result) {
  std::lock_guard lock(network_.mutex_);
  const SimLink* writer = served_link(link);
  if (writer == nullptr) return false;
  Network::Event event;
  event.kind = Network::Event::Kind::kCheckResult;
  event.result = result;
  return send_control(std::move(event), writer->backend_.context_->epoch, link, false);
}

bool SimBackend::send_read_answer(Connection link, const ReadAnswer& answer) {
  std::lock_guard lock(network_.mutex_);
  const SimLink* reader = served_link(link);
  if (reader == nullptr) return false;
  Network::Event event;
  event.kind = Network::Event::Kind::kReadAnswer;
  event.read_answer = answer;
  return send_control(std::move(event), reader->backend_.context_->epoch, link, false);
}

Result<PostResult> SimLink::post(const BackendMessage& message) {
  Network& network = backend_.network_;
  std::lock_guard lock(network.mutex_);
  Epoch self = backend_.context_->epoch;
  int64_t now_ns = backend_.context_->clock->now_ns();
  Network::Node& from = network.nodes_[self];
  if (from.dead) return unavailable("this simulated process is dead");
  if (from.stalled) return PostResult::kAgain;
  if (network.random_.chance(network.options_.again)) {
    network.schedule(now_ns + 1000, Network::Event{});  // so that somebody comes back
    return PostResult::kAgain;
  }
  Network::Event event;
  event.kind = Network::Event::Kind::kDeliver;
  event.from = self;
  event.to = peer_;
  event.link = id_;
  event.cookie = message.cookie;
  event.serial = serial_;
  event.remote_pool = message.remote_pool;
  event.tag = message.tag;
  event.segments.assign(message.segments.begin(), message.segments.end());
  event.local = message.local->data;
  int64_t due_ns = now_ns + network.delay_ns();
  if (!network.options_.reorder) {
    int64_t& last_ns = network.last_due_ns_[{self, peer_}];
    due_ns = last_ns = std::max(last_ns, due_ns);
  }
  network.schedule(due_ns, std::move(event));
  return PostResult::kPosted;
}

}  // namespace

template <typename Predicate>
void SimFabric::Network::detach(Predicate&& which) {
  auto handle = [&](Event& event) -> bool {  // true: forget it
    if (!which(event)) return false;
    if (event.kind != Event::Kind::kDeliver || !options_.late_writes) return true;
    if (event.local != nullptr) {
      for (const Segment& segment : event.segments) {
        const std::byte* begin = event.local + segment.local_offset;
        event.copy.insert(event.copy.end(), begin, begin + segment.bytes);
      }
      event.local = nullptr;
    }
    event.link = 0;
    return false;
  };
  std::erase_if(events_, [&](auto& entry) { return handle(const_cast<Event&>(entry.second)); });
  std::erase_if(held_, handle);
}

void SimFabric::Network::deliver(Event& event, Node& to) {
  std::vector<LocalPool> pools = to.context->pools();
  BATON_CHECK(event.remote_pool < pools.size());
  const LocalPool& pool = pools[event.remote_pool];
  size_t copied = 0;
  for (const Segment& segment : event.segments) {
    BATON_CHECK(segment.remote_offset + segment.bytes <= pool.region.bytes());
    const std::byte* source = event.local != nullptr ? event.local + segment.local_offset : event.copy.data() + copied;
    std::memcpy(pool.region.data() + segment.remote_offset, source, segment.bytes);
    copied += segment.bytes;
  }
  if (options_.corrupt > 0 && random_.chance(options_.corrupt)) {
    const Segment& segment = event.segments[random_.below(event.segments.size())];
    const uint64_t bit = random_.below(segment.bytes * 8);
    pool.region.data()[segment.remote_offset + bit / 8] ^= std::byte{1} << (bit % 8);
  }
  if (event.tag != Tag::kNone) to.arrivals.push_back(static_cast<uint32_t>(event.tag));
  ++delivered_;
  wake(to);
}

void SimFabric::Network::deliver_control(Event& event, const Node& from, Node& to) {
  const bool served = to.backend->served_link(event.link) != nullptr;
  if (event.kind == Event::Kind::kCheckResult) {
    to.check_results.push_back({event.link, std::move(event.result)});
  } else if (event.kind == Event::Kind::kReadAnswer) {
    to.read_answers.push_back({event.link, std::move(event.read_answer)});
  } else if (event.kind == Event::Kind::kCheck && served) {
    to.checks.push_back({event.link, from.context->agent_name, std::move(event.check)});
  } else if (event.kind == Event::Kind::kRead && served) {
    to.readers.insert(event.link);
    to.read_requests.push_back({event.link, event.from, from.context->agent_name, std::move(event.read)});
  }
}

size_t SimFabric::Network::advance(int64_t now_ns) {
  size_t count = 0;
  while (!events_.empty() && events_.begin()->first.first <= now_ns) {
    auto node = events_.extract(events_.begin());
    Event event = std::move(node.mapped());
    ++count;
    if (event.kind == Event::Kind::kNudge) continue;
    Node* from = find(event.from);
    Node* to = find(event.to);
    BATON_CHECK(from != nullptr && to != nullptr);
    if ((from->stalled && !from->dead) || (to->stalled && !to->dead)) {
      held_.push_back(std::move(event));
      continue;
    }
    if (event.kind == Event::Kind::kDeliver) {
      Event outcome;
      outcome.kind = Event::Kind::kComplete;
      outcome.from = outcome.to = event.from;
      outcome.link = event.link;
      outcome.cookie = event.cookie;
      int64_t due_ns = now_ns + delay_ns();
      if (to->dead || to->context == nullptr) {
        outcome.status = unavailable("the simulated process is dead");
        due_ns = now_ns + options_.death_notice_ns;
      } else if (to->refuses(event.from, event.serial)) {
        outcome.status = failed_precondition("fenced by the peer");
      } else {
        deliver(event, *to);
      }
      if (event.link != 0) schedule(due_ns, std::move(outcome));
      continue;
    }
    if (event.kind != Event::Kind::kComplete && event.kind != Event::Kind::kLinkFailed) {
      if (to->dead || to->backend == nullptr || from->dead || from->backend == nullptr) continue;
      deliver_control(event, *from, *to);
      wake(*to);
      continue;
    }
    if (from->dead || from->backend == nullptr) continue;
    from->outcomes.emplace_back(event.link, std::move(event));
    wake(*from);
  }
  return count;
}

SimFabric::SimFabric(SimOptions options) : network_(std::make_unique<Network>(options)) {}
SimFabric::~SimFabric() = default;

void SimFabric::kill(Epoch agent) {
  std::lock_guard lock(network_->mutex_);
  Network::Node* node = network_->find(agent);
  if (node == nullptr || node->backend == nullptr) return;
  network_->detach([agent](const Network::Event& event) { return event.from == agent; });
  node->backend->announce_death(*node);
}

void SimFabric::stall(Epoch agent) {
  std::lock_guard lock(network_->mutex_);
  if (Network::Node* node = network_->find(agent)) node->stalled = true;
}

void SimFabric::resume(Epoch agent) {
  std::lock_guard lock(network_->mutex_);
  Network::Node* node = network_->find(agent);
  if (node == nullptr || !node->stalled) return;
  node->stalled = false;
  // Due at once; what still concerns a stalled agent is held again.
  for (Network::Event& event : std::exchange(network_->held_, {})) network_->schedule(0, std::move(event));
  for (auto& [epoch, other] : network_->nodes_) network_->wake(other);
}

int64_t SimFabric::next_event_ns() const {
  std::lock_guard lock(network_->mutex_);
  return network_->events_.empty() ? kNever : network_->events_.begin()->first.first;
}

uint64_t SimFabric::delivered_messages() const {
  std::lock_guard lock(network_->mutex_);
  return network_->delivered_;
}

Result<std::unique_ptr<Agent>> create_sim_agent(SimFabric& fabric, AgentConfig config, const Clock& clock) {
  const HostBackendFactory make_sim = [&fabric](std::shared_ptr<BackendContext> context, const std::string&) {
    return Result<std::unique_ptr<Backend>>(std::make_unique<SimBackend>(fabric, std::move(context)));
  };
  if (config.transport != "staged:sim") config.transport = "sim";
  const auto make = [make_sim, transport = config.transport](
                        std::shared_ptr<BackendContext> context) -> Result<std::unique_ptr<Backend>> {
    if (!is_staged_transport(transport)) return make_sim(std::move(context), transport);
    BATON_ASSIGN_OR_RETURN(std::shared_ptr<UnusedSockets> unused, UnusedSockets::create());
    return create_staged_backend(std::move(context), transport, make_sim, std::move(unused));
  };
  return create_agent_with(std::move(config), clock, make);
}

}  // namespace baton::transfer
