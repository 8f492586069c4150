// What a device's sampler is told, and (where there is a GPU) that it chooses the same tokens as the CPU's.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "base/cuda/gpu.h"
#include "base/random.h"
#include "engine/sampler.h"
#include "kernels/cuda/cuda_sampler.h"
#include "model/cuda/sample_rows.h"

namespace baton {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(TokenChoice, MergesWhatConcernsOneToken) {
  Sampler sampler(100, {2, 900});
  SamplingParams params;
  params.min_tokens = 3;
  params.stop_token_ids = {7};
  params.logit_bias = {{5, 2.0f}, {2, 300.0f}};
  params.repetition_penalty = 1.5f;
  params.frequency_penalty = 0.25f;
  params.presence_penalty = 0.5f;
  const std::vector<TokenId> tokens = {5, 6, 5, 5};  // the last two are output
  TokenCounts counts;
  const SampleContext context = {.params = &params, .tokens = tokens, .prompt_tokens = 2, .output_index = 2, .counts = &counts};
  std::vector<LogitEdit> edits;
  const TokenChoice first = sampler.choice(context, &edits), second = sampler.choice(context, &edits);
  EXPECT_EQ(first.edit_begin, 0);
  EXPECT_EQ(first.edit_count, 4);
  EXPECT_EQ(second.edit_begin, 4);
  EXPECT_EQ(second.edit_count, 4);
  const auto edit = [&](TokenId token) {
    for (const LogitEdit& e : edits) {
      if (e.token == token) return e;
    }
    return LogitEdit{};
  };
  EXPECT_EQ(edit(2).bias, -kInfinity);
  EXPECT_EQ(edit(7).bias, -kInfinity);
  EXPECT_EQ(edit(5).bias, 2.0f);
  EXPECT_EQ(edit(5).repetition, 1.5f);
  EXPECT_EQ(edit(5).frequency, 0.5f);
  EXPECT_EQ(edit(5).presence, 0.5f);
  EXPECT_EQ(edit(6).frequency, 0.0f);
  EXPECT_EQ(edit(6).presence, 0.0f);
}

TEST(TokenChoice, GreedyNeedsNothingElse) {
  Sampler sampler(100, {});
  SamplingParams params;
  params.temperature = 0;
  std::vector<LogitEdit> edits;
  const TokenChoice choice =
      sampler.choice({.params = &params, .tokens = {}, .prompt_tokens = 0, .output_index = 0, .counts = nullptr}, &edits);
  EXPECT_TRUE(choice.greedy);
  EXPECT_EQ(choice.edit_count, 0);
}

/// Rows for the GPU's sampler.
class Rows {
 public:
  Rows(int32_t vocab_size, std::vector<TokenId> eos_token_ids) : sampler_(vocab_size, std::move(eos_token_ids)) {}

  void add(const SampleContext& context) {
    const size_t before = edits_.size();
    rows_.push_back(sample_row(sampler_.choice(context, &edits_)));
    for (size_t i = before; i < edits_.size(); ++i) device_edits_.push_back(sample_edit(edits_[i]));
  }
  std::span<const cuda::SampleRow> rows() const { return rows_; }
  std::span<const cuda::SampleEdit> edits() const { return device_edits_; }

 private:
  Sampler sampler_;
  std::vector<LogitEdit> edits_;
  std::vector<cuda::SampleRow> rows_;
  std::vector<cuda::SampleEdit> device_edits_;
};

class CudaSamplerTest : public testing::Test {
 protected:
  void SetUp() override {
    auto driver = cuda::Driver::load("");
    if (!driver.ok()) GTEST_SKIP() << "no GPU to sample on: " << driver.status().to_string();
    auto gpu = cuda::Gpu::open(*driver, 0);
    ASSERT_TRUE(gpu.ok()) << gpu.status().to_string();
    gpu_ = *gpu;
    auto sampler = cuda::CudaSampler::create(gpu_);
    if (!sampler.ok()) GTEST_SKIP() << "no GPU to sample on: " << sampler.status().to_string();
    sampler_ = std::move(sampler).value();
  }

  template <typename T>
  cuda::DeviceMemory upload(std::span<const T> values) {
    auto memory = cuda::DeviceMemory::allocate(gpu_, std::max<size_t>(values.size_bytes(), 16));
    BATON_CHECK(memory.ok()) << memory.status().to_string();
    cuda::CurrentDevice current(*gpu_);
    BATON_CHECK(gpu_->driver().copy_to_device(memory->address(), values.data(), values.size_bytes()) == cuda::kSuccess);
    return std::move(memory).value();
  }

  /// `batch`'s choices for rows of logits, one behind the other.
  std::vector<int32_t> choose(const Rows& batch, std::span<const float> logits) {
    const size_t rows = batch.rows().size();
    const auto device_logits = upload(logits);
    const auto how = upload(batch.rows());
    const auto edits = upload(batch.edits());
    std::vector<int32_t> tokens(rows, -7);
    const auto device_tokens = upload<int32_t>(tokens);
    const auto pointer = [](const cuda::DeviceMemory& memory) { return reinterpret_cast<void*>(memory.address()); };
    const Status status = sampler_->sample(nullptr, static_cast<float*>(pointer(device_logits)), static_cast<int64_t>(rows),
                                           static_cast<int64_t>(logits.size() / rows),
                                           static_cast<const cuda::SampleRow*>(pointer(how)),
                                           static_cast<const cuda::SampleEdit*>(pointer(edits)),
                                           static_cast<int32_t*>(pointer(device_tokens)));
    BATON_CHECK(status.ok()) << status.to_string();
    cuda::CurrentDevice current(*gpu_);
    const Status copied = gpu_->driver().check(
        gpu_->driver().copy_to_host(tokens.data(), device_tokens.address(), rows * sizeof(int32_t)), "sampling");
    BATON_CHECK(copied.ok()) << copied.to_string();
    return tokens;
  }

  std::shared_ptr<const cuda::Gpu> gpu_;
  std::unique_ptr<cuda::CudaSampler> sampler_;
};

float gauss(Random& random) {
  return static_cast<float>(std::sqrt(-2 * std::log(1 - random.uniform())) * std::cos(6.283185307179586 * random.uniform()));
}

TEST_F(CudaSamplerTest, ChoosesWhatTheCpuChooses) {
  constexpr size_t kRows = 48;
  for (const int32_t vocab : {1, 7, 1000, 32001, 151936}) {
    Random random(static_cast<uint64_t>(vocab));
    const std::vector<TokenId> eos = {vocab / 2};
    Sampler cpu(vocab, eos);
    Rows batch(vocab, eos);
    std::vector<float> logits(kRows * static_cast<size_t>(vocab));
    std::vector<SamplingParams> params(kRows);
    std::vector<std::vector<TokenId>> histories(kRows);
    std::vector<TokenCounts> counts(kRows);
    for (size_t row = 0; row < kRows; ++row) {
      const std::span<float> mine = std::span(logits).subspan(row * static_cast<size_t>(vocab), static_cast<size_t>(vocab));
      const float spread = row % 3 == 0 ? 1.0f : row % 3 == 1 ? 3.0f : 8.0f;
      for (float& logit : mine) {
        logit = gauss(random) * spread;
        if (row % 4 == 3) logit = std::round(logit);  // many ties
      }
      if (row % 8 == 5) mine[random.below(mine.size())] = -kInfinity;
      SamplingParams& p = params[row];
      p.temperature = row % 12 == 11 ? 0.0f : row % 5 == 0 ? 1.0f : 0.3f + static_cast<float>(random.uniform()) * 1.5f;
      if (row % 2 == 1) p.top_p = row % 10 == 3 ? 1e-6f : 0.5f + static_cast<float>(random.uniform()) * 0.5f;
      if (row % 3 == 1) p.top_k = static_cast<int32_t>(row % 7 == 0 ? 1 : random.below(200) + 1);
      if (row % 5 == 2) p.min_p = static_cast<float>(random.uniform()) * 0.2f;
      if (row == 10) p.top_k = vocab;
      p.seed = random();
      for (int i = 0; i < 40; ++i) histories[row].push_back(static_cast<TokenId>(random.below(static_cast<uint64_t>(vocab))));
      if (row % 4 == 2) p.repetition_penalty = 1.3f, p.presence_penalty = 0.4f, p.frequency_penalty = 0.2f;
      if (row % 6 == 4 && vocab > 1) {
        p.logit_bias = {{static_cast<TokenId>(random.below(static_cast<uint64_t>(vocab))), 3.5f}};
        p.min_tokens = 1000;
      }
    }
    const auto context = [&](size_t row) {
      return SampleContext{.params = &params[row], .tokens = histories[row], .prompt_tokens = 20,
                           .output_index = static_cast<int32_t>(row * 3), .counts = &counts[row]};
    };
    for (size_t row = 0; row < kRows; ++row) batch.add(context(row));
    const std::vector<int32_t> chosen = choose(batch, logits);
    for (size_t row = 0; row < kRows; ++row) {
      const auto expected = cpu.sample(std::span(logits).subspan(row * static_cast<size_t>(vocab), static_cast<size_t>(vocab)), context(row));
      const int32_t token = expected.ok() ? expected->token : cuda::kSampleNoToken;
      EXPECT_EQ(chosen[row], token) << "row " << row << ", vocabulary " << vocab << ", temperature " << params[row].temperature
                                    << ", top_p " << params[row].top_p << ", top_k " << params[row].top_k << ", min_p "
                                    << params[row].min_p;
    }
  }
}

TEST_F(CudaSamplerTest, DrawsByTheDistribution) {
  constexpr size_t kRows = 4096, kVocab = 5;
  std::vector<float> logits;
  Rows batch(kVocab, {});
  SamplingParams params;
  params.seed = 99;
  for (size_t row = 0; row < kRows; ++row) {
    for (size_t i = 0; i < kVocab; ++i) logits.push_back(std::log(static_cast<float>(i + 1)));
    batch.add({.params = &params, .tokens = {}, .prompt_tokens = 0, .output_index = static_cast<int32_t>(row), .counts = nullptr});
  }
  std::vector<double> seen(kVocab);
  for (const int32_t token : choose(batch, logits)) ++seen.at(static_cast<size_t>(token));
  for (size_t i = 0; i < kVocab; ++i) EXPECT_NEAR(seen[i] / kRows, static_cast<double>(i + 1) / 15, 0.03) << i;
}

TEST_F(CudaSamplerTest, SaysWhenThereIsNothingToChoose) {
  constexpr size_t kVocab = 1003;
  Rows batch(kVocab, {});
  SamplingParams params, none;
  for (TokenId token = 0; token < static_cast<TokenId>(kVocab); ++token) none.logit_bias.emplace_back(token, 0.0f);
  for (auto& [token, bias] : none.logit_bias) none.stop_token_ids.push_back(token);
  none.min_tokens = 1;
  for (const SamplingParams* p : std::vector<const SamplingParams*>{&params, &params, &params, &none}) {
    batch.add({.params = p, .tokens = {}, .prompt_tokens = 0, .output_index = 0, .counts = nullptr});
  }
  std::vector<float> logits(4 * kVocab, 1.0f);
  logits[500] = std::numeric_limits<float>::quiet_NaN();
  logits[kVocab + 1002] = kInfinity;
  logits[2 * kVocab] = -kInfinity;
  const std::vector<int32_t> chosen = choose(batch, logits);
  EXPECT_EQ(chosen[0], cuda::kSampleNotFinite);
  EXPECT_EQ(chosen[1], cuda::kSampleNotFinite);
  EXPECT_GE(chosen[2], 1);
  EXPECT_EQ(chosen[3], cuda::kSampleNoToken);
}

}  // namespace
}  // namespace baton
