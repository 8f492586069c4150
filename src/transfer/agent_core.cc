#include <algorithm>

#include "base/check.h"
#include "base/log.h"
#include "transfer/agent_impl.h"

namespace baton::transfer {
namespace {

/// How long close() and fence() wait for others to confirm.
constexpr int64_t kCloseWaitNs = 1'000'000'000;
/// When a backend said "not now" and has no descriptor that tells when.
constexpr int64_t kAgainSleepNs = 500'000;
/// It doubles up to this while nothing at all can be posted: a thousand peers that are being connected must not cost two
/// million turns a second.
constexpr int64_t kLongestAgainSleepNs = 4'000'000;

}  // namespace

size_t AgentCore::progress() {
  size_t count = turn();
  run_callbacks();
  return count;
}

size_t AgentCore::turn() {
  size_t count = 0;
  {
    std::lock_guard lock(mutex_);
    count = locked_turn();
  }
  if (count > 0) turned_.notify_all();
  return count;
}

/// REQUIRES: mutex_ is held.
size_t AgentCore::locked_turn() {
  int64_t now_ns = clock_.now_ns();
  // The cancels first: what they name has then been written, so taking the writes after them finds it.
  std::vector<TransferPointer> cancels = take_cancels();
  take_incoming();
  for (const TransferPointer& transfer : cancels) cancel_now(transfer, now_ns);
  size_t count = 0;
  for (size_t i = 0; i < busy_.size(); ++i) count += post(*busy_[i], now_ns) + send_checks(*busy_[i]) + send_reads(*busy_[i]);
  take_read_answers();
  for (const auto& backend : backends_) count += backend->progress(*this);
  count += take_check_results() + serve_checks() + progress_reads();
  for (PeerCore* peer : std::exchange(failed_, {})) fail_peer(*peer, peer->failure);
  check_time(now_ns);
  for (const auto& peer : busy_) {
    if (peer->state == PeerCore::State::kClosing) close_link(*peer);
    peer->busy = peer->inflight_count > 0 || !peer->to_post.empty() || !peer->unsent_reads.empty();
  }
  std::erase_if(busy_, [](const auto& peer) { return !peer->busy; });
  // Only then: a thousand idle peers must not be looked at in every turn.
  if (std::exchange(peer_closed_, false)) {
    std::erase_if(peers_, [](const auto& peer) { return peer->state == PeerCore::State::kClosed; });
  }
  count += std::exchange(finished_, 0);
  if (count > 0) ++turns_;
  return count;
}

void AgentCore::make_busy(const std::shared_ptr<PeerCore>& peer) {
  if (std::exchange(peer->busy, true)) return;
  busy_.push_back(peer);
}

void AgentCore::take_incoming() {
  std::vector<std::shared_ptr<PeerCore>> fresh;
  {
    std::lock_guard lock(handover_mutex_);
    fresh.swap(fresh_);
  }
  for (const std::shared_ptr<PeerCore>& peer : fresh) {
    std::deque<TransferPointer> incoming;
    Status down;
    {
      std::lock_guard lock(peer->queue_mutex);
      incoming.swap(peer->incoming);
      down = peer->down;
    }
    for (TransferPointer& transfer : incoming) {
      deadlines_.emplace(transfer->deadline_ns, transfer);
      if (!down.ok()) {
        fail_transfer(transfer, down);
        continue;
      }
      if (!transfer->wants_more()) {
        finish(transfer);
        continue;
      }
      if (transfer->read != nullptr) {
        peer->unsent_reads.push_back(std::move(transfer));
        make_busy(peer);
        continue;
      }
      Result<const BackendRegion*> local = transfer->local_region.impl()->with(*peer->backend);
      if (!local.ok()) {
        fail_transfer(transfer, local.status());
      } else {
        transfer->local = *local;
        peer->to_post.push_back(std::move(transfer));
        make_busy(peer);
      }
    }
  }
}

std::vector<TransferPointer> AgentCore::take_cancels() {
  std::lock_guard lock(handover_mutex_);
  return std::exchange(cancels_, {});
}

void AgentCore::cancel_now(const TransferPointer& transfer, int64_t now_ns) {
  if (transfer->state.load() == Transfer::Impl::State::kDone || transfer->stopped) return;
  fail_transfer(transfer, cancelled("the {} '{}' was cancelled", transfer->is_read ? "read from" : "write to",
                                    transfer->peer->metadata.name));
  if (transfer->state.load() != Transfer::Impl::State::kDone) expire(transfer, now_ns);
}

size_t AgentCore::post(PeerCore& peer, int64_t now_ns) {
  peer.again = false;
  while (!peer.to_post.empty() && peer.to_post.front()->stopped) peer.to_post.pop_front();
  if (peer.state != PeerCore::State::kOpen || !peer.failure.ok() || !peer.link->ready()) return 0;
  size_t posted = 0;
  uint64_t burst_bytes = 0;
  while (!peer.to_post.empty()) {
    const TransferPointer& transfer = peer.to_post.front();
    if (transfer->stopped || transfer->next_message == transfer->message_count) {
      peer.to_post.pop_front();
      continue;
    }
    const PlannedMessage& planned = transfer->plan.messages[transfer->next_message];
    if (peer.inflight_count >= peer.limits.max_inflight_messages ||
        (peer.inflight_count >= peer.limits.min_inflight_messages && peer.inflight_bytes + planned.bytes > peer.limits.max_inflight_bytes) ||
        burst_bytes >= peer.limits.max_burst_bytes) {
      break;
    }
    const bool hash_before = transfer->check != nullptr && peer.from == MemoryKind::kHost;
    if (hash_before && transfer->check->hashed_messages == transfer->next_message) {
      if (Status hashed = hash_next_message(*transfer); !hashed.ok()) {
        fail_transfer(TransferPointer(transfer), hashed);
        continue;
      }
    }
    uint32_t slot = free_slot(peer);
    BackendMessage message;
    const WritePlan& plan = transfer->plan;
    if (plan.blocks.empty()) {
      message.segments = std::span(plan.segments).subspan(planned.first_segment, planned.segment_count);
    } else {
      message.blocks = std::span(plan.blocks).subspan(planned.first_segment, planned.segment_count);
      message.range = plan.range;
      message.remote_end = transfer->remote_end;
    }
    message.bytes = planned.bytes;
    message.local = transfer->local;
    message.remote_pool = transfer->remote_pool;
    message.tag = transfer->tag;
    message.after = transfer->after;
    message.cookie = slot;
    message.end_can_wait = transfer->end_can_wait;
    message.read = transfer->is_read;
    Result<PostResult> result = peer.link->post(message);
    if (!result.ok()) {
      on_link_failed(*peer.link, result.status());
      break;
    }
    if (*result == PostResult::kFull) break;
    if (*result == PostResult::kAgain) {
      ++retries_;
      peer.again = true;
      peer.again_sleep_ns = posted > 0 ? kAgainSleepNs
                                       : std::clamp(2 * peer.again_sleep_ns, kAgainSleepNs, kLongestAgainSleepNs);
      break;
    }
    take_slot(peer, slot, {transfer, planned.bytes}, now_ns);
    burst_bytes += planned.bytes;
    ++posted;
    // GPU memory holds what is to be sent only from here on (BlockWrite::after).
    if (transfer->check != nullptr && !hash_before) {
      if (Status hashed = hash_next_message(*transfer); !hashed.ok()) fail_transfer(TransferPointer(transfer), hashed);
    }
    ++transfer->next_message;
  }
  if (posted > 0) {
    if (!peer.again) peer.again_sleep_ns = 0;
    peer.link->flush();
  }
  return posted;
}

uint32_t AgentCore::free_slot(PeerCore& peer) {
  if (peer.free_slots.empty()) {
    peer.free_slots.push_back(static_cast<uint32_t>(peer.inflight.size()));
    peer.inflight.emplace_back();
  }
  return peer.free_slots.back();
}

/// REQUIRES: `slot` is what free_slot() has just said.
void AgentCore::take_slot(PeerCore& peer, uint32_t slot, PeerCore::InFlight entry, int64_t now_ns) {
  peer.free_slots.pop_back();
  ++entry.transfer->inflight;
  peer.inflight_bytes += entry.bytes;
  peer.inflight[slot] = std::move(entry);
  if (peer.inflight_count++ == 0) {
    peer.busy_since_ns = now_ns;
    peer.last_progress_ns = now_ns;
  }
}

void AgentCore::release_slot(PeerCore& peer, uint64_t slot) {
  PeerCore::InFlight& entry = peer.inflight[slot];
  peer.inflight_bytes -= entry.bytes;
  entry = {};
  peer.free_slots.push_back(static_cast<uint32_t>(slot));
  if (--peer.inflight_count == 0) {
    peer.busy_ns.fetch_add(clock_.now_ns() - peer.busy_since_ns, std::memory_order_relaxed);
  }
}

void AgentCore::on_posted_done(Link& link, uint64_t cookie, const Status& status) {
  auto& peer = *static_cast<PeerCore*>(link.owner);
  BATON_CHECK(cookie < peer.inflight.size() && peer.inflight[cookie].transfer != nullptr)
      << "a completion for message " << cookie << " that is not under way";
  TransferPointer transfer = peer.inflight[cookie].transfer;
  uint64_t bytes = peer.inflight[cookie].bytes;
  release_slot(peer, cookie);
  --transfer->inflight;
  peer.last_progress_ns = clock_.now_ns();
  if (status.ok() && transfer->is_read) {
    peer.read_bytes.fetch_add(bytes, std::memory_order_relaxed);
  } else if (status.ok()) {
    peer.messages.fetch_add(1, std::memory_order_relaxed);
    peer.bytes.fetch_add(bytes, std::memory_order_relaxed);
    messages_sent_.fetch_add(1, std::memory_order_relaxed);
    bytes_sent_.fetch_add(bytes, std::memory_order_relaxed);
  } else {
    transfer->unsettled = transfer->unsettled || link.late_writes_possible();
    on_link_failed(link, status);
    if (!transfer->stopped) {
      transfer->stopped = true;
      transfer->outcome = status.with_context(transfer->path());
    }
  }
  end_if_ended(transfer);
}

std::string Transfer::Impl::path() const {
  return fmt::format("{} '{}' over {} ({})", is_read ? "read from" : "write to", peer->metadata.name, peer->transport,
                     peer->provider);
}

void AgentCore::end_if_ended(const TransferPointer& transfer) {
  if (transfer->inflight > 0 || (!transfer->stopped && transfer->wants_more())) return;
  const OutgoingCheck* check = transfer->check.get();
  if (check != nullptr && !transfer->stopped && check->next_block < check->blocks.size()) {
    start_check(transfer);
  } else {
    finish(transfer);
  }
}

void AgentCore::on_link_failed(Link& link, const Status& status) {
  auto& peer = *static_cast<PeerCore*>(link.owner);
  if (!peer.failure.ok() || peer.state != PeerCore::State::kOpen) return;
  peer.failure = status;
  failed_.push_back(&peer);
}

void AgentCore::fail_transfer(const TransferPointer& transfer, const Status& why) {
  if (!transfer->stopped) {
    transfer->stopped = true;
    transfer->outcome = why;
    if (transfer->check != nullptr) give_up_check(transfer);
    if (transfer->read != nullptr) give_up_read(transfer);
  }
  if (transfer->inflight == 0) finish(transfer);
}

void AgentCore::finish(const TransferPointer& transfer) {
  if (transfer->state.load() == Transfer::Impl::State::kDone) return;
  deadlines_.erase({transfer->deadline_ns, transfer});
  PeerCore& peer = *transfer->peer;
  if (transfer->outcome.ok()) {
    (transfer->is_read ? peer.reads : peer.writes).fetch_add(1, std::memory_order_relaxed);
  } else if (transfer->outcome.code() == StatusCode::kCancelled) {
    peer.cancelled.fetch_add(1, std::memory_order_relaxed);
  } else {
    peer.failures.fetch_add(1, std::memory_order_relaxed);
    ++failed_transfers_;
  }
  if (transfer->check != nullptr) {
    open_checks_.erase(transfer->check->id);
    transfer->check.reset();
  }
  if (transfer->served.backend != nullptr) end_served_read(transfer);
  transfer->read.reset();
  transfer->plan = {};
  transfer->local = nullptr;
  transfer->local_region = {};
  transfer->status = transfer->outcome;
  transfer->settled = !transfer->unsettled;
  queued_.fetch_sub(1);
  ++finished_;
  if (transfer->on_done) done_.push_back(transfer);
  transfer->state.store(Transfer::Impl::State::kDone, std::memory_order_release);
  transfer->state.notify_all();
}

void AgentCore::check_time(int64_t now_ns) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now_ns) {
    TransferPointer transfer = deadlines_.begin()->second;
    PeerCore& peer = *transfer->peer;
    if (!transfer->stopped) {
      const bool connecting = peer.link != nullptr && !peer.link->ready();
      const bool checking = transfer->check != nullptr && (transfer->check->id != 0 || transfer->check->unsent);
      const std::string progress =
          transfer->read != nullptr
              ? fmt::format("{} of {} blocks were asked for, and not all of them came", transfer->read->next_block,
                            transfer->read->what.blocks.size())
              : fmt::format("{} of {} messages were posted", transfer->next_message, transfer->message_count);
      fail_transfer(transfer, deadline_exceeded("{}: {}{}", transfer->path(), progress,
                                                connecting ? "; the peer has not answered yet"
                                                : checking ? "; it is delivered, but the peer has not said that it is right"
                                                           : ""));
      if (transfer->state.load() == Transfer::Impl::State::kDone) continue;
    }
    expire(transfer, now_ns);
  }
}

/// It has stopped, and something of it is under way: wait for that, as long as the peer shows life.
void AgentCore::expire(const TransferPointer& transfer, int64_t now_ns) {
  PeerCore& peer = *transfer->peer;
  int64_t stalled_at_ns = peer.last_progress_ns + config_.stall_timeout_ms * 1'000'000;
  deadlines_.erase({transfer->deadline_ns, transfer});
  if (now_ns < stalled_at_ns || peer.state != PeerCore::State::kOpen) {
    transfer->deadline_ns = std::max(stalled_at_ns, now_ns + 10'000'000);
    deadlines_.emplace(transfer->deadline_ns, transfer);
    return;
  }
  fail_peer(peer, unavailable("'{}' over {} ({}): nothing came back for {} ms with {} messages under way; the "
                              "path is broken off", peer.metadata.name, peer.transport, peer.provider,
                              (now_ns - peer.last_progress_ns) / 1'000'000, peer.inflight_count));
}

void AgentCore::fail_peer(PeerCore& peer, const Status& why) {
  if (peer.state != PeerCore::State::kOpen) return;
  peer.state = PeerCore::State::kClosing;
  peer.alive.store(false);
  Status down = why.with_context(
      fmt::format("peer '{}' over {} ({}) is down", peer.metadata.name, peer.transport, peer.provider));
  std::deque<TransferPointer> waiting;
  {
    std::lock_guard lock(peer.queue_mutex);
    peer.down = down;
    waiting.swap(peer.incoming);
  }
  if (why.code() == StatusCode::kCancelled) {
    log_info("transfer {}: closed '{}' ({}, {})", config_.name, peer.metadata.name, peer.transport,
             why.message());
  } else {
    log_warning("transfer {}: lost '{}' over {} ({}): {}", config_.name, peer.metadata.name, peer.transport,
                peer.provider, why.to_string());
  }
  waiting.insert(waiting.begin(), peer.to_post.begin(), peer.to_post.end());
  peer.to_post.clear();
  waiting.insert(waiting.end(), peer.unsent_reads.begin(), peer.unsent_reads.end());
  peer.unsent_reads.clear();
  for (const TransferPointer& transfer : waiting) fail_transfer(transfer, down);
  for (const PeerCore::InFlight& entry : peer.inflight) {
    if (entry.transfer != nullptr) fail_transfer(TransferPointer(entry.transfer), down);
  }
  close_link(peer);
}

void AgentCore::close_link(PeerCore& peer) {
  if (peer.link == nullptr || !peer.link->closable()) return;
  bool late = peer.link->late_writes_possible();
  if (peer.open_reads > 0) close_reads(peer);
  peer.link.reset();
  for (size_t slot = 0; slot < peer.inflight.size(); ++slot) {
    TransferPointer transfer = peer.inflight[slot].transfer;
    if (transfer == nullptr) continue;
    transfer->unsettled = transfer->unsettled || (late && peer.inflight[slot].kind == PeerCore::InFlight::Kind::kMessage);
    release_slot(peer, slot);
    if (--transfer->inflight == 0) finish(transfer);
  }
  peer.state = PeerCore::State::kClosed;
  peer_closed_ = true;
}

void AgentCore::run_callbacks() {
  inboxes_.run_due();
  std::vector<TransferPointer> done;
  {
    std::lock_guard lock(mutex_);
    done.swap(done_);
  }
  for (const TransferPointer& transfer : done) {
    if (transfer->on_done) {
      std::exchange(transfer->on_done, nullptr)(transfer->status);
    }
  }
}

bool AgentCore::wait_for_turn(std::unique_lock<std::mutex>& lock, int64_t deadline_ns) {
  if (config_.manual_progress) return false;  // the caller is the one who would make progress
  int64_t left_ns = deadline_ns - clock_.now_ns();
  if (left_ns <= 0) return false;
  uint64_t seen = turns_;
  turned_.wait_for(lock, std::chrono::nanoseconds(left_ns), [&] { return turns_ != seen; });
  return true;
}

Status AgentCore::close_peer(const PeerPaths& paths) {
  int64_t deadline_ns = clock_.now_ns() + kCloseWaitNs;
  {
    std::unique_lock lock(mutex_);
    const Epoch epoch = paths.main().metadata.epoch;
    std::vector<std::shared_ptr<PeerCore>> cores;
    for (const auto& core : paths.cores) {
      if (core != nullptr) cores.push_back(core);
    }
    // What was opened because it reads from here goes as well.
    for (const auto& core : peers_) {
      if (core->metadata.epoch == epoch && !core->wanted) cores.push_back(core);
    }
    for (const auto& peer : cores) fail_peer(*peer, cancelled("closed by this side"));
    for (const auto& peer : cores) {
      while (peer->state == PeerCore::State::kClosing && wait_for_turn(lock, deadline_ns)) {
      }
      if (peer->state == PeerCore::State::kClosing) {
        return unavailable("{} operations towards '{}' have not ended: the device still reads local memory",
                           peer->inflight_count, peer->metadata.name);
      }
    }
    ++turns_;
  }
  wake();  // for the callbacks
  return fence(paths.main().metadata.epoch);
}

Status AgentCore::fence(Epoch peer) {
  int64_t deadline_ns = clock_.now_ns() + kCloseWaitNs;
  std::unique_lock lock(mutex_);
  uint64_t serial = serial_++;
  ++fences_;
  // What it reads may belong to somebody else from now on.
  for (auto it = readers_.begin(); it != readers_.end();) {
    const auto reader = it++;
    if (reader->second.epoch == peer) forget_reader(reader);
  }
  while (true) {
    Status status;
    for (const auto& backend : backends_) {
      Status one = backend->fence(peer, serial);
      if (!one.ok()) status = one;
    }
    if (status.ok() || !wait_for_turn(lock, deadline_ns)) return status;
  }
}

}  // namespace baton::transfer
