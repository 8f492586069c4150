#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "base/random.h"

namespace baton {
namespace {

std::vector<float> random_logits(size_t count, uint64_t seed, double spread = 10.0) {
  Random random(seed);
  std::vector<float> logits(count);
  for (float& logit : logits) logit = static_cast<float>(random.uniform() * spread - spread / 2);
  return logits;
}

Result<SampledToken> sample(Sampler& sampler, std::vector<float>& logits, const SamplingParams& params,
                            int32_t index = 0, const std::vector<TokenId>& tokens = {}, size_t prompt_tokens = 0) {
  TokenCounts counts;
  return sampler.sample(logits, {.params = &params, .tokens = tokens, .prompt_tokens = prompt_tokens,
                                 .output_index = index, .counts = &counts});
}

/// vLLM's definition, with a full sort in double.
struct Reference {
  std::vector<double> probabilities;  // 0: not kept

  Reference(std::vector<double> logits, const SamplingParams& params) {
    for (double& logit : logits) logit /= static_cast<double>(params.temperature);
    std::vector<size_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    const double maximum = logits[order[0]];
    std::vector<bool> kept(logits.size(), true);
    for (size_t i = 0; i < logits.size(); ++i) {
      if (std::exp(logits[i] - maximum) < static_cast<double>(params.min_p)) kept[i] = false;
    }
    if (params.top_k > 0 && static_cast<size_t>(params.top_k) < logits.size()) {
      const double kth = logits[order[static_cast<size_t>(params.top_k) - 1]];
      for (size_t i = 0; i < logits.size(); ++i) kept[i] = kept[i] && logits[i] >= kth;
    }
    double mass = 0;
    for (size_t i = 0; i < logits.size(); ++i) mass += kept[i] ? std::exp(logits[i] - maximum) : 0;
    double passed = 0;
    for (size_t i : order) {
      if (!kept[i]) continue;
      if (passed >= static_cast<double>(params.top_p) * mass) kept[i] = false;
      passed += std::exp(logits[i] - maximum);
    }
    probabilities.assign(logits.size(), 0);
    double total = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
      if (kept[i]) total += probabilities[i] = std::exp(logits[i] - maximum);
    }
    for (double& p : probabilities) p /= total;
  }
  /// How far `uniform` is from where `token` would be drawn; 0: it would be.
  double distance(TokenId token, double uniform) const {
    double before = 0;
    for (size_t i = 0; i < static_cast<size_t>(token); ++i) before += probabilities[i];
    const double after = before + probabilities[static_cast<size_t>(token)];
    if (probabilities[static_cast<size_t>(token)] == 0) return 1;
    return uniform < before ? before - uniform : uniform >= after ? uniform - after : 0;
  }
  double smallest() const {
    double least = 1;
    for (double p : probabilities) least = p > 0 ? std::min(least, p) : least;
    return least;
  }
};

TEST(Sampler, GreedyTakesTheLowestOfEqualMaxima) {
  for (size_t vocab : {1u, 7u, 128u, 129u, 1000u}) {
    Sampler sampler(static_cast<int32_t>(vocab), {});
    std::vector<float> logits = random_logits(vocab, vocab);
    logits[vocab / 2] = logits[vocab - 1] = 100.0f;
    SamplingParams params{.temperature = 0};
    EXPECT_EQ(sample(sampler, logits, params)->token, static_cast<TokenId>(vocab / 2));
  }
}

TEST(Sampler, DrawsEqualTheReference) {
  struct Case {
    float temperature, top_p;
    int32_t top_k;
    float min_p;
  };
  const Case cases[] = {{1, 1, 0, 0},    {0.7f, 1, 0, 0},     {1, 0.9f, 0, 0},   {1.5f, 0.5f, 0, 0}, {1, 0.01f, 0, 0},
                        {1, 1, 20, 0},   {0.6f, 0.95f, 20, 0}, {1, 1, 1, 0},      {2, 1, 500, 0},     {1, 0.8f, 5000, 0},
                        {1, 1, 0, 0.1f}, {1, 0.9f, 50, 0.05f}, {0.01f, 1, 0, 0},  {100, 0.99f, 0, 0}, {1, 1, 0, 1},
                        {1, 0.999999f, 0, 0}};
  for (size_t vocab : {5u, 128u, 1000u, 5003u}) {
    Sampler sampler(static_cast<int32_t>(vocab), {});
    for (const Case& c : cases) {
      for (uint64_t seed = 0; seed < 20; ++seed) {
        std::vector<float> logits = random_logits(vocab, seed * 7 + vocab, seed % 3 == 0 ? 0.5 : 16.0);
        if (seed % 4 == 1) {  // ties everywhere, also at the edges of top_k and top_p
          for (float& logit : logits) logit = std::round(logit);
        }
        const std::vector<float> before = logits;
        SamplingParams params{.temperature = c.temperature, .top_p = c.top_p, .top_k = c.top_k, .min_p = c.min_p, .seed = seed};
        const Reference reference(std::vector<double>(logits.begin(), logits.end()), params);
        for (int32_t index = 0; index < 10; ++index) {
          const double uniform = static_cast<double>(mix_bits(seed, static_cast<uint64_t>(index)) >> 11) * 0x1p-53;
          const Result<SampledToken> sampled = sample(sampler, logits, params, index);
          ASSERT_TRUE(sampled.ok());
          // Float against double: sums differ by 1e-4 when thousands of tokens are nearly equal, and among those it is
          // open which one is the last that top_p keeps.
          EXPECT_LT(reference.distance(sampled->token, uniform), 2e-4 + reference.smallest())
              << "vocab " << vocab << " t " << c.temperature << " p " << c.top_p << " k " << c.top_k << " min_p "
              << c.min_p << " seed " << seed << " index " << index << " token " << sampled->token;
        }
        EXPECT_EQ(logits, before);
      }
    }
  }
}

TEST(Sampler, FrequenciesFollowTheProbabilities) {
  Sampler sampler(4, {});
  std::vector<float> logits = {std::log(0.1f), std::log(0.2f), std::log(0.3f), std::log(0.4f)};
  SamplingParams params{.seed = 42};
  std::map<TokenId, int> counts;
  constexpr int kDraws = 20000;
  for (int32_t i = 0; i < kDraws; ++i) ++counts[sample(sampler, logits, params, i)->token];
  for (TokenId token = 0; token < 4; ++token) {
    EXPECT_NEAR(counts[token] / double{kDraws}, 0.1 * (token + 1), 0.015) << token;
  }
}

TEST(Sampler, TheDrawDependsOnSeedAndIndexOnly) {
  Sampler a(1000, {}), b(1000, {});
  std::vector<float> logits = random_logits(1000, 1), other = random_logits(1000, 2);
  SamplingParams params{.top_p = 0.9f, .seed = 5};
  const TokenId expected = sample(a, logits, params, 3)->token;
  for (int32_t i = 0; i < 50; ++i) (void)sample(b, other, params, i);
  EXPECT_EQ(sample(b, logits, params, 3)->token, expected);
}

TEST(Sampler, LogprobsAreOfTheRawLogits) {
  constexpr size_t kVocab = 2000;
  Sampler sampler(kVocab, {7});
  std::vector<float> logits = random_logits(kVocab, 3);
  std::ranges::transform(logits, logits.begin(), [](float x) { return x * 2; });
  logits[11] = logits[5] = 15.0f;  // equal: the lower id first
  double sum = 0;
  for (float logit : logits) sum += std::exp(static_cast<double>(logit));
  SamplingParams params{.temperature = 0.1f, .top_k = 3, .repetition_penalty = 1.5f, .logit_bias = {{3, 90.0f}},
                        .logprobs = 5};
  const std::vector<TokenId> tokens = {5, 11};
  const SampledToken sampled = *sample(sampler, logits, params, 0, tokens, 1);
  EXPECT_EQ(sampled.token, 3);
  EXPECT_NEAR(sampled.logprob, logits[3] - std::log(sum), 1e-4);
  ASSERT_EQ(sampled.top_logprobs.size(), 5u);
  EXPECT_EQ(sampled.top_logprobs[0].token, 5);
  EXPECT_EQ(sampled.top_logprobs[1].token, 11);
  std::vector<float> sorted = logits;
  std::ranges::sort(sorted, std::greater<>());
  for (size_t i = 0; i < 5; ++i) {
    const TokenLogprob& top = sampled.top_logprobs[i];
    EXPECT_FLOAT_EQ(logits[static_cast<size_t>(top.token)], sorted[i]);
    EXPECT_NEAR(top.logprob, sorted[i] - std::log(sum), 1e-4);
  }
  params.logprobs = 0;
  const SampledToken only_chosen = *sample(sampler, logits, params, 0, tokens, 1);
  EXPECT_TRUE(only_chosen.top_logprobs.empty());
  EXPECT_EQ(only_chosen.logprob, sampled.logprob);
}

TEST(Sampler, MinTokensMasksEosAndStopTokens) {
  Sampler sampler(8, {1, 2, 99});
  std::vector<float> logits = {0, 9, 8, 7, 6, 5, 4, 3};
  SamplingParams params{.temperature = 0, .min_tokens = 2, .stop_token_ids = {3}};
  EXPECT_EQ(sample(sampler, logits, params, 0)->token, 4);
  EXPECT_EQ(sample(sampler, logits, params, 1)->token, 4);
  EXPECT_EQ(sample(sampler, logits, params, 2)->token, 1);
}

TEST(Sampler, PenaltiesAsInVllm) {
  Sampler sampler(6, {});
  // Prompt {0, 1}, output {1, 2, 2}.
  const std::vector<TokenId> tokens = {0, 1, 1, 2, 2};
  const std::vector<float> raw = {3.0f, 2.9f, 2.8f, 1.4f, -1.0f, -1.0f};
  const auto greedy = [&](SamplingParams params) {
    params.temperature = 0;
    std::vector<float> logits = raw;
    return sample(sampler, logits, params, 3, tokens, 2)->token;
  };
  EXPECT_EQ(greedy({}), 0);
  EXPECT_EQ(greedy({.repetition_penalty = 3.0f}), 3);       // 0, 1 and 2 are divided
  EXPECT_EQ(greedy({.presence_penalty = 2.0f}), 0);         // the prompt does not count
  EXPECT_EQ(greedy({.logit_bias = {{0, -100.0f}}}), 1);
  EXPECT_EQ(greedy({.presence_penalty = 0.05f, .logit_bias = {{0, -100.0f}}}), 1);
  EXPECT_EQ(greedy({.frequency_penalty = -0.5f}), 2);       // twice in the output
  EXPECT_EQ(greedy({.logit_bias = {{4, 1e9f}}}), 4);        // clamped to 100, as vLLM does

  TokenCounts counts;
  counts.update(std::span(tokens).first(3), 2);
  counts.update(tokens, 2);
  ASSERT_EQ(counts.entries().size(), 3u);
  EXPECT_EQ(counts.entries()[0].output_count, 0);
  EXPECT_EQ(counts.entries()[1].output_count, 1);
  EXPECT_EQ(counts.entries()[2].output_count, 2);
}

TEST(Sampler, ABrokenModelIsAnErrorAndNotAToken) {
  Sampler sampler(300, {});
  for (float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    for (size_t at : {0u, 200u, 299u}) {
      std::vector<float> logits = random_logits(300, 1);
      logits[at] = bad;
      EXPECT_EQ(sample(sampler, logits, {}).status().code(), StatusCode::kInternal);
    }
  }
  std::vector<float> masked(2, 0.0f);
  Sampler two(2, {0, 1});
  EXPECT_EQ(sample(two, masked, {.min_tokens = 1}).status().code(), StatusCode::kInvalidArgument);
}

TEST(Sampler, ExpIsRightToTwoUlp) {
  EXPECT_EQ(exp_nonpositive(0), 1.0f);
  EXPECT_EQ(exp_nonpositive(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(exp_nonpositive(-1e30f), 0.0f);
  for (float x = 0; x > -87.0f; x -= 0.00731f) {
    const double exact = std::exp(static_cast<double>(x));
    EXPECT_NEAR(exp_nonpositive(x) / exact, 1.0, 2.4e-7) << x;
  }
}

TEST(Sampler, EveryInstructionSetGivesTheSameBits) {
  const SamplerLoops& best = sampler_loops();
  const SamplerLoops& plain = plain_sampler_loops();
  for (size_t count : {1u, 7u, 128u, 130u, 1000u, 4096u}) {
    const std::vector<float> x = random_logits(count, count, 60.0);
    const size_t chunks = (count + SamplerLoops::kChunk - 1) / SamplerLoops::kChunk;
    std::vector<float> maxima_a(chunks), maxima_b(chunks), weights_a(count), weights_b(count);
    std::vector<double> sums_a(chunks), sums_b(chunks);
    EXPECT_TRUE(best.maxima(x.data(), count, maxima_a.data()));
    EXPECT_TRUE(plain.maxima(x.data(), count, maxima_b.data()));
    EXPECT_EQ(maxima_a, maxima_b);
    best.weigh(x.data(), count, 30.0f, 0.7f, weights_a.data(), sums_a.data());
    plain.weigh(x.data(), count, 30.0f, 0.7f, weights_b.data(), sums_b.data());
    EXPECT_EQ(weights_a, weights_b);
    EXPECT_EQ(sums_a, sums_b);
    for (size_t i = 0; i < count; ++i) EXPECT_EQ(weights_a[i], exp_nonpositive((x[i] - 30.0f) * 0.7f));
    best.cut(weights_a.data(), count, 1e-6f, sums_a.data());
    plain.cut(weights_b.data(), count, 1e-6f, sums_b.data());
    EXPECT_EQ(weights_a, weights_b);
    EXPECT_EQ(sums_a, sums_b);
  }
}

TEST(SamplingParams, ValidateNamesTheValueAndItsBounds) {
  EXPECT_TRUE(SamplingParams().validate(10).ok());
  const auto message = [](SamplingParams params) { return params.validate(10).message(); };
  EXPECT_EQ(message({.temperature = -1}), "temperature is -1; it must be from 0 to 1000000");
  EXPECT_NE(message({.temperature = std::nanf("")}), "");
  EXPECT_NE(message({.top_p = 0}), "");
  EXPECT_NE(message({.top_p = 1.5f}), "");
  EXPECT_NE(message({.top_k = -2}), "");
  EXPECT_NE(message({.min_p = -0.1f}), "");
  EXPECT_NE(message({.repetition_penalty = 0}), "");
  EXPECT_NE(message({.presence_penalty = 2.5f}), "");
  EXPECT_EQ(message({.max_tokens = 0}), "max_tokens is 0; it must be at least 1");
  EXPECT_EQ(message({.max_tokens = 4, .min_tokens = 5}), "min_tokens is 5; it must be from 0 to max_tokens (4)");
  EXPECT_EQ(message({.stop_token_ids = {10}}), "stop_token_ids contains token id 10; the vocabulary has ids 0 to 9");
  EXPECT_NE(message({.logit_bias = {{-1, 1.0f}}}), "");
  EXPECT_NE(message({.logprobs = 1000}), "");
}

}  // namespace
}  // namespace baton
