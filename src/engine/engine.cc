#include "engine/engine.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "engine/engine_impl.h"

namespace baton {
namespace {

constexpr int64_t kDefaultKvBytes = int64_t{1} << 30;
constexpr int64_t kMaxKvBytes = int64_t{1} << 46;

Status check_setting(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return {};
  return invalid_argument("engine: {} is {}; it must be from {} to {}", name, value, low, high);
}

/// Fills in kv_blocks and max_model_len.
Status resolve(EngineConfig* config, const Model& model, const BlockLayout& layout) {
  const int32_t model_len = model.max_model_len();
  if (config->max_model_len > model_len) {
    return invalid_argument("engine: max_model_len is {}, but the model has {} positions", config->max_model_len,
                            model_len);
  }
  const bool length_given = config->max_model_len > 0;
  if (!length_given) config->max_model_len = model_len;
  const int64_t block_bytes = layout.block_bytes();
  if (config->kv_blocks == 0) {
    if (config->kv_bytes > 0) {
      config->kv_blocks = config->kv_bytes / block_bytes;
      if (config->kv_blocks == 0) {
        return invalid_argument("engine: kv_bytes is {}, but one block of {} tokens has {} bytes", config->kv_bytes,
                                config->block_tokens, block_bytes);
      }
    } else {
      const int64_t useful = layout.tokens_to_blocks(config->max_model_len) * config->max_running;
      const int64_t spare = model.spare_kv_bytes();
      config->kv_blocks = std::clamp<int64_t>((spare > 0 ? spare : kDefaultKvBytes) / block_bytes, 1, useful);
    }
  }
  BATON_RETURN_IF_ERROR(check_setting("kv_blocks", config->kv_blocks, 1,
                                      std::min<int64_t>(kMaxKvBytes / block_bytes, std::numeric_limits<BlockId>::max())));
  config->kv_bytes = config->kv_blocks * block_bytes;

  const int64_t pool_tokens = config->kv_blocks * config->block_tokens;
  if (config->max_model_len > pool_tokens) {
    const int64_t wanted_bytes = layout.tokens_to_blocks(config->max_model_len) * block_bytes;
    if (length_given) {
      return invalid_argument("engine: max_model_len is {}, but the KV pool of {} blocks holds {} tokens; set "
                              "kv_bytes to at least {} or max_model_len to at most {}",
                              config->max_model_len, config->kv_blocks, pool_tokens, wanted_bytes, pool_tokens);
    }
    constexpr double kMiB = 1 << 20;
    log_info("engine: requests are limited to {} tokens by the KV pool ({:.1f} MiB); the model's {} would need {:.1f} MiB",
             pool_tokens, static_cast<double>(config->kv_bytes) / kMiB, config->max_model_len,
             static_cast<double>(wanted_bytes) / kMiB);
    config->max_model_len = static_cast<int32_t>(pool_tokens);
  }
  return {};
}

}  // namespace

Status EngineConfig::validate() const {
  constexpr int64_t kMillion = 1 << 20;
  BATON_RETURN_IF_ERROR(check_setting("block_tokens", block_tokens, 1, 4096));
  BATON_RETURN_IF_ERROR(check_setting("kv_blocks", kv_blocks, 0, std::numeric_limits<BlockId>::max()));
  BATON_RETURN_IF_ERROR(check_setting("kv_bytes", kv_bytes, 0, kMaxKvBytes));
  if (max_batched_tokens != 0) {
    BATON_RETURN_IF_ERROR(check_setting("max_batched_tokens", max_batched_tokens, block_tokens, kMillion));
  }
  BATON_RETURN_IF_ERROR(check_setting("max_running", max_running, 1, 65536));
  BATON_RETURN_IF_ERROR(check_setting("max_waiting", max_waiting, 1, kMillion));
  // 2^26 positions: far beyond any model, and sums of lengths stay far below 2^31.
  return check_setting("max_model_len", max_model_len, 0, 1 << 26);
}

Result<std::unique_ptr<Engine>> Engine::create(EngineConfig config, Model& model, const Clock& clock) {
  if (config.max_batched_tokens == 0) config.max_batched_tokens = model.usual_batched_tokens();
  BATON_RETURN_IF_ERROR(config.validate());
  BlockLayout layout = model.layout(config.block_tokens);
  BATON_RETURN_IF_ERROR(layout.validate());
  BATON_RETURN_IF_ERROR(model.prepare({.rows = config.max_batched_tokens,
                                       .sequences = config.max_running,
                                       .sequence_tokens = config.max_model_len > 0 ? config.max_model_len : model.max_model_len(),
                                       .block_tokens = config.block_tokens}));
  BATON_RETURN_IF_ERROR(resolve(&config, model, layout));
  Result<std::unique_ptr<Memory>> pool = model.allocate_kv(static_cast<size_t>(config.kv_bytes));
  if (!pool.ok()) {
    return pool.status().with_context(fmt::format("engine: KV pool of {} blocks", config.kv_blocks));
  }
  return std::unique_ptr<Engine>(
      std::make_unique<EngineImpl>(config, model, clock, std::move(layout), std::move(pool).value()));
}

EngineImpl::EngineImpl(const EngineConfig& config, Model& model, const Clock& clock, BlockLayout layout,
                       std::unique_ptr<Memory> pool)
    : config_(config),
      model_(model),
      clock_(clock),
      layout_(std::move(layout)),
      max_sequences_(max_sequences(config.max_running, config.max_batched_tokens, config.block_tokens)),
      pool_(std::move(pool)),
      blocks_(config.kv_blocks, config.block_tokens, config.prefix_cache),
      sampler_(model.config().vocab_size, model.config().eos_token_ids) {}

// -- Requests in and out. ----------------------------------------------------------------------------------------

Status EngineImpl::check_request(const Request& request) const {
  const int32_t vocab_size = model_.config().vocab_size;
  if (request.prompt.empty()) return invalid_argument("the prompt is empty; it needs at least one token");
  const size_t length = request.prompt.size() + request.generated.size();
  if (length >= static_cast<size_t>(config_.max_model_len)) {
    return invalid_argument("prompt and output so far have {} tokens; this worker takes at most {}, with room for "
                            "one more token of output",
                            length, config_.max_model_len - 1);
  }
  const auto check_tokens = [&](const char* name, const std::vector<TokenId>& tokens) -> Status {
    const auto bad = std::ranges::find_if(tokens, [&](TokenId token) { return token < 0 || token >= vocab_size; });
    if (bad == tokens.end()) return {};
    return invalid_argument("{} token {} is id {}; the vocabulary has ids 0 to {}", name, bad - tokens.begin(), *bad,
                            vocab_size - 1);
  };
  BATON_RETURN_IF_ERROR(check_tokens("prompt", request.prompt));
  BATON_RETURN_IF_ERROR(check_tokens("output", request.generated));
  BATON_RETURN_IF_ERROR(request.sampling.validate(vocab_size));
  if (find(request.id) != nullptr) {
    return invalid_argument("request {} is here already", static_cast<uint64_t>(request.id));
  }
  return {};
}

std::unique_ptr<Sequence> EngineImpl::make_sequence(Request request) {
  auto sequence = std::make_unique<Sequence>();
  sequence->id = request.id;
  sequence->arrival = next_arrival_++;
  sequence->prefill_only = request.prefill_only;
  sequence->deadline = request.deadline;
  sequence->prompt_tokens = static_cast<int32_t>(request.prompt.size());
  sequence->tokens = std::move(request.prompt);
  sequence->tokens.insert(sequence->tokens.end(), request.generated.begin(), request.generated.end());
  sequence->sampling = std::move(request.sampling);
  return sequence;
}

Status EngineImpl::submit(Request request) {
  BATON_CHECK(!in_step_) << "the layer callback must not call the engine";
  BATON_RETURN_IF_ERROR(check_request(request));
  if (!request.generated.empty()) {  // a replay may hold the whole output: only its end was lost
    const FinishReason finish =
        finish_reason(request.sampling, request.generated.back(), std::ssize(request.generated),
                      std::ssize(request.prompt) + std::ssize(request.generated));
    if (finish != FinishReason::kNone) {
      TokenOutput output;
      output.request = request.id;
      output.index = static_cast<int32_t>(request.generated.size());
      output.finish = finish;
      pending_.push_back(std::move(output));
      return {};
    }
  }
  if (std::ssize(waiting_) >= config_.max_waiting) {
    return resource_exhausted("{} requests are waiting; at most {} may", waiting_.size(), config_.max_waiting);
  }
  std::unique_ptr<Sequence> sequence = make_sequence(std::move(request));
  enqueue(sequence.get());
  sequences_.emplace(sequence->id, std::move(sequence));
  return {};
}

void EngineImpl::cancel(RequestId id) {
  BATON_CHECK(!in_step_) << "the layer callback must not call the engine";
  std::erase_if(pending_, [&](const TokenOutput& output) { return output.request == id; });
  Sequence* sequence = find(id);
  if (sequence == nullptr) return;
  if (sequence->state == Sequence::State::kReserved) {
    abandon(id, true);
  } else {
    erase(sequence);
  }
}

bool EngineImpl::has_work() const {
  if (!pending_.empty() || !running_.empty() || under_way_ > 0) return true;
  if (waiting_.empty()) return false;
  return !blocked_ || next_deadline_.expired(clock_);
}

Deadline EngineImpl::next_deadline() const {
  return waiting_.empty() && running_.empty() ? Deadline::never() : next_deadline_;
}

Sequence* EngineImpl::find(RequestId id) const {
  const auto it = sequences_.find(id);
  return it == sequences_.end() ? nullptr : it->second.get();
}

bool EngineImpl::stops(const SamplingParams& sampling, TokenId token) const {
  const auto contains = [&](const std::vector<TokenId>& ids) { return std::ranges::find(ids, token) != ids.end(); };
  return (!sampling.ignore_eos && contains(model_.config().eos_token_ids)) || contains(sampling.stop_token_ids);
}

/// Of a sequence whose newest output is `last`; kNone: it goes on.
FinishReason EngineImpl::finish_reason(const SamplingParams& sampling, TokenId last, int64_t outputs,
                                       int64_t length) const {
  if (outputs >= sampling.min_tokens && stops(sampling, last)) return FinishReason::kStop;
  if (outputs >= sampling.max_tokens || length >= config_.max_model_len) return FinishReason::kLength;
  return FinishReason::kNone;
}

void EngineImpl::enqueue(Sequence* sequence) {
  sequence->state = Sequence::State::kWaiting;
  const auto place = std::ranges::lower_bound(waiting_, sequence->arrival, {}, &Sequence::arrival);
  waiting_.insert(place, sequence);
  waiting_tokens_ += sequence->length();
  note_deadline(sequence->deadline);
  if (waiting_.front() == sequence) blocked_ = false;
}

void EngineImpl::dequeue(Sequence* sequence) {
  const auto place = std::ranges::lower_bound(waiting_, sequence->arrival, {}, &Sequence::arrival);
  BATON_CHECK(place != waiting_.end() && *place == sequence) << "not in the queue";
  if (place == waiting_.begin()) blocked_ = false;
  waiting_.erase(place);
  waiting_tokens_ -= sequence->length();
}

void EngineImpl::start_running(Sequence* sequence) {
  sequence->state = Sequence::State::kRunning;
  sequence->preempted = false;
  running_.insert(std::ranges::lower_bound(running_, sequence->arrival, {}, &Sequence::arrival), sequence);
  note_deadline(sequence->deadline);
}

void EngineImpl::free_blocks(Sequence* sequence) {
  BATON_CHECK(sequence->steps == 0) << "a step under way writes into its blocks";
  if (!sequence->table.empty()) blocked_ = false;
  blocks_.release(sequence->table);
  sequence->table.clear();
  sequence->published = {};
  sequence->computed = 0;
  sequence->launched = 0;
}

void EngineImpl::erase(Sequence* sequence) {
  switch (sequence->state) {
    case Sequence::State::kWaiting:
      dequeue(sequence);
      break;
    case Sequence::State::kRunning:
      running_.erase(std::ranges::find(running_, sequence));
      break;
    case Sequence::State::kReserved:
      --reserved_;
      break;
    case Sequence::State::kHeld:
      --held_;
      break;
    case Sequence::State::kGone:
      BATON_CHECK(false) << "erased twice";
  }
  blocked_ = false;  // a place is free, if not blocks
  if (sequence->steps > 0) {
    sequence->state = Sequence::State::kGone;
    gone_.push_back(std::move(sequences_.at(sequence->id)));
  } else {
    free_blocks(sequence);
  }
  sequences_.erase(sequence->id);
}

/// A step that the sequence had rows in was dropped.
void EngineImpl::end_part(Sequence* sequence) {
  --sequence->steps;
  sequence->launched = sequence->computed;
  sequence->awaited = 0;
  if (sequence->state == Sequence::State::kGone && sequence->steps == 0) bury(sequence);
}

void EngineImpl::bury(Sequence* sequence) {
  free_blocks(sequence);
  std::erase_if(gone_, [&](const std::unique_ptr<Sequence>& gone) { return gone.get() == sequence; });
}

EngineStats EngineImpl::stats() const {
  EngineStats stats = totals_;
  stats.waiting = std::ssize(waiting_);
  stats.running = std::ssize(running_);
  stats.reserved = reserved_;
  stats.held = held_;
  stats.waiting_tokens = waiting_tokens_;
  for (const Sequence* sequence : running_) {
    const int32_t left = sequence->length() - sequence->computed;
    if (left > 1) stats.waiting_tokens += left;
  }
  stats.blocks = blocks_.counts();
  return stats;
}

}  // namespace baton
