// The engine over real (tiny) models and kernels: what engine_property_test shows with a fake model holds for floating
// point too, because every row's result is the same in any batch.

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <vector>

#include "base/random.h"
#include "engine/engine.h"
#include "kernels/kernels.h"
#include "model/model.h"

namespace baton {
namespace {

const std::filesystem::path kModels = std::filesystem::path(BATON_SOURCE_DIR) / "tests/golden/models";

using Outputs = std::map<uint64_t, std::vector<std::pair<TokenId, float>>>;

std::unique_ptr<Engine> make_engine(Model& model, const EngineConfig& config) {
  Result<std::unique_ptr<Engine>> engine = Engine::create(config, model);
  BATON_CHECK(engine.ok()) << engine.status().to_string();
  return std::move(engine).value();
}

std::vector<Request> make_requests(int32_t vocab_size) {
  Random random(3);
  std::vector<TokenId> shared(40);
  for (TokenId& token : shared) token = static_cast<TokenId>(random.below(static_cast<uint64_t>(vocab_size)));
  std::vector<Request> requests;
  for (uint64_t id = 1; id <= 12; ++id) {
    Request request;
    request.id = RequestId{id};
    if (id % 2 == 0) request.prompt = shared;
    const size_t length = 1 + random.below(50);
    for (size_t i = 0; i < length; ++i) {
      request.prompt.push_back(static_cast<TokenId>(random.below(static_cast<uint64_t>(vocab_size))));
    }
    request.sampling.temperature = id % 3 == 0 ? 0.8f : 0.0f;
    request.sampling.top_p = 0.95f;
    request.sampling.seed = id;
    request.sampling.max_tokens = 20;
    request.sampling.ignore_eos = true;
    request.sampling.logprobs = 0;
    requests.push_back(std::move(request));
  }
  return requests;
}

void collect(const StepOutput& step, Outputs* outputs) {
  for (const TokenOutput& output : step.tokens) {
    EXPECT_TRUE(output.status.ok()) << output.status.to_string();
    if (!output.token) continue;
    auto& list = (*outputs)[static_cast<uint64_t>(output.request)];
    EXPECT_EQ(output.index, std::ssize(list));
    list.emplace_back(*output.token, output.logprob);
  }
}

class EngineModel : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(kModels / GetParam())) GTEST_SKIP() << "no golden model";
    Result<std::unique_ptr<Kernels>> kernels = make_cpu_kernels("auto", 2);
    ASSERT_TRUE(kernels.ok()) << kernels.status().to_string();
    kernels_ = std::move(kernels).value();
    ModelOptions options;
    options.path = kModels / GetParam();
    Result<std::unique_ptr<Model>> model = Model::load(options, *kernels_);
    ASSERT_TRUE(model.ok()) << model.status().to_string();
    model_ = std::move(model).value();
    requests_ = make_requests(model_->config().vocab_size);
    // The reference: one request at a time, whole prompts, nothing cached.
    auto engine = make_engine(*model_, {.kv_blocks = 64, .max_model_len = 200, .prefix_cache = false});
    for (const Request& request : requests_) {
      ASSERT_TRUE(engine->submit(request).ok());
      while (engine->has_work()) collect(engine->step(), &expected_);
    }
    ASSERT_EQ(expected_.size(), requests_.size());
  }

  std::unique_ptr<Kernels> kernels_;
  std::unique_ptr<Model> model_;
  std::vector<Request> requests_;
  Outputs expected_;
};

TEST_P(EngineModel, BatchesChunksCacheAndPreemptionChangeNothing) {
  const EngineConfig configs[] = {
      {.kv_blocks = 256, .max_model_len = 200},
      {.kv_blocks = 256, .max_batched_tokens = 32, .max_model_len = 200},
      {.kv_blocks = 256, .max_batched_tokens = 48, .max_model_len = 200, .prefix_cache = false},
      {.kv_blocks = 14, .max_batched_tokens = 64, .max_model_len = 200},
      {.kv_blocks = 14, .max_batched_tokens = 64, .max_model_len = 200, .prefix_cache = false},
  };
  int64_t preemptions = 0, hits = 0;
  for (const EngineConfig& config : configs) {
    auto engine = make_engine(*model_, config);
    Outputs outputs;
    for (const Request& request : requests_) ASSERT_TRUE(engine->submit(request).ok());
    while (engine->has_work()) collect(engine->step(), &outputs);
    EXPECT_EQ(outputs, expected_) << config.kv_blocks << " blocks, " << config.max_batched_tokens << " tokens a step";
    EXPECT_EQ(engine->stats().blocks.used, 0);
    preemptions += engine->stats().preemptions;
    hits += engine->stats().prefix_hit_tokens;
  }
  EXPECT_GT(preemptions, 0);
  EXPECT_GT(hits, 0);
}

TEST_P(EngineModel, DisaggregatedEqualsAggregated) {
  const EngineConfig config = {.kv_blocks = 256, .max_batched_tokens = 32, .max_model_len = 200};
  auto prefill = make_engine(*model_, config), decode = make_engine(*model_, config);
  std::map<uint64_t, Engine::Reservation> grants;
  const BlockLayout& layout = prefill->layout();
  prefill->set_layer_ready([&](const LayerReady& ready) {
    const Engine::Reservation& grant = grants.at(static_cast<uint64_t>(ready.request));
    const int32_t skip = grant.cached_tokens / layout.block_tokens;
    for (int32_t i = std::max(ready.first_block, skip); i < ready.last_block; ++i) {
      const auto at = static_cast<size_t>(i);
      std::memcpy(decode->kv_pool().data() + grant.blocks[at] * layout.block_bytes() + layout.layer_offset_bytes(ready.layer),
                  prefill->kv_pool().data() + ready.table[at] * layout.block_bytes() + layout.layer_offset_bytes(ready.layer),
                  static_cast<size_t>(layout.layer_bytes()));
    }
  });
  Outputs outputs;
  for (const Request& request : requests_) {
    Result<Engine::Reservation> reservation = decode->reserve(request);
    ASSERT_TRUE(reservation.ok()) << reservation.status().to_string();
    grants[static_cast<uint64_t>(request.id)] = *reservation;
    Request first = request;
    first.prefill_only = true;
    ASSERT_TRUE(prefill->submit(std::move(first)).ok());
  }
  while (prefill->has_work() || decode->has_work()) {
    for (TokenOutput& output : prefill->step().tokens) {
      ASSERT_EQ(output.finish, FinishReason::kPrefillDone);
      prefill->release(output.request);
      ASSERT_TRUE(decode->admit(output.request, std::move(output)).ok());
    }
    collect(decode->step(), &outputs);
  }
  EXPECT_EQ(outputs, expected_);
  EXPECT_EQ(decode->stats().blocks.used, 0);
  EXPECT_EQ(prefill->stats().blocks.used, 0);
}

INSTANTIATE_TEST_SUITE_P(Golden, EngineModel,
                         ::testing::Values("qwen3", "qwen2", "qwen2-window", "llama3", "llama-yarn", "mistral"),
                         [](const auto& param) {
                           std::string name = param.param;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace baton
