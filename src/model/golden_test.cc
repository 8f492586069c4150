// Every architecture against transformers: tests/golden/models, written by tools/make_model_fixtures.py.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "base/log.h"
#include "base/random.h"
#include "model/device_model.h"
#include "model/safetensors.h"

namespace baton {
namespace {

constexpr double kTolerance = 2e-2;  // of the largest logit
constexpr int32_t kBlockTokens = 16;
constexpr int32_t kBlocks = 64;

const std::filesystem::path kGolden = std::filesystem::path(BATON_SOURCE_DIR) / "tests/golden/models";

/// A model with a KV pool, and sequences whose blocks are scattered over it.
class Runner {
 public:
  Runner(Model& model, uint64_t seed = 1) : model_(model), free_(kBlocks) {
    auto pool = model.allocate_kv(static_cast<size_t>(kBlocks * model.layout(kBlockTokens).block_bytes()));
    BATON_CHECK(pool.ok()) << pool.status().to_string();
    pool_ = std::move(pool).value();
    std::iota(free_.begin(), free_.end(), 0);
    Random random(seed);
    std::shuffle(free_.begin(), free_.end(), random);
  }

  std::vector<int32_t> allocate(size_t tokens) {
    const size_t count = (tokens + kBlockTokens - 1) / kBlockTokens;
    BATON_CHECK(count <= free_.size());
    std::vector<int32_t> blocks(free_.end() - static_cast<std::ptrdiff_t>(count), free_.end());
    free_.resize(free_.size() - count);
    return blocks;
  }

  struct Part {
    std::span<const int32_t> tokens;
    int32_t start_pos;
    const std::vector<int32_t>* blocks;
  };

  /// Logits of the last row of each part, or of all rows.
  std::vector<float> forward(const std::vector<Part>& parts, bool all_rows = false,
                             std::function<void(int32_t)> layer_done = {}) {
    std::vector<int32_t> tokens, logit_rows;
    std::vector<SequenceSlice> slices;
    for (const Part& part : parts) {
      slices.push_back({static_cast<int32_t>(tokens.size()), static_cast<int32_t>(part.tokens.size()),
                        part.start_pos, part.blocks->data()});
      tokens.insert(tokens.end(), part.tokens.begin(), part.tokens.end());
      logit_rows.push_back(static_cast<int32_t>(tokens.size()) - 1);
    }
    if (all_rows) {
      logit_rows.resize(tokens.size());
      std::iota(logit_rows.begin(), logit_rows.end(), 0);
    }
    ForwardBatch batch{tokens, slices, logit_rows, pool(), kBlockTokens, {}, {}, {}, {}};
    if (layer_done) batch.layer_done = [&](int32_t layer, const std::shared_ptr<void>&) { layer_done(layer); };
    std::vector<float> logits(logit_rows.size() * static_cast<size_t>(model_.config().vocab_size));
    Status status = model_.forward(batch, logits.data());
    EXPECT_TRUE(status.ok()) << status.to_string();
    return logits;
  }

  /// The most likely token of the last row of each part, as the model chooses it.
  std::vector<int32_t> choose(const std::vector<Part>& parts) {
    std::vector<int32_t> chosen(parts.size());
    launch(parts, chosen);
    finish();
    return chosen;
  }
  /// The same in two parts; `chosen` is written by finish().
  void launch(const std::vector<Part>& parts, std::span<int32_t> chosen) {
    std::vector<int32_t> tokens, logit_rows;
    std::vector<SequenceSlice> slices;
    for (const Part& part : parts) {
      slices.push_back({static_cast<int32_t>(tokens.size()), static_cast<int32_t>(part.tokens.size()), part.start_pos, part.blocks->data()});
      tokens.insert(tokens.end(), part.tokens.begin(), part.tokens.end());
      logit_rows.push_back(static_cast<int32_t>(tokens.size()) - 1);
    }
    const std::vector<TokenChoice> choices(parts.size());
    ForwardBatch batch{tokens, slices, logit_rows, pool(), kBlockTokens, {}, chosen, choices, {}};
    const Status status = model_.launch(batch, nullptr);
    EXPECT_TRUE(status.ok()) << status.to_string();
  }
  void finish() {
    const Status status = model_.finish();
    EXPECT_TRUE(status.ok()) << status.to_string();
  }

  std::byte* pool() { return pool_->span().data(); }
  size_t pool_bytes() const { return pool_->span().size(); }

 private:
  Model& model_;
  std::unique_ptr<Memory> pool_;
  std::vector<int32_t> free_;
};

double relative_error(std::span<const float> got, std::span<const float> want) {
  EXPECT_EQ(got.size(), want.size());
  double worst = 0, largest = 0;
  for (size_t i = 0; i < want.size(); i++) {
    double difference = std::abs(static_cast<double>(got[i]) - want[i]);
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
    largest = std::max(largest, std::abs(static_cast<double>(want[i])));
  }
  return worst / largest;
}

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// Parameter: model folder and instruction set.
class Golden : public testing::TestWithParam<std::tuple<std::string, std::string>> {
 protected:
  void SetUp() override {
    const std::filesystem::path folder = kGolden / std::get<0>(GetParam());
    ModelOptions options;
    options.path = folder;
    DeviceOptions device;
    device.device = on_gpu() ? "cuda" : "cpu";
    if (!on_gpu()) device.isa = std::get<1>(GetParam());
    device.threads = 2;
    device.batch_invariant = std::get<1>(GetParam()) == "cuda_invariant";
    auto loaded = load_on_device(options, device);
    if (!loaded.ok() && (loaded.status().code() == StatusCode::kUnavailable || loaded.status().code() == StatusCode::kUnimplemented)) {
      GTEST_SKIP() << loaded.status().to_string();
    }
    ASSERT_TRUE(loaded.ok()) << loaded.status().to_string();
    device_ = std::move(loaded).value();
    model_ = device_.model.get();
    auto golden = SafetensorsFile::open(folder / "golden.safetensors");
    ASSERT_TRUE(golden.ok()) << golden.status().to_string();
    golden_.emplace(std::move(golden).value());
  }

  template <typename T>
  std::vector<T> array(const std::string& name) {
    auto data = golden_->data(golden_->tensors().at(name));
    std::vector<T> values(data.size() / sizeof(T));
    std::memcpy(values.data(), data.data(), data.size());
    return values;
  }

  static bool on_gpu() { return std::get<1>(GetParam()).starts_with("cuda"); }

  DeviceModel device_;
  Model* model_ = nullptr;
  std::optional<SafetensorsFile> golden_;
};

TEST_P(Golden, LogitsAreThoseOfTransformers) {
  double worst = 0;
  for (int count : {1, 7, 33, 150}) {
    Runner runner(*model_);
    std::vector<int32_t> prompt = array<int32_t>(fmt::format("prompt_{}", count));
    std::vector<int32_t> blocks = runner.allocate(prompt.size());
    std::vector<float> logits = runner.forward({{prompt, 0, &blocks}});
    double error = relative_error(logits, array<float>(fmt::format("last_logits_{}", count)));
    EXPECT_LE(error, kTolerance) << count << " tokens";
    worst = std::max(worst, error);
  }
  RecordProperty("worst_relative_error", fmt::format("{:.5f}", worst));
  fmt::print("  {} with {}: largest relative error {:.5f}\n", std::get<0>(GetParam()), device_.name, worst);
}

TEST_P(Golden, LogitsOfEveryRow) {
  if (!golden_->tensors().contains("all_logits_33")) GTEST_SKIP() << "only some models have them";
  Runner runner(*model_);
  std::vector<int32_t> prompt = array<int32_t>("prompt_33");
  std::vector<int32_t> blocks = runner.allocate(prompt.size());
  std::vector<float> logits = runner.forward({{prompt, 0, &blocks}}, /*all_rows=*/true);
  EXPECT_LE(relative_error(logits, array<float>("all_logits_33")), kTolerance);
}

TEST_P(Golden, CutsAndCompanyChangeNoBit) {
  if (std::get<1>(GetParam()) == "cuda") GTEST_SKIP() << "a GPU's products are not the same at every size of batch";
  std::vector<int32_t> prompt = array<int32_t>("prompt_150"), other = array<int32_t>("prompt_33");
  std::span<const int32_t> all(prompt);
  Runner runner(*model_);
  std::vector<int32_t> blocks = runner.allocate(prompt.size());
  const std::vector<float> whole = runner.forward({{all, 0, &blocks}});
  std::vector<int32_t> other_blocks = runner.allocate(other.size());
  const std::vector<float> other_whole = runner.forward({{other, 0, &other_blocks}});

  for (size_t chunk : {size_t{1}, size_t{13}, size_t{16}, size_t{64}}) {
    Runner fresh(*model_, chunk + 2);
    std::vector<int32_t> fresh_blocks = fresh.allocate(prompt.size());
    std::vector<float> logits;
    for (size_t at = 0; at < prompt.size(); at += chunk) {
      size_t size = std::min(chunk, prompt.size() - at);
      logits = fresh.forward({{all.subspan(at, size), static_cast<int32_t>(at), &fresh_blocks}});
    }
    EXPECT_TRUE(same_bits(logits, whole)) << "in chunks of " << chunk;
  }

  // The last chunk of one sequence, the whole other and a decode row, together.
  Runner mixed(*model_, 99);
  std::vector<int32_t> a = mixed.allocate(150), b = mixed.allocate(33), c = mixed.allocate(33);
  mixed.forward({{all.first(100), 0, &a}, {std::span<const int32_t>(other).first(32), 0, &c}});
  std::vector<float> logits = mixed.forward({{std::span<const int32_t>(other).last(1), 32, &c},
                                             {all.subspan(100), 100, &a},
                                             {other, 0, &b}});
  const auto vocab = static_cast<std::ptrdiff_t>(model_->config().vocab_size);
  auto row = [&](int i) {
    return std::vector<float>(logits.begin() + i * vocab, logits.begin() + (i + 1) * vocab);
  };
  EXPECT_TRUE(same_bits(row(0), other_whole)) << "decode row";
  EXPECT_TRUE(same_bits(row(1), whole)) << "last chunk";
  EXPECT_TRUE(same_bits(row(2), other_whole)) << "whole prompt";
}

TEST_P(Golden, CutsAndCompanyChangeLittle) {
  std::vector<int32_t> prompt = array<int32_t>("prompt_150"), other = array<int32_t>("prompt_33");
  const std::vector<float> want = array<float>("last_logits_150"), other_want = array<float>("last_logits_33");
  std::span<const int32_t> all(prompt), other_all(other);
  for (size_t chunk : {size_t{1}, size_t{13}, size_t{16}, size_t{64}, size_t{149}}) {
    Runner runner(*model_, chunk + 2);
    std::vector<int32_t> blocks = runner.allocate(prompt.size());
    std::vector<float> logits;
    for (size_t at = 0; at < prompt.size(); at += chunk) {
      const size_t size = std::min(chunk, prompt.size() - at);
      logits = runner.forward({{all.subspan(at, size), static_cast<int32_t>(at), &blocks}});
    }
    EXPECT_LE(relative_error(logits, want), kTolerance) << "in chunks of " << chunk;
  }
  Runner mixed(*model_, 99);
  std::vector<int32_t> a = mixed.allocate(150), b = mixed.allocate(33), c = mixed.allocate(33);
  mixed.forward({{all.first(100), 0, &a}, {other_all.first(32), 0, &c}});
  const std::vector<float> logits = mixed.forward({{other_all.last(1), 32, &c}, {all.subspan(100), 100, &a}, {other_all, 0, &b}});
  const auto vocab = static_cast<size_t>(model_->config().vocab_size);
  EXPECT_LE(relative_error(std::span(logits).subspan(0, vocab), other_want), kTolerance) << "decode row";
  EXPECT_LE(relative_error(std::span(logits).subspan(vocab, vocab), want), kTolerance) << "last chunk";
  EXPECT_LE(relative_error(std::span(logits).subspan(2 * vocab), other_want), kTolerance) << "whole prompt";
}

/// Sequences that decode together, in batches of many sizes, each beside the other's company.
TEST_P(Golden, DecodingTogetherIsDecodingAlone) {
  std::vector<int32_t> prompt = array<int32_t>("prompt_33");
  const std::vector<float> want = array<float>("last_logits_33");
  std::span<const int32_t> all(prompt);
  for (size_t count : {size_t{1}, size_t{2}, size_t{3}, size_t{9}, size_t{17}}) {
    Runner runner(*model_, count);
    std::vector<std::vector<int32_t>> blocks;
    std::vector<Runner::Part> first, last;
    for (size_t i = 0; i < count; i++) blocks.push_back(runner.allocate(prompt.size()));
    for (size_t i = 0; i < count; i++) {
      first.push_back({all.first(32), 0, &blocks[i]});
      last.push_back({all.last(1), 32, &blocks[i]});
    }
    runner.forward(first);
    const std::vector<float> logits = runner.forward(last);
    const auto vocab = static_cast<size_t>(model_->config().vocab_size);
    const auto best = static_cast<int32_t>(std::max_element(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(vocab)) - logits.begin());
    for (size_t i = 0; i < count; i++) {
      EXPECT_LE(relative_error(std::span(logits).subspan(i * vocab, vocab), want), kTolerance) << i << " of " << count;
      EXPECT_TRUE(same_bits(std::span(logits).first(vocab), std::span(logits).subspan(i * vocab, vocab))) << i << " of " << count;
    }
    if (model_->can_choose(0)) {
      EXPECT_EQ(runner.choose(last), std::vector<int32_t>(count, best));
    }
  }
}

TEST_P(Golden, GreedyTokensAreThoseOfTransformersWhereItIsSure) {
  std::ifstream file(kGolden / std::get<0>(GetParam()) / "golden.json");
  nlohmann::json golden = nlohmann::json::parse(file);
  int sure = 0;
  for (const auto& one : golden["cases"]) {
    auto prompt = one["prompt"].get<std::vector<int32_t>>();
    auto tokens = one["tokens"].get<std::vector<int32_t>>();
    auto margins = one["margins"].get<std::vector<double>>();
    std::vector<int32_t> text = prompt;
    text.insert(text.end(), tokens.begin(), tokens.end());
    Runner runner(*model_);
    std::vector<int32_t> blocks = runner.allocate(text.size());
    std::vector<float> logits = runner.forward({{prompt, 0, &blocks}});
    for (size_t step = 0; step < tokens.size(); step++) {
      auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
      if (margins[step] > kTolerance) {
        EXPECT_EQ(best, tokens[step]) << "prompt of " << prompt.size() << ", step " << step;
        sure++;
      }
      // The reference's token goes on, so that one unsure step does not end the comparison.
      const auto position = static_cast<int32_t>(prompt.size() + step);
      logits = runner.forward({{std::span<const int32_t>(&tokens[step], 1), position, &blocks}});
    }
  }
  EXPECT_GT(sure, 64);
}

TEST_P(Golden, KvOfALayerIsFinalWhenLayerDoneSaysSo) {
  if (on_gpu()) GTEST_SKIP() << "there it is said by an event, and the memory is the GPU's";
  Runner runner(*model_);
  std::vector<int32_t> prompt = array<int32_t>("prompt_33");
  std::vector<int32_t> blocks = runner.allocate(prompt.size());
  const BlockLayout layout = model_->layout(kBlockTokens);
  auto layer_bytes = [&](int32_t layer) {
    std::vector<std::byte> bytes;
    for (int32_t block : blocks) {
      const std::byte* begin = runner.pool() + block * layout.block_bytes() + layout.layer_offset_bytes(layer);
      bytes.insert(bytes.end(), begin, begin + layout.layer_bytes());
    }
    return bytes;
  };
  std::vector<std::vector<std::byte>> seen;
  runner.forward({{prompt, 0, &blocks}}, false, [&](int32_t layer) {
    EXPECT_EQ(static_cast<size_t>(layer), seen.size());
    seen.push_back(layer_bytes(layer));
  });
  ASSERT_EQ(seen.size(), static_cast<size_t>(layout.layers));
  for (int32_t layer = 0; layer < layout.layers; layer++) {
    EXPECT_EQ(seen[static_cast<size_t>(layer)], layer_bytes(layer));
    EXPECT_NE(seen[static_cast<size_t>(layer)], std::vector<std::byte>(seen[0].size())) << "nothing written";
  }
}

TEST_P(Golden, StepsLaunchedBeforeTheirTokensAreKnownGiveTheSame) {
  if (!model_->runs_ahead()) GTEST_SKIP() << "it computes within forward()";
  constexpr size_t kSteps = 20, kSequences = 3;
  ASSERT_TRUE(model_->prepare({.rows = 256, .sequences = kSequences, .sequence_tokens = 200, .block_tokens = kBlockTokens}).ok());
  const std::vector<int32_t> prompts[kSequences] = {array<int32_t>("prompt_33"), array<int32_t>("prompt_7"), array<int32_t>("prompt_150")};
  std::vector<std::vector<int32_t>> expected, got(kSteps, std::vector<int32_t>(kSequences));
  for (const bool ahead : {false, true}) {
    Runner runner(*model_);
    std::vector<int32_t> blocks[kSequences];
    std::vector<Runner::Part> parts;
    for (size_t i = 0; i < kSequences; ++i) {
      blocks[i] = runner.allocate(prompts[i].size() + kSteps);
      parts.push_back({prompts[i], 0, &blocks[i]});
    }
    if (ahead) {
      runner.launch(parts, got[0]);
    } else {
      expected.push_back(runner.choose(parts));
    }
    for (size_t step = 1; step < kSteps; ++step) {
      // From the tenth step on the first sequence is gone: rows move.
      const size_t first = step >= 10 ? 1 : 0;
      std::vector<int32_t> tokens;
      parts.clear();
      for (size_t i = first; i < kSequences; ++i) {
        const auto row = static_cast<int32_t>(step == 10 ? i : i - first);
        tokens.push_back(ahead ? chosen_before(row) : expected.back()[static_cast<size_t>(row)]);
      }
      for (size_t i = first; i < kSequences; ++i) {
        parts.push_back({std::span(tokens).subspan(i - first, 1), static_cast<int32_t>(prompts[i].size() + step - 1), &blocks[i]});
      }
      got[step].resize(kSequences - first);
      if (ahead) {
        runner.launch(parts, got[step]);
        runner.finish();  // the one before
      } else {
        expected.push_back(runner.choose(parts));
      }
    }
    if (ahead) runner.finish();
  }
  EXPECT_EQ(got, expected);
}

TEST_P(Golden, NoLogitsWantedStillWritesTheCache) {
  if (on_gpu()) GTEST_SKIP() << "the memory is the GPU's";
  std::vector<int32_t> prompt = array<int32_t>("prompt_33");
  Runner with(*model_), without(*model_);
  std::vector<int32_t> blocks = with.allocate(prompt.size());
  ASSERT_EQ(blocks, without.allocate(prompt.size()));
  with.forward({{prompt, 0, &blocks}});
  std::vector<SequenceSlice> slices{{0, 33, 0, blocks.data()}};
  ForwardBatch batch{prompt, slices, {}, without.pool(), kBlockTokens, {}, {}, {}, {}};
  ASSERT_TRUE(model_->forward(batch, nullptr).ok());
  EXPECT_EQ(0, std::memcmp(with.pool(), without.pool(), with.pool_bytes()));
}

TEST_P(Golden, BadBatchesAreRefused) {
  Runner runner(*model_);
  std::vector<int32_t> blocks = runner.allocate(4), tokens{1, 2, 3, 4};
  std::vector<float> logits(4 * static_cast<size_t>(model_->config().vocab_size));
  auto message = [&](std::vector<int32_t> ids, std::vector<SequenceSlice> slices, std::vector<int32_t> rows) {
    ForwardBatch batch{ids, slices, rows, runner.pool(), kBlockTokens, {}, {}, {}, {}};
    return model_->forward(batch, logits.data()).message();
  };
  const int32_t* table = blocks.data();
  EXPECT_EQ(message(tokens, {{0, 4, 0, table}}, {3}), "");
  EXPECT_THAT(message({1, 320, 3, 4}, {{0, 4, 0, table}}, {3}), testing::HasSubstr("token id 320 is not in [0, 320)"));
  EXPECT_NE(message({1, -1, 3, 4}, {{0, 4, 0, table}}, {3}), "");
  EXPECT_NE(message({}, {}, {}), "");
  EXPECT_NE(message(tokens, {{0, 3, 0, table}}, {2}), "");
  EXPECT_NE(message(tokens, {{0, 2, 0, table}, {3, 1, 0, table}}, {3}), "");
  EXPECT_NE(message(tokens, {{0, 4, -1, table}}, {3}), "");
  EXPECT_NE(message(tokens, {{0, 4, 0, nullptr}}, {3}), "");
  EXPECT_NE(message(tokens, {{0, 4, 0, table}}, {4}), "");
  EXPECT_NE(message(tokens, {{0, 4, 0, table}}, {2, 1}), "");
  EXPECT_THAT(message(tokens, {{0, 4, model_->max_model_len() - 3, table}}, {3}), testing::HasSubstr("is beyond"));
}

INSTANTIATE_TEST_SUITE_P(Models, Golden,
                         testing::Combine(testing::Values("qwen3", "qwen2", "qwen2-window", "llama3", "llama-yarn",
                                                          "mistral"),
                                          testing::Values("plain", "avx2", "avx512bf16", "cuda", "cuda_invariant")),
                         [](const auto& info) {
                           std::string name = std::get<0>(info.param) + "_" + std::get<1>(info.param);
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace baton
