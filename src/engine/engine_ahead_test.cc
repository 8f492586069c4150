// Steps that are launched while the one before is computed, on a device that does what it is told as late as it may.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <vector>

#include "base/log.h"
#include "engine/engine.h"
#include "engine/testing/async_fake_model.h"

namespace baton {
namespace {

using testing::AsyncFakeModel;

constexpr EngineConfig kSmall = {.block_tokens = 4, .kv_blocks = 64, .max_batched_tokens = 32, .max_running = 8};

std::vector<TokenId> tokens_from(TokenId from, int count) {
  std::vector<TokenId> tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), from);
  return tokens;
}

Request make_request(uint64_t id, std::vector<TokenId> prompt, int32_t max_tokens = 8) {
  Request request;
  request.id = RequestId{id};
  request.prompt = std::move(prompt);
  request.sampling.temperature = 0;
  request.sampling.max_tokens = max_tokens;
  request.sampling.ignore_eos = true;
  return request;
}

struct Ahead : ::testing::Test {
  struct Collected {
    std::vector<TokenId> tokens;
    FinishReason finish = FinishReason::kNone;
    Status status;
    int32_t cached = 0;
  };

  explicit Ahead(EngineConfig config = kSmall) : engine(make(config)) {}

  std::unique_ptr<Engine> make(EngineConfig config) {
    Result<std::unique_ptr<Engine>> made = Engine::create(config, model, clock);
    BATON_CHECK(made.ok()) << made.status().to_string();
    return std::move(made).value();
  }

  std::vector<TokenId> expected(std::vector<TokenId> tokens, int count) const {
    std::vector<TokenId> output;
    for (int i = 0; i < count; ++i) {
      const std::vector<float> logits = model.logits_after(tokens);
      output.push_back(static_cast<TokenId>(std::ranges::max_element(logits) - logits.begin()));
      tokens.push_back(output.back());
    }
    return output;
  }

  /// Number of outputs.
  size_t step() {
    const bool idle = model.under_way() == 0 && engine->stats().running + engine->stats().waiting > 0;
    size_t count = step_once();
    if (idle && count == 0 && model.under_way() == 1) count = step_once();
    return count;
  }
  size_t step_once() {
    const StepOutput out = engine->step();
    EXPECT_LE(model.under_way(), 1u) << "nothing is planned deeper";
    device = out.device;
    for (const TokenOutput& output : out.tokens) {
      Collected& into = outputs[static_cast<uint64_t>(output.request)];
      EXPECT_EQ(into.finish, FinishReason::kNone) << "output after the end";
      if (output.token) {
        EXPECT_EQ(output.index, std::ssize(into.tokens));
        if (into.tokens.empty()) into.cached = output.cached_prompt_tokens;
        into.tokens.push_back(*output.token);
      }
      into.finish = output.finish;
      into.status = output.status;
    }
    return out.tokens.size();
  }
  void run(int most = 10000) {
    while (engine->has_work() && most-- > 0) step();
    EXPECT_GT(most, 0) << "it does not end";
    EXPECT_EQ(model.under_way(), 0u);
    EXPECT_EQ(engine->stats().blocks.used, 0);
  }
  void submit(Request request) { ASSERT_TRUE(engine->submit(std::move(request)).ok()); }

  AsyncFakeModel model;
  ManualClock clock;
  std::unique_ptr<Engine> engine;
  std::map<uint64_t, Collected> outputs;
  Status device;
};

TEST_F(Ahead, EveryDecodeIsLaunchedBeforeItsTokenIsKnownAndNoneTooMany) {
  const auto prompt = tokens_from(10, 21);
  submit(make_request(1, prompt, 30));
  step();
  EXPECT_EQ(outputs[1].tokens.size(), 1u);
  EXPECT_EQ(model.under_way(), 1u);
  run();
  EXPECT_EQ(outputs[1].tokens, expected(prompt, 30));
  EXPECT_EQ(outputs[1].finish, FinishReason::kLength);
  EXPECT_EQ(engine->stats().steps, 30);
  EXPECT_EQ(engine->stats().steps_ahead, 29);
  EXPECT_EQ(model.rows, 21 + 29) << "when max_tokens ends it is known before";
  EXPECT_EQ(engine->stats().decode_tokens, 29);
}

TEST_F(Ahead, TheModelsLengthIsKnownBeforeToo) {
  EngineConfig config = kSmall;
  config.max_model_len = 30;
  engine = make(config);
  submit(make_request(1, tokens_from(10, 21), 100));
  run();
  EXPECT_EQ(outputs[1].tokens, expected(tokens_from(10, 21), 9));
  EXPECT_EQ(model.rows, 21 + 8);
}

TEST_F(Ahead, AStopTokenWastesOneRowAndItsBlocksWaitForIt) {
  const auto prompt = tokens_from(0, 8);
  Request request = make_request(1, prompt, 30);
  const auto plain = expected(prompt, 5);
  request.sampling.stop_token_ids = {plain[4]};
  submit(request);
  while (outputs[1].finish == FinishReason::kNone) step();
  EXPECT_EQ(outputs[1].finish, FinishReason::kStop);
  EXPECT_EQ(outputs[1].tokens.back(), plain[4]);
  const auto count = std::ssize(outputs[1].tokens);
  EXPECT_EQ(engine->stats().running, 0);
  EXPECT_GT(engine->stats().blocks.used, 0) << "a step writes into them";
  EXPECT_TRUE(engine->has_work());
  EXPECT_EQ(step(), 0u);
  EXPECT_FALSE(engine->has_work());
  EXPECT_EQ(engine->stats().blocks.used, 0);
  EXPECT_EQ(model.rows, 8 + count) << "one that was not needed";
  EXPECT_EQ(engine->stats().decode_tokens, count - 1);
  // The row too many is in no cached block.
  std::vector<TokenId> again = prompt;
  again.insert(again.end(), outputs[1].tokens.begin(), outputs[1].tokens.end());
  again.insert(again.end(), 9, 3);
  submit(make_request(2, again, 4));
  run();
  EXPECT_EQ(outputs[2].tokens, expected(again, 4));
  EXPECT_GT(outputs[2].cached, 0);
}

TEST_F(Ahead, EosAmongOthersLeavesThemAlone) {
  const auto plain = expected(tokens_from(20, 6), 12);
  Request ending = make_request(2, tokens_from(20, 6), 12);
  ending.sampling.stop_token_ids = {plain[5]};
  submit(make_request(1, tokens_from(10, 6), 12));
  submit(ending);
  submit(make_request(3, tokens_from(30, 6), 12));
  run();
  EXPECT_EQ(outputs[1].tokens, expected(tokens_from(10, 6), 12));
  EXPECT_EQ(outputs[2].finish, FinishReason::kStop);
  EXPECT_EQ(outputs[3].tokens, expected(tokens_from(30, 6), 12));
}

TEST_F(Ahead, ACancelledRequestKeepsItsBlocksUntilTheStepHasEnded) {
  submit(make_request(1, tokens_from(0, 6), 20));
  submit(make_request(2, tokens_from(40, 6), 20));
  step();
  step();
  engine->cancel(RequestId{1});
  engine->cancel(RequestId{1});
  EXPECT_EQ(engine->stats().running, 1);
  const int64_t used = engine->stats().blocks.used;
  step();
  EXPECT_LT(engine->stats().blocks.used, used);
  EXPECT_EQ(outputs[1].tokens.size(), 2u);
  engine->cancel(RequestId{2});
  EXPECT_TRUE(engine->has_work());
  submit(make_request(2, tokens_from(50, 6), 5));  // the id is free
  outputs.erase(2);
  run();
  EXPECT_EQ(outputs[2].tokens, expected(tokens_from(50, 6), 5));
}

TEST_F(Ahead, ADeadlineInFlight) {
  Request request = make_request(1, tokens_from(0, 6), 20);
  request.deadline = Deadline::after_ms(clock, 100);
  submit(request);
  step();
  clock.advance_ms(100);
  step();
  EXPECT_EQ(outputs[1].finish, FinishReason::kError);
  EXPECT_EQ(outputs[1].tokens.size(), 1u);
  run();
}

TEST_F(Ahead, PreemptionWaitsForTheStep) {
  EngineConfig config = kSmall;
  config.kv_blocks = 12;
  engine = make(config);
  for (uint64_t id = 1; id <= 4; ++id) submit(make_request(id, tokens_from(static_cast<TokenId>(10 * id), 7), 30));
  run();
  EXPECT_GT(engine->stats().preemptions, 0);
  EXPECT_GT(engine->stats().steps_ahead, 0);
  for (uint64_t id = 1; id <= 4; ++id) EXPECT_EQ(outputs[id].tokens, expected(tokens_from(static_cast<TokenId>(10 * id), 7), 30)) << id;
}

TEST_F(Ahead, ChunksAndDecodesInOneStep) {
  submit(make_request(1, tokens_from(0, 5), 30));
  step();
  submit(make_request(2, tokens_from(20, 90), 10));
  step();  // it was submitted with a step under way: the one after that has its first rows
  step();
  EXPECT_EQ(model.largest_batch, 29) << "one decode and seven blocks of prefill";
  run();
  EXPECT_EQ(outputs[1].tokens, expected(tokens_from(0, 5), 30));
  EXPECT_EQ(outputs[2].tokens, expected(tokens_from(20, 90), 10));
}

TEST_F(Ahead, WhoWaitsForAPlaceStartsAsEarlyAsWithoutIt) {
  EngineConfig config = kSmall;
  config.max_running = 1;
  engine = make(config);
  submit(make_request(1, tokens_from(0, 6), 5));
  submit(make_request(2, tokens_from(30, 6), 5));
  run();
  EXPECT_EQ(engine->stats().steps, 10);
  EXPECT_EQ(engine->stats().steps_ahead, 8);
  EXPECT_EQ(outputs[2].tokens, expected(tokens_from(30, 6), 5));
}

TEST_F(Ahead, AnEqualPromptWaitsForTheBlocksThatAreBeingComputed) {
  submit(make_request(1, tokens_from(0, 32), 5));  // takes the whole step
  submit(make_request(2, tokens_from(0, 32), 5));
  run();
  EXPECT_EQ(outputs[2].cached, 28);
  EXPECT_EQ(outputs[2].tokens, outputs[1].tokens);
  EXPECT_EQ(outputs[2].tokens, expected(tokens_from(0, 32), 5));
}

TEST_F(Ahead, WhatTheHostMustSeeFirstIsNotLaunchedBefore) {
  const auto prompt = tokens_from(0, 6);
  Request request = make_request(1, prompt, 10);
  request.sampling.logprobs = 2;
  submit(request);
  run();
  EXPECT_EQ(outputs[1].tokens, expected(prompt, 10));
  EXPECT_EQ(engine->stats().steps_ahead, 0);

  request = make_request(2, prompt, 10);
  request.sampling.frequency_penalty = 2;
  submit(request);
  run();
  EXPECT_EQ(outputs[2].tokens.size(), 10u);
  EXPECT_EQ(engine->stats().steps_ahead, 0);

  model.chooses = false;
  submit(make_request(3, prompt, 10));
  run();
  EXPECT_EQ(outputs[3].tokens, expected(prompt, 10));
  EXPECT_EQ(engine->stats().steps_ahead, 0);

  model.chooses = true;
  request = make_request(4, prompt, 10);
  request.sampling.logit_bias = {{5, 4.0f}};
  request.sampling.min_tokens = 7;
  request.sampling.stop_token_ids = {expected(prompt, 1)[0]};
  submit(request);
  run();
  EXPECT_GE(outputs[4].tokens.size(), 7u);
  EXPECT_GE(engine->stats().steps_ahead, 6);
}

TEST_F(Ahead, AFailedStepFailsThoseInItAndTheStepBehindItGoesOn) {
  submit(make_request(1, tokens_from(0, 6), 10));
  step();
  submit(make_request(2, tokens_from(40, 6), 5));
  model.fail_finish = internal_error("no");
  set_log_sink([](LogLevel, std::string_view) {});
  step();  // launches a step with both, and the one with 1 alone fails
  set_log_sink(nullptr);
  EXPECT_EQ(outputs[1].finish, FinishReason::kError);
  EXPECT_EQ(outputs[1].status.message(), "no");
  run();
  EXPECT_EQ(outputs[2].tokens, expected(tokens_from(40, 6), 5));
}

TEST_F(Ahead, WhatCannotBeLaunchedFailsAfterTheStepBefore) {
  submit(make_request(1, tokens_from(0, 6), 10));
  step();
  model.fail_launch = internal_error("no");
  set_log_sink([](LogLevel, std::string_view) {});
  step();
  EXPECT_EQ(outputs[1].tokens.size(), 2u) << "the token of the step before";
  EXPECT_EQ(outputs[1].finish, FinishReason::kNone);
  run();
  set_log_sink(nullptr);
  EXPECT_EQ(outputs[1].finish, FinishReason::kError);
  EXPECT_EQ(outputs[1].tokens, expected(tokens_from(0, 6), 2));
}

TEST_F(Ahead, ALostDeviceLeavesRequestsAsTheyWere) {
  submit(make_request(1, tokens_from(0, 6), 10));
  step();
  step();
  model.fail_finish = unavailable("lost");
  EXPECT_EQ(step(), 0u);
  EXPECT_EQ(device.message(), "lost");
  EXPECT_EQ(model.under_way(), 0u);
  engine->cancel(RequestId{1});
  EXPECT_EQ(engine->stats().blocks.used, 0);
}

TEST_F(Ahead, NothingLeftToChooseEndsTheRequest) {
  Request request = make_request(1, tokens_from(0, 6), 10);
  request.sampling.min_tokens = 10;
  request.sampling.stop_token_ids = tokens_from(0, 128);
  submit(request);
  run();
  EXPECT_EQ(outputs[1].finish, FinishReason::kError);
  EXPECT_EQ(outputs[1].status.code(), StatusCode::kInvalidArgument);
}

TEST_F(Ahead, TheNextStepIsPlannedWhenThisOneIsNearlyDone) {
  constexpr int64_t kStepNs = 8'000'000;
  model.on_finish = [&] { clock.advance_ns(kStepNs); };
  submit(make_request(1, tokens_from(0, 6), 30));
  EXPECT_EQ(engine->spare_ns(), 0);
  step();
  EXPECT_EQ(engine->spare_ns(), 0) << "no decode was measured";
  step();
  step();
  EXPECT_EQ(engine->spare_ns(), kStepNs / 16 * 15);
  // What comes meanwhile is in the next step.
  clock.advance_ns(kStepNs / 2);
  EXPECT_EQ(engine->spare_ns(), kStepNs / 16 * 7);
  submit(make_request(2, tokens_from(40, 6), 30));
  EXPECT_EQ(engine->spare_ns(), kStepNs / 16 * 7);
  clock.advance_ns(kStepNs / 16 * 7);
  EXPECT_EQ(engine->spare_ns(), 0);
  model.on_finish = [&] { clock.advance_ns(kStepNs / 16); };
  step();
  EXPECT_EQ(engine->spare_ns(), 0) << "a prefill, which lasts who knows how long";
  const int64_t before = engine->stats().prefill_tokens;
  step();
  EXPECT_EQ(engine->stats().prefill_tokens - before, 6);
  EXPECT_EQ(outputs[2].tokens.size(), 1u);
  run();
  EXPECT_EQ(outputs[2].tokens, expected(tokens_from(40, 6), 30));
}

TEST_F(Ahead, WhatComesWhileTheFirstStepIsLaunchedIsInTheNext) {
  submit(make_request(1, tokens_from(0, 20), 3));
  EXPECT_EQ(step_once(), 0u);
  submit(make_request(2, tokens_from(40, 20), 3));
  EXPECT_EQ(step_once(), 1u);
  EXPECT_EQ(step_once(), 2u);
  run();
  EXPECT_EQ(engine->stats().steps, 4);
}

TEST_F(Ahead, APrefillSaysWhenItIsNearlyDone) {
  model.mostly_done_chance = 0;
  submit(make_request(1, tokens_from(0, 20), 3));
  EXPECT_EQ(step_once(), 0u) << "it is launched";
  EXPECT_EQ(model.under_way(), 1u);
  EXPECT_GT(engine->spare_ns(), 0);
  submit(make_request(2, tokens_from(40, 20), 3));
  model.mostly_done_chance = 1;
  EXPECT_EQ(engine->spare_ns(), 0);
  EXPECT_EQ(step(), 1u);
  EXPECT_EQ(step(), 2u) << "the second one's prompt with the first one's second token";
  model.mostly_done_chance = 0;
  run();
  EXPECT_EQ(outputs[1].tokens, expected(tokens_from(0, 20), 3));
  EXPECT_EQ(outputs[2].tokens, expected(tokens_from(40, 20), 3));
  EXPECT_EQ(engine->stats().steps, 4);
}

TEST_F(Ahead, AnEstimateThatIsTooLongMendsItself) {
  int64_t computing_ns = 8'000'000, rest_ns = computing_ns;
  model.on_finish = [&] { clock.advance_ns(std::max<int64_t>(rest_ns, 0)); };
  submit(make_request(1, tokens_from(0, 6), 60));
  for (int i = 0; i < 4; ++i) step();
  computing_ns = 2'000'000;  // faster by far, and the device is idle when the wait is over
  int late = 0;
  for (int i = 0; i < 30; ++i) {
    const int64_t waited_ns = engine->spare_ns();
    clock.advance_ns(waited_ns);
    late += waited_ns > computing_ns;
    rest_ns = computing_ns - waited_ns;
    step();
  }
  EXPECT_GT(late, 0);
  EXPECT_LT(late, 4);
  run();
}

TEST_F(Ahead, TheEngineEndsAfterTheStepUnderWay) {
  submit(make_request(1, tokens_from(0, 6), 10));
  step();
  EXPECT_EQ(model.under_way(), 1u);
  engine = nullptr;
  EXPECT_EQ(model.under_way(), 0u);
}

// -- Handoff. ----------------------------------------------------------------------------------------------------

TEST_F(Ahead, PrefilledLayersAreAnnouncedWhenTheyAreLaunched) {
  struct Seen {
    std::shared_ptr<void> ready;
    int32_t layer, first_block, last_block;
  };
  std::vector<Seen> seen;
  engine->set_layer_ready([&](const LayerReady& ready) {
    seen.push_back({ready.ready, ready.layer, ready.first_block, ready.last_block});
    EXPECT_FALSE(*static_cast<const AsyncFakeModel::Reached*>(ready.ready.get()));
  });
  Request request = make_request(1, tokens_from(0, 70));
  request.prefill_only = true;
  submit(request);
  step();
  EXPECT_EQ(seen.size(), 4u) << "the second chunk's layers, too";
  while (outputs[1].finish == FinishReason::kNone) step();
  EXPECT_EQ(outputs[1].finish, FinishReason::kPrefillDone);
  ASSERT_EQ(seen.size(), 6u);
  int32_t block = 0;
  for (size_t i = 0; i < seen.size(); ++i) {
    EXPECT_TRUE(*static_cast<const AsyncFakeModel::Reached*>(seen[i].ready.get()));
    EXPECT_EQ(seen[i].layer, static_cast<int32_t>(i % 2));
    EXPECT_EQ(seen[i].first_block, block);
    if (i % 2 == 1) block = seen[i].last_block;
  }
  EXPECT_EQ(block, 18);
  EXPECT_EQ(engine->stats().held, 1);
  EXPECT_FALSE(engine->has_work()) << "nothing follows a prefill";
  engine->release(request.id);
  run();
}

TEST_F(Ahead, APrefillThatIsCancelledKeepsItsBlocksUntilItsChunkIsDone) {
  Request request = make_request(1, tokens_from(0, 90));
  request.prefill_only = true;
  submit(request);
  step();
  engine->cancel(request.id);
  EXPECT_EQ(engine->stats().blocks.used, 23);
  EXPECT_EQ(step(), 0u);
  run();
}

TEST_F(Ahead, AnAdmittedRequestDoesNotWaitForTheStepUnderWay) {
  submit(make_request(1, tokens_from(0, 6), 10));
  step();
  const Request request = make_request(2, tokens_from(60, 8), 3);
  const auto reserved = engine->reserve(request);
  ASSERT_TRUE(reserved.ok());
  // The KV of a prefill, from another engine of the same model.
  testing::FakeModel other_model;
  auto other = Engine::create(kSmall, other_model, clock).value();
  std::vector<BlockId> prefilled_blocks;
  other->set_layer_ready([&](const LayerReady& ready) { prefilled_blocks.assign(ready.table.begin(), ready.table.end()); });
  Request first = request;
  first.prefill_only = true;
  ASSERT_TRUE(other->submit(first).ok());
  const StepOutput prefilled = other->step();
  ASSERT_EQ(prefilled.tokens.size(), 1u);
  const auto bytes = static_cast<size_t>(engine->layout().block_bytes());
  for (size_t i = 0; i < reserved->blocks.size(); ++i) {
    std::memcpy(engine->kv_pool().data() + static_cast<size_t>(reserved->blocks[i]) * bytes,
                other->kv_pool().data() + static_cast<size_t>(prefilled_blocks[i]) * bytes, bytes);
  }
  ASSERT_TRUE(engine->admit(request.id, prefilled.tokens[0]).ok());
  ASSERT_EQ(model.under_way(), 1u);
  EXPECT_EQ(step(), 1u);
  EXPECT_EQ(model.under_way(), 1u) << "nobody waited for it";
  EXPECT_EQ(outputs[2].tokens.size(), 1u);
  run();
  EXPECT_EQ(outputs[1].tokens, expected(tokens_from(0, 6), 10));
  EXPECT_EQ(outputs[2].tokens, expected(tokens_from(60, 8), 3));
}

TEST_F(Ahead, BlocksThatAStepWritesAreNotReserved) {
  EngineConfig config = kSmall;
  config.kv_blocks = 8;
  config.prefix_cache = false;
  engine = make(config);
  submit(make_request(1, tokens_from(0, 20), 10));
  step();
  engine->cancel(RequestId{1});
  EXPECT_EQ(engine->reserve(make_request(2, tokens_from(0, 24))).status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(step(), 0u);
  EXPECT_TRUE(engine->reserve(make_request(2, tokens_from(0, 24))).ok());
  engine->abandon(RequestId{2}, false);
}

}  // namespace
}  // namespace baton
