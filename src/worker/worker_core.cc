#include "worker/worker_core.h"

#include <prometheus/metric_family.h>

#include <algorithm>

#include "base/log.h"
#include "protocol/metrics_codec.h"
#include "protocol/validate.h"

namespace baton::worker {

namespace {
/// Deadlines are looked at this often while any is running.
constexpr int64_t kTickMs = 10;
constexpr int64_t kIdleTickMs = 250;
constexpr int64_t kMsNs = 1'000'000;
}  // namespace

WorkerCore::WorkerCore(CoreConfig config, Engine& engine, KvTransfer& transfer, protocol::Network& network,
                       std::shared_ptr<Mailbox> mailbox, WorkerMetrics& metrics, const Clock& clock)
    : context_{std::move(config), engine, transfer, clock, std::move(mailbox), metrics, {}, 1, false},
      peers_(context_, network, [this] { return make_hello(); }),
      decode_(context_, peers_),
      prefill_(context_) {
  engine.set_layer_ready([this](const LayerReady& ready) { prefill_.on_layer_ready(ready); });
}

WorkerCore::~WorkerCore() { context_.engine.set_layer_ready({}); }

void WorkerCore::run_once(std::vector<Event> events) {
  // All that has happened is known before anything is judged late: a long step must not look like a silent peer.
  for (Event& event : events) {
    std::visit([this](auto& e) { handle(e); }, event);
  }
  if (context_.now_ms() - last_tick_ms_ >= kTickMs) tick();
  start_queued();
  if (context_.engine.has_work() && context_.engine.spare_ns() == 0) step();
  if (!device_.ok()) return;
  decode_.flush();
  report_load();
}

int64_t WorkerCore::idle_ns() const {
  if (context_.engine.has_work()) return std::min(context_.engine.spare_ns(), kTickMs * kMsNs);
  bool timers = decode_.requests() > 0 || decode_.quarantined() > 0 || prefill_.active() > 0 || peers_.busy() ||
                load_urgent_;
  return (timers ? kTickMs : kIdleTickMs) * kMsNs;
}

void WorkerCore::step() {
  StepOutput output = context_.engine.step();
  if (!output.device.ok()) {
    device_ = output.device;
    return;
  }
  int64_t tokens = 0;
  for (const TokenOutput& token : output.tokens) {
    tokens += token.token.has_value();
    if (!decode_.on_output(token) && !prefill_.on_output(token)) {
      log_debug("an output of request {}, which nobody waits for", static_cast<uint64_t>(token.request));
    }
  }
  context_.metrics.step(static_cast<double>(output.step_ns) * 1e-9, tokens);
}

void WorkerCore::start_queued() {
  while (!context_.admission.empty()) {
    auto [arrival, side] = context_.admission.front();
    bool started =
        side == AdmissionQueue::Side::kDecode ? decode_.try_start(arrival) : prefill_.try_start(arrival);
    if (!started) return;
    context_.admission.remove(arrival);
  }
}

void WorkerCore::tick() {
  last_tick_ms_ = context_.now_ms();
  if (peers_.tick()) load_urgent_ = true;
  decode_.tick();
  prefill_.tick();
}

// -- Events -------------------------------------------------------------------------------------------------

void WorkerCore::handle(FrameArrived& event) {
  Status status;
  if (PrefillPeer* peer = peers_.by_channel(event.channel.get())) {
    status = handle_peer_frame(*peer, event.frame);
  } else if (auto kind = accepted_.find(event.channel.get()); kind == accepted_.end()) {
    status = handle_stranger(event.channel, event.frame);
  } else if (kind->second == Kind::kRouter) {
    status = handle_router_frame(event.channel.get(), event.frame);
  } else {
    status = handle_decode_frame(event.channel, event.frame);
  }
  if (status.ok()) return;
  log_warning("the channel with {} is closed: {}", event.channel->address(), status.to_string());
  event.channel->close();
}

Status WorkerCore::handle_peer_frame(PrefillPeer& peer, const protocol::Frame& frame) {
  BATON_RETURN_IF_ERROR(
      protocol::validate_frame(frame, peer.up ? protocol::Sender::kPrefillSide : protocol::Sender::kStranger));
  peer.last_heard_ms = context_.now_ms();
  switch (frame.body_case()) {
    case protocol::Frame::kHello: {
      Status status = peers_.on_hello(peer, frame.hello());
      if (!status.ok()) peer.refused = status;
      load_urgent_ = true;
      return status;
    }
    case protocol::Frame::kProgress: decode_.on_progress(frame.progress().handoff()); return {};
    case protocol::Frame::kCommit: return decode_.on_commit(peer, frame.commit());
    case protocol::Frame::kAbort: decode_.on_abort(peer, frame.abort()); return {};
    case protocol::Frame::kLoad: peers_.on_load(peer, frame.load()); return {};
    case protocol::Frame::kHeadsUp: return {};  // the mailbox has taken note
    default: return internal_error("{} passed validation", protocol::frame_kind_name(frame));
  }
}

Status WorkerCore::handle_stranger(const std::shared_ptr<protocol::Channel>& channel, const protocol::Frame& frame) {
  BATON_RETURN_IF_ERROR(protocol::validate_frame(frame, protocol::Sender::kStranger));
  const protocol::Hello& hello = frame.hello();
  protocol::Frame answer;
  *answer.mutable_hello() = make_hello();
  BATON_RETURN_IF_ERROR(channel->send(answer));  // before judging it, so that the other side can say why, too
  if (hello.protocol_version() != protocol::kProtocolVersion) {
    return failed_precondition("{} speaks protocol version {}, this worker {}", hello.name(),
                               hello.protocol_version(), protocol::kProtocolVersion);
  }
  if (Epoch{hello.epoch()} == context_.transfer.epoch()) return failed_precondition("this worker called itself");
  if (hello.role() == protocol::ROLE_ROUTER) {
    accepted_[channel.get()] = Kind::kRouter;
    decode_.add_router(channel, hello);
  } else {
    accepted_[channel.get()] = Kind::kDecodeWorker;
    prefill_.add_peer(channel, hello);
  }
  load_urgent_ = true;
  last_load_ms_ = 0;  // the newcomer waits for it
  last_metrics_ms_ = 0;
  return {};
}

Status WorkerCore::handle_router_frame(const protocol::Channel* channel, const protocol::Frame& frame) {
  BATON_RETURN_IF_ERROR(protocol::validate_frame(frame, protocol::Sender::kRouter));
  switch (frame.body_case()) {
    case protocol::Frame::kGenerate: return decode_.on_generate(channel, frame.generate());
    case protocol::Frame::kCancel: decode_.on_cancel(channel, frame.cancel().request()); return {};
    case protocol::Frame::kSetPeers: {
      std::vector<std::string> addresses;
      for (const auto& candidate : frame.set_peers().prefill()) addresses.push_back(candidate.address());
      peers_.set_wanted(channel, addresses);
      load_urgent_ = true;
      return {};
    }
    case protocol::Frame::kHeadsUp: return {};
    default: return internal_error("{} passed validation", protocol::frame_kind_name(frame));
  }
}

Status WorkerCore::handle_decode_frame(const std::shared_ptr<protocol::Channel>& channel,
                                       const protocol::Frame& frame) {
  BATON_RETURN_IF_ERROR(protocol::validate_frame(frame, protocol::Sender::kDecodeSide));
  if (frame.body_case() == protocol::Frame::kCancelPrefill) {
    prefill_.on_cancel(channel.get(), frame.cancel_prefill().handoff());
    return {};
  }
  return prefill_.on_prefill(channel, frame.prefill());
}

void WorkerCore::handle(ChannelClosed& event) {
  const protocol::Channel* channel = event.channel.get();
  if (PrefillPeer* peer = peers_.by_channel(channel)) {
    Epoch lost = peers_.on_closed(*peer, event.status);
    if (lost != Epoch::kNone) decode_.on_peer_lost(lost);
    load_urgent_ = true;
    return;
  }
  auto kind = accepted_.find(channel);
  if (kind == accepted_.end()) return;
  if (kind->second == Kind::kRouter) {
    decode_.on_router_closed(channel);
    peers_.forget_router(channel);
  } else {
    prefill_.on_closed(channel);
  }
  accepted_.erase(kind);
}

void WorkerCore::handle(WriteDone& event) { prefill_.on_write_done(event); }
void WorkerCore::handle(InboxComplete& event) { decode_.on_inbox_complete(event.handoff); }
void WorkerCore::handle(FenceDone& event) {
  if (peers_.on_fence_done(event.peer, event.status)) decode_.on_peer_fenced(event.peer);
}

// -- What others are told -----------------------------------------------------------------------------------

protocol::Hello WorkerCore::make_hello() const {
  protocol::Hello hello;
  hello.set_protocol_version(protocol::kProtocolVersion);
  hello.set_epoch(static_cast<uint64_t>(context_.transfer.epoch()));
  hello.set_name(context_.config.name);
  hello.set_role(context_.config.role);
  hello.set_model(context_.config.served_model_name);
  hello.set_fingerprint(context_.engine.layout().fingerprint());
  hello.set_transfer_metadata(context_.transfer.metadata());
  hello.set_kv_pool(context_.transfer.pool());
  hello.set_vocab_size(context_.engine.model().config().vocab_size);
  hello.set_max_model_len(context_.config.max_model_len);
  hello.set_block_tokens(context_.engine.layout().block_tokens);
  hello.set_transport(context_.transfer.describe());
  hello.set_kernels(context_.config.kernels);
  return hello;
}

protocol::Load WorkerCore::make_load() const {
  EngineStats stats = context_.engine.stats();
  protocol::Load load;
  load.set_blocks_total(stats.blocks.total);
  load.set_blocks_free(stats.blocks.free);
  load.set_blocks_cached(stats.blocks.cached);
  load.set_blocks_used(stats.blocks.used);
  load.set_blocks_quarantined(stats.blocks.quarantined);
  load.set_waiting(stats.waiting + static_cast<int64_t>(context_.admission.size()));
  load.set_running(stats.running + stats.reserved);
  load.set_queued_tokens(stats.waiting_tokens);
  load.set_draining(context_.draining);
  load.set_local_prefill_tokens(decode_.local_prefill_tokens());
  return load;
}

void WorkerCore::report_load() {
  const int64_t now_ms = context_.now_ms();
  const int64_t since_ms = now_ms - last_load_ms_;
  if (since_ms < context_.config.load_min_interval_ms) return;
  protocol::Load load = make_load();
  uint64_t key = 0;
  for (int64_t value : {load.blocks_free(), load.blocks_cached(), load.blocks_quarantined(), load.waiting(),
                        load.running(), load.queued_tokens()}) {
    key = mix_bits(key, static_cast<uint64_t>(value));
  }
  if (key == last_load_key_ && !load_urgent_ && since_ms < context_.config.load_max_interval_ms) return;
  last_load_key_ = key;
  last_load_ms_ = now_ms;
  load_urgent_ = false;
  context_.metrics.update(context_.engine.stats(), static_cast<int64_t>(context_.admission.size()),
                          static_cast<int64_t>(decode_.quarantined()), static_cast<int64_t>(prefill_.active()),
                          static_cast<int64_t>(decode_.routers()));
  const transfer::AgentStats transfer = context_.transfer.stats();
  context_.metrics.checked(transfer.checked_blocks, transfer.corrupt_blocks);
  prefill_.send_load(load);
  peers_.fill(&load);
  if (decode_.routers() > 0 && now_ms - last_metrics_ms_ >= context_.config.load_max_interval_ms) {
    last_metrics_ms_ = now_ms;
    load.set_metrics(protocol::encode_metrics(context_.metrics.collect()));
  }
  decode_.send_load(load);
}

// -- The end ------------------------------------------------------------------------------------------------

void WorkerCore::begin_drain() {
  context_.draining = true;
  load_urgent_ = true;
}

bool WorkerCore::drained() const {
  return decode_.requests() == 0 && prefill_.active() == 0 && !context_.engine.has_work();
}

void WorkerCore::drop_all() {
  prefill_.abort_all(unavailable("{} is shutting down", context_.config.name));
  decode_.drop_routers();
}

void WorkerCore::disconnect() {
  decode_.drop_routers();
  prefill_.drop_peers();
  peers_.close_all();
}

CoreHealth WorkerCore::health() const {
  CoreHealth health;
  health.name = context_.config.name;
  health.epoch = context_.transfer.epoch();
  health.draining = context_.draining;
  health.engine = context_.engine.stats();
  health.requests = static_cast<int64_t>(decode_.requests());
  health.queued = static_cast<int64_t>(context_.admission.size());
  health.active_prefills = static_cast<int64_t>(prefill_.active());
  health.quarantined_handoffs = static_cast<int64_t>(decode_.quarantined());
  health.routers = static_cast<int64_t>(decode_.routers());
  health.decode_peers = static_cast<int64_t>(prefill_.peers());
  health.load = make_load();
  peers_.fill(&health.load);
  return health;
}

}  // namespace baton::worker
