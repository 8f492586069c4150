#include "protocol/validate.h"

#include <cmath>

#include "protocol/baton.pb.h"

namespace baton::protocol {

namespace {

constexpr int kLastStatusCode = static_cast<int>(StatusCode::kAborted);
constexpr int kLastFinishReason = 5;  // FinishReason::kCancelled; the engine's header is not ours to include

/// Collects the first failure, so that a message's checks read as a list.
class Checker {
 public:
  explicit Checker(std::string_view message) : message_(message) {}

  template <typename T>
  void range(std::string_view field, T value, T low, T high) {
    if (!status_.ok() || (value >= low && value <= high)) return;  // NaN is in no range
    status_ = invalid_argument("{}.{} is {}, allowed are {} to {}", message_, field, value, low, high);
  }
  void count(std::string_view field, int64_t count, int64_t limit) {
    if (!status_.ok() || count <= limit) return;
    status_ = invalid_argument("{}.{} has {} entries, the limit is {}", message_, field, count, limit);
  }
  void length(std::string_view field, const std::string& value, size_t limit) {
    if (!status_.ok() || value.size() <= limit) return;
    status_ = invalid_argument("{}.{} has {} bytes, the limit is {}", message_, field, value.size(), limit);
  }
  void require(bool condition, std::string_view what) {
    if (!status_.ok() || condition) return;
    status_ = invalid_argument("{}: {}", message_, what);
  }
  void tokens(std::string_view field, const google::protobuf::RepeatedField<int32_t>& values, int limit) {
    count(field, values.size(), limit);
    if (!status_.ok()) return;
    for (int32_t token : values) {
      if (token < 0) {
        status_ = invalid_argument("{}.{} has the token {}", message_, field, token);
        return;
      }
    }
  }
  void keep(const Status& status) {
    if (status_.ok() && !status.ok()) status_ = status.with_context(message_);
  }
  Status take() { return std::move(status_); }

 private:
  std::string_view message_;
  Status status_;
};

Status check(const StatusMessage& message) {
  Checker c("StatusMessage");
  c.range("code", message.code(), 0, kLastStatusCode);
  c.length("message", message.message(), kMaxTextBytes);
  return c.take();
}

Status check(const Hello& hello) {
  Checker c("Hello");
  c.require(hello.epoch() != 0, "epoch is 0");
  c.length("name", hello.name(), kMaxAddressBytes);
  c.require(!hello.name().empty(), "name is empty");
  c.require(Role_IsValid(hello.role()) && hello.role() != ROLE_UNKNOWN, "unknown role");
  c.length("model", hello.model(), kMaxTextBytes);
  c.length("fingerprint", hello.fingerprint(), kMaxTextBytes);
  c.length("transfer_metadata", hello.transfer_metadata(), kMaxMetadataBytes);
  c.length("transport", hello.transport(), kMaxTextBytes);
  c.length("kernels", hello.kernels(), kMaxTextBytes);
  if (hello.role() != ROLE_ROUTER) {
    c.range("vocab_size", hello.vocab_size(), 1, 1 << 24);
    c.range("max_model_len", hello.max_model_len(), 1, 1 << 30);
    c.range("block_tokens", hello.block_tokens(), 1, 1 << 16);
  }
  return c.take();
}

Status check(const Sampling& s) {
  Checker c("Sampling");
  c.range("temperature", s.temperature(), 0.0f, 1e6f);
  c.range("top_p", s.top_p(), 0.0f, 1.0f);
  c.range("top_k", s.top_k(), 0, 1 << 30);
  c.range("min_p", s.min_p(), 0.0f, 1.0f);
  c.range("presence_penalty", s.presence_penalty(), -100.0f, 100.0f);
  c.range("frequency_penalty", s.frequency_penalty(), -100.0f, 100.0f);
  c.range("repetition_penalty", s.repetition_penalty(), 0.0f, 1e6f);
  c.count("logit_bias", s.logit_bias_size(), kMaxLogitBias);
  for (const auto& bias : s.logit_bias()) {
    c.range("logit_bias.token", bias.token(), 0, INT32_MAX);
    c.require(!std::isnan(bias.bias()), "logit_bias is not a number");
  }
  c.range("max_tokens", s.max_tokens(), 0, 1 << 30);
  c.range("min_tokens", s.min_tokens(), 0, 1 << 30);
  c.tokens("stop_token_ids", s.stop_token_ids(), kMaxStopTokens);
  c.range("logprobs", s.logprobs(), -1, kMaxLogprobs);
  return c.take();
}

template <typename Candidates>
void check_candidates(Checker& c, const Candidates& candidates) {
  c.count("prefill", candidates.size(), kMaxCandidates);
  for (const auto& candidate : candidates) {
    c.length("prefill.address", candidate.address(), kMaxAddressBytes);
    c.require(!candidate.address().empty(), "prefill.address is empty");
  }
}

Status check(const Generate& g) {
  Checker c("Generate");
  c.require(g.prompt_size() > 0, "prompt is empty");
  c.tokens("prompt", g.prompt(), kMaxTokens);
  c.tokens("generated", g.generated(), kMaxTokens);
  c.require(g.has_sampling(), "sampling is missing");
  c.keep(check(g.sampling()));
  check_candidates(c, g.prefill());
  c.range<int64_t>("timeout_ms", g.timeout_ms(), 0, kMaxTimeoutMs);
  c.range<int64_t>("queue_timeout_ms", g.queue_timeout_ms(), 0, kMaxTimeoutMs);
  return c.take();
}

Status check(const TokenOutput& t) {
  Checker c("TokenOutput");
  c.range("token", t.token(), 0, INT32_MAX);
  c.range("index", t.index(), 0, INT32_MAX);
  c.count("top_logprobs", t.top_logprobs_size(), kMaxLogprobs);
  for (const auto& entry : t.top_logprobs()) c.range("top_logprobs.token", entry.token(), 0, INT32_MAX);
  c.range("finish", t.finish(), 0, kLastFinishReason);
  if (t.has_status()) c.keep(check(t.status()));
  c.range("cached_prompt_tokens", t.cached_prompt_tokens(), 0, INT32_MAX);
  c.length("path", t.path(), kMaxTextBytes);
  return c.take();
}

Status check(const StepOutput& s) {
  Checker c("StepOutput");
  c.count("tokens", s.tokens_size(), kMaxOutputsPerStep);
  for (const auto& token : s.tokens()) c.keep(check(token));
  return c.take();
}

Status check(const Prefill& p) {
  Checker c("Prefill");
  c.require(p.handoff() != 0, "handoff is 0");
  c.require(p.tokens_size() > 0, "tokens is empty");
  c.tokens("tokens", p.tokens(), 2 * kMaxTokens);
  c.range("prompt_tokens", p.prompt_tokens(), 1, p.tokens_size());
  c.require(p.has_sampling(), "sampling is missing");
  c.keep(check(p.sampling()));
  c.count("blocks", p.blocks_size(), kMaxBlocks);
  c.range("first_block", p.first_block(), 0, kMaxBlocks);
  c.require(p.blocks_size() > 0, "blocks is empty");
  c.require(p.tag() != 0, "tag is 0");
  c.range<int64_t>("lease_ms", p.lease_ms(), 1, kMaxTimeoutMs);
  c.range<int64_t>("timeout_ms", p.timeout_ms(), 0, kMaxTimeoutMs);
  return c.take();
}

Status check(const Commit& m) {
  Checker c("Commit");
  c.require(m.handoff() != 0, "handoff is 0");
  c.require(m.has_first(), "first is missing");
  c.keep(check(m.first()));
  c.require(m.first().has_token(), "first has no token");
  c.range("queue_s", m.queue_s(), 0.0, 1e9);
  c.range("compute_s", m.compute_s(), 0.0, 1e9);
  c.range("exposed_s", m.exposed_s(), 0.0, 1e9);
  return c.take();
}

Status check(const Load& l) {
  Checker c("Load");
  for (int64_t value : {l.blocks_total(), l.blocks_free(), l.blocks_cached(), l.blocks_used(), l.blocks_quarantined(),
                        l.waiting(), l.running(), l.queued_tokens()}) {
    c.range<int64_t>("counts", value, 0, int64_t{1} << 48);
  }
  c.range("local_prefill_tokens", l.local_prefill_tokens(), 0, INT32_MAX);
  c.count("pairs", l.pairs_size(), kMaxPairs);
  for (const auto& pair : l.pairs()) {
    c.length("pairs.peer", pair.peer(), kMaxAddressBytes);
    c.length("pairs.address", pair.address(), kMaxAddressBytes);
    c.length("pairs.why_not", pair.why_not(), kMaxTextBytes);
    c.length("pairs.transport", pair.transport(), kMaxTextBytes);
    c.length("pairs.provider", pair.provider(), kMaxTextBytes);
    c.length("pairs.reason", pair.reason(), kMaxTextBytes);
  }
  c.length("metrics", l.metrics(), kMaxMetricsBytes);
  return c.take();
}

bool may_send(Sender sender, Frame::BodyCase kind) {
  switch (kind) {
    case Frame::kHello: return sender == Sender::kStranger;
    case Frame::kGenerate:
    case Frame::kCancel:
    case Frame::kSetPeers: return sender == Sender::kRouter;
    case Frame::kStepOutput: return sender == Sender::kWorker;
    case Frame::kPrefill:
    case Frame::kCancelPrefill: return sender == Sender::kDecodeSide;
    case Frame::kProgress:
    case Frame::kCommit:
    case Frame::kAbort: return sender == Sender::kPrefillSide;
    case Frame::kLoad: return sender == Sender::kWorker || sender == Sender::kPrefillSide;
    case Frame::kHeadsUp: return sender == Sender::kRouter || sender == Sender::kPrefillSide;
    case Frame::BODY_NOT_SET: return false;
  }
  return false;
}

std::string_view sender_name(Sender sender) {
  switch (sender) {
    case Sender::kStranger: return "a peer that has not said Hello (or twice)";
    case Sender::kRouter: return "a router";
    case Sender::kWorker: return "a worker";
    case Sender::kDecodeSide: return "a decode side";
    case Sender::kPrefillSide: return "a prefill side";
  }
  return "?";
}

}  // namespace

std::string_view frame_kind_name(const Frame& frame) {
  switch (frame.body_case()) {
    case Frame::kHello: return "hello";
    case Frame::kGenerate: return "generate";
    case Frame::kCancel: return "cancel";
    case Frame::kStepOutput: return "step_output";
    case Frame::kPrefill: return "prefill";
    case Frame::kCancelPrefill: return "cancel_prefill";
    case Frame::kProgress: return "progress";
    case Frame::kCommit: return "commit";
    case Frame::kAbort: return "abort";
    case Frame::kSetPeers: return "set_peers";
    case Frame::kLoad: return "load";
    case Frame::kHeadsUp: return "heads_up";
    case Frame::BODY_NOT_SET: return "empty";
  }
  return "unknown";
}

Status validate_frame(const Frame& frame, Sender sender) {
  if (!may_send(sender, frame.body_case())) {
    return failed_precondition("{} may not send {}", sender_name(sender), frame_kind_name(frame));
  }
  switch (frame.body_case()) {
    case Frame::kHello: return check(frame.hello());
    case Frame::kGenerate: return check(frame.generate());
    case Frame::kCancel: return {};
    case Frame::kStepOutput: return check(frame.step_output());
    case Frame::kPrefill: return check(frame.prefill());
    case Frame::kCancelPrefill: return {};
    case Frame::kProgress: {
      Checker c("Progress");
      c.range("computed_tokens", frame.progress().computed_tokens(), 0, 2 * kMaxTokens);
      return c.take();
    }
    case Frame::kCommit: return check(frame.commit());
    case Frame::kAbort: return frame.abort().has_status() ? check(frame.abort().status()) : Status();
    case Frame::kSetPeers: {
      Checker c("SetPeers");
      check_candidates(c, frame.set_peers().prefill());
      return c.take();
    }
    case Frame::kLoad: return check(frame.load());
    case Frame::kHeadsUp: return {};
    case Frame::BODY_NOT_SET: break;
  }
  return failed_precondition("an empty frame");
}

}  // namespace baton::protocol
