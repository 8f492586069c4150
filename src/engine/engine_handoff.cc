// The two sides of a handoff: reservations that a peer fills, and prefilled KV that is sent to one.

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "engine/engine_impl.h"

namespace baton {

/// Blocks that requests which came before must find when they start: those of preempted ones, and of the head of the
/// queue when it is kept waiting by blocks or places. Reservations take what is left.
int64_t EngineImpl::blocks_for_waiting() const {
  if (waiting_.empty()) return 0;
  int64_t blocks = blocked_ || waiting_.front()->preempted ? blocks_of(waiting_.front()->length()) : 0;
  for (size_t i = 1; i < waiting_.size() && waiting_[i]->preempted; ++i) blocks += blocks_of(waiting_[i]->length());
  return blocks;
}

Result<Engine::Reservation> EngineImpl::reserve(const Request& request) {
  BATON_CHECK(!in_step_) << "the layer callback must not call the engine";
  BATON_RETURN_IF_ERROR(check_request(request));
  if (request.prefill_only) return invalid_argument("a prefill_only request cannot be reserved for decoding");
  if (quarantined_.contains(request.id)) {
    return failed_precondition("request {} has blocks in quarantine from an earlier attempt; use another id",
                               static_cast<uint64_t>(request.id));
  }
  const int64_t outputs = std::ssize(request.generated);
  const int64_t length = std::ssize(request.prompt) + outputs;
  if (outputs > 0 && finish_reason(request.sampling, request.generated.back(), outputs, length) != FinishReason::kNone) {
    return invalid_argument("the output so far, {} tokens, is complete already: there is nothing to decode", outputs);
  }

  const int64_t sequences = std::ssize(running_) + reserved_;
  const int64_t kept = blocks_for_waiting();
  if (sequences + (kept > 0 ? 1 : 0) >= max_sequences_) {
    return resource_exhausted("{} sequences run and {} are reserved; at most {} may be", running_.size(), reserved_,
                              max_sequences_);
  }
  std::vector<TokenId> tokens = request.prompt;
  tokens.insert(tokens.end(), request.generated.begin(), request.generated.end());
  const BlockPool::PrefixPeek peek = blocks_.peek_prefix_blocks(tokens, length);
  const int64_t needed = blocks_of(length) - peek.tokens / config_.block_tokens + peek.idle_blocks;
  const int64_t left = kept + growth_headroom(sequences, config_.kv_blocks);
  if (needed + left > blocks_.available()) {
    return resource_exhausted("{} KV blocks are wanted, {} of {} are free or cached, and {} of those are kept for "
                              "requests that came before",
                              needed, blocks_.available(), config_.kv_blocks, left);
  }

  std::unique_ptr<Sequence> sequence = make_sequence(request);
  sequence->state = Sequence::State::kReserved;
  sequence->table = blocks_.match_prefix(tokens, length);
  sequence->reserved_cached_blocks = static_cast<int32_t>(sequence->table.size());
  const int32_t cached_tokens = sequence->reserved_cached_blocks * config_.block_tokens;
  sequence->cached_prompt_tokens = std::min(cached_tokens, sequence->prompt_tokens);
  sequence->admitted_before = true;
  totals_.prefix_query_tokens += length;
  totals_.prefix_hit_tokens += cached_tokens;
  const Status status = blocks_.allocate_into(blocks_of(length) - std::ssize(sequence->table), &sequence->table);
  BATON_CHECK(status.ok()) << "counted before: " << status.to_string();
  Reservation reservation{.cached_tokens = cached_tokens, .blocks = sequence->table};
  ++reserved_;
  sequences_.emplace(sequence->id, std::move(sequence));
  return reservation;
}

Status EngineImpl::admit(RequestId id, TokenOutput first) {
  BATON_CHECK(!in_step_) << "the layer callback must not call the engine";
  Sequence* sequence = find(id);
  if (sequence == nullptr || sequence->state != Sequence::State::kReserved) {
    return not_found("request {} has no reservation", static_cast<uint64_t>(id));
  }
  const int32_t vocab_size = model_.config().vocab_size;
  if (!first.token.has_value() || *first.token < 0 || *first.token >= vocab_size) {
    return invalid_argument("the first token of request {} is {}; the vocabulary has ids 0 to {}",
                            static_cast<uint64_t>(id), first.token.value_or(-1), vocab_size - 1);
  }
  --reserved_;
  sequence->computed = sequence->length();
  sequence->launched = sequence->computed;
  publish(sequence);
  start_running(sequence);

  first.request = id;
  first.index = sequence->outputs();
  first.status = Status();
  first.cached_prompt_tokens = std::clamp(first.cached_prompt_tokens, sequence->cached_prompt_tokens, sequence->prompt_tokens);
  sequence->reported = true;
  sequence->tokens.push_back(*first.token);
  first.finish = finish_reason(sequence->sampling, *first.token, sequence->outputs(), sequence->length());
  const bool finished = first.finish != FinishReason::kNone;
  pending_.push_back(std::move(first));
  if (finished) erase(sequence);
  return {};
}

void EngineImpl::abandon(RequestId id, bool quarantine) {
  BATON_CHECK(!in_step_) << "the layer callback must not call the engine";
  Sequence* sequence = find(id);
  if (sequence == nullptr || sequence->state != Sequence::State::kReserved) return;
  if (quarantine) {
    std::vector<BlockId> blocks(sequence->table.begin() + sequence->reserved_cached_blocks, sequence->table.end());
    sequence->table.resize(static_cast<size_t>(sequence->reserved_cached_blocks));
    if (!blocks.empty()) {
      blocks_.quarantine(blocks);
      quarantined_.emplace(id, std::move(blocks));
    }
  }
  erase(sequence);
}

void EngineImpl::end_quarantine(RequestId id) {
  BATON_CHECK(!in_step_) << "the layer callback must not call the engine";
  const auto it = quarantined_.find(id);
  if (it == quarantined_.end()) return;
  blocks_.unquarantine(it->second);
  quarantined_.erase(it);
  blocked_ = false;
}

void EngineImpl::set_layer_ready(std::function<void(const LayerReady&)> callback) {
  BATON_CHECK(!in_step_) << "the layer callback must not call the engine";
  layer_ready_ = std::move(callback);
}

void EngineImpl::release(RequestId id) {
  BATON_CHECK(!in_step_) << "the layer callback must not call the engine";
  Sequence* sequence = find(id);
  if (sequence != nullptr && sequence->state == Sequence::State::kHeld) erase(sequence);
}

}  // namespace baton
