#include "tests/sim/sim_client.h"

#include <algorithm>

#include "worker/convert.h"

namespace baton::sim {

Oracle::Oracle(const ClusterOptions& options) {
  EngineConfig config;
  config.block_tokens = options.block_tokens;
  config.kv_blocks = 4 * options.max_model_len / options.block_tokens;
  config.max_model_len = options.max_model_len;
  config.prefix_cache = false;
  engine_ = Engine::create(config, model_).value();
}

Oracle::Answer Oracle::answer(const std::vector<TokenId>& prompt, const SamplingParams& sampling) {
  Request request;
  request.id = RequestId{next_id_++};
  request.prompt = prompt;
  request.sampling = sampling;
  BATON_CHECK(engine_->submit(request).ok());
  Answer answer;
  while (answer.finish == FinishReason::kNone) {
    for (const TokenOutput& output : engine_->step().tokens) {
      if (output.token.has_value()) answer.tokens.push_back(*output.token);
      answer.finish = output.finish;
    }
  }
  return answer;
}

SimClient::SimClient(Cluster& cluster, Oracle& oracle, std::string name, std::vector<std::string> decode_workers,
                     std::vector<std::string> prefill_workers)
    : cluster_(cluster),
      oracle_(oracle),
      name_(std::move(name)),
      epoch_(cluster.random() | 1),
      prefill_(std::move(prefill_workers)) {
  for (const auto& worker : decode_workers) workers_[worker].name = worker;
  cluster_.add_actor([this] { turn(); });
}

void SimClient::connect(Worker& worker) {
  protocol::ChannelHandler handler{
      [this, &worker](std::shared_ptr<protocol::Channel> channel, protocol::Frame&& frame) {
        if (channel == worker.channel) on_frame(worker, frame);
      },
      [this, &worker](std::shared_ptr<protocol::Channel> channel, Status) {
        if (channel == worker.channel) on_closed(worker);
      }};
  worker.channel = cluster_.network.process(name_).connect(Cluster::address_of(worker.name), handler, 200);
  protocol::Frame frame;
  auto* hello = frame.mutable_hello();
  hello->set_protocol_version(protocol::kProtocolVersion);
  hello->set_epoch(epoch_);
  hello->set_name(name_);
  hello->set_role(protocol::ROLE_ROUTER);
  ignore_status(worker.channel->send(frame));
  frame.Clear();
  for (const auto& prefill : prefill_) {
    if (prefill != worker.name) {
      frame.mutable_set_peers()->add_prefill()->set_address(Cluster::address_of(prefill));
    }
  }
  frame.mutable_set_peers();
  ignore_status(worker.channel->send(frame));
}

void SimClient::turn() {
  for (auto& [name, worker] : workers_) {
    if (worker.channel == nullptr && cluster_.clock.now_ns() >= worker.next_attempt_ns) connect(worker);
  }
  for (auto& [id, call] : calls_) {
    if (!call.ended && call.worker.empty()) send(id, call);
  }
}

void SimClient::on_closed(Worker& worker) {
  worker.channel.reset();
  worker.up = false;
  worker.next_attempt_ns = cluster_.clock.now_ns() + 20'000'000;
  for (auto& [id, call] : calls_) {
    if (call.ended || call.worker != worker.name) continue;
    std::erase_if(wire_ids_, [&, call_id = id](const auto& entry) { return entry.second == call_id; });
    call.worker.clear();
    if (call.cancelled) {  // nobody waits for it
      call.ended = true;
      call.finish = FinishReason::kCancelled;
    } else {
      ++call.replays;
    }
  }
}

void SimClient::on_frame(Worker& worker, const protocol::Frame& frame) {
  switch (frame.body_case()) {
    case protocol::Frame::kHello:
      worker.up = true;
      worker.epoch = frame.hello().epoch();
      break;
    case protocol::Frame::kLoad:
      worker.load = frame.load();
      break;
    case protocol::Frame::kStepOutput:
      for (const auto& output : frame.step_output().tokens()) on_output(worker, output);
      break;
    default:
      errors_.push_back(fmt::format("{} sent a frame that routers don't get", worker.name));
  }
}

void SimClient::on_output(Worker& worker, const protocol::TokenOutput& output) {
  auto wire = wire_ids_.find(output.request());
  if (wire == wire_ids_.end()) {
    errors_.push_back(fmt::format("{}: an output for request {}, which has ended", worker.name, output.request()));
    return;
  }
  const uint64_t id = wire->second;
  Call& call = calls_.at(id);
  if (!output.path().empty()) call.paths.push_back(output.path());
  if (output.has_token()) {
    if (output.index() != static_cast<int32_t>(call.generated.size())) {
      errors_.push_back(
          fmt::format("call {}: token index {} where {} was due", id, output.index(), call.generated.size()));
    }
    call.generated.push_back(output.token());
  }
  auto finish = static_cast<FinishReason>(output.finish());
  if (finish == FinishReason::kNone) return;
  wire_ids_.erase(wire);
  call.finish = finish;
  call.code = static_cast<StatusCode>(output.status().code());
  call.ended = true;
  if (finish == FinishReason::kCancelled && !call.cancelled) {
    errors_.push_back(fmt::format("call {} was cancelled by nobody", id));
  }
}

void SimClient::send(uint64_t id, Call& call) {
  std::vector<Worker*> up;
  for (auto& [name, worker] : workers_) {
    if (worker.up && worker.channel != nullptr) up.push_back(&worker);
  }
  if (up.empty()) return;
  Worker& worker = *up[cluster_.random.below(up.size())];
  const uint64_t wire_id = next_id_++;
  protocol::Frame frame;
  auto* generate = frame.mutable_generate();
  generate->set_request(wire_id);
  generate->mutable_prompt()->Add(call.prompt.begin(), call.prompt.end());
  generate->mutable_generated()->Add(call.generated.begin(), call.generated.end());
  worker::to_proto(call.sampling, generate->mutable_sampling());
  generate->set_timeout_ms(call.timeout_ms);
  std::vector<std::string> candidates = prefill_;
  std::shuffle(candidates.begin(), candidates.end(), cluster_.random);
  for (const auto& candidate : candidates) {
    if (candidate != worker.name) generate->add_prefill()->set_address(Cluster::address_of(candidate));
  }
  if (!worker.channel->send(frame).ok()) return;
  wire_ids_[wire_id] = id;
  call.worker = worker.name;
}

uint64_t SimClient::generate(std::vector<TokenId> prompt, SamplingParams sampling, int64_t timeout_ms) {
  uint64_t id = next_id_++;
  Call& call = calls_[id];
  call.prompt = std::move(prompt);
  call.sampling = std::move(sampling);
  call.timeout_ms = timeout_ms;
  return id;
}

void SimClient::cancel(uint64_t id) {
  Call& call = calls_.at(id);
  if (call.ended || call.cancelled) return;
  call.cancelled = true;
  if (call.worker.empty()) {
    call.ended = true;
    call.finish = FinishReason::kCancelled;
    return;
  }
  for (const auto& [wire_id, call_id] : wire_ids_) {
    if (call_id != id) continue;
    protocol::Frame frame;
    frame.mutable_cancel()->set_request(wire_id);
    ignore_status(workers_.at(call.worker).channel->send(frame));
  }
}

bool SimClient::all_ended() const {
  return std::all_of(calls_.begin(), calls_.end(), [](const auto& entry) { return entry.second.ended; });
}

void SimClient::check_answers() {
  for (const auto& [id, call] : calls_) {
    Oracle::Answer answer = oracle_.answer(call.prompt, call.sampling);
    const bool whole = call.finish == FinishReason::kStop || call.finish == FinishReason::kLength;
    const bool right_prefix = call.generated.size() <= answer.tokens.size() &&
                              std::equal(call.generated.begin(), call.generated.end(), answer.tokens.begin());
    if (!right_prefix) {
      errors_.push_back(fmt::format("call {}: wrong tokens {} instead of {} by {}", id, fmt::join(call.generated, ","),
                                    fmt::join(answer.tokens, ","), fmt::join(call.paths, " then ")));
    } else if (whole && (call.generated.size() != answer.tokens.size() || call.finish != answer.finish)) {
      errors_.push_back(fmt::format("call {}: {} tokens and finish {} instead of {} and {}", id, call.generated.size(),
                                    static_cast<int>(call.finish), answer.tokens.size(),
                                    static_cast<int>(answer.finish)));
    }
  }
}

const protocol::Load* SimClient::load(const std::string& worker) const {
  auto it = workers_.find(worker);
  return it == workers_.end() ? nullptr : &it->second.load;
}

int64_t SimClient::count_paths(const std::string& prefix) const {
  int64_t count = 0;
  for (const auto& [id, call] : calls_) {
    for (const auto& path : call.paths) count += path.starts_with(prefix);
  }
  return count;
}

}  // namespace baton::sim
