// The property that everything else leans on: what a request outputs depends on the request alone, not on what ran
// beside it, how its prompt was cut, what was cached, whether it was preempted, or where it was moved to.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <vector>

#include "base/random.h"
#include "engine/engine.h"
#include "engine/sampler.h"
#include "engine/testing/async_fake_model.h"
#include "engine/testing/fake_model.h"

namespace baton {
namespace {

using testing::AsyncFakeModel;
using testing::FakeModel;

constexpr int32_t kVocab = 96;
constexpr int32_t kMaxLen = 120;

FakeModel::Options model_options() {
  return {.vocab_size = kVocab, .layers = 2, .kv_heads = 1, .max_model_len = kMaxLen, .eos_token_ids = {1, 2}};
}

std::unique_ptr<Engine> make_engine(FakeModel& model, const EngineConfig& config) {
  Result<std::unique_ptr<Engine>> engine = Engine::create(config, model);
  BATON_CHECK(engine.ok()) << engine.status().to_string();
  return std::move(engine).value();
}

struct Expected {
  std::vector<TokenId> tokens;
  std::vector<float> logprobs;
  FinishReason finish = FinishReason::kNone;
};

std::vector<Request> mixed_requests(int count, uint64_t seed) {
  Random random(seed);
  std::vector<Request> requests;
  // A few system prompts that many requests share.
  std::vector<std::vector<TokenId>> heads(4);
  for (auto& head : heads) {
    head.resize(8 + random.below(25));
    for (TokenId& token : head) token = static_cast<TokenId>(random.below(kVocab));
  }
  for (int i = 0; i < count; ++i) {
    Request request;
    request.id = RequestId{static_cast<uint64_t>(i) + 1};
    if (random.chance(0.6)) request.prompt = heads[random.below(heads.size())];
    if (!requests.empty() && random.chance(0.15)) request.prompt = requests[random.below(requests.size())].prompt;
    const size_t more = 1 + random.below(30);
    for (size_t j = 0; j < more && request.prompt.size() < kMaxLen - 2; ++j) {
      request.prompt.push_back(static_cast<TokenId>(random.below(kVocab)));
    }
    SamplingParams& sampling = request.sampling;
    sampling.temperature = random.chance(0.4) ? 0.0f : static_cast<float>(0.3 + random.uniform());
    sampling.seed = random();
    if (random.chance(0.3)) sampling.top_p = static_cast<float>(0.5 + random.uniform() / 2);
    if (random.chance(0.3)) sampling.top_k = static_cast<int32_t>(1 + random.below(40));
    if (random.chance(0.2)) sampling.min_p = static_cast<float>(random.uniform() * 0.2);
    if (random.chance(0.2)) sampling.repetition_penalty = static_cast<float>(0.8 + random.uniform());
    if (random.chance(0.2)) sampling.presence_penalty = static_cast<float>(random.uniform() * 2 - 1);
    if (random.chance(0.2)) sampling.frequency_penalty = static_cast<float>(random.uniform() * 2 - 1);
    if (random.chance(0.2)) sampling.logit_bias = {{static_cast<TokenId>(random.below(kVocab)), 3.0f}, {1, -2.0f}};
    if (random.chance(0.2)) sampling.stop_token_ids = {static_cast<TokenId>(random.below(kVocab))};
    if (random.chance(0.3)) sampling.logprobs = static_cast<int32_t>(random.below(4));
    sampling.max_tokens = 1 + static_cast<int32_t>(random.below(50));
    sampling.min_tokens = random.chance(0.3) ? static_cast<int32_t>(random.below(static_cast<uint64_t>(sampling.max_tokens))) : 0;
    sampling.ignore_eos = random.chance(0.5);
    requests.push_back(std::move(request));
  }
  return requests;
}

/// Most of them made such that their next step may be launched before their token is known.
std::vector<Request> unobserved(std::vector<Request> requests) {
  Random random(3);
  for (Request& request : requests) {
    if (random.chance(0.03)) continue;
    request.sampling.logprobs = -1;
    request.sampling.repetition_penalty = 1;
    request.sampling.presence_penalty = request.sampling.frequency_penalty = 0;
  }
  return requests;
}

/// `seed` 0: computes within forward(); else runs beside the host.
std::unique_ptr<FakeModel> make_model(uint64_t seed) {
  if (seed == 0) return std::make_unique<FakeModel>(model_options());
  auto model = std::make_unique<AsyncFakeModel>(model_options(), seed);
  model->mostly_done_chance = 0.5;
  return model;
}

/// One at a time, from whole histories, with no engine at all but its sampler.
std::vector<Expected> expectations(const std::vector<Request>& requests) {
  const FakeModel model(model_options());
  Sampler sampler(kVocab, model.config().eos_token_ids);
  std::vector<Expected> all;
  for (const Request& request : requests) {
    Expected expected;
    std::vector<TokenId> tokens = request.prompt;
    TokenCounts counts;
    const SamplingParams& sampling = request.sampling;
    while (expected.finish == FinishReason::kNone) {
      std::vector<float> logits = model.logits_after(tokens);
      const auto count = static_cast<int32_t>(expected.tokens.size());
      const SampledToken sampled = *sampler.sample(logits, {.params = &sampling, .tokens = tokens,
                                                            .prompt_tokens = request.prompt.size(),
                                                            .output_index = count, .counts = &counts});
      tokens.push_back(sampled.token);
      expected.tokens.push_back(sampled.token);
      expected.logprobs.push_back(sampled.logprob);
      const bool eos = sampled.token == 1 || sampled.token == 2;
      const bool stop = std::ranges::find(sampling.stop_token_ids, sampled.token) != sampling.stop_token_ids.end();
      if (count + 1 >= sampling.min_tokens && ((eos && !sampling.ignore_eos) || stop)) {
        expected.finish = FinishReason::kStop;
      } else if (count + 1 >= sampling.max_tokens || tokens.size() >= kMaxLen) {
        expected.finish = FinishReason::kLength;
      }
    }
    all.push_back(std::move(expected));
  }
  return all;
}

/// Compares outputs as they come; a request may end early only by being cancelled.
class Checker {
 public:
  Checker(const std::vector<Expected>& expected, const char* what) : expected_(expected), what_(what) {}

  void check(const StepOutput& step) {
    for (const TokenOutput& output : step.tokens) {
      const auto id = static_cast<uint64_t>(output.request);
      const Expected& expected = expected_[id - 1];
      Seen& seen = seen_[id];
      ASSERT_FALSE(seen.ended) << what_ << ": output of request " << id << " after its end";
      ASSERT_NE(output.finish, FinishReason::kError) << what_ << ": " << output.status.to_string();
      ASSERT_TRUE(output.token.has_value()) << what_ << ": request " << id;
      ASSERT_EQ(output.index, seen.count) << what_ << ": request " << id;
      ASSERT_LT(seen.count, std::ssize(expected.tokens)) << what_ << ": request " << id;
      ASSERT_EQ(*output.token, expected.tokens[static_cast<size_t>(seen.count)]) << what_ << ": request " << id << " at " << seen.count;
      ASSERT_EQ(output.logprob, expected.logprobs[static_cast<size_t>(seen.count)]) << what_ << ": request " << id;
      ++seen.count;
      if (output.finish == FinishReason::kNone) continue;
      seen.ended = true;
      ASSERT_EQ(output.finish, expected.finish) << what_ << ": request " << id;
      ASSERT_EQ(seen.count, std::ssize(expected.tokens)) << what_ << ": request " << id;
    }
  }
  bool ended(uint64_t id) { return seen_[id].ended; }
  int32_t count(uint64_t id) { return seen_[id].count; }
  void forget(uint64_t id) { seen_[id].ended = true; }
  void resume_at(uint64_t id, int32_t count) { seen_[id].count = count; }

 private:
  struct Seen {
    int32_t count = 0;
    bool ended = false;
  };
  const std::vector<Expected>& expected_;
  const char* what_;
  std::map<uint64_t, Seen> seen_;
};

struct Setting {
  const char* name;
  EngineConfig config;
  bool preempts;
};

const Setting kSettings[] = {
    {"roomy", {.block_tokens = 4, .kv_blocks = 4000, .max_batched_tokens = 512, .max_running = 64}, false},
    {"no prefix cache", {.block_tokens = 4, .kv_blocks = 4000, .max_batched_tokens = 512, .max_running = 64, .prefix_cache = false}, false},
    {"tiny chunks", {.block_tokens = 4, .kv_blocks = 2000, .max_batched_tokens = 24, .max_running = 20}, false},
    {"one at a time", {.block_tokens = 8, .kv_blocks = 15, .max_batched_tokens = 8, .max_running = 1}, false},
    {"tiny pool", {.block_tokens = 4, .kv_blocks = 40, .max_batched_tokens = 64, .max_running = 32}, true},
    {"tiny pool, no cache", {.block_tokens = 4, .kv_blocks = 40, .max_batched_tokens = 64, .max_running = 32, .prefix_cache = false}, true},
    {"one sequence's pool", {.block_tokens = 4, .kv_blocks = 30, .max_batched_tokens = 40, .max_running = 32}, true},
    {"blocks of one", {.block_tokens = 1, .kv_blocks = 160, .max_batched_tokens = 33, .max_running = 32}, true},
};

void run_all_settings(const std::vector<Request>& requests, uint64_t model_seed) {
  const std::vector<Expected> expected = expectations(requests);
  for (const Setting& setting : kSettings) {
    Random random(7);
    const std::unique_ptr<FakeModel> owned = make_model(model_seed);
    FakeModel& model = *owned;
    auto engine = make_engine(model, setting.config);
    ASSERT_EQ(engine->config().max_model_len, kMaxLen) << setting.name;
    Checker checker(expected, setting.name);
    size_t next = 0;
    int64_t steps = 0, idle = 0;
    while (next < requests.size() || engine->has_work()) {
      ASSERT_LT(++steps, 200'000) << setting.name << " does not end";
      for (uint64_t burst = random.below(4); burst > 0 && next < requests.size(); --burst) {
        ASSERT_TRUE(engine->submit(requests[next++]).ok());
      }
      if (next > 0 && random.chance(0.05)) {
        const uint64_t id = 1 + random.below(next);
        engine->cancel(RequestId{id});
        checker.forget(id);
      }
      const int64_t before = model.forwards;
      checker.check(engine->step());
      if (::testing::Test::HasFatalFailure()) return;
      idle = model.forwards == before ? idle + 1 : 0;
      ASSERT_LT(idle, 100) << setting.name << " makes no progress";
    }
    for (uint64_t id = 1; id <= requests.size(); ++id) EXPECT_TRUE(checker.ended(id)) << setting.name << " " << id;
    const EngineStats stats = engine->stats();
    EXPECT_EQ(stats.blocks.used, 0) << setting.name;
    EXPECT_EQ(stats.waiting_tokens, 0) << setting.name;
    EXPECT_EQ(stats.waiting + stats.running + stats.reserved + stats.held, 0) << setting.name;
    EXPECT_EQ(stats.preemptions > 0, setting.preempts) << setting.name << ": " << stats.preemptions;
    EXPECT_EQ(stats.prefix_hit_tokens > 0, setting.config.prefix_cache) << setting.name;
    EXPECT_LE(model.largest_batch, setting.config.max_batched_tokens) << setting.name;
    EXPECT_EQ(stats.steps_ahead > stats.steps / 20, model_seed > 0) << setting.name << ": " << stats.steps_ahead << " of " << stats.steps;
  }
}

TEST(EngineProperty, OutputsDependOnTheRequestAlone) { run_all_settings(mixed_requests(200, 1), 0); }

TEST(EngineProperty, NorOnStepsThatAreLaunchedBeforeTheirTokensAreKnown) {
  for (uint64_t seed : {1, 2, 3}) run_all_settings(unobserved(mixed_requests(200, seed)), seed);
}

/// Two engines and the worker's part in between, driven by dice: reservations are made, filled layer by layer, committed,
/// abandoned with and without quarantine, prefilled locally instead, cancelled, and the decode side dies now
/// and then, after which its requests are replayed on a new one.
class Cluster {
 public:
  Cluster(const std::vector<Request>& requests, const std::vector<Expected>& expected, EngineConfig prefill,
          EngineConfig decode, const char* name, uint64_t seed, bool ahead)
      : requests_(requests), checker_(expected, name), decode_config_(decode), random_(seed), name_(name),
        prefill_model_(make_model(ahead ? seed : 0)), decode_model_(make_model(ahead ? seed + 100 : 0)) {
    prefill_ = make_engine(*prefill_model_, prefill);
    decode_ = make_engine(*decode_model_, decode);
    prefill_->set_layer_ready([this](const LayerReady& ready) { copy(ready); });
  }

  void run() {
    for (size_t i = 0; i < requests_.size(); ++i) queue_.push_back(i + 1);
    const auto busy = [&] { return prefill_->has_work() || decode_->has_work(); };  // to the end of the last step under way
    for (int64_t turn = 0; !queue_.empty() || !live_.empty() || !stale_.empty() || busy(); ++turn) {
      ASSERT_LT(turn, 200'000) << name_ << " does not end: " << queue_.size() << " queued, " << live_.size() << " live";
      if (!queue_.empty() && random_.chance(0.5)) start();
      if (random_.chance(0.02)) cancel_one();
      if (random_.chance(0.02)) abandon_one();
      if (random_.chance(0.1)) end_one_quarantine();
      if (random_.chance(0.001)) lose_decode();
      if (random_.chance(0.7)) step_prefill();
      if (random_.chance(0.8)) step_decode();
      if (::testing::Test::HasFatalFailure()) return;
    }
    EXPECT_EQ(decode_->stats().blocks.used, 0) << name_;
    EXPECT_EQ(decode_->stats().blocks.quarantined, 0) << name_;
    EXPECT_EQ(prefill_->stats().blocks.used, 0) << name_;
    EXPECT_EQ(decode_->stats().reserved + prefill_->stats().held, 0) << name_;
    for (uint64_t id = 1; id <= requests_.size(); ++id) EXPECT_TRUE(checker_.ended(id)) << name_ << " " << id;
  }
  int64_t preemptions() const { return preemptions_ + decode_->stats().preemptions; }

 private:
  struct Attempt {
    std::vector<BlockId> grant;   // empty: local
    int32_t skip_blocks = 0;
    bool reserved = false;
    std::optional<TokenOutput> committed;
  };

  Request with_output(uint64_t id) {
    Request request = requests_[id - 1];
    request.generated = outputs_[id];
    return request;
  }

  void start() {
    const uint64_t id = queue_.front();
    if (checker_.ended(id)) {
      queue_.pop_front();
      return;
    }
    Request request = with_output(id);
    if (random_.chance(0.2) || stale_.contains(id)) {
      if (!decode_->submit(std::move(request)).ok()) return;
      live_[id] = {};
      queue_.pop_front();
      return;
    }
    Result<Engine::Reservation> reservation = decode_->reserve(request);
    if (!reservation.ok()) {
      ASSERT_EQ(reservation.status().code(), StatusCode::kResourceExhausted) << reservation.status().to_string();
      return;
    }
    Attempt attempt;
    attempt.grant = reservation->blocks;
    attempt.skip_blocks = reservation->cached_tokens / decode_config_.block_tokens;
    attempt.reserved = true;
    queue_.pop_front();
    live_[id] = std::move(attempt);
    request.prefill_only = true;
    ASSERT_TRUE(prefill_->submit(std::move(request)).ok());
  }

  /// A layer that is not computed yet is copied when it is.
  void copy(const LayerReady& ready) {
    if (ready.ready != nullptr && !*static_cast<const AsyncFakeModel::Reached*>(ready.ready.get())) {
      std::vector<BlockId>& table = later_.emplace_back(ready, std::vector(ready.table.begin(), ready.table.end())).second;
      later_.back().first.table = table;
      return;
    }
    const auto id = static_cast<uint64_t>(ready.request);
    const auto it = live_.find(id);
    if (it == live_.end() || !it->second.reserved) return;
    const BlockLayout& layout = prefill_->layout();
    for (int32_t i = std::max(ready.first_block, it->second.skip_blocks); i < ready.last_block; ++i) {
      const auto at = static_cast<size_t>(i);
      std::memcpy(decode_->kv_pool().data() + it->second.grant[at] * layout.block_bytes() + layout.layer_offset_bytes(ready.layer),
                  prefill_->kv_pool().data() + ready.table[at] * layout.block_bytes() + layout.layer_offset_bytes(ready.layer),
                  static_cast<size_t>(layout.layer_bytes()));
    }
  }

  void copy_what_is_computed() {
    for (size_t waiting = later_.size(); waiting > 0; --waiting) {
      const auto next = std::move(later_.front());
      later_.pop_front();
      copy(next.first);
    }
  }

  void step_prefill() {
    StepOutput step = prefill_->step();
    copy_what_is_computed();
    for (TokenOutput& output : step.tokens) {
      const auto id = static_cast<uint64_t>(output.request);
      ASSERT_EQ(output.finish, FinishReason::kPrefillDone) << output.status.to_string();
      const auto it = live_.find(id);
      if (it != live_.end() && it->second.reserved) it->second.committed = std::move(output);
      prefill_->release(RequestId{id});
    }
    for (auto& [id, attempt] : live_) {  // the commit arrives some time later
      if (!attempt.committed || !random_.chance(0.5)) continue;
      ASSERT_TRUE(decode_->admit(RequestId{id}, std::move(*attempt.committed)).ok());
      attempt = {};
    }
  }

  void step_decode() {
    const StepOutput step = decode_->step();
    checker_.check(step);
    for (const TokenOutput& output : step.tokens) {
      const auto id = static_cast<uint64_t>(output.request);
      if (output.token) outputs_[id].push_back(*output.token);
      if (output.finish != FinishReason::kNone) live_.erase(id);
    }
  }

  uint64_t any_live() {
    auto it = live_.begin();
    std::advance(it, static_cast<ptrdiff_t>(random_.below(live_.size())));
    return it->first;
  }
  void scribble(const Attempt& attempt) {  // a late write: harmless while the blocks are quarantined
    const int64_t bytes = decode_->layout().block_bytes();
    for (size_t i = static_cast<size_t>(attempt.skip_blocks); i < attempt.grant.size(); ++i) {
      std::memset(decode_->kv_pool().data() + attempt.grant[i] * bytes, 0x5a, static_cast<size_t>(bytes));
    }
  }
  void cancel_one() {
    if (live_.empty()) return;
    const uint64_t id = any_live();
    if (live_[id].reserved) stale_[id] = live_[id];
    prefill_->cancel(RequestId{id});
    decode_->cancel(RequestId{id});
    live_.erase(id);
    checker_.forget(id);
  }
  void abandon_one() {
    if (live_.empty()) return;
    const uint64_t id = any_live();
    if (!live_[id].reserved) return;
    const bool quarantine = random_.chance(0.7);
    prefill_->cancel(RequestId{id});
    decode_->abandon(RequestId{id}, quarantine);
    if (quarantine) stale_[id] = live_[id];
    live_.erase(id);
    queue_.push_front(id);
  }
  void end_one_quarantine() {
    if (stale_.empty()) return;
    const auto it = stale_.begin();
    scribble(it->second);
    decode_->end_quarantine(RequestId{it->first});
    stale_.erase(it);
  }
  void lose_decode() {
    preemptions_ += decode_->stats().preemptions;
    decode_ = make_engine(*decode_model_, decode_config_);
    for (const auto& [id, attempt] : live_) {
      prefill_->cancel(RequestId{id});
      queue_.push_back(id);
    }
    live_.clear();
    stale_.clear();
  }

  const std::vector<Request>& requests_;
  Checker checker_;
  EngineConfig decode_config_;
  Random random_;
  const char* name_;
  std::unique_ptr<FakeModel> prefill_model_, decode_model_;
  std::unique_ptr<Engine> prefill_, decode_;
  std::deque<std::pair<LayerReady, std::vector<BlockId>>> later_;  // with the table it points to
  std::deque<uint64_t> queue_;
  std::map<uint64_t, Attempt> live_;
  std::map<uint64_t, Attempt> stale_;  // in quarantine
  std::map<uint64_t, std::vector<TokenId>> outputs_;
  int64_t preemptions_ = 0;
};

void move_requests(const std::vector<Request>& requests, bool ahead) {
  const std::vector<Expected> expected = expectations(requests);
  int64_t preemptions = 0;
  for (const Setting& setting : kSettings) {
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      EngineConfig prefill = setting.config;
      prefill.prefix_cache = seed != 2;
      Cluster cluster(requests, expected, prefill, setting.config, setting.name, seed, ahead);
      cluster.run();
      if (::testing::Test::HasFatalFailure()) return;
      preemptions += cluster.preemptions();
    }
  }
  EXPECT_GT(preemptions, 100);
}

TEST(EngineProperty, MovedRequestsGiveTheSameTokens) { move_requests(mixed_requests(200, 2), false); }

TEST(EngineProperty, SoDoThoseWhoseStepsAreLaunchedBeforeTheirTokensAreKnown) {
  move_requests(unobserved(mixed_requests(200, 2)), true);
}

}  // namespace
}  // namespace baton
