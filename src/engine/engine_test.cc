#include "engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <set>
#include <tuple>

#include "base/log.h"
#include "engine/testing/fake_model.h"

namespace baton {
namespace {

using testing::FakeModel;

const bool kQuiet = (set_log_level(LogLevel::kWarning), true);

constexpr EngineConfig kSmall = {.block_tokens = 4, .kv_blocks = 64, .max_batched_tokens = 32, .max_running = 8};

std::unique_ptr<Engine> make_engine(FakeModel& model, EngineConfig config = kSmall,
                                    const Clock& clock = SteadyClock::instance()) {
  Result<std::unique_ptr<Engine>> engine = Engine::create(config, model, clock);
  BATON_CHECK(engine.ok()) << engine.status().to_string();
  return std::move(engine).value();
}

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

/// What one sequence should give, computed from whole histories.
std::vector<TokenId> expected_greedy(const FakeModel& model, std::vector<TokenId> tokens, int count) {
  std::vector<TokenId> output;
  for (int i = 0; i < count; ++i) {
    const std::vector<float> logits = model.logits_after(tokens);
    output.push_back(static_cast<TokenId>(std::ranges::max_element(logits) - logits.begin()));
    tokens.push_back(output.back());
  }
  return output;
}

struct Collected {
  std::vector<TokenId> tokens;
  FinishReason finish = FinishReason::kNone;
  Status status;
  int32_t cached = -1;
};
using Outputs = std::map<uint64_t, Collected>;

void collect(const StepOutput& step, Outputs* outputs, int32_t first_index = 0) {
  for (const TokenOutput& output : step.tokens) {
    Collected& into = (*outputs)[static_cast<uint64_t>(output.request)];
    EXPECT_EQ(into.finish, FinishReason::kNone) << "output after the end";
    if (output.token) {
      EXPECT_EQ(output.index, first_index + std::ssize(into.tokens));
      if (into.tokens.empty()) into.cached = output.cached_prompt_tokens;
      into.tokens.push_back(*output.token);
    }
    into.finish = output.finish;
    into.status = output.status;
  }
}

Outputs run(Engine& engine, int32_t first_index = 0, int max_steps = 10000) {
  Outputs outputs;
  while (engine.has_work() && max_steps-- > 0) collect(engine.step(), &outputs, first_index);
  EXPECT_GT(max_steps, 0) << "it does not end";
  return outputs;
}

TEST(Engine, GeneratesWhatTheModelSays) {
  FakeModel model;
  auto engine = make_engine(model);
  const auto prompt = tokens_from(10, 21);
  ASSERT_TRUE(engine->submit(make_request(1, prompt, 30)).ok());
  const Outputs outputs = run(*engine);
  EXPECT_EQ(outputs.at(1).tokens, expected_greedy(model, prompt, 30));
  EXPECT_EQ(outputs.at(1).finish, FinishReason::kLength);
  EXPECT_EQ(engine->stats().blocks.used, 0);
  EXPECT_EQ(engine->stats().running, 0);
  EXPECT_FALSE(engine->has_work());
  EXPECT_TRUE(engine->step().tokens.empty());
}

TEST(Engine, CutsPromptsIntoChunksWithinTheTokenBudget) {
  FakeModel model;
  EngineConfig config = kSmall;
  config.max_batched_tokens = 9;
  auto engine = make_engine(model, config);
  const auto prompt = tokens_from(0, 50);
  ASSERT_TRUE(engine->submit(make_request(1, prompt, 1)).ok());
  EXPECT_EQ(run(*engine).at(1).tokens, expected_greedy(model, prompt, 1));
  EXPECT_EQ(model.forwards, 7);  // 6 of 8 tokens, then 2
  EXPECT_LE(model.largest_batch, 8);
}

TEST(Engine, BatchesDecodesAndPrefills) {
  FakeModel model;
  auto engine = make_engine(model);
  for (uint64_t id = 1; id <= 5; ++id) {
    ASSERT_TRUE(engine->submit(make_request(id, tokens_from(static_cast<TokenId>(id), 6), 10)).ok());
  }
  const Outputs outputs = run(*engine);
  for (uint64_t id = 1; id <= 5; ++id) {
    EXPECT_EQ(outputs.at(id).tokens, expected_greedy(model, tokens_from(static_cast<TokenId>(id), 6), 10));
  }
  EXPECT_EQ(model.forwards, 10);
}

TEST(Engine, ReusesACachedPrefix) {
  FakeModel model;
  auto engine = make_engine(model);
  const auto prompt = tokens_from(0, 20);
  ASSERT_TRUE(engine->submit(make_request(1, prompt)).ok());
  const Outputs first = run(*engine);
  EXPECT_EQ(first.at(1).cached, 0);
  const int64_t rows = model.rows;
  ASSERT_TRUE(engine->submit(make_request(2, prompt)).ok());
  const Outputs second = run(*engine);
  EXPECT_EQ(second.at(2).cached, 16);  // the last token is computed, and with it its block
  EXPECT_EQ(second.at(2).tokens, first.at(1).tokens);
  EXPECT_EQ(model.rows - rows, 4 + 7);
  EXPECT_EQ(engine->stats().prefix_hit_tokens, 16);
  EXPECT_EQ(engine->stats().prefix_query_tokens, 40);

  // A conversation's next turn: prompt, answer and new words.
  auto turn = prompt;
  turn.insert(turn.end(), first.at(1).tokens.begin(), first.at(1).tokens.end());
  turn.push_back(3);
  ASSERT_TRUE(engine->submit(make_request(3, turn)).ok());
  EXPECT_EQ(run(*engine).at(3).cached, 24);  // the answer's last token was never computed
}

TEST(Engine, StopsAtEosStopTokensAndLengths) {
  FakeModel model({.max_model_len = 40, .eos_token_ids = {1, 2}});
  EngineConfig config = kSmall;
  auto engine = make_engine(model, config);
  const auto prompt = tokens_from(0, 8);
  const auto plain = expected_greedy(model, prompt, 30);

  Request request = make_request(1, prompt, 30);
  request.sampling.stop_token_ids = {plain[4]};
  ASSERT_TRUE(engine->submit(request).ok());
  Collected stopped = run(*engine).at(1);
  EXPECT_EQ(stopped.finish, FinishReason::kStop);
  EXPECT_EQ(stopped.tokens.back(), plain[4]);
  EXPECT_LE(stopped.tokens.size(), 5u);

  request.sampling.min_tokens = 20;
  ASSERT_TRUE(engine->submit(request).ok());
  EXPECT_GT(run(*engine).at(1).tokens.size(), 20u);

  ASSERT_TRUE(engine->submit(make_request(2, prompt, 1000)).ok());
  const Collected longest = run(*engine).at(2);
  EXPECT_EQ(longest.finish, FinishReason::kLength);
  EXPECT_EQ(longest.tokens.size(), 32u);  // the model's 40 positions

  FakeModel eos_model({.max_model_len = 200, .eos_token_ids = {plain[2]}});
  auto eos_engine = make_engine(eos_model);
  request = make_request(3, prompt, 30);
  request.sampling.ignore_eos = false;
  ASSERT_TRUE(eos_engine->submit(request).ok());
  EXPECT_EQ(run(*eos_engine).at(3).finish, FinishReason::kStop);
  request.sampling.ignore_eos = true;
  ASSERT_TRUE(eos_engine->submit(request).ok());
  EXPECT_EQ(run(*eos_engine).at(3).finish, FinishReason::kLength);
}

TEST(Engine, RefusesWhatItCannotServe) {
  FakeModel model({.vocab_size = 50, .max_model_len = 100});
  EngineConfig config = kSmall;
  config.max_waiting = 2;
  auto engine = make_engine(model, config);
  const auto code = [&](Request request) { return engine->submit(std::move(request)).code(); };
  EXPECT_EQ(code(make_request(1, {})), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(make_request(1, {50})), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(make_request(1, {-1})), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(make_request(1, std::vector<TokenId>(100, 1))), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(make_request(1, {1}, 0)), StatusCode::kInvalidArgument);
  EXPECT_EQ(engine->submit(make_request(1, std::vector<TokenId>(100, 1))).message(),
            "prompt and output so far have 100 tokens; this worker takes at most 99, with room for one more token of "
            "output");
  EXPECT_EQ(code(make_request(1, std::vector<TokenId>(99, 1))), StatusCode::kOk);
  EXPECT_EQ(code(make_request(1, {1})), StatusCode::kInvalidArgument);  // the same id
  EXPECT_EQ(code(make_request(2, {1})), StatusCode::kOk);
  EXPECT_EQ(code(make_request(3, {1})), StatusCode::kResourceExhausted);
  EXPECT_EQ(run(*engine).size(), 2u);
}

TEST(Engine, ConfigurationErrorsSayWhatToDo) {
  FakeModel model({.max_model_len = 1000});
  const auto error = [&](EngineConfig config) { return Engine::create(config, model).status().message(); };
  EXPECT_EQ(error({.block_tokens = 0}), "engine: block_tokens is 0; it must be from 1 to 4096");
  EXPECT_EQ(error({.max_batched_tokens = 8}), "engine: max_batched_tokens is 8; it must be from 16 to 1048576");
  EXPECT_EQ(error({.max_model_len = 2000}), "engine: max_model_len is 2000, but the model has 1000 positions");
  EXPECT_EQ(error({.kv_bytes = 5}), "engine: kv_bytes is 5, but one block of 16 tokens has 1024 bytes");
  EXPECT_EQ(error({.kv_blocks = 2, .max_model_len = 1000}),
            "engine: max_model_len is 1000, but the KV pool of 2 blocks holds 32 tokens; set kv_bytes to at least 64512 "
            "or max_model_len to at most 32");
  EXPECT_EQ(make_engine(model, {.kv_blocks = 2})->config().max_model_len, 32);
  // By default what max_running sequences can use: 63 blocks each.
  const auto engine = make_engine(model, {.max_running = 4});
  EXPECT_EQ(engine->config().kv_blocks, 63 * 4);
  EXPECT_EQ(engine->kv_pool().size(), static_cast<size_t>(63 * 4 * 1024));
  EXPECT_EQ(make_engine(model, {.kv_bytes = 10 * 1024 + 3})->config().kv_blocks, 10);
}

TEST(Engine, PreemptionLosesAndRepeatsNothing) {
  FakeModel model;
  EngineConfig config = kSmall;
  config.kv_blocks = 12;
  auto engine = make_engine(model, config);
  for (uint64_t id = 1; id <= 4; ++id) {
    ASSERT_TRUE(engine->submit(make_request(id, tokens_from(static_cast<TokenId>(10 * id), 7), 30)).ok());
  }
  const Outputs outputs = run(*engine);
  EXPECT_GT(engine->stats().preemptions, 0);
  for (uint64_t id = 1; id <= 4; ++id) {
    EXPECT_EQ(outputs.at(id).tokens, expected_greedy(model, tokens_from(static_cast<TokenId>(10 * id), 7), 30)) << id;
  }
  EXPECT_EQ(engine->stats().blocks.used, 0);
}

TEST(Engine, CancelFreesBlocksAtOnceAndSilently) {
  FakeModel model;
  auto engine = make_engine(model);
  for (uint64_t id = 1; id <= 10; ++id) ASSERT_TRUE(engine->submit(make_request(id, tokens_from(0, 6))).ok());
  (void)engine->step();
  EXPECT_GT(engine->stats().running, 0);
  EXPECT_GT(engine->stats().waiting, 0);
  for (uint64_t id = 0; id <= 11; ++id) engine->cancel(RequestId{id});
  EXPECT_EQ(engine->stats().running, 0);
  EXPECT_EQ(engine->stats().waiting, 0);
  EXPECT_EQ(engine->stats().waiting_tokens, 0);
  EXPECT_EQ(engine->stats().blocks.used, 0);
  EXPECT_FALSE(engine->has_work());
  EXPECT_TRUE(engine->step().tokens.empty());
}

TEST(Engine, DeadlinesEndWaitingAndRunningRequests) {
  FakeModel model;
  ManualClock clock;
  EngineConfig config = kSmall;
  config.max_running = 1;
  auto engine = make_engine(model, config, clock);
  for (uint64_t id = 1; id <= 3; ++id) {
    Request request = make_request(id, tokens_from(0, 6), 50);
    if (id != 3) request.deadline = Deadline::after_ms(clock, static_cast<int64_t>(100 * id));
    ASSERT_TRUE(engine->submit(std::move(request)).ok());
  }
  EXPECT_EQ(engine->next_deadline(), Deadline::after_ms(clock, 100));
  Outputs outputs;
  collect(engine->step(), &outputs);
  clock.advance_ms(100);
  collect(engine->step(), &outputs);
  EXPECT_EQ(outputs.at(1).finish, FinishReason::kError);
  EXPECT_EQ(outputs.at(1).status.to_string(),
            "DEADLINE_EXCEEDED: the request's deadline passed while it was running, with 6 of its tokens computed and "
            "1 generated");
  clock.advance_ms(1000);
  while (engine->has_work()) collect(engine->step(), &outputs);
  EXPECT_EQ(outputs.at(2).finish, FinishReason::kError);
  EXPECT_EQ(outputs.at(3).finish, FinishReason::kLength);
  EXPECT_EQ(engine->stats().blocks.used, 0);
  EXPECT_EQ(engine->next_deadline(), Deadline::never());
}

TEST(Engine, AFailedStepFailsItsRequestsOnly) {
  FakeModel model;
  EngineConfig config = kSmall;
  config.max_running = 1;
  auto engine = make_engine(model, config);
  ASSERT_TRUE(engine->submit(make_request(1, tokens_from(0, 6))).ok());
  ASSERT_TRUE(engine->submit(make_request(2, tokens_from(0, 6))).ok());
  model.fail_next = internal_error("device lost");
  std::vector<std::string> errors;
  set_log_sink([&](LogLevel, std::string_view line) { errors.emplace_back(line); });
  const Outputs outputs = run(*engine);
  set_log_sink(nullptr);
  EXPECT_EQ(errors, std::vector<std::string>{"engine: a step of 6 tokens failed: INTERNAL: device lost"});
  EXPECT_EQ(outputs.at(1).finish, FinishReason::kError);
  EXPECT_EQ(outputs.at(1).status.message(), "device lost");
  EXPECT_EQ(outputs.at(2).finish, FinishReason::kLength);
  EXPECT_EQ(engine->stats().blocks.used, 0);
}

TEST(Engine, ALostDeviceIsSaidAndNoRequestIsFailed) {
  FakeModel model;
  auto engine = make_engine(model);
  ASSERT_TRUE(engine->submit(make_request(1, tokens_from(0, 6))).ok());
  model.fail_next = unavailable("a step on the GPU: CUDA_ERROR_ILLEGAL_ADDRESS");
  const StepOutput lost = engine->step();
  EXPECT_EQ(lost.device.message(), "a step on the GPU: CUDA_ERROR_ILLEGAL_ADDRESS");
  EXPECT_TRUE(lost.tokens.empty());
}

TEST(Engine, AReplayGoesOnWhereTheOutputWas) {
  FakeModel model;
  auto engine = make_engine(model);
  const auto prompt = tokens_from(0, 9);
  const auto all = expected_greedy(model, prompt, 12);
  Request request = make_request(1, prompt, 12);
  request.generated.assign(all.begin(), all.begin() + 5);
  ASSERT_TRUE(engine->submit(request).ok());
  const Collected rest = run(*engine, 5).at(1);
  EXPECT_EQ(rest.tokens, std::vector<TokenId>(all.begin() + 5, all.end()));
  EXPECT_EQ(rest.finish, FinishReason::kLength);

  request.generated = all;  // only the finish was lost
  ASSERT_TRUE(engine->submit(request).ok());
  const Collected end = run(*engine).at(1);
  EXPECT_TRUE(end.tokens.empty());
  EXPECT_EQ(end.finish, FinishReason::kLength);
  EXPECT_EQ(engine->reserve(request).status().code(), StatusCode::kInvalidArgument);
}

TEST(Engine, MemoryIsNotTouchedBeforeItIsUsed) {
  FakeModel model({.layers = 8, .kv_heads = 8});
  auto engine = make_engine(model, {.kv_bytes = int64_t{8} << 30});  // more than the test machine may have free
  EXPECT_GE(engine->kv_pool().size(), size_t{7} << 30);
  ASSERT_TRUE(engine->submit(make_request(1, {1, 2, 3})).ok());
  EXPECT_EQ(run(*engine).at(1).tokens.size(), 8u);
}

// -- Handoff -----------------------------------------------------------------------------------------------------

/// Copies what LayerReady announces from one engine's pool into another's, as the transfer would.
struct Wire {
  Engine& from;
  Engine& to;
  std::map<uint64_t, std::vector<BlockId>> grants;
  std::map<uint64_t, int32_t> skip;  // blocks that the receiver has already
  std::set<std::tuple<uint64_t, int32_t, int32_t>> sent;

  void operator()(const LayerReady& ready) {
    const auto id = static_cast<uint64_t>(ready.request);
    const auto grant = grants.find(id);
    if (grant == grants.end()) return;
    const BlockLayout& layout = from.layout();
    for (int32_t i = std::max(ready.first_block, skip[id]); i < ready.last_block; ++i) {
      EXPECT_TRUE(sent.emplace(id, ready.layer, i).second) << "sent twice: layer " << ready.layer << " block " << i;
      std::memcpy(to.kv_pool().data() + grant->second[static_cast<size_t>(i)] * layout.block_bytes() +
                      layout.layer_offset_bytes(ready.layer),
                  from.kv_pool().data() + ready.table[static_cast<size_t>(i)] * layout.block_bytes() +
                      layout.layer_offset_bytes(ready.layer),
                  static_cast<size_t>(layout.layer_bytes()));
    }
  }
};

class Handoff : public ::testing::Test {
 protected:
  FakeModel prefill_model_, decode_model_;
  std::unique_ptr<Engine> prefill_ = make_engine(prefill_model_);
  std::unique_ptr<Engine> decode_ = make_engine(decode_model_);
  Wire wire_{*prefill_, *decode_, {}, {}, {}};

  void SetUp() override {
    prefill_->set_layer_ready([this](const LayerReady& ready) { wire_(ready); });
  }

  /// Reserve, prefill, copy: up to the commit.
  TokenOutput prefill(const Request& request) {
    Result<Engine::Reservation> reservation = decode_->reserve(request);
    EXPECT_TRUE(reservation.ok()) << reservation.status().to_string();
    const auto id = static_cast<uint64_t>(request.id);
    wire_.grants[id] = reservation->blocks;
    wire_.skip[id] = reservation->cached_tokens / kSmall.block_tokens;
    Request first = request;
    first.prefill_only = true;
    EXPECT_TRUE(prefill_->submit(first).ok());
    TokenOutput committed;
    while (prefill_->has_work()) {
      StepOutput step = prefill_->step();
      for (TokenOutput& output : step.tokens) committed = std::move(output);
    }
    EXPECT_EQ(committed.finish, FinishReason::kPrefillDone);
    EXPECT_EQ(prefill_->stats().held, 1);
    prefill_->release(request.id);
    EXPECT_EQ(prefill_->stats().blocks.used, 0);
    EXPECT_EQ(wire_.sent.size(), (reservation->blocks.size() - static_cast<size_t>(wire_.skip[id])) * 2);
    wire_.sent.clear();
    return committed;
  }
};

TEST_F(Handoff, DisaggregatedEqualsAggregated) {
  const auto prompt = tokens_from(0, 50);  // two chunks, and a block that is not full
  const Request request = make_request(1, prompt, 20);
  ASSERT_TRUE(decode_->admit(request.id, prefill(request)).ok());
  const Collected output = run(*decode_).at(1);
  EXPECT_EQ(output.tokens, expected_greedy(prefill_model_, prompt, 20));
  EXPECT_EQ(output.finish, FinishReason::kLength);
  EXPECT_EQ(decode_model_.rows, 19);  // not one token of the prompt

  // What was received is published: the same prompt again needs no bytes but those of the last block.
  const Request again = make_request(2, prompt, 20);
  const TokenOutput first = prefill(again);
  EXPECT_EQ(first.cached_prompt_tokens, 48);
  ASSERT_TRUE(decode_->admit(again.id, first).ok());
  EXPECT_EQ(wire_.skip[2], 12);
  EXPECT_EQ(run(*decode_).at(2).tokens, output.tokens);
  EXPECT_EQ(decode_->stats().blocks.used, 0);
}

TEST_F(Handoff, AReplayIsHandedOffToo) {
  const auto prompt = tokens_from(0, 10);
  const auto all = expected_greedy(prefill_model_, prompt, 20);
  Request request = make_request(1, prompt, 20);
  request.generated.assign(all.begin(), all.begin() + 7);
  const TokenOutput first = prefill(request);
  EXPECT_EQ(first.index, 7);
  ASSERT_TRUE(decode_->admit(request.id, first).ok());
  EXPECT_EQ(run(*decode_, 7).at(1).tokens, std::vector<TokenId>(all.begin() + 7, all.end()));
}

TEST_F(Handoff, AFirstTokenThatIsTheLastEndsTheRequest) {
  const Request request = make_request(1, tokens_from(0, 10), 1);
  ASSERT_TRUE(decode_->admit(request.id, prefill(request)).ok());
  EXPECT_EQ(decode_->stats().blocks.used, 0);
  EXPECT_TRUE(decode_->has_work());
  const Collected output = run(*decode_).at(1);
  EXPECT_EQ(output.tokens.size(), 1u);
  EXPECT_EQ(output.finish, FinishReason::kLength);

  Request stopping = make_request(2, tokens_from(0, 10), 10);
  stopping.sampling.ignore_eos = false;
  ASSERT_TRUE(decode_->reserve(stopping).ok());
  ASSERT_TRUE(decode_->admit(stopping.id, {.token = 1}).ok());
  EXPECT_EQ(run(*decode_).at(2).finish, FinishReason::kStop);
}

TEST_F(Handoff, AdmittingIsChecked) {
  const Request request = make_request(1, tokens_from(0, 10));
  EXPECT_EQ(decode_->admit(request.id, {.token = 5}).code(), StatusCode::kNotFound);
  ASSERT_TRUE(decode_->reserve(request).ok());
  EXPECT_EQ(decode_->reserve(request).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(decode_->admit(request.id, {}).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(decode_->admit(request.id, {.token = 128}).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(decode_->stats().reserved, 1);
  EXPECT_FALSE(decode_->has_work());
  EXPECT_TRUE(decode_->admit(request.id, {.token = 5}).ok());
  EXPECT_EQ(decode_->stats().reserved, 0);
}

TEST_F(Handoff, QuarantineKeepsBlocksUntilTheEnd) {
  const auto prompt = tokens_from(0, 10);
  ASSERT_TRUE(decode_->submit(make_request(1, prompt)).ok());
  run(*decode_);
  const int64_t cached = decode_->stats().blocks.cached;
  ASSERT_TRUE(decode_->reserve(make_request(2, tokens_from(0, 30))).ok());  // the first 12 tokens are cached
  decode_->abandon(RequestId{2}, true);
  EngineStats stats = decode_->stats();
  EXPECT_EQ(stats.blocks.quarantined, 8 - 2);
  EXPECT_EQ(stats.blocks.cached, cached);
  EXPECT_EQ(stats.reserved, 0);
  // A local attempt under the same id may run at once; another reservation may not.
  EXPECT_EQ(decode_->reserve(make_request(2, prompt)).status().code(), StatusCode::kFailedPrecondition);
  ASSERT_TRUE(decode_->submit(make_request(2, prompt)).ok());
  EXPECT_EQ(run(*decode_).at(2).finish, FinishReason::kLength);
  EXPECT_EQ(decode_->stats().blocks.quarantined, 6);
  decode_->end_quarantine(RequestId{2});
  decode_->end_quarantine(RequestId{2});
  EXPECT_EQ(decode_->stats().blocks.quarantined, 0);

  ASSERT_TRUE(decode_->reserve(make_request(3, prompt)).ok());
  decode_->cancel(RequestId{3});  // a peer may be writing: quarantined, not freed
  EXPECT_EQ(decode_->stats().blocks.quarantined, 1);
  decode_->end_quarantine(RequestId{3});
  ASSERT_TRUE(decode_->reserve(make_request(4, prompt)).ok());
  decode_->abandon(RequestId{4}, false);
  EXPECT_EQ(decode_->stats().blocks.used, 0);
  EXPECT_EQ(decode_->stats().blocks.quarantined, 0);
}

TEST_F(Handoff, ReservationsLeaveRoomForThoseWhoCameBefore) {
  FakeModel model;
  EngineConfig config = kSmall;
  config.kv_blocks = 16;
  config.max_model_len = 60;
  auto engine = make_engine(model, config);
  // Reserved to the brim; a waiting request cannot start, and the engine has nothing to do.
  ASSERT_TRUE(engine->reserve(make_request(1, tokens_from(0, 32))).ok());
  ASSERT_TRUE(engine->submit(make_request(2, tokens_from(50, 40))).ok());
  EXPECT_TRUE(engine->step().tokens.empty());
  EXPECT_FALSE(engine->has_work());
  // What is free now is the waiting request's.
  const Status refused = engine->reserve(make_request(3, tokens_from(0, 20))).status();
  EXPECT_EQ(refused.code(), StatusCode::kResourceExhausted);
  engine->abandon(RequestId{1}, true);
  (void)engine->step();
  EXPECT_FALSE(engine->has_work());  // quarantined blocks are nobody's
  engine->end_quarantine(RequestId{1});
  EXPECT_TRUE(engine->has_work());
  EXPECT_EQ(run(*engine).at(2).tokens, expected_greedy(model, tokens_from(50, 40), 8));
  EXPECT_TRUE(engine->reserve(make_request(3, tokens_from(0, 20))).ok());
}

TEST_F(Handoff, AWorkerFullOfReservationsMakesProgress) {
  FakeModel model;
  EngineConfig config = kSmall;
  config.kv_blocks = 16;
  config.prefix_cache = false;
  auto engine = make_engine(model, config);
  uint64_t count = 0;
  while (engine->reserve(make_request(count + 1, tokens_from(static_cast<TokenId>(count), 15), 40)).ok()) ++count;
  EXPECT_GE(count, 3u);
  std::map<uint64_t, std::vector<TokenId>> expected;
  Wire wire{*prefill_, *engine, {}, {}, {}};
  for (uint64_t id = 1; id <= count; ++id) {
    const auto prompt = tokens_from(static_cast<TokenId>(id - 1), 15);
    expected[id] = expected_greedy(model, prompt, 40);
    engine->abandon(RequestId{id}, false);  // again, this time with the grant
    Result<Engine::Reservation> reservation = engine->reserve(make_request(id, prompt, 40));
    ASSERT_TRUE(reservation.ok()) << reservation.status().to_string();
    prefill_->set_layer_ready([&](const LayerReady& ready) { wire(ready); });
    wire.grants[id] = reservation->blocks;
    Request request = make_request(id, prompt, 40);
    request.prefill_only = true;
    ASSERT_TRUE(prefill_->submit(request).ok());
    while (prefill_->has_work()) (void)prefill_->step();
    prefill_->release(RequestId{id});
  }
  // All full: the first to be admitted cannot grow and gives way; it is computed again when there is room.
  Outputs outputs;
  for (uint64_t id = 1; id <= count; ++id) {
    ASSERT_TRUE(engine->admit(RequestId{id}, {.token = expected[id][0]}).ok());
    for (int i = 0; i < 4; ++i) collect(engine->step(), &outputs);
  }
  for (int i = 0; i < 10000 && engine->has_work(); ++i) collect(engine->step(), &outputs);
  for (uint64_t id = 1; id <= count; ++id) {
    EXPECT_EQ(outputs[id].tokens, expected[id]) << id;
    EXPECT_EQ(outputs[id].finish, FinishReason::kLength);
  }
  EXPECT_GT(engine->stats().preemptions, 0);
  EXPECT_EQ(engine->stats().blocks.used, 0);
}

TEST(EngineDeathTest, TheLayerCallbackMustNotCallTheEngine) {
  FakeModel model;
  auto engine = make_engine(model);
  engine->set_layer_ready([&](const LayerReady& ready) { engine->cancel(ready.request); });
  Request request = make_request(1, tokens_from(0, 8));
  request.prefill_only = true;
  ASSERT_TRUE(engine->submit(request).ok());
  EXPECT_DEATH((void)engine->step(), "must not call the engine");
}

}  // namespace
}  // namespace baton
