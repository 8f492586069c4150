#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "engine/batch.h"
#include "engine/engine.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "tensor/memory.h"

namespace baton {

/// The engine behind Engine::create. Everything it grows with use (views, batch, logits) is kept between steps.
class EngineImpl final : public Engine {
 public:
  /// `config` is resolved: kv_blocks and max_model_len are set. `pool` holds kv_blocks blocks of `layout`.
  EngineImpl(const EngineConfig& config, Model& model, const Clock& clock, BlockLayout layout,
             std::unique_ptr<Memory> pool);

  Status submit(Request request) override;
  void cancel(RequestId id) override;
  bool has_work() const override;
  Deadline next_deadline() const override;
  StepOutput step() override;

  Result<Reservation> reserve(const Request& request) override;
  Status admit(RequestId id, TokenOutput first) override;
  void abandon(RequestId id, bool quarantine) override;
  void end_quarantine(RequestId id) override;
  void set_layer_ready(std::function<void(const LayerReady&)> callback) override;
  void release(RequestId id) override;

  EngineStats stats() const override;
  const BlockLayout& layout() const override { return layout_; }
  std::span<std::byte> kv_pool() const override { return pool_->span(); }
  MemoryPlace kv_place() const override { return pool_->place(); }
  const EngineConfig& config() const override { return config_; }
  const Model& model() const override { return model_; }

 private:
  /// One sequence's rows in the step that is being computed.
  struct Work {
    Sequence* sequence = nullptr;
    int32_t rows = 0;
    int32_t logits = -1;  // index among the rows with logits, -1: its tokens are not all computed yet
    bool decode = false;
  };

  Status check_request(const Request& request) const;
  std::unique_ptr<Sequence> make_sequence(Request request);
  Sequence* find(RequestId id) const;
  FinishReason finish_reason(const SamplingParams& sampling, TokenId last, int64_t outputs, int64_t length) const;
  bool stops(const SamplingParams& sampling, TokenId token) const;

  // The parts of a step, in order.
  void expire(StepOutput* out);
  void plan_step();
  void preempt_planned();
  void start_planned();
  void build_batch();
  Status compute();
  void finish_rows(StepOutput* out);
  void sample(const Work& work, StepOutput* out);

  void fail(Sequence* sequence, const Status& status, StepOutput* out);
  void publish(Sequence* sequence);
  void free_blocks(Sequence* sequence);
  void erase(Sequence* sequence);
  void enqueue(Sequence* sequence);
  void dequeue(Sequence* sequence);
  void start_running(Sequence* sequence);
  void note_deadline(Deadline deadline) { next_deadline_ = std::min(next_deadline_, deadline); }
  void notify_layer(int32_t layer, const Sequence& sequence, int32_t first_block, int32_t last_block,
                    const std::shared_ptr<void>& ready) const;
  /// Fills choices_ and edits_; false: the logits are needed here.
  bool choose_on_device();
  SampleContext sample_context(Sequence& sequence) const;
  int64_t blocks_of(int64_t tokens) const { return layout_.tokens_to_blocks(tokens); }
  int64_t blocks_for_waiting() const;
  Status ensure_logits(int32_t rows);

  const EngineConfig config_;
  Model& model_;
  const Clock& clock_;
  const BlockLayout layout_;
  const int32_t max_sequences_;
  std::unique_ptr<Memory> pool_;
  BlockPool blocks_;
  Sampler sampler_;

  std::unordered_map<RequestId, std::unique_ptr<Sequence>> sequences_;
  std::unordered_map<RequestId, std::vector<BlockId>> quarantined_;
  std::deque<Sequence*> waiting_;    // in order of arrival
  std::vector<Sequence*> running_;   // in order of arrival
  std::vector<TokenOutput> pending_; // to be reported by the next step
  int64_t reserved_ = 0, held_ = 0, waiting_tokens_ = 0;
  uint64_t next_arrival_ = 0;
  bool blocked_ = false;             // the head of waiting_ cannot start until something is released
  Deadline next_deadline_;           // at most the earliest of waiting_ and running_
  bool in_step_ = false;
  std::function<void(const LayerReady&)> layer_ready_;
  EngineStats totals_;               // the counters; gauges are filled in by stats()

  // Scratch of a step.
  std::vector<RunningView> running_views_;
  std::vector<WaitingView> waiting_views_;
  Plan plan_;
  std::vector<Work> work_;
  std::vector<Sequence*> picked_;
  Batch batch_;
  std::unique_ptr<Memory> logits_;
  std::vector<int32_t> chosen_;
  std::vector<TokenChoice> choices_;  // by row with logits
  std::vector<LogitEdit> edits_;
  int32_t logits_capacity_ = 0;      // rows
};

}  // namespace baton
