#include "worker/peers.h"

#include <algorithm>

#include "base/log.h"
#include "protocol/validate.h"

namespace baton::worker {

namespace {
constexpr int64_t kFenceRetryMinMs = 50;
constexpr int64_t kFenceRetryMaxMs = 2000;
/// A peer whose last life can't be shut out yet is reconnected only after so long: it may have come back as a new one.
constexpr int64_t kFenceHoldMs = 2000;
}  // namespace

PeerTable::PeerTable(CoreContext& context, protocol::Network& network, std::function<protocol::Hello()> make_hello)
    : context_(context), network_(network), make_hello_(std::move(make_hello)), jitter_(context.config.seed) {}

void PeerTable::set_wanted(const protocol::Channel* router, const std::vector<std::string>& addresses) {
  wanted_by_[router] = std::set<std::string>(addresses.begin(), addresses.end());
  std::set<std::string> all;
  for (const auto& [channel, list] : wanted_by_) all.insert(list.begin(), list.end());
  for (const auto& address : all) want(address);
  for (auto& [address, peer] : peers_) peer.wanted = all.contains(address);
}

void PeerTable::want(const std::string& address) {
  auto [it, inserted] = peers_.try_emplace(address);
  PrefillPeer& peer = it->second;
  if (!inserted) return;
  if (peers_.size() > static_cast<size_t>(protocol::kMaxCandidates)) {
    peers_.erase(it);
    return;
  }
  peer.address = address;
  peer.refused = unavailable("{}: not connected yet", address);
  connect(peer);
}

void PeerTable::connect(PrefillPeer& peer) {
  peer.channel =
      network_.connect(peer.address, Mailbox::handler(context_.mailbox), context_.config.connect_timeout_ms);
  protocol::Frame frame;
  *frame.mutable_hello() = make_hello_();
  Status status = peer.channel->send(frame);
  if (!status.ok()) peer.channel->close();  // on_closed follows
}

void PeerTable::back_off(PrefillPeer& peer) {
  const CoreConfig& config = context_.config;
  peer.backoff_ms = std::clamp(peer.backoff_ms * 2, config.reconnect_min_ms, config.reconnect_max_ms);
  peer.next_attempt_ms = context_.now_ms() + peer.backoff_ms / 2 +
                         static_cast<int64_t>(jitter_.below(static_cast<uint64_t>(peer.backoff_ms / 2 + 1)));
  // Trying again won't help soon: another version, ourselves.
  if (peer.refused.code() == StatusCode::kFailedPrecondition) peer.next_attempt_ms += config.reconnect_max_ms;
}

Status PeerTable::readiness(const PrefillPeer& peer) const {
  if (!peer.up) return peer.refused.ok() ? unavailable("{}: not connected", peer.address) : peer.refused;
  if (!peer.refused.ok()) return peer.refused;
  if (!peer.path_ready) {
    return unavailable("{}: no path to our memory: {}", peer.name,
                       peer.path.why_not().empty() ? "not known yet" : peer.path.why_not());
  }
  int64_t silent_ms = context_.now_ms() - peer.last_heard_ms;
  if (silent_ms >= context_.config.lease_ms) {
    return unavailable("{}: silent for {} ms, the lease is {} ms", peer.name, silent_ms, context_.config.lease_ms);
  }
  return {};
}

PrefillPeer* PeerTable::usable(const std::string& address, Epoch epoch, Status* why_not) {
  auto it = peers_.find(address);
  if (it == peers_.end()) {
    want(address);
    *why_not = unavailable("{}: not connected yet", address);
    return nullptr;
  }
  PrefillPeer& peer = it->second;
  *why_not = readiness(peer);
  if (why_not->ok() && epoch != Epoch::kNone && epoch != peer.epoch) {
    *why_not = failed_precondition("{}: the router means its epoch {:x}, connected is {:x}", address,
                                   static_cast<uint64_t>(epoch), static_cast<uint64_t>(peer.epoch));
  }
  return why_not->ok() ? &peer : nullptr;
}

PrefillPeer* PeerTable::by_channel(const protocol::Channel* channel) {
  for (auto& [address, peer] : peers_) {
    if (peer.channel.get() == channel) return &peer;
  }
  return nullptr;
}

PrefillPeer* PeerTable::by_epoch(Epoch epoch) {
  for (auto& [address, peer] : peers_) {
    if (peer.up && peer.epoch == epoch) return &peer;
  }
  return nullptr;
}

Status PeerTable::on_hello(PrefillPeer& peer, const protocol::Hello& hello) {
  peer.last_heard_ms = context_.now_ms();
  peer.name = hello.name();
  if (hello.protocol_version() != protocol::kProtocolVersion) {
    return failed_precondition("{} speaks protocol version {}, this worker {}", peer.name, hello.protocol_version(),
                               protocol::kProtocolVersion);
  }
  if (hello.role() == protocol::ROLE_ROUTER) return failed_precondition("{} is a router", peer.name);
  Epoch epoch{hello.epoch()};
  if (epoch == context_.transfer.epoch()) return failed_precondition("{} is this worker itself", peer.address);
  if (fences_.contains(epoch)) return unavailable("{} was lost and is not shut out yet", peer.name);
  if (PrefillPeer* other = by_epoch(epoch)) {
    return failed_precondition("{} and {} are the same worker", peer.address, other->address);
  }
  peer.epoch = epoch;
  peer.up = true;
  peer.backoff_ms = 0;
  peer.path_ready = false;
  peer.path.Clear();
  // A mismatch keeps the channel: reconnecting would not change it, and /health should show both values.
  Status compatible = context_.engine.layout().check_compatible(hello.fingerprint());
  if (compatible.ok() && hello.vocab_size() != context_.engine.model().config().vocab_size) {
    compatible = failed_precondition("vocab_size {} here, {} there", context_.engine.model().config().vocab_size,
                                     hello.vocab_size());
  }
  peer.refused = compatible.with_context(peer.name);
  if (!peer.refused.ok()) {
    log_error("{} can't prefill for us: {}", peer.name, peer.refused.message());
  } else {
    log_info("prefill worker {} at {} is connected", peer.name, peer.address);
    if (hello.kernels() != context_.config.kernels) {
      log_warning("{} computes with {}, this worker with {}: outputs may differ from those of a single worker where two "
                  "tokens are nearly as likely; --isa gives all workers the same", peer.name, hello.kernels(),
                  context_.config.kernels);
    }
  }
  return {};
}

void PeerTable::on_load(PrefillPeer& peer, const protocol::Load& load) {
  if (load.pairs_size() != 1) return;
  bool was_ready = peer.path_ready;
  peer.path = load.pairs(0);
  peer.path_ready = peer.path.ready() && !load.draining();
  if (load.draining()) peer.path.set_why_not("draining");
  if (peer.path_ready && !was_ready) {
    log_info("{} writes our KV by {} ({}), {} rails: {}", peer.name, peer.path.transport(), peer.path.provider(),
             peer.path.rails(), peer.path.reason());
  } else if (!peer.path_ready && was_ready) {
    log_warning("{} can't reach our memory: {}", peer.name, peer.path.why_not());
  }
}

Epoch PeerTable::on_closed(PrefillPeer& peer, const Status& status) {
  Epoch lost = peer.up ? peer.epoch : Epoch::kNone;
  if (peer.up) {
    log_warning("prefill worker {} at {} is lost: {}", peer.name, peer.address, status.to_string());
    Fence& fence = fences_[lost];
    fence.name = peer.name;
    fence.since_ms = context_.now_ms();
    start_fence(lost, fence);
  }
  // What on_hello said is worth more than that the channel was closed for it.
  bool said_why = !peer.up && !peer.refused.ok() && (status.ok() || peer.refused.code() != StatusCode::kUnavailable);
  if (!said_why) peer.refused = status.ok() ? unavailable("{}: closed", peer.address) : status;
  peer.channel.reset();
  peer.up = false;
  peer.path_ready = false;
  back_off(peer);
  return lost;
}

void PeerTable::start_fence(Epoch epoch, Fence& fence) {
  fence.in_flight = true;
  fence.backoff_ms = std::clamp(fence.backoff_ms * 2, kFenceRetryMinMs, kFenceRetryMaxMs);
  context_.transfer.fence(epoch, [mailbox = context_.mailbox, epoch](const Status& status) {
    mailbox->post(FenceDone{epoch, status});
  });
}

bool PeerTable::on_fence_done(Epoch epoch, const Status& status) {
  auto it = fences_.find(epoch);
  if (it == fences_.end()) return false;
  Fence& fence = it->second;
  fence.in_flight = false;
  if (!status.ok()) {
    if (fence.backoff_ms <= kFenceRetryMinMs) {
      log_warning("{} may still write into our blocks; they stay in quarantine: {}", fence.name, status.message());
    }
    fence.next_try_ms = context_.now_ms() + fence.backoff_ms;
    return false;
  }
  fences_.erase(it);
  return true;
}

bool PeerTable::tick() {
  const int64_t now_ms = context_.now_ms();
  for (auto& [epoch, fence] : fences_) {
    if (!fence.in_flight && now_ms >= fence.next_try_ms) start_fence(epoch, fence);
  }
  bool changed = false;
  for (auto it = peers_.begin(); it != peers_.end();) {
    PrefillPeer& peer = it->second;
    bool ready = readiness(peer).ok();
    auto [last, inserted] = last_ready_.try_emplace(it->first, ready);
    if (inserted || last->second != ready) {
      changed = true;
      last->second = ready;
      context_.metrics.peer_ready(peer.address, ready);
    }
    if (!peer.wanted && peer.channel == nullptr) {
      context_.metrics.forget_peer(peer.address);
      last_ready_.erase(it->first);
      it = peers_.erase(it);
      changed = true;
      continue;
    }
    if (peer.channel == nullptr && now_ms >= peer.next_attempt_ms) {
      auto fence = fences_.find(peer.epoch);
      if (fence == fences_.end() || now_ms - fence->second.since_ms >= kFenceHoldMs) connect(peer);
    }
    ++it;
  }
  return changed;
}

void PeerTable::close_all() {
  for (auto& [address, peer] : peers_) {
    peer.wanted = false;
    if (peer.channel != nullptr) peer.channel->close();
  }
}

void PeerTable::fill(protocol::Load* load) const {
  for (const auto& [address, peer] : peers_) {
    protocol::PairStatus* pair = load->add_pairs();
    *pair = peer.path;
    pair->set_peer(peer.name);
    pair->set_address(address);
    Status ready = readiness(peer);
    pair->set_ready(ready.ok());
    pair->set_why_not(ready.message());
  }
}

bool PeerTable::busy() const {
  if (!fences_.empty()) return true;
  return std::any_of(peers_.begin(), peers_.end(), [](const auto& entry) { return entry.second.channel == nullptr; });
}

}  // namespace baton::worker
