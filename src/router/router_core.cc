#include <algorithm>
#include <utility>

#include "base/log.h"
#include "base/random.h"
#include "protocol/validate.h"
#include "router/router.h"

namespace baton {

namespace {

constexpr size_t kMaxPrefillCandidates = 3;
// FinishReason of engine/request.h, as it travels in TokenOutput.finish.
constexpr int kFinishNone = 0;
constexpr int kFinishError = 4;

Status from_message(const protocol::StatusMessage& message) {
  int code = message.code();
  if (code <= 0 || code > static_cast<int>(StatusCode::kAborted)) {
    code = static_cast<int>(StatusCode::kInternal);
  }
  return Status(static_cast<StatusCode>(code), message.message());
}

/// Which model a worker has loaded, whatever name it serves it under: part of its layout's fingerprint.
std::string_view model_identity(const protocol::Hello& hello) {
  constexpr std::string_view kField = " model=";
  std::string_view fingerprint = hello.fingerprint();
  size_t at = fingerprint.find(kField);
  return at == std::string_view::npos ? std::string_view() : fingerprint.substr(at + kField.size());
}

std::string worker_label(const WorkerEntry& worker) {
  if (worker.hello.name().empty()) return worker.address;
  return fmt::format("{} ({})", worker.hello.name(), worker.address);
}

}  // namespace

struct RouterCore::RequestState {
  uint64_t id = 0;
  std::vector<int32_t> prompt;
  std::vector<int32_t> generated;
  protocol::Sampling sampling;
  std::shared_ptr<Client> client;
  int64_t deadline_ns = 0;        // of the whole request
  int64_t queue_deadline_ns = 0;  // of the present wait for a worker
  int32_t attempts = 0;
  WorkerEntry* worker = nullptr;            // who decodes it
  WorkerEntry* prefill = nullptr;           // first candidate, until the first token
  std::unordered_set<std::string> full;     // workers that refused it for lack of room
  Status last_failure;

  int64_t tokens() const { return static_cast<int64_t>(prompt.size() + generated.size()); }
};

Status RouterConfig::validate() const {
  if (workers.empty()) {
    return invalid_argument("the router has no worker; name each with --worker ADDRESS");
  }
  std::unordered_set<std::string> seen;
  for (const std::string& address : workers) {
    if (address.empty()) return invalid_argument("a worker address is empty");
    if (!seen.insert(address).second) {
      return invalid_argument("worker address {} is given twice", address);
    }
  }
  if (max_requests < 1) return invalid_argument("max_requests is {}; it must be positive", max_requests);
  if (max_attempts < 1) return invalid_argument("max_attempts is {}; it must be positive", max_attempts);
  if (queue_timeout_ms < 1 || request_timeout_ms < 0) {
    return invalid_argument("timeouts must be positive (queue {} ms, request {} ms)", queue_timeout_ms,
                            request_timeout_ms);
  }
  if (request_timeout_ms > protocol::kMaxTimeoutMs || queue_timeout_ms > protocol::kMaxTimeoutMs) {
    return invalid_argument("timeouts can be {} ms at most (queue {} ms, request {} ms)", protocol::kMaxTimeoutMs,
                            queue_timeout_ms, request_timeout_ms);
  }
  if (reconnect_min_ms < 1 || reconnect_max_ms < reconnect_min_ms) {
    return invalid_argument("reconnect times must be 1 <= min <= max (are {} and {} ms)",
                            reconnect_min_ms, reconnect_max_ms);
  }
  return {};
}

RouterCore::RouterCore(RouterConfig config, const Clock& clock, protocol::Network& network,
                       protocol::ChannelHandler handler)
    : config_(std::move(config)),
      clock_(clock),
      network_(network),
      handler_(std::move(handler)),
      epoch_(random_id()),
      registry_(config_.workers),
      policy_(config_.policy) {}

RouterCore::~RouterCore() = default;

void RouterCore::start() {
  started_ns_ = clock_.now_ns();
  silence_ns_ = config_.worker_silence_ms * 1'000'000;
  for (auto& worker : registry_.entries()) connect(*worker);
}

// ---- requests ------------------------------------------------------------------------------------------

Status RouterCore::submit(uint64_t id, RouterRequest body, RouterEventSink sink) {
  if (shut_down_) return unavailable("the router is shutting down");
  if (static_cast<int64_t>(requests_.size()) >= config_.max_requests) {
    ++stats_.refused;
    return resource_exhausted("{} requests are in the router, the limit (--max-requests); try again later",
                              requests_.size());
  }
  auto request = std::make_unique<RequestState>();
  int64_t now = clock_.now_ns();
  request->id = id;
  request->prompt = std::move(body.prompt);
  request->sampling = std::move(body.sampling);
  request->client = std::make_shared<Client>(Client{std::move(sink)});
  int64_t timeout_ms = body.timeout_ms > 0 ? body.timeout_ms : config_.request_timeout_ms;
  request->deadline_ns = timeout_ms > 0 ? now + timeout_ms * 1'000'000 : Deadline::never().at_ns;
  request->queue_deadline_ns = now + config_.queue_timeout_ms * 1'000'000;
  RequestState& state = *request;
  requests_.emplace(id, std::move(request));
  ++stats_.accepted;
  if (!dispatch(state)) waiting_.push_back(id);
  deliver();
  return {};
}

void RouterCore::cancel(uint64_t id) {
  auto it = requests_.find(id);
  if (it == requests_.end()) return;
  RequestState& request = *it->second;
  if (request.worker != nullptr && request.worker->channel) {
    protocol::Frame frame;
    frame.mutable_cancel()->set_request(id);
    // A channel that refuses is closing, and that cancels everything on it.
    ignore_status(request.worker->channel->send(frame));
  }
  detach(request);
  request.client->cancelled = true;
  ++stats_.cancelled;
  requests_.erase(it);
}

bool RouterCore::dispatch(RequestState& request) {
  std::vector<WorkerEntry*> candidates = registry_.decode_candidates();
  std::erase_if(candidates,
                [&](const WorkerEntry* worker) { return request.full.contains(worker->address); });
  while (!candidates.empty()) {
    WorkerEntry* worker = policy_.pick_decode(candidates, request.tokens());
    if (send_generate(request, *worker)) return true;
    std::erase(candidates, worker);
  }
  return false;
}

bool RouterCore::send_generate(RequestState& request, WorkerEntry& worker) {
  int64_t now = clock_.now_ns();
  protocol::Frame frame;
  protocol::Generate* generate = frame.mutable_generate();
  generate->set_request(request.id);
  generate->mutable_prompt()->Assign(request.prompt.begin(), request.prompt.end());
  generate->mutable_generated()->Assign(request.generated.begin(), request.generated.end());
  *generate->mutable_sampling() = request.sampling;
  if (request.deadline_ns != Deadline::never().at_ns) {
    generate->set_timeout_ms(std::max<int64_t>(1, (request.deadline_ns - now) / 1'000'000));
  }
  generate->set_queue_timeout_ms(std::max<int64_t>(1, (request.queue_deadline_ns - now) / 1'000'000));
  std::vector<WorkerEntry*> prefill =
      policy_.rank_prefill(registry_.prefill_candidates(worker), kMaxPrefillCandidates);
  for (const WorkerEntry* candidate : prefill) {
    protocol::PrefillCandidate* entry = generate->add_prefill();
    entry->set_address(candidate->address);
    entry->set_epoch(candidate->hello.epoch());
  }
  // A worker takes a frame beyond the protocol's limits for a broken peer and closes the channel, with all requests
  // on it. No client may bring that about.
  if (Status valid = protocol::validate_frame(frame, protocol::Sender::kRouter); !valid.ok()) {
    end(request, invalid_argument("the request is beyond what workers take: {}", valid.message()));
    return true;
  }
  if (!prefill.empty() && prefill.front()->outstanding_prefill_tokens == 0 && prefill.front()->channel &&
      request.tokens() >= worker.load.local_prefill_tokens()) {
    protocol::Frame heads_up;  // it is idle, so asleep
    heads_up.mutable_heads_up();
    ignore_status(prefill.front()->channel->send(heads_up));
  }
  Status sent = worker.channel->send(frame);
  if (!sent.ok()) {
    log_warning("worker {} does not take requests: {}", worker_label(worker), sent.to_string());
    worker.channel->close();
    return false;
  }
  request.worker = &worker;
  ++request.attempts;
  worker.requests.insert(request.id);
  ++worker.outstanding_requests;
  worker.outstanding_tokens += request.tokens();
  if (!prefill.empty()) {
    request.prefill = prefill.front();
    request.prefill->outstanding_prefill_tokens += request.tokens();
  }
  return true;
}

/// Takes the request out of its workers' books.
void RouterCore::detach(RequestState& request) {
  if (request.prefill != nullptr) {
    request.prefill->outstanding_prefill_tokens -= static_cast<int64_t>(request.tokens());
    request.prefill = nullptr;
  }
  if (request.worker != nullptr) {
    request.worker->requests.erase(request.id);
    --request.worker->outstanding_requests;
    request.worker->outstanding_tokens -= request.tokens();
    request.worker = nullptr;
  }
}

/// The worker is gone or has failed the request: prompt and tokens so far go to another one.
void RouterCore::start_again(RequestState& request, const Status& why) {
  detach(request);
  request.last_failure = why;
  if (request.attempts >= config_.max_attempts) {
    end(request, unavailable("the request failed on {} workers, the limit (--max-attempts); the last said: {}",
                             request.attempts, why.message()));
    return;
  }
  ++stats_.replays;
  request.queue_deadline_ns = clock_.now_ns() + config_.queue_timeout_ms * 1'000'000;
  if (!dispatch(request)) waiting_.push_back(request.id);
}

void RouterCore::end(RequestState& request, Status status, std::vector<protocol::TokenOutput> tokens) {
  detach(request);
  if (status.ok()) {
    ++stats_.finished;
  } else {
    ++stats_.failed;
  }
  RouterEvent event;
  event.request = request.id;
  event.tokens = std::move(tokens);
  event.finished = true;
  event.status = std::move(status);
  deliveries_.push_back({request.client, std::move(event)});
  requests_.erase(request.id);
}

void RouterCore::deliver() {
  // A sink may cancel other requests; what was already on its way to those is dropped here.
  std::vector<Delivery> deliveries = std::exchange(deliveries_, {});
  for (Delivery& delivery : deliveries) {
    if (!delivery.client->cancelled) delivery.client->sink(std::move(delivery.event));
  }
}

void RouterCore::dispatch_waiting() {
  int64_t now = clock_.now_ns();
  std::deque<uint64_t> still_waiting;
  bool workers_left = !registry_.decode_candidates().empty();
  for (uint64_t id : std::exchange(waiting_, {})) {
    auto it = requests_.find(id);
    if (it == requests_.end() || it->second->worker != nullptr) continue;
    RequestState& request = *it->second;
    if (workers_left && dispatch(request)) continue;
    if (now >= request.queue_deadline_ns) {
      if (!request.full.empty()) {
        end(request, resource_exhausted("every worker is full: {}", request.last_failure.message()));
      } else {
        end(request, unavailable("no worker could take the request within {} ms: {}",
                                 config_.queue_timeout_ms, no_worker_reason()));
      }
      continue;
    }
    still_waiting.push_back(id);
  }
  waiting_.insert(waiting_.end(), still_waiting.begin(), still_waiting.end());
}

std::string RouterCore::no_worker_reason() const {
  std::string reason;
  for (const auto& worker : registry_.entries()) {
    if (worker->state == WorkerState::kReady) continue;
    if (!reason.empty()) reason += "; ";
    reason += fmt::format("{} is {}: {}", worker_label(*worker), worker_state_name(worker->state),
                          worker->why_not);
  }
  return reason.empty() ? "every worker is draining" : reason;
}

// ---- frames from workers ----------------------------------------------------------------------------------

void RouterCore::on_frame(const std::shared_ptr<protocol::Channel>& channel, protocol::Frame&& frame) {
  WorkerEntry* worker = registry_.by_channel(channel.get());
  if (worker == nullptr) return;  // a life that is over
  worker->last_heard_ns = clock_.now_ns();
  Status valid = protocol::validate_frame(
      frame, worker->state == WorkerState::kReady ? protocol::Sender::kWorker : protocol::Sender::kStranger);
  if (!valid.ok()) {
    lose_worker(*worker, WorkerState::kDown, valid.with_context("it sent a frame that is not acceptable"));
  } else if (frame.has_hello()) {
    on_hello(*worker, std::move(*frame.mutable_hello()));
  } else if (frame.has_step_output()) {
    for (auto& output : *frame.mutable_step_output()->mutable_tokens()) {
      on_token(*worker, std::move(output));
    }
  } else if (frame.has_load()) {
    protocol::Load load = std::move(*frame.mutable_load());
    if (!load.metrics().empty()) {
      worker->metrics = std::move(*load.mutable_metrics());
      load.clear_metrics();
    }
    worker->load = std::move(load);
    dispatch_waiting();
  }
  deliver();
}

void RouterCore::on_hello(WorkerEntry& worker, protocol::Hello&& hello) {
  Status refused;
  if (hello.protocol_version() != protocol::kProtocolVersion) {
    refused = failed_precondition("it speaks protocol version {}, this router {}; run the same release",
                                  hello.protocol_version(), protocol::kProtocolVersion);
  } else if (hello.epoch() == 0 || hello.role() == protocol::ROLE_ROUTER ||
             hello.role() == protocol::ROLE_UNKNOWN) {
    refused = failed_precondition("its Hello names no worker role or epoch");
  } else if (!config_.served_model_name.empty() && hello.model() != config_.served_model_name) {
    refused = failed_precondition("it serves model '{}', this router '{}'", hello.model(),
                                  config_.served_model_name);
  }
  // Equal names don't make equal models: another one's tokens must not go on a stream that this one began.
  for (const auto& other : registry_.entries()) {
    if (!refused.ok() || other.get() == &worker || other->state != WorkerState::kReady) continue;
    std::string_view here = model_identity(hello), there = model_identity(other->hello);
    if (!here.empty() && !there.empty() && here != there) {
      refused = failed_precondition("under the name '{}' it holds the model {}, but worker {} holds {}", hello.model(), here,
                                    worker_label(*other), there);
    }
  }
  if (!refused.ok()) {
    worker.hello = std::move(hello);
    lose_worker(worker, WorkerState::kRefused, refused);
    return;
  }
  bool new_life = worker.hello.epoch() != hello.epoch();
  worker.hello = std::move(hello);
  worker.state = WorkerState::kReady;
  worker.why_not.clear();
  worker.backoff_ms = 0;
  worker.was_down_logged = false;
  if (new_life) {
    log_info("worker {} is here: role {}, model '{}', transport {}", worker_label(worker),
             protocol::Role_Name(worker.hello.role()), worker.hello.model(), worker.hello.transport());
  }
  send_peers();
  dispatch_waiting();
}

/// Tells every worker which prefill workers it may be sent to, so that paths are made before they are needed.
void RouterCore::send_peers() {
  for (const auto& worker : registry_.entries()) {
    if (worker->state != WorkerState::kReady) continue;
    protocol::Frame frame;
    protocol::SetPeers* peers = frame.mutable_set_peers();
    for (const auto& other : registry_.entries()) {
      if (other == worker || !other->can_prefill()) continue;
      protocol::PrefillCandidate* candidate = peers->add_prefill();
      candidate->set_address(other->address);
      candidate->set_epoch(other->hello.epoch());
    }
    ignore_status(worker->channel->send(frame));
  }
}

void RouterCore::on_token(WorkerEntry& worker, protocol::TokenOutput&& output) {
  auto it = requests_.find(output.request());
  if (it == requests_.end() || it->second->worker != &worker) return;  // cancelled meanwhile
  RequestState& request = *it->second;
  if (output.finish() == kFinishError) {
    on_worker_error(request, from_message(output.status()));
    return;
  }
  if (output.has_token()) {
    if (output.index() != static_cast<int64_t>(request.generated.size())) {
      protocol::Frame cancel;
      cancel.mutable_cancel()->set_request(request.id);
      ignore_status(worker.channel->send(cancel));
      start_again(request, internal_error("worker {} sent token {} where {} was due", worker_label(worker),
                                          output.index(), request.generated.size()));
      return;
    }
    if (request.prefill != nullptr) {
      request.prefill->outstanding_prefill_tokens -= request.tokens();
      request.prefill = nullptr;
    }
    request.generated.push_back(output.token());
    ++worker.outstanding_tokens;
  }
  std::vector<protocol::TokenOutput> tokens;
  bool finished = output.finish() != kFinishNone;
  tokens.push_back(std::move(output));
  if (finished) {
    end(request, Status(), std::move(tokens));
    return;
  }
  RouterEvent event;
  event.request = request.id;
  event.tokens = std::move(tokens);
  deliveries_.push_back({request.client, std::move(event)});
}

void RouterCore::on_worker_error(RequestState& request, const Status& status) {
  switch (status.code()) {
    case StatusCode::kResourceExhausted:
      // Another worker may have room; when none has, the client hears what the last one said.
      request.full.insert(request.worker->address);
      detach(request);
      request.last_failure = status;
      if (!dispatch(request)) end(request, status);
      return;
    case StatusCode::kUnavailable:
    case StatusCode::kAborted:
    case StatusCode::kInternal:
    case StatusCode::kDataLoss:
    case StatusCode::kFailedPrecondition:
      start_again(request, status);
      return;
    default:
      end(request, status);  // the client's fault or the deadline: another worker would say the same
  }
}

// ---- workers that come and go ---------------------------------------------------------------------------

void RouterCore::connect(WorkerEntry& worker) {
  worker.state = WorkerState::kConnecting;
  worker.last_heard_ns = clock_.now_ns();
  worker.load.Clear();
  worker.metrics.clear();
  worker.channel = network_.connect(worker.address, handler_);
  protocol::Frame frame;
  protocol::Hello* hello = frame.mutable_hello();
  hello->set_protocol_version(protocol::kProtocolVersion);
  hello->set_epoch(epoch_);
  hello->set_name(config_.name);
  hello->set_role(protocol::ROLE_ROUTER);
  hello->set_model(config_.served_model_name);
  ignore_status(worker.channel->send(frame));
}

void RouterCore::on_closed(const std::shared_ptr<protocol::Channel>& channel, const Status& status) {
  WorkerEntry* worker = registry_.by_channel(channel.get());
  if (worker == nullptr) return;
  lose_worker(*worker, WorkerState::kDown, status);
  deliver();
}

void RouterCore::lose_worker(WorkerEntry& worker, WorkerState state, const Status& why) {
  bool was_ready = worker.state == WorkerState::kReady;
  // A worker that has never been here is most likely still starting: /health says so, the log needs not.
  bool known = worker.hello.epoch() != 0;
  if (was_ready || (known && !worker.was_down_logged)) {
    log_warning("worker {} is {}: {}; {} requests go to others", worker_label(worker),
                worker_state_name(state), why.message(), worker.requests.size());
    worker.was_down_logged = true;
  }
  if (was_ready) ++stats_.worker_losses;
  // The channel is let go before it is closed, so that its on_closed finds no entry.
  std::shared_ptr<protocol::Channel> channel = std::exchange(worker.channel, nullptr);
  worker.state = state;
  worker.why_not = why.message();
  worker.load.Clear();
  worker.metrics.clear();
  worker.backoff_ms = state == WorkerState::kRefused
                          ? config_.reconnect_max_ms
                          : std::clamp(worker.backoff_ms * 2, config_.reconnect_min_ms, config_.reconnect_max_ms);
  worker.reconnect_at_ns = clock_.now_ns() + worker.backoff_ms * 1'000'000;
  if (channel) channel->close();

  std::vector<uint64_t> orphans(worker.requests.begin(), worker.requests.end());
  std::sort(orphans.begin(), orphans.end());
  for (uint64_t id : orphans) {
    auto it = requests_.find(id);
    if (it != requests_.end()) {
      start_again(*it->second, unavailable("worker {} is gone: {}", worker_label(worker), why.message()));
    }
  }
  if (was_ready) send_peers();
}

void RouterCore::tick() {
  int64_t now = clock_.now_ns();
  for (auto& worker : registry_.entries()) {
    bool has_channel = worker->state == WorkerState::kConnecting || worker->state == WorkerState::kReady;
    if (has_channel && now - worker->last_heard_ns > silence_ns_) {
      lose_worker(*worker, WorkerState::kDown,
                  unavailable("nothing heard for {} ms (--worker-silence-ms)", config_.worker_silence_ms));
    } else if (!has_channel && !shut_down_ && now >= worker->reconnect_at_ns) {
      connect(*worker);
    }
  }
  std::vector<uint64_t> expired;
  for (const auto& [id, request] : requests_) {
    if (now >= request->deadline_ns) expired.push_back(id);
  }
  for (uint64_t id : expired) {
    RequestState& request = *requests_.at(id);
    if (request.worker != nullptr) {
      protocol::Frame frame;
      frame.mutable_cancel()->set_request(id);
      ignore_status(request.worker->channel->send(frame));
    }
    end(request, deadline_exceeded("the request took longer than its time limit; {} tokens were generated",
                                   request.generated.size()));
  }
  dispatch_waiting();
  deliver();
}

int64_t RouterCore::next_tick_ns() const {
  constexpr int64_t kTickNs = 20'000'000;
  return clock_.now_ns() + kTickNs;
}

RouterHealth RouterCore::health() const {
  RouterHealth health;
  health.requests = static_cast<int64_t>(requests_.size());
  health.model = config_.served_model_name;
  bool unheard = false, has_prefill = false, has_decode = false, pair_ready = false;
  std::string pair_problem;
  for (const auto& worker : registry_.entries()) {
    WorkerView entry;
    entry.address = worker->address;
    entry.name = worker->hello.name();
    entry.role = protocol::Role_Name(worker->hello.role());
    entry.state = std::string(worker_state_name(worker->state));
    entry.why_not = worker->why_not;
    entry.transport = worker->hello.transport();
    entry.epoch = worker->hello.epoch();
    entry.load = worker->load;
    health.workers.push_back(std::move(entry));
    if (worker->hello.epoch() == 0) unheard = true;
    if (worker->hello.role() == protocol::ROLE_PREFILL) has_prefill = true;
    if (worker->can_decode()) {
      has_decode = true;
      for (const auto& pair : worker->load.pairs()) {
        if (pair.ready()) pair_ready = true;
        else if (!pair.why_not().empty()) pair_problem = fmt::format("{}: {}", pair.peer(), pair.why_not());
      }
    }
    if (worker->state == WorkerState::kReady) {
      if (health.model.empty()) health.model = worker->hello.model();
      health.vocab_size = worker->hello.vocab_size();
      health.max_model_len = health.max_model_len == 0
                                 ? worker->hello.max_model_len()
                                 : std::min(health.max_model_len, worker->hello.max_model_len());
    }
  }
  bool can_serve = !registry_.decode_candidates().empty();
  bool in_grace = clock_.now_ns() - started_ns_ < config_.startup_grace_ms * 1'000'000;
  bool disaggregated = !has_prefill || pair_ready;
  if (!can_serve) {
    health.why_not = no_worker_reason();
  } else if (!was_ready_ && unheard && in_grace) {
    health.why_not = no_worker_reason();
  } else if (!was_ready_ && !disaggregated) {
    health.why_not = fmt::format("no prefill worker is paired with a decode worker yet{}{}",
                                 pair_problem.empty() ? "" : ": ", pair_problem);
  } else {
    was_ready_ = true;
    health.ready = true;
    if (!has_decode) {
      health.degraded = true;
      health.why_not = "prefill workers also decode: no decode worker is here";
    } else if (!disaggregated) {
      health.degraded = true;
      health.why_not = "decode workers prefill by themselves: no prefill worker is paired";
    }
  }
  return health;
}

void RouterCore::shutdown() {
  shut_down_ = true;
  while (!requests_.empty()) {
    RequestState& request = *requests_.begin()->second;
    end(request, unavailable("the router is shutting down"));
  }
  for (auto& worker : registry_.entries()) {
    std::shared_ptr<protocol::Channel> channel = std::exchange(worker->channel, nullptr);
    worker->state = WorkerState::kDown;
    worker->why_not = "the router is shutting down";
    if (channel) channel->close();
  }
  deliver();
}

}  // namespace baton
