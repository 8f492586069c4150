// What launching ahead does to times, on a device and a host whose times are made up (of the order of a small model on an H200): the
// device is not left idle between steps, and nobody waits longer for a first token.

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <vector>

#include "base/random.h"
#include "engine/engine.h"
#include "engine/testing/async_fake_model.h"

namespace baton {
namespace {

constexpr int64_t kUs = 1000;

class TimedModel final : public testing::AsyncFakeModel {
 public:
  TimedModel(ManualClock& clock, bool ahead, int64_t decode_us)
      : AsyncFakeModel({.max_model_len = 1024, .eos_token_ids = {}}), clock_(clock), ahead_(ahead), decode_us_(decode_us) {}
  bool runs_ahead() const override { return ahead_; }
  bool mostly_done() const override {
    const Span& newest = spans_.back();
    return !newest.prefill || 8 * (clock_.now_ns() - newest.begin_ns) >= 7 * (newest.end_ns - newest.begin_ns);
  }
  Status launch(const ForwardBatch& batch, float* logits) override {
    const bool prefill = batch.tokens.size() != batch.sequences.size();
    const auto rows = static_cast<int64_t>(batch.tokens.size());
    const int64_t begin_ns = std::max(clock_.now_ns() + 10 * kUs, free_ns_);
    clock_.advance_ns(prefill ? 600 * kUs : 20 * kUs);  // kernel by kernel, or one graph
    const int64_t computing_ns = prefill ? (decode_us_ + 200 + rows * 4) * kUs : (decode_us_ + rows * 5) * kUs;
    if (free_ns_ > 0) idle_ns += std::max<int64_t>(0, begin_ns - free_ns_);
    free_ns_ = std::max(begin_ns + computing_ns, clock_.now_ns());
    spans_.push_back({prefill, begin_ns, free_ns_});
    return AsyncFakeModel::launch(batch, logits);
  }
  Status finish() override {
    clock_.advance_ns(std::max<int64_t>(0, spans_.front().end_ns - clock_.now_ns()) + 5 * kUs);
    spans_.pop_front();
    return AsyncFakeModel::finish();
  }

  int64_t idle_ns = 0;

 private:
  struct Span {
    bool prefill;
    int64_t begin_ns, end_ns;
  };
  ManualClock& clock_;
  const bool ahead_;
  const int64_t decode_us_;
  std::deque<Span> spans_;
  int64_t free_ns_ = 0;
};

struct Arrival {
  int64_t at_ns;
  int32_t prompt, output;
};

struct Times {
  double ttft_ms = 0, end_ms = 0, idle_ms = 0;
};

/// A worker's loop: what has come, a step when it is due, and some work with what it gave.
Times serve(const std::vector<Arrival>& arrivals, bool ahead, int64_t decode_us) {
  ManualClock clock(0);
  TimedModel model(clock, ahead, decode_us);
  auto engine = Engine::create({.kv_blocks = 4000, .max_batched_tokens = 8192, .prefix_cache = false}, model, clock).value();
  Random random(5);
  std::map<uint64_t, int64_t> first_ns;
  size_t next = 0;
  while (next < arrivals.size() || engine->has_work()) {
    for (; next < arrivals.size() && arrivals[next].at_ns <= clock.now_ns(); ++next) {
      Request request;
      request.id = RequestId{next};
      for (int32_t i = 0; i < arrivals[next].prompt; ++i) request.prompt.push_back(static_cast<TokenId>(random.below(100)));
      request.sampling.temperature = 0;
      request.sampling.max_tokens = arrivals[next].output;
      EXPECT_TRUE(engine->submit(std::move(request)).ok());
    }
    const int64_t until_arrival_ns = next < arrivals.size() ? arrivals[next].at_ns - clock.now_ns() : 1000 * kUs;
    if (!engine->has_work()) {
      clock.advance_ns(until_arrival_ns);
    } else if (const int64_t spare_ns = engine->spare_ns(); spare_ns > 0) {
      clock.advance_ns(std::min(spare_ns + 60 * kUs, until_arrival_ns + 30 * kUs));  // threads wake up late
    } else {
      const StepOutput out = engine->step();
      for (const TokenOutput& output : out.tokens) first_ns.try_emplace(static_cast<uint64_t>(output.request), clock.now_ns());
      clock.advance_ns((20 + static_cast<int64_t>(out.tokens.size()) * 3) * kUs);
    }
  }
  Times times;
  for (size_t i = 0; i < arrivals.size(); ++i) times.ttft_ms += static_cast<double>(first_ns.at(i) - arrivals[i].at_ns) * 1e-6;
  times.ttft_ms /= static_cast<double>(arrivals.size());
  times.end_ms = static_cast<double>(clock.now_ns()) * 1e-6;
  times.idle_ms = static_cast<double>(model.idle_ns) * 1e-6;
  return times;
}

TEST(EnginePace, ABurstOnAnIdleDevice) {
  for (const int count : {1, 2, 10, 64}) {
    std::vector<Arrival> arrivals;
    for (int i = 0; i < count; ++i) arrivals.push_back({1000 * kUs + i * 30 * kUs, 128, 100});
    const Times with = serve(arrivals, true, 700), without = serve(arrivals, false, 700);
    EXPECT_LT(with.ttft_ms, without.ttft_ms + 0.25) << count;
    EXPECT_LT(with.end_ms, without.end_ms) << count;
    EXPECT_LT(with.idle_ms, without.idle_ms / 5) << count;
  }
}

TEST(EnginePace, ArrivalsAmongDecodes) {
  struct Case {
    int every_us;
    int64_t decode_us;  // least that a step of decoding takes
    double longer_ms;   // that the mean TTFT may be: who comes in the last 0.3 ms of a step waits for the next one
  };
  for (const auto& [every_us, decode_us, longer_ms] : {Case{2'000, 700, 0.4}, {5'000, 700, 0.4}, {20'000, 700, 0.4}, {30'000, 5'000, 0.6}}) {
    Random random(11);
    std::vector<Arrival> arrivals;
    int64_t at_ns = 0;
    for (int i = 0; i < 200; ++i) {
      at_ns += static_cast<int64_t>(random.below(2 * static_cast<uint64_t>(every_us))) * kUs;
      arrivals.push_back({at_ns, 20 + static_cast<int32_t>(random.below(400)), 10 + static_cast<int32_t>(random.below(100))});
    }
    const Times with = serve(arrivals, true, decode_us), without = serve(arrivals, false, decode_us);
    EXPECT_LT(with.ttft_ms, without.ttft_ms + longer_ms) << every_us;
    EXPECT_LT(with.end_ms, without.end_ms) << every_us;
    EXPECT_LT(with.idle_ms, without.idle_ms * 0.6) << every_us;
  }
}

}  // namespace
}  // namespace baton
