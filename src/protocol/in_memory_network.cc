#include "protocol/in_memory_network.h"

#include <algorithm>

#include "protocol/baton.pb.h"

namespace baton::protocol {

namespace {
std::pair<std::string, std::string> ordered(const std::string& a, const std::string& b) {
  return a < b ? std::make_pair(a, b) : std::make_pair(b, a);
}
}  // namespace

struct InMemoryNetwork::Process {
  std::string name;
  bool alive = true;
  std::unique_ptr<ProcessNetwork> network;
  std::vector<std::weak_ptr<Endpoint>> endpoints;
};

/// Something that will happen to `target`.
struct InMemoryNetwork::Event {
  enum class Kind { kFrame, kClosed, kConnect };
  Kind kind = Kind::kFrame;
  std::shared_ptr<Endpoint> target;
  std::string from;      // process name of the other side
  std::string bytes;     // kFrame
  Status status;         // kClosed
  std::string address;   // kConnect: where `target` wants to go
};

/// One side of a channel.
class InMemoryNetwork::Endpoint final : public Channel, public std::enable_shared_from_this<Endpoint> {
 public:
  Endpoint(InMemoryNetwork& hub, Process& process, std::string address, ChannelHandler handler)
      : hub_(hub), process_(process), address_(std::move(address)), handler_(std::move(handler)) {}

  Status send(const Frame& frame) override {
    size_t bytes = frame.ByteSizeLong();
    if (bytes > hub_.options_.limits.max_frame_bytes) {
      return invalid_argument("a frame of {} bytes to {} is over the limit of {}", bytes, address_,
                              hub_.options_.limits.max_frame_bytes);
    }
    if (closed_ || !process_.alive) return unavailable("the channel to {} is closed", address_);
    if (queued_bytes_ > 0 && queued_bytes_ + bytes > hub_.options_.limits.max_queued_bytes) {
      return resource_exhausted("{} does not read: {} bytes wait to be sent, the limit is {}", address_,
                                queued_bytes_, hub_.options_.limits.max_queued_bytes);
    }
    queued_bytes_ += bytes;
    if (connected_) {
      post_frame(frame.SerializeAsString());
    } else {
      before_connect_.push_back(frame.SerializeAsString());
    }
    return {};
  }

  void close() override {
    if (closed_ || !process_.alive) return;
    closed_ = true;
    if (auto other = other_.lock()) hub_.schedule({Event::Kind::kClosed, other, process_.name, {}, peer_closed(), {}});
    // The own side hears of it too, from pump() like every callback.
    hub_.schedule({Event::Kind::kClosed, shared_from_this(), process_.name, {}, Status(), {}});
  }

  const std::string& address() const override { return address_; }

  Status peer_closed() const { return unavailable("{} closed the channel", process_.name); }
  void post_frame(std::string bytes) {
    if (auto other = other_.lock()) {
      hub_.schedule({Event::Kind::kFrame, other, process_.name, std::move(bytes), {}, {}});
    }
  }

  InMemoryNetwork& hub_;
  Process& process_;
  const std::string address_;
  ChannelHandler handler_;
  std::weak_ptr<Endpoint> other_;
  std::shared_ptr<Endpoint> keep_alive_;  // until on_closed has run
  std::vector<std::string> before_connect_;
  size_t queued_bytes_ = 0;
  int64_t last_due_ns_ = 0;  // of what is on its way to this side: keeps the order
  bool connected_ = false;
  bool closed_ = false;      // by this side
  bool reported_ = false;    // on_closed has run
};

class InMemoryNetwork::MemoryListener final : public Listener {
 public:
  MemoryListener(InMemoryNetwork& hub, Process& process, std::string address, ChannelHandler handler)
      : hub_(hub), process_(process), address_(std::move(address)), handler_(std::move(handler)) {}
  ~MemoryListener() override {
    auto it = hub_.listeners_.find(address_);
    if (it != hub_.listeners_.end() && it->second == this) hub_.listeners_.erase(it);
    for (auto& weak : accepted_) {
      auto endpoint = weak.lock();
      if (endpoint == nullptr) continue;
      endpoint->close();
      endpoint->handler_ = {};  // the owner of the handler is going away
      endpoint->reported_ = true;
      endpoint->keep_alive_.reset();
    }
  }
  const std::string& address() const override { return address_; }

  InMemoryNetwork& hub_;
  Process& process_;
  const std::string address_;
  const ChannelHandler handler_;
  std::vector<std::weak_ptr<Endpoint>> accepted_;
};

class InMemoryNetwork::ProcessNetwork final : public Network {
 public:
  ProcessNetwork(InMemoryNetwork& hub, Process& process) : hub_(hub), process_(process) {}

  Result<std::unique_ptr<Listener>> listen(const std::string& address, ChannelHandler handler) override {
    if (!process_.alive) return unavailable("process {} is dead", process_.name);
    std::string bound = address;
    if (bound.ends_with(":0")) bound = fmt::format("{}:{}", address.substr(0, address.size() - 2), ++next_port_);
    if (hub_.listeners_.contains(bound)) return unavailable("cannot listen on {}: in use", bound);
    auto listener = std::make_unique<MemoryListener>(hub_, process_, bound, std::move(handler));
    hub_.listeners_[bound] = listener.get();
    return std::unique_ptr<Listener>(std::move(listener));
  }

  std::shared_ptr<Channel> connect(const std::string& address, ChannelHandler handler,
                                   int64_t connect_timeout_ms) override {
    auto endpoint = std::make_shared<Endpoint>(hub_, process_, address, std::move(handler));
    endpoint->keep_alive_ = endpoint;
    process_.endpoints.push_back(endpoint);
    auto listener = hub_.listeners_.find(address);
    std::string to = listener == hub_.listeners_.end() ? process_.name : listener->second->process_.name;
    // A connection that can't be made for now fails at its deadline, as over a network.
    if (hub_.frozen_.contains(to) || hub_.partitions_.contains(ordered(process_.name, to))) {
      Event timeout{Event::Kind::kClosed, endpoint, process_.name, {},
                    unavailable("{} did not answer within {} ms", address, connect_timeout_ms), {}};
      endpoint->last_due_ns_ = hub_.clock_.now_ns() + connect_timeout_ms * 1'000'000;
      hub_.schedule(std::move(timeout));
    } else {
      hub_.schedule({Event::Kind::kConnect, endpoint, to, {}, {}, address});
    }
    return endpoint;
  }

 private:
  InMemoryNetwork& hub_;
  Process& process_;
  uint32_t next_port_ = 40000;
};

InMemoryNetwork::InMemoryNetwork(const Clock& clock, uint64_t seed, Options options)
    : clock_(clock), random_(seed), options_(options) {}

InMemoryNetwork::~InMemoryNetwork() {
  events_.clear();
  for (auto& process : processes_) {
    for (auto& weak : process->endpoints) {
      if (auto endpoint = weak.lock()) {
        endpoint->closed_ = true;
        endpoint->handler_ = {};
        endpoint->keep_alive_.reset();
      }
    }
  }
}

Network& InMemoryNetwork::process(const std::string& name) {
  auto it = alive_.find(name);
  if (it == alive_.end()) {
    auto process = std::make_unique<Process>();
    process->name = name;
    process->network = std::make_unique<ProcessNetwork>(*this, *process);
    it = alive_.emplace(name, process.get()).first;
    processes_.push_back(std::move(process));
  }
  return *it->second->network;
}

void InMemoryNetwork::kill(const std::string& name) {
  auto it = alive_.find(name);
  if (it == alive_.end()) return;
  Process& process = *it->second;
  alive_.erase(it);
  frozen_.erase(name);
  std::erase_if(listeners_, [&](const auto& entry) { return &entry.second->process_ == &process; });
  for (auto& weak : process.endpoints) {
    auto endpoint = weak.lock();
    if (endpoint == nullptr) continue;
    if (auto other = endpoint->other_.lock(); other != nullptr && !endpoint->closed_) {
      schedule({Event::Kind::kClosed, other, name, {}, unavailable("the connection to {} was lost", name), {}});
    }
    endpoint->closed_ = true;
    endpoint->reported_ = true;
    endpoint->handler_ = {};
    endpoint->keep_alive_.reset();
  }
  process.alive = false;
}

void InMemoryNetwork::freeze(const std::string& name) { frozen_.insert(name); }
void InMemoryNetwork::thaw(const std::string& name) { frozen_.erase(name); }
void InMemoryNetwork::partition(const std::string& a, const std::string& b) { partitions_.insert(ordered(a, b)); }
void InMemoryNetwork::heal(const std::string& a, const std::string& b) { partitions_.erase(ordered(a, b)); }

void InMemoryNetwork::break_channels(const std::string& a, const std::string& b) {
  auto it = alive_.find(a);
  if (it == alive_.end()) return;
  for (auto& weak : it->second->endpoints) {
    auto endpoint = weak.lock();
    if (endpoint == nullptr || endpoint->closed_) continue;
    auto other = endpoint->other_.lock();
    if (other == nullptr || other->process_.name != b) continue;
    // Each side learns of it by itself: a cut doesn't stop that.
    for (const auto& side : {endpoint, other}) {
      side->closed_ = true;
      schedule({Event::Kind::kClosed, side, side->process_.name, {}, unavailable("the connection broke"), {}});
    }
  }
}

int64_t InMemoryNetwork::draw_delay_ns() {
  int64_t range_us = options_.max_delay_us - options_.min_delay_us;
  int64_t us = options_.min_delay_us;
  if (range_us > 0) us += static_cast<int64_t>(random_.below(static_cast<uint64_t>(range_us) + 1));
  return us * 1000;
}

void InMemoryNetwork::schedule(Event event) {
  int64_t due_ns = std::max(clock_.now_ns() + draw_delay_ns(), event.target->last_due_ns_);
  event.target->last_due_ns_ = due_ns;
  events_.emplace(std::make_pair(due_ns, next_sequence_++), std::move(event));
}

bool InMemoryNetwork::blocked(const Event& event) const {
  const std::string& to = event.target->process_.name;
  return event.target->process_.alive && (frozen_.contains(to) || partitions_.contains(ordered(event.from, to)));
}

std::optional<int64_t> InMemoryNetwork::next_event_ns() const {
  for (const auto& [key, event] : events_) {
    if (!blocked(event)) return key.first;
  }
  return std::nullopt;
}

int64_t InMemoryNetwork::pump() {
  int64_t callbacks = 0;
  const int64_t now_ns = clock_.now_ns();
  // What callbacks send has a later sequence number, so the walk meets it when it is due now. An event that is held
  // back holds back all that follow it on its channel: their targets are the same.
  for (auto it = events_.begin(); it != events_.end() && it->first.first <= now_ns;) {
    if (blocked(it->second)) {
      ++it;
      continue;
    }
    Event event = std::move(it->second);
    auto key = it->first;
    events_.erase(it);
    deliver(event);
    ++callbacks;
    it = events_.upper_bound(key);
  }
  return callbacks;
}

void InMemoryNetwork::deliver(Event& event) {
  auto target = event.target;
  if (!target->process_.alive) return;
  switch (event.kind) {
    case Event::Kind::kFrame: {
      if (auto sender = target->other_.lock()) sender->queued_bytes_ -= event.bytes.size();
      if (target->closed_ || target->reported_) return;
      Frame frame;
      BATON_CHECK(frame.ParseFromString(event.bytes)) << "a frame did not survive its own serialisation";
      if (target->handler_.on_frame) target->handler_.on_frame(target, std::move(frame));
      return;
    }
    case Event::Kind::kClosed: {
      target->closed_ = true;
      if (std::exchange(target->reported_, true)) return;
      auto handler = std::move(target->handler_);
      if (handler.on_closed) handler.on_closed(target, std::move(event.status));
      target->keep_alive_.reset();
      return;
    }
    case Event::Kind::kConnect: {
      auto it = listeners_.find(event.address);
      if (it == listeners_.end() || !it->second->process_.alive) {
        if (!target->closed_) {
          schedule({Event::Kind::kClosed, target, target->process_.name, {},
                    unavailable("cannot connect to {}", event.address), {}});
        }
        return;
      }
      if (target->closed_) return;
      MemoryListener& listener = *it->second;
      auto accepted = std::make_shared<Endpoint>(
          *this, listener.process_, fmt::format("{}#{}", target->process_.name, ++next_channel_), listener.handler_);
      accepted->keep_alive_ = accepted;
      accepted->connected_ = target->connected_ = true;
      accepted->other_ = target;
      target->other_ = accepted;
      listener.process_.endpoints.push_back(accepted);
      listener.accepted_.push_back(accepted);
      for (auto& bytes : std::exchange(target->before_connect_, {})) target->post_frame(std::move(bytes));
      return;
    }
  }
}

}  // namespace baton::protocol
