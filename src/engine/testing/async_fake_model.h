#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "base/random.h"
#include "engine/sampler.h"
#include "engine/testing/fake_model.h"

namespace baton::testing {

/// A FakeModel on a device that runs beside the host. A step reads and writes the pool at launch or, as dice say, as late as
/// finish(): a block that is given to somebody else while a step still has it gives wrong tokens to one of them. It chooses tokens
/// itself, as the engine's Sampler would.
class AsyncFakeModel : public FakeModel {
 public:
  /// What layer_done passes on: the layer is written once this is true.
  using Reached = bool;

  explicit AsyncFakeModel(Options options = {}, uint64_t seed = 1)
      : FakeModel(options), random_(seed), sampler_(options.vocab_size, options.eos_token_ids) {}

  bool can_choose(size_t edits) const override { return chooses && edits <= 1000; }
  bool runs_ahead() const override { return true; }

  Status launch(const ForwardBatch& batch, float* logits) override {
    BATON_CHECK(flights_.size() < 2) << "two steps are under way";
    if (!fail_launch.ok()) return std::exchange(fail_launch, Status());
    auto flight = std::make_unique<Flight>();
    flight->tokens.assign(batch.tokens.begin(), batch.tokens.end());
    for (int32_t& token : flight->tokens) {
      if (token >= 0) continue;
      BATON_CHECK(!flights_.empty() && token >= -std::ssize(flights_.front()->chosen_span)) << token;
    }
    flight->slices.assign(batch.sequences.begin(), batch.sequences.end());
    for (SequenceSlice& slice : flight->slices) {
      const int32_t blocks = (slice.start_pos + slice.rows + batch.block_tokens - 1) / batch.block_tokens;
      flight->tables.emplace_back(slice.block_table, slice.block_table + blocks);
      slice.block_table = flight->tables.back().data();
    }
    flight->logit_rows.assign(batch.logit_rows.begin(), batch.logit_rows.end());
    flight->choices.assign(batch.choices.begin(), batch.choices.end());
    flight->edits.assign(batch.edits.begin(), batch.edits.end());
    flight->chosen_span = batch.chosen;
    flight->logits = logits;
    flight->kv_pool = batch.kv_pool;
    flight->block_tokens = batch.block_tokens;
    if (batch.layer_done && has_events) {
      for (int32_t layer = 0; layer < config().layers; ++layer) batch.layer_done(layer, flight->reached);
    }
    const bool at_once = batch.layer_done && !has_events;
    if (at_once) flight->layer_done = batch.layer_done;
    flights_.push_back(std::move(flight));
    if (at_once || random_.chance(0.5)) run_all();
    return {};
  }

  Status finish() override {
    BATON_CHECK(!flights_.empty()) << "nothing is under way";
    const std::unique_ptr<Flight> flight = std::move(flights_.front());
    flights_.erase(flights_.begin());
    if (on_finish) on_finish();
    if (!fail_finish.ok()) {
      last_chosen_.assign(flight->logit_rows.size(), kChosenNotFinite);
      return std::exchange(fail_finish, Status());
    }
    if (!flight->done) run(*flight);
    std::ranges::copy(flight->chosen, flight->chosen_span.begin());
    return {};
  }

  bool mostly_done() const override { return dice_.chance(mostly_done_chance); }

  size_t under_way() const { return flights_.size(); }

  bool chooses = true;     ///< false: as a model that gives logits only
  double mostly_done_chance = 1;
  bool has_events = true;  ///< false: what layer_done announces is written
  Status fail_launch, fail_finish;  ///< returned, once, by the next
  std::function<void()> on_finish;  ///< the host waits for a step

 private:
  struct Flight {
    std::vector<int32_t> tokens, logit_rows, chosen;
    std::vector<SequenceSlice> slices;
    std::vector<std::vector<int32_t>> tables;
    std::vector<TokenChoice> choices;
    std::vector<LogitEdit> edits;
    std::span<int32_t> chosen_span;
    float* logits = nullptr;
    std::byte* kv_pool = nullptr;
    int32_t block_tokens = 0;
    std::function<void(int32_t, const std::shared_ptr<void>&)> layer_done;
    std::shared_ptr<Reached> reached = std::make_shared<Reached>(false);
    bool done = false;
  };

  void run_all() {
    for (const auto& flight : flights_) {
      if (!flight->done) run(*flight);
    }
  }

  void run(Flight& flight) {
    for (int32_t& token : flight.tokens) {
      if (token < 0) token = std::max(0, last_chosen_[static_cast<size_t>(-1 - token)]);
    }
    scratch_.resize(flight.logit_rows.size() * static_cast<size_t>(config().vocab_size));
    ForwardBatch batch;
    batch.tokens = flight.tokens;
    batch.sequences = flight.slices;
    batch.logit_rows = flight.logit_rows;
    batch.kv_pool = flight.kv_pool;
    batch.block_tokens = flight.block_tokens;
    batch.layer_done = std::move(flight.layer_done);
    BATON_CHECK(forward(batch, scratch_.data()).ok());
    *flight.reached = true;
    if (flight.chosen_span.empty()) {
      if (flight.logits != nullptr) std::ranges::copy(scratch_, flight.logits);
    } else {
      for (size_t i = 0; i < flight.logit_rows.size(); ++i) flight.chosen.push_back(choose(flight, i));
    }
    last_chosen_ = flight.chosen;
    flight.done = true;
  }

  int32_t choose(const Flight& flight, size_t row) {
    const auto vocab_size = static_cast<size_t>(config().vocab_size);
    return sampler_.choose({scratch_.data() + row * vocab_size, vocab_size}, flight.choices[row], flight.edits);
  }

  Random random_;
  mutable Random dice_{7};
  Sampler sampler_;
  std::vector<std::unique_ptr<Flight>> flights_;
  std::vector<int32_t> last_chosen_;
  std::vector<float> scratch_;
};

}  // namespace baton::testing
