// One iteration: plan, compute, sample.

#include <algorithm>
#include <bit>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "engine/engine_impl.h"

namespace baton {

StepOutput EngineImpl::step() {
  BATON_CHECK(!in_step_) << "the layer callback must not call the engine";
  StepOutput out;
  if (!pending_.empty()) {  // first tokens of handoffs don't wait for a computation
    out.tokens = std::move(pending_);
    pending_.clear();
    return out;
  }
  in_step_ = true;
  expire(&out);
  if (!running_.empty() || !waiting_.empty()) {
    plan_step();
    build_batch();
    if (!batch_.empty()) {
      const Status status = compute();
      ++totals_.steps;
      if (status.ok()) {
        finish_rows(&out);
      } else if (status.code() == StatusCode::kUnavailable) {
        out.device = status;
      } else {
        log_error("engine: a step of {} tokens failed: {}", batch_.rows(), status.to_string());
        for (const Work& work : work_) fail(work.sequence, status, &out);
      }
    }
  }
  // The logits of a big batch are memory that an idle worker should not hold.
  constexpr size_t kKeepBytes = size_t{32} << 20;
  if (running_.empty() && logits_ && logits_->span().size() > kKeepBytes) {
    logits_ = nullptr;
    logits_capacity_ = 0;
  }
  in_step_ = false;
  return out;
}

void EngineImpl::expire(StepOutput* out) {
  const int64_t now_ns = clock_.now_ns();
  if (!next_deadline_.expired(now_ns)) return;
  picked_.clear();
  next_deadline_ = Deadline::never();
  const auto look = [&](Sequence* sequence) {
    if (sequence->deadline.expired(now_ns)) {
      picked_.push_back(sequence);
    } else {
      note_deadline(sequence->deadline);
    }
  };
  std::ranges::for_each(running_, look);
  std::ranges::for_each(waiting_, look);
  for (Sequence* sequence : picked_) {
    const bool waiting = sequence->state == Sequence::State::kWaiting;
    fail(sequence,
         deadline_exceeded("the request's deadline passed while it was {}, with {} of its tokens computed and {} "
                           "generated",
                           waiting ? "waiting" : "running", sequence->computed, sequence->outputs()),
         out);
  }
}

/// Fills plan_ and applies what it says about blocks and queues: afterwards every planned sequence is running and
/// has its blocks. Leaves the rows in work_.
void EngineImpl::plan_step() {
  work_.clear();
  running_views_.clear();
  int32_t decodes = 0;
  int64_t growth = 0;
  for (const Sequence* sequence : running_) {
    RunningView view;
    view.tokens = sequence->length();
    view.computed = sequence->computed;
    view.blocks = static_cast<int32_t>(sequence->table.size());
    view.preemptible = !sequence->prefill_only;
    decodes += view.tokens - view.computed == 1;
    growth += view.computed + 1 > view.blocks * config_.block_tokens;
    running_views_.push_back(view);
  }
  if (growth > blocks_.available()) {
    for (size_t i = 0; i < running_.size(); ++i) {
      running_views_[i].releasable_blocks = static_cast<int32_t>(blocks_.releasable(running_[i]->table));
    }
  }

  // As many of the queue as could start with the tokens and places that are left: looking up a prefix costs time.
  waiting_views_.clear();
  if (!blocked_) {
    int64_t tokens = config_.max_batched_tokens - decodes;
    int64_t places = max_sequences_ - std::ssize(running_) - reserved_;
    for (const Sequence* sequence : waiting_) {
      const auto peek = blocks_.peek_prefix_blocks(sequence->tokens, sequence->length() - 1);
      WaitingView view;
      view.tokens = sequence->length();
      view.cached_tokens = static_cast<int32_t>(peek.tokens);
      view.cached_idle_blocks = static_cast<int32_t>(peek.idle_blocks);
      waiting_views_.push_back(view);
      tokens -= view.tokens - view.cached_tokens;
      if (tokens <= 0 || --places <= 0) break;
    }
  }

  SchedulerInput input;
  input.running = running_views_;
  input.waiting = waiting_views_;
  input.available_blocks = blocks_.available();
  input.total_blocks = config_.kv_blocks;
  input.reserved = static_cast<int32_t>(reserved_);
  input.limits = {.block_tokens = config_.block_tokens,
                  .max_batched_tokens = config_.max_batched_tokens,
                  .max_sequences = max_sequences_};
  schedule(input, &plan_);
  const bool blocked = blocked_ || plan_.blocked;

  // Pointers first: preempting and admitting moves the indices.
  for (const Plan::Slice& slice : plan_.running) {
    const RunningView& view = running_views_[static_cast<size_t>(slice.index)];
    work_.push_back({.sequence = running_[static_cast<size_t>(slice.index)],
                     .rows = slice.rows,
                     .logits = -1,
                     .decode = view.tokens - view.computed == 1});
  }
  picked_.clear();
  for (int32_t index : plan_.grown) picked_.push_back(running_[static_cast<size_t>(index)]);
  preempt_planned();
  start_planned();
  blocked_ = blocked && plan_.preempted.empty();
}

void EngineImpl::preempt_planned() {
  for (int32_t index : plan_.preempted) {  // from the last on, so that the indices before stay right
    Sequence* sequence = running_[static_cast<size_t>(index)];
    running_.erase(running_.begin() + index);
    free_blocks(sequence);
    sequence->preempted = true;
    enqueue(sequence);
    ++totals_.preemptions;
  }
}

void EngineImpl::start_planned() {
  const size_t first_admitted = work_.size();
  for (const Plan::Slice& slice : plan_.admitted) {
    work_.push_back({.sequence = waiting_[static_cast<size_t>(slice.index)], .rows = slice.rows, .logits = -1, .decode = false});
  }
  // Every prefix is taken before anything is allocated, so that no allocation evicts what the plan counted on.
  for (size_t i = first_admitted; i < work_.size(); ++i) {
    Sequence* sequence = work_[i].sequence;
    dequeue(sequence);
    sequence->table = blocks_.match_prefix(sequence->tokens, sequence->length() - 1);
    sequence->computed = static_cast<int32_t>(std::ssize(sequence->table)) * config_.block_tokens;
    if (!std::exchange(sequence->admitted_before, true)) {
      totals_.prefix_query_tokens += sequence->length();
      totals_.prefix_hit_tokens += sequence->computed;
      sequence->cached_prompt_tokens = std::min(sequence->computed, sequence->prompt_tokens);
    }
  }
  for (Sequence* sequence : picked_) {
    const Status status = blocks_.allocate_into(1, &sequence->table);
    BATON_CHECK(status.ok()) << "planned growth: " << status.to_string();
  }
  for (size_t i = first_admitted; i < work_.size(); ++i) {
    Sequence* sequence = work_[i].sequence;
    const Status status =
        blocks_.allocate_into(blocks_of(sequence->length()) - std::ssize(sequence->table), &sequence->table);
    BATON_CHECK(status.ok()) << "planned admission: " << status.to_string();
    start_running(sequence);
  }
  for (size_t i = first_admitted; i < work_.size(); ++i) {
    const Sequence& sequence = *work_[i].sequence;
    if (!sequence.prefill_only || sequence.computed == 0) continue;
    for (int32_t layer = 0; layer < layout_.layers; ++layer) {
      notify_layer(layer, sequence, 0, sequence.computed / config_.block_tokens, nullptr);
    }
  }
}

void EngineImpl::notify_layer(int32_t layer, const Sequence& sequence, int32_t first_block, int32_t last_block,
                              const std::shared_ptr<void>& ready) const {
  if (!layer_ready_) return;
  layer_ready_({.request = sequence.id,
                .layer = layer,
                .first_block = first_block,
                .last_block = last_block,
                .table = sequence.table,
                .ready = ready});
}

void EngineImpl::build_batch() {
  batch_.clear();
  for (Work& work : work_) {
    const Sequence& sequence = *work.sequence;
    const bool complete = sequence.computed + work.rows == sequence.length();
    work.logits = batch_.add(sequence.tokens, sequence.computed, work.rows, sequence.table, complete);
    (work.decode ? totals_.decode_tokens : totals_.prefill_tokens) += work.rows;
  }
}

Status EngineImpl::ensure_logits(int32_t rows) {
  if (rows <= logits_capacity_) return {};
  const auto capacity = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(rows)));
  const size_t row_bytes = static_cast<size_t>(model_.config().vocab_size) * sizeof(float);
  logits_ = nullptr;  // first give back, then ask
  logits_capacity_ = 0;
  BATON_ASSIGN_OR_RETURN(logits_, model_.allocate_logits(static_cast<size_t>(capacity) * row_bytes));
  logits_capacity_ = capacity;
  return {};
}

Status EngineImpl::compute() {
  ForwardBatch batch = batch_.view();
  chosen_.clear();
  if (can_choose()) {
    chosen_.resize(static_cast<size_t>(batch_.logit_rows()));
    batch.chosen = chosen_;
  } else {
    BATON_RETURN_IF_ERROR(ensure_logits(batch_.logit_rows()));
  }
  batch.kv_pool = pool_->span().data();
  batch.block_tokens = config_.block_tokens;
  const bool sends = layer_ready_ && std::ranges::any_of(work_, [](const Work& w) { return w.sequence->prefill_only; });
  if (sends) {
    batch.layer_done = [this](int32_t layer, const std::shared_ptr<void>& ready) {
      for (const Work& work : work_) {
        const Sequence& sequence = *work.sequence;
        if (!sequence.prefill_only) continue;
        notify_layer(layer, sequence, sequence.computed / config_.block_tokens,
                     static_cast<int32_t>(blocks_of(sequence.computed + work.rows)), ready);
      }
    };
  }
  return model_.forward(batch, logits_ ? reinterpret_cast<float*>(logits_->span().data()) : nullptr);
}

/// When every row's token is the most likely one and nothing else is asked, the device can choose them: then no logits have
/// to come to the host.
bool EngineImpl::can_choose() const {
  if (!model_.can_choose()) return false;
  return std::ranges::all_of(work_, [](const Work& work) {
    const SamplingParams& params = work.sequence->sampling;
    return work.logits < 0 ||
           (params.temperature == 0 && params.logprobs < 0 && params.logit_bias.empty() && params.presence_penalty == 0 &&
            params.frequency_penalty == 0 && params.repetition_penalty == 1 &&
            work.sequence->outputs() >= params.min_tokens);
  });
}

void EngineImpl::finish_rows(StepOutput* out) {
  out->tokens.reserve(out->tokens.size() + work_.size());
  for (const Work& work : work_) {
    work.sequence->computed += work.rows;
    publish(work.sequence);
    if (work.logits >= 0) sample(work, out);
  }
}

void EngineImpl::publish(Sequence* sequence) {
  if (!config_.prefix_cache || sequence->computed / config_.block_tokens <= sequence->published.blocks) return;
  blocks_.publish(std::span(sequence->tokens).first(static_cast<size_t>(sequence->computed)), sequence->table,
                  &sequence->published);
}

void EngineImpl::sample(const Work& work, StepOutput* out) {
  Sequence* sequence = work.sequence;
  const auto vocab_size = static_cast<size_t>(model_.config().vocab_size);
  Result<SampledToken> sampled = SampledToken();
  if (!chosen_.empty()) {
    sampled->token = chosen_[static_cast<size_t>(work.logits)];
    if (sampled->token < 0) sampled = internal_error("the model produced a NaN or an infinity");
  } else {
    float* logits = reinterpret_cast<float*>(logits_->span().data()) + static_cast<size_t>(work.logits) * vocab_size;
    sampled = sampler_.sample({logits, vocab_size}, {.params = &sequence->sampling,
                                                     .tokens = sequence->tokens,
                                                     .prompt_tokens = static_cast<size_t>(sequence->prompt_tokens),
                                                     .output_index = sequence->outputs(),
                                                     .counts = &sequence->counts});
  }
  if (!sampled.ok()) {
    fail(sequence, sampled.status(), out);
    return;
  }
  TokenOutput output;
  output.request = sequence->id;
  output.token = sampled->token;
  output.index = sequence->outputs();
  output.logprob = sampled->logprob;
  output.top_logprobs = std::move(sampled->top_logprobs);
  if (!std::exchange(sequence->reported, true)) output.cached_prompt_tokens = sequence->cached_prompt_tokens;

  if (sequence->prefill_only) {
    output.finish = FinishReason::kPrefillDone;
    out->tokens.push_back(std::move(output));
    running_.erase(std::ranges::find(running_, sequence));
    sequence->state = Sequence::State::kHeld;
    ++held_;
    blocked_ = false;
    return;
  }
  sequence->tokens.push_back(sampled->token);
  output.finish = finish_reason(sequence->sampling, sampled->token, sequence->outputs(), sequence->length());
  const bool finished = output.finish != FinishReason::kNone;
  out->tokens.push_back(std::move(output));
  if (finished) erase(sequence);
}

void EngineImpl::fail(Sequence* sequence, const Status& status, StepOutput* out) {
  TokenOutput output;
  output.request = sequence->id;
  output.index = sequence->outputs();
  output.finish = FinishReason::kError;
  output.status = status;
  out->tokens.push_back(std::move(output));
  erase(sequence);
}

}  // namespace baton
