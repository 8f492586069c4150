#include "worker/decode_side.h"

#include <algorithm>

#include "base/log.h"
#include "worker/convert.h"

namespace baton::worker {

DecodeSide::DecodeSide(CoreContext& context, PeerTable& peers)
    : context_(context), peers_(peers), break_even_(context.config.local_prefill_tokens) {
  context_.metrics.local_prefill_tokens(break_even_.tokens());
}

// -- Routers and their requests -----------------------------------------------------------------------------

void DecodeSide::add_router(std::shared_ptr<protocol::Channel> channel, const protocol::Hello& hello) {
  auto router = std::make_unique<Router>();
  router->channel = channel;
  router->name = hello.name();
  log_info("router {} is connected", router->name);
  routers_[channel.get()] = std::move(router);
}

void DecodeSide::on_router_closed(const protocol::Channel* channel) {
  auto it = routers_.find(channel);
  if (it == routers_.end()) return;
  std::vector<uint64_t> keys;
  for (const auto& [request, key] : it->second->keys) keys.push_back(key);
  std::sort(keys.begin(), keys.end());
  if (!keys.empty()) log_warning("router {} is gone; {} requests are cancelled", it->second->name, keys.size());
  for (uint64_t key : keys) {
    ClientRequest& request = *requests_.at(key);
    stop_work(request);
    context_.metrics.request_done("cancelled");
    forget(request);
  }
  routers_.erase(it);
}

Status DecodeSide::on_generate(const protocol::Channel* channel, const protocol::Generate& generate) {
  Router& router = *routers_.at(channel);
  if (router.keys.contains(generate.request())) {
    return invalid_argument("{} uses request {} twice", router.name, generate.request());
  }
  const int64_t now_ms = context_.now_ms();
  const CoreConfig& config = context_.config;
  uint64_t key = context_.next_id++;
  auto owned = std::make_unique<ClientRequest>();
  ClientRequest& request = *owned;
  requests_[key] = std::move(owned);
  router.keys[generate.request()] = key;
  request.key = key;
  request.router = &router;
  request.router_request = generate.request();
  request.request.prompt.assign(generate.prompt().begin(), generate.prompt().end());
  request.request.generated.assign(generate.generated().begin(), generate.generated().end());
  request.request.sampling = from_proto(generate.sampling());
  request.tokens = generate.prompt_size() + generate.generated_size();
  for (const auto& candidate : generate.prefill()) {
    request.candidates.push_back({candidate.address(), Epoch{candidate.epoch()}});
  }
  request.arrived_ms = now_ms;
  if (generate.timeout_ms() > 0) request.deadline = Deadline::after_ms(context_.clock, generate.timeout_ms());
  request.request.deadline = request.deadline;
  request.queue_timeout_ms =
      generate.queue_timeout_ms() > 0 ? generate.queue_timeout_ms() : config.default_queue_timeout_ms;
  request.queue_deadline = Deadline::after_ms(context_.clock, request.queue_timeout_ms);

  const Engine& engine = context_.engine;
  Status status = request.request.sampling.validate(engine.model().config().vocab_size);
  if (status.ok() && request.tokens >= config.max_model_len) {
    status = invalid_argument("{} tokens; this model takes fewer than {}", request.tokens, config.max_model_len);
  }
  if (status.ok() && context_.draining) status = unavailable("{} is shutting down", config.name);
  if (status.ok() && context_.admission.size() >= static_cast<size_t>(config.max_queued)) {
    status = resource_exhausted("{} requests wait at {}, the limit is {}", context_.admission.size(), config.name,
                                config.max_queued);
  }
  if (!status.ok()) {
    fail(request, status);
    return {};
  }
  context_.admission.add(key, AdmissionQueue::Side::kDecode);
  return {};
}

void DecodeSide::on_cancel(const protocol::Channel* channel, uint64_t request_id) {
  Router& router = *routers_.at(channel);
  auto key = router.keys.find(request_id);
  if (key == router.keys.end()) return;  // it has ended by itself meanwhile
  ClientRequest& request = *requests_.at(key->second);
  stop_work(request);
  emit_end(request, FinishReason::kCancelled, {});
}

void DecodeSide::fail(ClientRequest& request, const Status& status) {
  stop_work(request);
  emit_end(request, FinishReason::kError, status);
}

void DecodeSide::emit_end(ClientRequest& request, FinishReason finish, const Status& status) {
  TokenOutput end;
  end.finish = finish;
  end.status = status;
  to_proto(end, request.router_request, request.router->outbox.add_tokens());
  context_.metrics.request_done(finish == FinishReason::kCancelled ? "cancelled"
                                : status.code() == StatusCode::kResourceExhausted ? "refused"
                                                                                  : "failed");
  forget(request);
}

void DecodeSide::stop_work(ClientRequest& request) {
  switch (request.state) {
    case State::kQueued:
      context_.admission.remove(request.key);
      break;
    case State::kPrefilling:
    case State::kCommitted:
      context_.metrics.handoff_done("decode", "cancelled", "request_ended");
      end_attempt(request, false);
      break;
    case State::kDecoding:
      context_.engine.cancel(RequestId{request.attempt});
      attempts_.erase(request.attempt);
      request.attempt = 0;
      break;
  }
}

void DecodeSide::forget(ClientRequest& request) {
  BATON_CHECK(request.attempt == 0 || request.state == State::kDecoding);
  if (request.attempt != 0) attempts_.erase(request.attempt);
  request.router->keys.erase(request.router_request);
  requests_.erase(request.key);
}

DecodeSide::ClientRequest* DecodeSide::by_attempt(uint64_t attempt) {
  auto it = attempts_.find(attempt);
  return it == attempts_.end() ? nullptr : requests_.at(it->second).get();
}

// -- Starting -------------------------------------------------------------------------------------------------

bool DecodeSide::try_start(uint64_t key) {
  auto it = requests_.find(key);
  if (it == requests_.end() || it->second->state != State::kQueued) return true;
  ClientRequest& request = *it->second;
  if (request.tokens >= break_even_.tokens()) {
    while (request.next_candidate < request.candidates.size()) {
      const Candidate& candidate = request.candidates[request.next_candidate];
      Status why_not;
      PrefillPeer* peer = peers_.usable(candidate.address, candidate.epoch, &why_not);
      if (peer == nullptr) {
        log_debug("request {}: {} is not used: {}", request.key, candidate.address, why_not.to_string());
        ++request.next_candidate;
        continue;
      }
      bool no_room = false;
      if (try_start_remote(request, *peer, &no_room)) return true;
      if (no_room) return false;
      break;  // short enough for this worker, or remote prefill failed for a reason of our own
    }
  }
  return try_start_local(request);
}

bool DecodeSide::try_start_remote(ClientRequest& request, PrefillPeer& peer, bool* no_room) {
  Engine& engine = context_.engine;
  const BlockLayout& layout = engine.layout();
  const uint64_t attempt = context_.next_id;
  request.request.id = RequestId{attempt};
  auto reservation = engine.reserve(request.request);
  if (!reservation.ok()) {
    if (reservation.status().code() == StatusCode::kResourceExhausted) {
      *no_room = true;
      return false;
    }
    fail(request, reservation.status());
    return true;
  }
  ++context_.next_id;
  const int32_t first_block = reservation->cached_tokens / layout.block_tokens;
  auto tag = context_.transfer.open_inbox();
  // At least one: a prompt whose blocks are all cached here leaves a prefill worker nothing to write.
  const int32_t worth_sending = std::max(1, break_even_.tokens());
  if (request.tokens - reservation->cached_tokens < worth_sending || !tag.ok()) {
    if (!tag.ok()) log_warning("prefilling here, no inbox: {}", tag.status().message());
    if (tag.ok()) context_.transfer.close_inbox(*tag);
    engine.abandon(RequestId{attempt}, false);
    return false;
  }

  protocol::Frame frame;
  protocol::Prefill* prefill = frame.mutable_prefill();
  prefill->set_handoff(attempt);
  prefill->mutable_tokens()->Reserve(request.tokens);
  prefill->mutable_tokens()->Add(request.request.prompt.begin(), request.request.prompt.end());
  prefill->mutable_tokens()->Add(request.request.generated.begin(), request.request.generated.end());
  prefill->set_prompt_tokens(static_cast<int32_t>(request.request.prompt.size()));
  to_proto(request.request.sampling, prefill->mutable_sampling());
  for (size_t b = static_cast<size_t>(first_block); b < reservation->blocks.size(); ++b) {
    prefill->add_blocks(static_cast<uint32_t>(reservation->blocks[b]));
  }
  prefill->set_first_block(first_block);
  prefill->set_tag(static_cast<uint32_t>(*tag));
  prefill->set_lease_ms(context_.config.lease_ms);
  const int64_t now_ms = context_.now_ms();
  if (request.deadline != Deadline::never()) {
    prefill->set_timeout_ms(std::max<int64_t>(1, request.deadline.at_ns / 1'000'000 - now_ms));
  }

  ++request.next_candidate;
  Status sent = peer.channel->send(frame);
  if (!sent.ok()) {  // it never heard of the blocks
    log_warning("{} can't be asked to prefill: {}", peer.name, sent.message());
    peer.channel->close();
    context_.transfer.close_inbox(*tag);
    engine.abandon(RequestId{attempt}, false);
    bool done = try_start(request.key);  // with the next candidate; each is tried once
    *no_room = !done;
    return done;
  }
  request.attempt = attempt;
  attempts_[attempt] = request.key;
  request.tag = *tag;
  request.peer = peer.epoch;
  request.peer_name = peer.name;
  request.sent_ms = now_ms;
  request.sent_ns = context_.clock.now_ns();
  request.granted_bytes = static_cast<uint64_t>(prefill->blocks_size()) * static_cast<uint64_t>(layout.block_bytes());
  request.lease_end_ms = now_ms + context_.config.lease_ms;
  request.path = "remote:" + peer.name;
  request.remote = true;
  request.state = State::kPrefilling;
  started(request);
  return true;
}

bool DecodeSide::try_start_local(ClientRequest& request) {
  if (!context_.has_room(request.tokens)) return false;
  const uint64_t attempt = context_.next_id;
  request.request.id = RequestId{attempt};
  Status status = context_.engine.submit(request.request);
  if (status.code() == StatusCode::kResourceExhausted) return false;
  if (!status.ok()) {
    fail(request, status);
    return true;
  }
  ++context_.next_id;
  request.attempt = attempt;
  attempts_[attempt] = request.key;
  request.request = {};
  request.path = "local";
  request.remote = false;
  request.state = State::kDecoding;
  started(request);
  return true;
}

void DecodeSide::started(ClientRequest& request) {
  if (std::exchange(request.started, true)) return;
  context_.metrics.request_started(seconds_between_ms(request.arrived_ms, context_.now_ms()));
}

// -- The handoff ------------------------------------------------------------------------------------------------

void DecodeSide::on_progress(uint64_t handoff) {
  ClientRequest* request = by_attempt(handoff);
  if (request == nullptr || request->state != State::kPrefilling) return;
  request->lease_end_ms = context_.now_ms() + context_.config.lease_ms;
}

Status DecodeSide::on_commit(const PrefillPeer& peer, const protocol::Commit& commit) {
  ClientRequest* request = by_attempt(commit.handoff());
  auto quarantined = quarantine_.find(commit.handoff());
  transfer::Tag tag{};
  if (request != nullptr && request->state == State::kPrefilling && request->peer == peer.epoch) {
    tag = request->tag;
    request->commit = commit;
    request->state = State::kCommitted;
    request->lease_end_ms = context_.now_ms() + context_.config.lease_ms;
  } else if (quarantined != quarantine_.end() && quarantined->second.peer == peer.epoch) {
    tag = quarantined->second.tag;  // nobody wants it any more, but its blocks become free
  } else {
    return failed_precondition("{} commits handoff {}, which it doesn't have", peer.name, commit.handoff());
  }
  // Delivered is not yet arrived: the count decides.
  return context_.transfer.expect(tag, commit.messages(),
                                  [mailbox = context_.mailbox, handoff = commit.handoff()] {
                                    mailbox->post(InboxComplete{handoff});
                                  });
}

void DecodeSide::on_inbox_complete(uint64_t handoff) {
  if (ClientRequest* request = by_attempt(handoff); request != nullptr && request->state == State::kCommitted) {
    admit(*request);
  } else if (auto it = quarantine_.find(handoff); it != quarantine_.end()) {
    release_quarantine(it);
  }
}

void DecodeSide::admit(ClientRequest& request) {
  if (request.commit.bytes() < request.granted_bytes) {
    retry(request, true, "bad_commit",
          data_loss("{} wrote {} bytes of {}", request.peer_name, request.commit.bytes(), request.granted_bytes));
    return;
  }
  TokenOutput first = from_proto(request.commit.first());
  first.request = RequestId{request.attempt};
  first.index = static_cast<int32_t>(request.request.generated.size());
  Status status = context_.engine.admit(RequestId{request.attempt}, std::move(first));
  if (!status.ok()) {
    retry(request, true, "bad_commit", status);
    return;
  }
  context_.transfer.close_inbox(request.tag);
  request.tag = {};
  request.state = State::kDecoding;
  request.request = {};
  const protocol::Commit& commit = request.commit;
  context_.metrics.handoff_done("decode", "committed", "ok");
  context_.metrics.handoff_admitted(seconds_between_ms(request.sent_ms, context_.now_ms()), commit.queue_s(),
                                    commit.compute_s(), commit.exposed_s());
  break_even_.observe(static_cast<double>(context_.clock.now_ns() - request.sent_ns) * 1e-9, commit.queue_s(),
                      commit.compute_s(), request.tokens - commit.first().cached_prompt_tokens());
  context_.metrics.local_prefill_tokens(break_even_.tokens());
  request.commit.Clear();
}

void DecodeSide::on_abort(const PrefillPeer& peer, const protocol::Abort& abort) {
  Status status = abort.has_status() ? from_proto(abort.status()) : aborted("no reason given");
  ClientRequest* request = by_attempt(abort.handoff());
  if (request != nullptr && request->peer == peer.epoch &&
      (request->state == State::kPrefilling || request->state == State::kCommitted)) {
    retry(*request, true, "aborted", status);
  } else if (auto it = quarantine_.find(abort.handoff()); it != quarantine_.end() && it->second.peer == peer.epoch) {
    release_quarantine(it);
  }
}

void DecodeSide::retry(ClientRequest& request, bool flushed, const char* reason, const Status& status) {
  log_info("handoff {} to {} failed ({}): {}", request.attempt, request.peer_name, reason, status.to_string());
  context_.metrics.handoff_done("decode", "failed", reason);
  end_attempt(request, flushed);
  request.state = State::kQueued;
  // It keeps its place by its arrival, but starts a new wait.
  request.queue_deadline = Deadline::after_ms(context_.clock, request.queue_timeout_ms);
  context_.admission.add(request.key, AdmissionQueue::Side::kDecode);
}

void DecodeSide::end_attempt(ClientRequest& request, bool flushed) {
  const uint64_t attempt = std::exchange(request.attempt, 0);
  attempts_.erase(attempt);
  context_.engine.abandon(RequestId{attempt}, !flushed);
  request.commit.Clear();
  if (flushed) {
    context_.transfer.close_inbox(request.tag);
    return;
  }
  quarantine_[attempt] = {attempt, request.peer, request.peer_name, request.tag, context_.now_ms(), false};
  if (PrefillPeer* peer = peers_.by_epoch(request.peer)) {
    protocol::Frame frame;
    frame.mutable_cancel_prefill()->set_handoff(attempt);
    if (!peer->channel->send(frame).ok()) peer->channel->close();
  }
}

void DecodeSide::release_quarantine(std::map<uint64_t, Quarantined>::iterator it) {
  context_.transfer.close_inbox(it->second.tag);
  context_.engine.end_quarantine(RequestId{it->first});
  quarantine_.erase(it);
}

void DecodeSide::on_peer_lost(Epoch epoch) {
  std::vector<uint64_t> keys;
  for (const auto& [key, request] : requests_) {
    bool waits = request->state == State::kPrefilling || request->state == State::kCommitted;
    if (waits && request->peer == epoch) keys.push_back(key);
  }
  for (uint64_t key : keys) retry(*requests_.at(key), false, "peer_lost", unavailable("the peer's channel is closed"));
}

void DecodeSide::on_peer_fenced(Epoch epoch) {
  for (auto it = quarantine_.begin(); it != quarantine_.end();) {
    auto current = it++;
    if (current->second.peer == epoch) release_quarantine(current);
  }
}

// -- Outputs and time ---------------------------------------------------------------------------------------------

bool DecodeSide::on_output(const TokenOutput& output) {
  ClientRequest* request = by_attempt(static_cast<uint64_t>(output.request));
  if (request == nullptr) return false;
  protocol::TokenOutput* to = request->router->outbox.add_tokens();
  to_proto(output, request->router_request, to);
  if (!request->path.empty()) {
    to->set_path(std::exchange(request->path, {}));
    context_.metrics.first_output(request->remote, seconds_between_ms(request->arrived_ms, context_.now_ms()));
  }
  if (output.finish != FinishReason::kNone) {
    context_.metrics.request_done(output.finish == FinishReason::kError ? "failed" : "finished");
    forget(*request);
  }
  return true;
}

void DecodeSide::tick() {
  const int64_t now_ms = context_.now_ms();
  std::vector<uint64_t> keys;
  for (const auto& [key, request] : requests_) {
    if (request->state != State::kDecoding) keys.push_back(key);
  }
  for (uint64_t key : keys) {
    auto it = requests_.find(key);
    if (it == requests_.end()) continue;
    ClientRequest& request = *it->second;
    if (request.deadline.expired(context_.clock)) {
      fail(request, deadline_exceeded("the request's time ran out before its first token"));
    } else if (request.state == State::kQueued) {
      if (request.queue_deadline.expired(context_.clock)) {
        EngineStats stats = context_.engine.stats();
        fail(request, resource_exhausted("waited {} ms for KV blocks at {}: {} of {} are in use",
                                         request.queue_timeout_ms, context_.config.name, stats.blocks.used,
                                         stats.blocks.total));
      }
    } else if (now_ms >= request.lease_end_ms) {
      bool committed = request.state == State::kCommitted;
      retry(request, false, committed ? "writes_missing" : "lease_expired",
            deadline_exceeded("no sign of {} for {} ms", committed ? "its writes" : "progress",
                              context_.config.lease_ms));
    }
  }
  for (auto& [handoff, entry] : quarantine_) {
    if (entry.told || now_ms - entry.since_ms < context_.config.quarantine_timeout_ms) continue;
    entry.told = true;
    if (PrefillPeer* peer = peers_.by_epoch(entry.peer)) {
      log_warning("{} has not answered for handoff {} in {} ms; its channel is closed, to shut it out", entry.peer_name,
                  handoff, now_ms - entry.since_ms);
      peer->channel->close();
    }
  }
}

void DecodeSide::flush() {
  for (auto& [channel, router] : routers_) {
    if (router->outbox.tokens_size() == 0) continue;
    protocol::Frame frame;
    frame.mutable_step_output()->Swap(&router->outbox);
    Status status = router->channel->send(frame);
    if (status.ok()) continue;
    log_warning("router {} is given up: {}", router->name, status.to_string());
    router->channel->close();  // on_closed cancels its requests
  }
}

void DecodeSide::send_load(const protocol::Load& load) {
  if (routers_.empty()) return;
  protocol::Frame frame;
  *frame.mutable_load() = load;
  for (auto& [channel, router] : routers_) {
    if (!router->channel->send(frame).ok()) router->channel->close();
  }
}

void DecodeSide::drop_routers() {
  for (auto& [channel, router] : routers_) router->channel->close();
}

}  // namespace baton::worker
