#include "worker/convert.h"

#include "protocol/validate.h"

namespace baton::worker {

namespace {

/// What the other side's bounds and UTF-8 check (proto3 strings) let through.
std::string to_wire_text(const std::string& text) {
  std::string out = text.substr(0, protocol::kMaxTextBytes);
  for (char& c : out) {
    if (static_cast<unsigned char>(c) >= 0x80) c = '?';
  }
  return out;
}

}  // namespace

void to_proto(const SamplingParams& from, protocol::Sampling* to) {
  to->set_temperature(from.temperature);
  to->set_top_p(from.top_p);
  to->set_top_k(from.top_k);
  to->set_min_p(from.min_p);
  to->set_seed(from.seed);
  to->set_presence_penalty(from.presence_penalty);
  to->set_frequency_penalty(from.frequency_penalty);
  to->set_repetition_penalty(from.repetition_penalty);
  for (const auto& [token, bias] : from.logit_bias) {
    auto* entry = to->add_logit_bias();
    entry->set_token(token);
    entry->set_bias(bias);
  }
  to->set_max_tokens(from.max_tokens);
  to->set_min_tokens(from.min_tokens);
  to->mutable_stop_token_ids()->Assign(from.stop_token_ids.begin(), from.stop_token_ids.end());
  to->set_ignore_eos(from.ignore_eos);
  to->set_logprobs(from.logprobs);
}

SamplingParams from_proto(const protocol::Sampling& from) {
  SamplingParams to;
  to.temperature = from.temperature();
  to.top_p = from.top_p();
  to.top_k = from.top_k();
  to.min_p = from.min_p();
  to.seed = from.seed();
  to.presence_penalty = from.presence_penalty();
  to.frequency_penalty = from.frequency_penalty();
  to.repetition_penalty = from.repetition_penalty();
  for (const auto& entry : from.logit_bias()) to.logit_bias.emplace_back(entry.token(), entry.bias());
  to.max_tokens = from.max_tokens();
  to.min_tokens = from.min_tokens();
  to.stop_token_ids.assign(from.stop_token_ids().begin(), from.stop_token_ids().end());
  to.ignore_eos = from.ignore_eos();
  to.logprobs = from.logprobs();
  return to;
}

void to_proto(const Status& from, protocol::StatusMessage* to) {
  to->set_code(static_cast<int>(from.code()));
  to->set_message(to_wire_text(from.message()));
}

Status from_proto(const protocol::StatusMessage& from) {
  return Status(static_cast<StatusCode>(from.code()), from.message());
}

void to_proto(const TokenOutput& from, uint64_t request, protocol::TokenOutput* to) {
  to->set_request(request);
  to->set_has_token(from.token.has_value());
  to->set_token(from.token.value_or(0));
  to->set_index(from.index);
  to->set_logprob(from.logprob);
  for (const auto& entry : from.top_logprobs) {
    auto* t = to->add_top_logprobs();
    t->set_token(entry.token);
    t->set_logprob(entry.logprob);
  }
  to->set_finish(static_cast<int>(from.finish));
  if (!from.status.ok()) to_proto(from.status, to->mutable_status());
  to->set_cached_prompt_tokens(from.cached_prompt_tokens);
}

TokenOutput from_proto(const protocol::TokenOutput& from) {
  TokenOutput to;
  if (from.has_token()) to.token = from.token();
  to.index = from.index();
  to.logprob = from.logprob();
  for (const auto& entry : from.top_logprobs()) to.top_logprobs.push_back({entry.token(), entry.logprob()});
  to.finish = static_cast<FinishReason>(from.finish());
  if (from.has_status()) to.status = from_proto(from.status());
  to.cached_prompt_tokens = from.cached_prompt_tokens();
  return to;
}

}  // namespace baton::worker
