// One iteration: plan, launch; wait for the step before, sample.

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
  const bool first = under_way_ == 0;
  while (under_way_ < kMaxSteps && launch_step()) {
    if (first && may_run_ahead()) {  // what came while it was launched belongs into the next one
      in_step_ = false;
      return out;
    }
  }
  if (under_way_ > 0) finish_step(&out);
  // The logits of a big batch are memory that an idle worker should not hold.
  constexpr size_t kKeepBytes = size_t{32} << 20;
  if (running_.empty() && under_way_ == 0 && logits_ && logits_->span().size() > kKeepBytes) {
    logits_ = nullptr;
    logits_capacity_ = 0;
  }
  in_step_ = false;
  return out;
}

EngineImpl::~EngineImpl() {
  drop_steps();  // they write into the pool
}

// -- Launching. --------------------------------------------------------------------------------------------------

bool EngineImpl::launch_step() {
  if (running_.empty() && waiting_.empty()) return false;
  if (under_way_ > 0 && !may_run_ahead()) return false;
  const int64_t begin_ns = clock_.now_ns();
  Step& step = steps_[next_step_];
  if (!plan_step(&step)) return false;
  build_batch(&step);
  if (batch_.empty()) return false;
  step.rows = batch_.rows();
  step.status = compute(&step);
  for (const Work& work : step.work) {
    Sequence& sequence = *work.sequence;
    ++sequence.steps;
    sequence.launched += work.rows;
    if (work.logits < 0) continue;
    ++sequence.awaited;
    sequence.awaited_row = work.logits;
  }
  step.decodes = std::ranges::all_of(step.work, &Work::decode);
  ++totals_.steps;
  if (under_way_ > 0) {
    ++totals_.steps_ahead;
  } else {
    step_began_ns_ = begin_ns;
  }
  next_step_ = (next_step_ + 1) % kMaxSteps;
  ++under_way_;
  return true;
}

bool EngineImpl::may_run_ahead() const {
  if (!model_.runs_ahead() || !newest_step().status.ok() || !newest_step().chooses) return false;
  // Penalties count the token that is not known yet.
  return std::ranges::none_of(running_, [&](const Sequence* sequence) {
    return sequence->awaited > 0 && has_penalties(sequence->sampling) && !ends_with_awaited(*sequence);
  });
}

/// A step with prefill in it says itself when it is nearly done. One of decoding takes at least as long as the last ones, in
/// proportion where it has fewer rows.
int64_t EngineImpl::spare_ns() const {
  constexpr int64_t kLeastMarginNs = 300'000, kLeastNs = 50'000;  // threads wake up late
  constexpr int64_t kAskAgainNs = 50'000;
  if (under_way_ != 1 || !pending_.empty() || running_.empty() || !may_run_ahead()) return 0;
  if (!newest_step().decodes) return model_.mostly_done() ? 0 : kAskAgainNs;
  int64_t expected_ns = std::min(decode_time_.last_ns, decode_time_.before_ns);
  if (newest_step().rows < decode_time_.rows) expected_ns = expected_ns * newest_step().rows / decode_time_.rows;
  const int64_t margin_ns = std::max(expected_ns / 16, kLeastMarginNs);
  const int64_t left_ns = step_began_ns_ + expected_ns - margin_ns - clock_.now_ns();
  return left_ns < kLeastNs ? 0 : left_ns;
}

bool EngineImpl::prefix_under_way(const Sequence& waiting, int64_t cached_tokens) const {
  const int64_t end = cached_tokens + config_.block_tokens;
  if (!config_.prefix_cache || end >= waiting.length()) return false;
  return std::ranges::any_of(running_, [&](const Sequence* sequence) {
    return sequence->computed < end && end <= std::min(sequence->launched, sequence->length()) &&
           std::equal(waiting.tokens.begin(), waiting.tokens.begin() + end, sequence->tokens.begin());
  });
}

bool EngineImpl::step_will_release() const {
  return !gone_.empty() || std::ranges::any_of(running_, [&](const Sequence* sequence) { return ends_with_awaited(*sequence); });
}

bool EngineImpl::ends_with_awaited(const Sequence& sequence) const {
  if (sequence.awaited == 0) return false;
  return sequence.prefill_only || sequence.outputs() + sequence.awaited >= sequence.sampling.max_tokens ||
         sequence.length() + sequence.awaited >= config_.max_model_len;
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
/// has its blocks. Leaves the rows in `step`. False, and nothing has changed: it has to wait for the step under way.
bool EngineImpl::plan_step(Step* step) {
  step->work.clear();
  running_views_.clear();
  int32_t decodes = 0;
  int64_t growth = 0;
  for (const Sequence* sequence : running_) {
    RunningView view;
    view.computed = sequence->launched;
    view.tokens = ends_with_awaited(*sequence) ? view.computed : sequence->length() + sequence->awaited;
    view.blocks = static_cast<int32_t>(sequence->table.size());
    view.preemptible = !sequence->prefill_only;
    decodes += view.tokens - view.computed == 1;
    growth += view.tokens > view.computed && view.computed + 1 > view.blocks * config_.block_tokens;
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
      if (under_way_ > 0 && prefix_under_way(*sequence, peek.tokens)) return false;
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
  // Blocks of who is computed now cannot be taken away, and who waits should not wait for one step more than it must.
  if (under_way_ > 0 && (!plan_.preempted.empty() || (blocked && !waiting_.empty() && step_will_release()))) return false;

  // Pointers first: preempting and admitting moves the indices.
  for (const Plan::Slice& slice : plan_.running) {
    const RunningView& view = running_views_[static_cast<size_t>(slice.index)];
    step->work.push_back({.sequence = running_[static_cast<size_t>(slice.index)],
                          .rows = slice.rows,
                          .logits = -1,
                          .decode = view.tokens - view.computed == 1});
  }
  picked_.clear();
  for (int32_t index : plan_.grown) picked_.push_back(running_[static_cast<size_t>(index)]);
  preempt_planned();
  start_planned(step);
  blocked_ = blocked && plan_.preempted.empty();
  return true;
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

void EngineImpl::start_planned(Step* step) {
  std::vector<Work>& work = step->work;
  const size_t first_admitted = work.size();
  for (const Plan::Slice& slice : plan_.admitted) {
    work.push_back({.sequence = waiting_[static_cast<size_t>(slice.index)], .rows = slice.rows, .logits = -1, .decode = false});
  }
  // Every prefix is taken before anything is allocated, so that no allocation evicts what the plan counted on.
  for (size_t i = first_admitted; i < work.size(); ++i) {
    Sequence* sequence = work[i].sequence;
    dequeue(sequence);
    sequence->table = blocks_.match_prefix(sequence->tokens, sequence->length() - 1);
    sequence->computed = static_cast<int32_t>(std::ssize(sequence->table)) * config_.block_tokens;
    sequence->launched = sequence->computed;
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
  for (size_t i = first_admitted; i < work.size(); ++i) {
    Sequence* sequence = work[i].sequence;
    const Status status =
        blocks_.allocate_into(blocks_of(sequence->length()) - std::ssize(sequence->table), &sequence->table);
    BATON_CHECK(status.ok()) << "planned admission: " << status.to_string();
    start_running(sequence);
  }
  for (size_t i = first_admitted; i < work.size(); ++i) {
    const Sequence& sequence = *work[i].sequence;
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

void EngineImpl::build_batch(Step* step) {
  batch_.clear();
  for (Work& work : step->work) {
    const Sequence& sequence = *work.sequence;
    if (sequence.launched == sequence.length()) {
      work.logits = batch_.add_chosen(sequence.awaited_row, sequence.launched, sequence.table);
    } else {
      const bool complete = sequence.launched + work.rows == sequence.length();
      work.logits = batch_.add(sequence.tokens, sequence.launched, work.rows, sequence.table, complete);
    }
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

Status EngineImpl::compute(Step* step) {
  ForwardBatch batch = batch_.view();
  step->chooses = choose_on_device(*step);
  if (step->chooses) {
    step->chosen.resize(static_cast<size_t>(batch_.logit_rows()));
    batch.chosen = step->chosen;
    batch.choices = choices_;
    batch.edits = edits_;
  } else {
    BATON_RETURN_IF_ERROR(ensure_logits(batch_.logit_rows()));
  }
  batch.kv_pool = pool_->span().data();
  batch.block_tokens = config_.block_tokens;
  const bool sends = layer_ready_ && std::ranges::any_of(step->work, [](const Work& w) { return w.sequence->prefill_only; });
  if (sends) {
    batch.layer_done = [this, step](int32_t layer, const std::shared_ptr<void>& ready) {
      for (const Work& work : step->work) {
        const Sequence& sequence = *work.sequence;
        if (!sequence.prefill_only) continue;
        notify_layer(layer, sequence, sequence.launched / config_.block_tokens,
                     static_cast<int32_t>(blocks_of(sequence.launched + work.rows)), ready);
      }
    };
  }
  return model_.launch(batch, logits_ ? reinterpret_cast<float*>(logits_->span().data()) : nullptr);
}

/// Unless somebody wants logprobs: then no logits have to come to the host.
bool EngineImpl::choose_on_device(const Step& step) {
  choices_.clear();
  edits_.clear();
  if (!model_.can_choose(0)) return false;
  choices_.resize(static_cast<size_t>(batch_.logit_rows()));
  for (const Work& work : step.work) {
    if (work.logits < 0) continue;
    Sequence& sequence = *work.sequence;
    if (sequence.sampling.logprobs >= 0) return false;
    choices_[static_cast<size_t>(work.logits)] =
        sampler_.choice(sample_context(sequence, sequence.outputs() + sequence.awaited), &edits_);
  }
  return model_.can_choose(edits_.size());
}

SampleContext EngineImpl::sample_context(Sequence& sequence, int32_t output_index) const {
  return {.params = &sequence.sampling,
          .tokens = sequence.tokens,
          .prompt_tokens = static_cast<size_t>(sequence.prompt_tokens),
          .output_index = output_index,
          .counts = &sequence.counts};
}

// -- Finishing. --------------------------------------------------------------------------------------------------

void EngineImpl::finish_step(StepOutput* out) {
  const Step& step = oldest_step();
  const int64_t wait_begin_ns = clock_.now_ns();
  const Status status = step.status.ok() ? model_.finish() : step.status;
  --under_way_;
  const int64_t ended_ns = clock_.now_ns();
  const int64_t began_ns = std::exchange(step_began_ns_, ended_ns);
  // Where there was nothing to wait for it had ended who knows when: the estimate was too long, or prefill took long to launch.
  constexpr int64_t kNoWaitNs = 20'000;
  const bool waited = ended_ns - wait_begin_ns >= kNoWaitNs;
  if (step.decodes && (waited || newest_step().decodes)) {
    const int64_t took_ns = ended_ns - began_ns;
    decode_time_ = {step.rows, waited ? took_ns : took_ns / 2, decode_time_.last_ns};
  }
  if (status.code() == StatusCode::kUnavailable) {
    for (const Work& work : step.work) end_part(work.sequence);
    drop_steps();
    out->device = status;
    return;
  }
  if (!status.ok()) log_error("engine: a step of {} tokens failed: {}", step.rows, status.to_string());
  out->tokens.reserve(out->tokens.size() + step.work.size());
  for (const Work& work : step.work) {
    Sequence* sequence = work.sequence;
    --sequence->steps;
    if (sequence->state == Sequence::State::kGone) {
      if (sequence->steps == 0) bury(sequence);
      continue;
    }
    if (work.logits >= 0) --sequence->awaited;
    if (!status.ok()) {
      fail(sequence, status, out);
      continue;
    }
    sequence->computed += work.rows;
    (work.decode ? totals_.decode_tokens : totals_.prefill_tokens) += work.rows;
    publish(sequence);
    if (work.logits >= 0) sample(step, work, out);
  }
  out->step_ns = clock_.now_ns() - began_ns;
}

/// Waits for what is under way and forgets it: every sequence is as it was before.
void EngineImpl::drop_steps() {
  for (; under_way_ > 0; --under_way_) {
    const Step& step = oldest_step();
    if (step.status.ok()) ignore_status(model_.finish());
    for (const Work& work : step.work) end_part(work.sequence);
  }
}

void EngineImpl::publish(Sequence* sequence) {
  if (!config_.prefix_cache || sequence->computed / config_.block_tokens <= sequence->published.blocks) return;
  blocks_.publish(std::span(sequence->tokens).first(static_cast<size_t>(sequence->computed)), sequence->table,
                  &sequence->published);
}

void EngineImpl::sample(const Step& step, const Work& work, StepOutput* out) {
  Sequence* sequence = work.sequence;
  const auto vocab_size = static_cast<size_t>(model_.config().vocab_size);
  Result<SampledToken> sampled = SampledToken();
  if (step.chooses) {
    sampled->token = step.chosen[static_cast<size_t>(work.logits)];
    if (sampled->token == kChosenNone) sampled = sampler_.nothing_left();
    else if (sampled->token < 0) sampled = Sampler::not_finite();
  } else {
    float* logits = reinterpret_cast<float*>(logits_->span().data()) + static_cast<size_t>(work.logits) * vocab_size;
    sampled = sampler_.sample({logits, vocab_size}, sample_context(*sequence, sequence->outputs()));
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
