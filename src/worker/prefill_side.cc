#include "worker/prefill_side.h"

#include <algorithm>
#include <utility>

#include "base/log.h"
#include "worker/convert.h"

namespace baton::worker {

namespace {
constexpr int64_t kLinkRetryMs = 100;
/// Signs of life per lease.
constexpr int64_t kProgressPerLease = 4;
/// A burst has at most so many layers for each one still to be computed, so that it is over before they are.
constexpr int32_t kBurstLayersPerLayer = 4;

/// Whether the layers [first, layer] go now. NVLink that carries something every few milliseconds costs a long prefill 2 % of
/// its time, in one burst 0.3 % (H200, docs/performance.md).
bool burst_is_due(int32_t first, int32_t layer, int32_t layers) {
  return layer == layers - 1 || layer - first + 1 >= kBurstLayersPerLayer * (layers - layer);
}
}  // namespace

PrefillSide::PrefillSide(CoreContext& context) : context_(context) {}

void PrefillSide::add_peer(std::shared_ptr<protocol::Channel> channel, const protocol::Hello& hello) {
  auto peer = std::make_shared<Peer>();
  peer->channel = channel;
  peer->name = hello.name();
  peer->epoch = Epoch{hello.epoch()};
  peer->metadata = hello.transfer_metadata();
  peer->pool = hello.kv_pool();
  peer->refused = context_.engine.layout().check_compatible(hello.fingerprint()).with_context(hello.name());
  if (peer->refused.ok()) {
    connect_link(*peer);
  } else {
    log_error("can't prefill for {}: {}", peer->name, peer->refused.message());
    peer->link_status = peer->refused;
  }
  peers_[channel.get()] = std::move(peer);
}

void PrefillSide::connect_link(Peer& peer) {
  auto link = context_.transfer.connect(peer.epoch, peer.metadata, peer.pool);
  Status before = std::exchange(peer.link_status, link.status());
  if (link.ok()) {
    peer.link = *std::move(link);
    transfer::PathInfo path = peer.link->path();
    peer.bursts = path.transport == context_.config.burst_transport;
    log_info("KV for {} goes by {} ({}), {} rails: {}", peer.name, path.transport, path.provider, path.rails,
             path.reason);
    return;
  }
  peer.next_link_try_ms = context_.now_ms() + kLinkRetryMs;
  if (before.code() != peer.link_status.code()) {
    log_warning("no path to the memory of {}: {}", peer.name, peer.link_status.message());
  }
}

void PrefillSide::on_closed(const protocol::Channel* channel) {
  auto it = peers_.find(channel);
  if (it == peers_.end()) return;
  auto peer = std::move(it->second);
  peers_.erase(it);
  peer->closed = true;
  std::vector<uint64_t> ids;
  for (const auto& [handoff, id] : peer->ids) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  for (uint64_t id : ids) {
    auto handoff = handoffs_.find(id);
    if (handoff != handoffs_.end()) begin_abort(handoff->second, unavailable("{} closed its channel", peer->name));
  }
  // The link goes with the last of the peer's handoffs, here or when they are flushed.
}

Status PrefillSide::check(const Peer& peer, const protocol::Prefill& prefill) const {
  if (context_.draining) return unavailable("{} is shutting down", context_.config.name);
  if (!peer.refused.ok()) return peer.refused;
  if (peer.link == nullptr || !peer.link->alive()) {
    return peer.link_status.ok() ? unavailable("the path to {} is down", peer.name) : peer.link_status;
  }
  if (context_.admission.size() >= static_cast<size_t>(context_.config.max_queued)) {
    return resource_exhausted("{} prefills and requests wait, the limit is {}", context_.admission.size(),
                              context_.config.max_queued);
  }
  if (prefill.tokens_size() >= context_.config.max_model_len) {
    return invalid_argument("{} tokens, this worker takes fewer than {}", prefill.tokens_size(),
                            context_.config.max_model_len);
  }
  int64_t blocks = context_.engine.layout().tokens_to_blocks(prefill.tokens_size());
  if (prefill.first_block() + int64_t{prefill.blocks_size()} != blocks) {
    return invalid_argument("{} tokens are {} blocks, but {} + {} are granted", prefill.tokens_size(), blocks,
                            prefill.first_block(), prefill.blocks_size());
  }
  return {};
}

Status PrefillSide::on_prefill(const std::shared_ptr<protocol::Channel>& channel, const protocol::Prefill& prefill) {
  auto it = peers_.find(channel.get());
  BATON_CHECK(it != peers_.end());
  const std::shared_ptr<Peer>& peer = it->second;
  if (peer->ids.contains(prefill.handoff())) {
    return invalid_argument("{} uses handoff {} twice", peer->name, prefill.handoff());
  }
  Status status = check(*peer, prefill);
  if (!status.ok()) {
    context_.metrics.handoff_done("prefill", "failed", "refused");
    send_abort(*peer, prefill.handoff(), status);
    return {};
  }
  const int64_t now_ms = context_.now_ms();
  uint64_t id = context_.next_id++;
  Handoff& handoff = handoffs_[id];
  handoff.id = id;
  handoff.handoff = prefill.handoff();
  handoff.peer = peer;
  handoff.tokens = prefill.tokens_size();
  handoff.blocks.assign(prefill.blocks().begin(), prefill.blocks().end());
  handoff.first_block = prefill.first_block();
  handoff.tag = transfer::Tag{prefill.tag()};
  handoff.received_ms = now_ms;
  handoff.delivery = std::make_shared<Delivery>();
  handoff.delivery->channel = channel;
  if (prefill.timeout_ms() > 0) handoff.deadline = Deadline::after_ms(context_.clock, prefill.timeout_ms());
  handoff.lease_ms = prefill.lease_ms();
  handoff.next_progress_ms = now_ms + handoff.lease_ms / kProgressPerLease;
  Request& request = handoff.request;
  request.id = RequestId{id};
  request.prompt.assign(prefill.tokens().begin(), prefill.tokens().begin() + prefill.prompt_tokens());
  request.generated.assign(prefill.tokens().begin() + prefill.prompt_tokens(), prefill.tokens().end());
  request.sampling = from_proto(prefill.sampling());
  request.prefill_only = true;
  request.deadline = handoff.deadline;
  peer->ids[handoff.handoff] = id;
  ++peer->handoffs;
  context_.admission.add(id, AdmissionQueue::Side::kPrefill);
  return {};
}

bool PrefillSide::try_start(uint64_t id) {
  auto it = handoffs_.find(id);
  if (it == handoffs_.end() || it->second.state != State::kQueued) return true;
  Handoff& handoff = it->second;
  if (!context_.has_room(handoff.tokens)) return false;
  Status status = context_.engine.submit(handoff.request);
  if (status.code() == StatusCode::kResourceExhausted) return false;
  if (!status.ok()) {
    begin_abort(handoff, status);
    return true;
  }
  handoff.request = {};
  handoff.submitted = true;
  handoff.state = State::kComputing;
  handoff.started_ms = context_.now_ms();
  return true;
}

void PrefillSide::on_layer_ready(const LayerReady& ready) {
  auto it = handoffs_.find(static_cast<uint64_t>(ready.request));
  if (it == handoffs_.end()) return;
  Handoff& handoff = it->second;
  const BlockLayout& layout = context_.engine.layout();
  if (handoff.state != State::kComputing || !handoff.failure.ok()) return;
  // Inside a step is the only place from where a busy worker can show that it lives, for the waiting ones, too.
  const int64_t now_ms = context_.now_ms();
  for (auto& [id, any] : handoffs_) {
    if (now_ms >= any.next_progress_ms && any.state != State::kFlushing) send_progress(any);
  }
  if (ready.layer == layout.layers - 1) {
    handoff.computed_tokens = std::min(handoff.tokens, ready.last_block * layout.block_tokens);
  }

  if (ready.layer == 0) handoff.unsent_layer = 0;
  if (handoff.peer->bursts && !burst_is_due(handoff.unsent_layer, ready.layer, layout.layers)) return;
  const int32_t first_layer = std::exchange(handoff.unsent_layer, ready.layer + 1);
  const int32_t layers = ready.layer + 1 - first_layer;
  transfer::BlockWrite write;
  int32_t end_block = handoff.first_block + static_cast<int32_t>(handoff.blocks.size());
  for (int32_t b = std::max(ready.first_block, handoff.first_block); b < std::min(ready.last_block, end_block); ++b) {
    write.blocks.push_back({static_cast<uint32_t>(ready.table[static_cast<size_t>(b)]),
                            handoff.blocks[static_cast<size_t>(b - handoff.first_block)]});
  }
  if (write.blocks.empty()) return;
  handoff.written += static_cast<int64_t>(write.blocks.size()) * layers;
  write.offset_bytes = static_cast<uint64_t>(layout.layer_offset_bytes(first_layer));
  write.length_bytes = static_cast<uint64_t>(layers * layout.layer_bytes());
  write.tag = handoff.tag;
  write.deadline = handoff.deadline;
  write.after = ready.ready.get();
  uint32_t index = static_cast<uint32_t>(handoff.writes.size());
  {
    std::lock_guard lock(handoff.delivery->mutex);
    ++handoff.delivery->pending;
    handoff.delivery->all_posted = context_.config.heads_up && handoff.written == expected_writes(handoff);
  }
  auto written = handoff.peer->link->write(
      std::move(write), [mailbox = context_.mailbox, delivery = handoff.delivery, clock = &context_.clock,
                         id = handoff.id, index, event = ready.ready](const Status& status) {
        {
          std::lock_guard lock(delivery->mutex);
          --delivery->pending;
          if (!status.ok()) delivery->spoiled = true;
          delivery->try_commit(clock->now_ns());
          delivery->try_announce();
        }
        mailbox->post(WriteDone{id, index, status});
      });
  if (!written.ok()) {
    handoff.failure = written.status();  // the engine may not be called from here
    std::lock_guard lock(handoff.delivery->mutex);
    --handoff.delivery->pending;
    handoff.delivery->spoiled = true;
    return;
  }
  ++handoff.pending_writes;
  handoff.messages += (*written)->messages();
  handoff.bytes += (*written)->bytes();
  handoff.writes.push_back(*std::move(written));
}

void PrefillSide::Delivery::try_commit(int64_t now_ns) {
  if (pending > 0 || spoiled || sent || !commit.has_commit()) return;
  sent = true;
  commit.mutable_commit()->set_exposed_s(static_cast<double>(now_ns - computed_ns) * 1e-9);
  sent_ok = channel->send(commit).ok();
}

void PrefillSide::Delivery::try_announce() {
  if (pending > 0 || !all_posted || spoiled || announced || commit.has_commit()) return;
  announced = true;
  protocol::Frame frame;
  frame.mutable_heads_up();
  ignore_status(channel->send(frame));  // a courtesy: the Commit will find out
}

int64_t PrefillSide::expected_writes(const Handoff& handoff) const {
  return static_cast<int64_t>(handoff.blocks.size()) * context_.engine.layout().layers;
}

bool PrefillSide::on_output(const TokenOutput& output) {
  auto it = handoffs_.find(static_cast<uint64_t>(output.request));
  if (it == handoffs_.end()) return false;
  Handoff& handoff = it->second;
  if (handoff.state != State::kComputing) return true;
  if (output.finish == FinishReason::kError || !output.token.has_value()) {
    begin_abort(handoff, output.status.ok() ? internal_error("prefill ended without a token") : output.status);
    return true;
  }
  handoff.computed_tokens = handoff.tokens;
  handoff.state = State::kDelivering;
  const int64_t expected = expected_writes(handoff);
  if (handoff.failure.ok() && handoff.written < expected) {
    handoff.failure = internal_error("{} of {} layers of blocks were written", handoff.written, expected);
  }
  if (!handoff.failure.ok()) {
    begin_abort(handoff, handoff.failure);
  } else {
    prepare_commit(handoff, output);
    finish_if_quiet(handoff);
  }
  return true;
}

void PrefillSide::on_write_done(const WriteDone& done) {
  auto it = handoffs_.find(done.prefill_id);
  if (it == handoffs_.end()) return;
  Handoff& handoff = it->second;
  BATON_CHECK(handoff.pending_writes > 0 && done.write < handoff.writes.size());
  --handoff.pending_writes;
  if (!done.status.ok()) {
    handoff.settled = handoff.settled && handoff.writes[done.write]->settled();
    if (handoff.state != State::kFlushing) {
      context_.metrics.transfer_failed(handoff.peer->name,
                                       handoff.peer->link ? handoff.peer->link->path().transport : "none");
      log_warning("KV of handoff {} to {}: {}", handoff.handoff, handoff.peer->name, done.status.to_string());
      begin_abort(handoff, done.status);
      return;
    }
  }
  handoff.writes[done.write].reset();
  finish_if_quiet(handoff);
}

void PrefillSide::begin_abort(Handoff& handoff, Status status) {
  if (handoff.state == State::kFlushing) return;
  if (handoff.state == State::kQueued) context_.admission.remove(handoff.id);
  handoff.state = State::kFlushing;
  handoff.abort_status = std::move(status);
  {
    // A Commit that just left does no harm: all was delivered then, and the Abort that follows says nothing new.
    std::lock_guard lock(handoff.delivery->mutex);
    handoff.delivery->spoiled = true;
  }
  for (const auto& write : handoff.writes) {
    if (write != nullptr) write->cancel();
  }
  finish_if_quiet(handoff);
}

void PrefillSide::finish_if_quiet(Handoff& handoff) {
  if (handoff.pending_writes > 0) return;
  if (handoff.state == State::kDelivering) {
    committed(handoff);
  } else if (handoff.state == State::kFlushing) {
    if (handoff.submitted) context_.engine.cancel(RequestId{handoff.id});
    bool cancelled = handoff.abort_status.code() == StatusCode::kCancelled;
    context_.metrics.handoff_done("prefill", cancelled ? "cancelled" : "failed",
                                  handoff.peer->closed ? "peer_lost" : cancelled ? "cancelled" : "error");
    std::shared_ptr<Peer> peer = handoff.peer;
    if (!peer->closed && handoff.settled) {
      send_abort(*peer, handoff.handoff, handoff.abort_status);
    } else if (!peer->closed) {
      log_warning("the path to {} broke with KV on the way; closing the channel, so that it shuts us out", peer->name);
      peer->channel->close();
    }
    end(handoff);
  }
}

void PrefillSide::prepare_commit(Handoff& handoff, const TokenOutput& first) {
  const int64_t now_ns = context_.clock.now_ns();
  Delivery& delivery = *handoff.delivery;
  std::lock_guard lock(delivery.mutex);
  protocol::Commit* commit = delivery.commit.mutable_commit();
  commit->set_handoff(handoff.handoff);
  to_proto(first, 0, commit->mutable_first());
  commit->mutable_first()->set_finish(static_cast<int>(FinishReason::kNone));  // the decode side decides that
  commit->set_messages(handoff.messages);
  commit->set_bytes(handoff.bytes);
  commit->set_queue_s(seconds_between_ms(handoff.received_ms, handoff.started_ms));
  commit->set_compute_s(seconds_between_ms(handoff.started_ms, now_ns / 1'000'000));
  delivery.computed_ns = now_ns;
  delivery.try_commit(now_ns);
}

void PrefillSide::committed(Handoff& handoff) {
  bool sent_ok = false;
  {
    std::lock_guard lock(handoff.delivery->mutex);
    BATON_CHECK(handoff.delivery->sent) << "every write has called back before its event was handled";
    sent_ok = handoff.delivery->sent_ok;
  }
  context_.metrics.handoff_done("prefill", sent_ok ? "committed" : "failed", sent_ok ? "ok" : "peer_lost");
  if (!sent_ok) handoff.peer->channel->close();
  context_.engine.release(RequestId{handoff.id});
  end(handoff);
}

void PrefillSide::end(Handoff& handoff) {
  std::shared_ptr<Peer> peer = handoff.peer;
  peer->ids.erase(handoff.handoff);
  --peer->handoffs;
  handoffs_.erase(handoff.id);
  count_transfers(*peer);
}

void PrefillSide::on_cancel(const protocol::Channel* channel, uint64_t handoff) {
  auto peer = peers_.find(channel);
  BATON_CHECK(peer != peers_.end());
  auto id = peer->second->ids.find(handoff);
  if (id == peer->second->ids.end()) {
    // Committed or aborted already, or never heard of: in any case nothing of it is under way.
    send_abort(*peer->second, handoff, cancelled("handoff {} is not known here", handoff));
    return;
  }
  begin_abort(handoffs_.at(id->second), cancelled("cancelled by {}", peer->second->name));
}

void PrefillSide::send_abort(Peer& peer, uint64_t handoff, const Status& status) {
  protocol::Frame frame;
  frame.mutable_abort()->set_handoff(handoff);
  to_proto(status, frame.mutable_abort()->mutable_status());
  if (!peer.channel->send(frame).ok()) peer.channel->close();
}

void PrefillSide::send_progress(Handoff& handoff) {
  handoff.next_progress_ms = context_.now_ms() + handoff.lease_ms / kProgressPerLease;
  if (handoff.peer->closed) return;
  protocol::Frame frame;
  frame.mutable_progress()->set_handoff(handoff.handoff);
  frame.mutable_progress()->set_computed_tokens(handoff.computed_tokens);
  if (!handoff.peer->channel->send(frame).ok()) handoff.peer->channel->close();
}

void PrefillSide::tick() {
  const int64_t now_ms = context_.now_ms();
  for (auto& [channel, peer] : peers_) {
    bool down = peer->link == nullptr || !peer->link->alive();
    if (down && peer->refused.ok() && now_ms >= peer->next_link_try_ms) {
      // One life of a channel has one life of a link: its metadata may be stale after a failure. The peer
      // makes new ones when it connects again.
      if (peer->link != nullptr) {
        log_warning("the path to {} is down; closing its channel", peer->name);
        peer->next_link_try_ms = now_ms + kLinkRetryMs * 10;
        peer->channel->close();
      } else {
        connect_link(*peer);
      }
    }
    count_transfers(*peer);
  }
  std::vector<uint64_t> failed;
  for (auto& [id, handoff] : handoffs_) {
    if (handoff.state == State::kFlushing) continue;
    if (!handoff.failure.ok()) {
      failed.push_back(id);
    } else if (handoff.deadline.expired(context_.clock)) {
      handoff.failure = deadline_exceeded("the handoff's time is over");
      failed.push_back(id);
    } else if (handoff.state == State::kQueued &&
               now_ms - handoff.received_ms >= context_.config.prefill_queue_timeout_ms) {
      handoff.failure = resource_exhausted("waited {} ms for a place", now_ms - handoff.received_ms);
      failed.push_back(id);
    } else if (now_ms >= handoff.next_progress_ms) {
      send_progress(handoff);
    }
  }
  for (uint64_t id : failed) {
    auto it = handoffs_.find(id);
    if (it != handoffs_.end()) begin_abort(it->second, it->second.failure);
  }
}

void PrefillSide::abort_all(const Status& status) {
  std::vector<uint64_t> ids;
  for (const auto& [id, handoff] : handoffs_) ids.push_back(id);
  for (uint64_t id : ids) {
    auto it = handoffs_.find(id);
    if (it != handoffs_.end()) begin_abort(it->second, status);
  }
}

void PrefillSide::drop_peers() {
  for (auto& [channel, peer] : peers_) peer->channel->close();
}

void PrefillSide::count_transfers(Peer& peer) {
  if (peer.link == nullptr) return;
  transfer::PeerStats stats = peer.link->stats();
  if (stats.bytes == peer.counted_bytes) return;
  context_.metrics.transferred(peer.name, peer.link->path().transport, stats.bytes - peer.counted_bytes,
                               stats.busy_s - peer.counted_busy_s);
  peer.counted_bytes = stats.bytes;
  peer.counted_busy_s = stats.busy_s;
}

void PrefillSide::send_load(const protocol::Load& load) {
  for (auto& [channel, peer] : peers_) {
    protocol::Frame frame;
    *frame.mutable_load() = load;
    protocol::PairStatus* pair = frame.mutable_load()->add_pairs();
    pair->set_peer(peer->name);
    pair->set_ready(peer->link != nullptr && peer->link->alive());
    if (peer->link != nullptr) {
      transfer::PathInfo path = peer->link->path();
      pair->set_transport(path.transport);
      pair->set_provider(path.provider);
      pair->set_rails(path.rails);
      pair->set_reason(path.reason);
      pair->set_bandwidth_bytes_per_s(path.bandwidth_bytes_per_s);
    }
    if (!pair->ready()) {
      pair->set_why_not(peer->link_status.ok() ? "the path is down" : peer->link_status.message());
    }
    if (!peer->channel->send(frame).ok()) peer->channel->close();
  }
}

}  // namespace baton::worker
