#pragma once

#include <array>
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
///
/// Where the model runs ahead, step k + 1 is planned and launched while step k is computed, before its tokens are known: a sequence
/// that decodes in k + 1 takes the token that k chooses on the device. Only then does the host wait for k. One that turns out to end
/// with k has computed one token too much, which is dropped, and is kGone until k + 1 has ended. Step k + 1 waits for k as it does on
/// any other model when it needs k's tokens on the host (logprobs, penalties), when it has to preempt, and when it would start
/// somebody who has room, or finds its prefix cached, once k has ended. What k + 1 must not do it is not told by the scheduler but by what the scheduler is shown: sequences as
/// they will be after k.
class EngineImpl final : public Engine {
 public:
  /// `config` is resolved: kv_blocks and max_model_len are set. `pool` holds kv_blocks blocks of `layout`.
  EngineImpl(const EngineConfig& config, Model& model, const Clock& clock, BlockLayout layout,
             std::unique_ptr<Memory> pool);
  ~EngineImpl() override;

  Status submit(Request request) override;
  void cancel(RequestId id) override;
  bool has_work() const override;
  Deadline next_deadline() const override;
  StepOutput step() override;
  int64_t spare_ns() const override;

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
  /// One sequence's rows in a step.
  struct Work {
    Sequence* sequence = nullptr;
    int32_t rows = 0;
    int32_t logits = -1;  // index among the rows with logits, -1: its tokens are not all computed yet
    bool decode = false;
  };
  /// A step that is planned, then launched, then over.
  struct Step {
    std::vector<Work> work;
    int32_t rows = 0;
    bool decodes = false;              // and nothing else
    bool chooses = false;              // the device chooses the tokens, else the logits come here
    std::vector<int32_t> chosen;       // [rows with logits]
    Status status;                     // of launching it
  };
  static constexpr size_t kMaxSteps = 2;
  /// How long the last steps of decoding took.
  struct DecodeTime {
    int32_t rows = 0;
    int64_t last_ns = 0, before_ns = 0;
  };

  Status check_request(const Request& request) const;
  std::unique_ptr<Sequence> make_sequence(Request request);
  Sequence* find(RequestId id) const;
  FinishReason finish_reason(const SamplingParams& sampling, TokenId last, int64_t outputs, int64_t length) const;
  bool stops(const SamplingParams& sampling, TokenId token) const;

  // The parts of a step, in order.
  void expire(StepOutput* out);
  /// False: there is nothing to launch, or not before the step under way has ended.
  bool launch_step();
  bool may_run_ahead() const;
  /// Whether a step under way computes the block that continues the `cached_tokens` of `waiting` that are cached.
  bool prefix_under_way(const Sequence& waiting, int64_t cached_tokens) const;
  /// Whether blocks or a place are sure to come free when the step under way ends.
  bool step_will_release() const;
  bool plan_step(Step* step);
  void preempt_planned();
  void start_planned(Step* step);
  void build_batch(Step* step);
  Status compute(Step* step);
  void finish_step(StepOutput* out);
  void drop_steps();
  void sample(const Step& step, const Work& work, StepOutput* out);

  Step& oldest_step() { return steps_[(next_step_ + kMaxSteps - under_way_) % kMaxSteps]; }
  const Step& newest_step() const { return steps_[(next_step_ + kMaxSteps - 1) % kMaxSteps]; }
  /// Whether the tokens that are awaited are the sequence's last for certain.
  bool ends_with_awaited(const Sequence& sequence) const;
  void end_part(Sequence* sequence);
  void bury(Sequence* sequence);

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
  bool choose_on_device(const Step& step);
  SampleContext sample_context(Sequence& sequence, int32_t output_index) const;
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
  std::vector<std::unique_ptr<Sequence>> gone_;  // kGone
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

  std::array<Step, kMaxSteps> steps_;  // taken in turn
  size_t next_step_ = 0, under_way_ = 0;
  int64_t step_began_ns_ = 0;        // of the oldest one under way: when it was planned, or the one before had ended
  DecodeTime decode_time_;

  // Scratch of a step.
  std::vector<RunningView> running_views_;
  std::vector<WaitingView> waiting_views_;
  Plan plan_;
  std::vector<Sequence*> picked_;
  Batch batch_;
  std::unique_ptr<Memory> logits_;   // of the step under way, if it does not choose itself: then there is no second one
  std::vector<TokenChoice> choices_;  // by row with logits
  std::vector<LogitEdit> edits_;
  int32_t logits_capacity_ = 0;      // rows
};

}  // namespace baton
