#include "model/rope.h"

#include <gtest/gtest.h>

#include <cmath>

namespace baton {
namespace {

struct Case {
  const char* name;
  RopeConfig config;
  double attention_factor;
  std::vector<double> expected;  // pairs 0, 10, 20, 30, 40, 50, 63 of head_dim 128
};

RopeConfig llama31() {
  RopeConfig config;
  config.type = RopeConfig::Type::kLlama3;
  config.theta = 500000.0;
  config.factor = 8.0;
  config.original_max_positions = 8192;
  return config;
}

RopeConfig yarn(double theta, double factor, int64_t original) {
  RopeConfig config;
  config.type = RopeConfig::Type::kYarn;
  config.theta = theta;
  config.factor = factor;
  config.original_max_positions = original;
  return config;
}

RopeConfig yarn_with_everything() {
  RopeConfig config = yarn(10000.0, 40.0, 4096);
  config.mscale = 1.0;
  config.mscale_all_dim = 0.707;
  config.truncate = false;
  config.beta_fast = 16.0;
  config.beta_slow = 2.0;
  return config;
}

RopeConfig linear() {
  RopeConfig config;
  config.type = RopeConfig::Type::kLinear;
  config.factor = 2.0;
  return config;
}

/// Values computed with transformers 5 (ROPE_INIT_FUNCTIONS).
TEST(Rope, FrequenciesAreThoseOfTransformers) {
  const Case cases[] = {
      {"llama3", llama31(), 1.0,
       {1.0, 1.28687382e-01, 1.65604409e-02, 1.37189368e-03, 3.42810235e-05, 4.41153452e-06, 3.06892588e-07}},
      {"yarn of Qwen", yarn(1e6, 4.0, 32768), 1.138629436111989,
       {1.0, 1.15478203e-01, 1.33352149e-02, 1.06436096e-03, 4.44569851e-05, 5.13381246e-06, 3.10234441e-07}},
      {"yarn with mscale", yarn_with_everything(), 1.0857263992561355,
       {1.0, 2.37137362e-01, 5.62341288e-02, 9.52086132e-03, 1.23952457e-04, 1.87473543e-05, 2.88695469e-06}},
      {"linear", linear(), 1.0,
       {0.5, 1.18568681e-01, 2.81170644e-02, 6.66760746e-03, 1.58113893e-03, 3.74947092e-04, 5.77390965e-05}},
  };
  for (const Case& one : cases) {
    RopeFrequencies got = rope_frequencies(one.config, 128);
    ASSERT_EQ(got.inverse_frequencies.size(), 64u);
    EXPECT_NEAR(got.attention_factor, one.attention_factor, 1e-12) << one.name;
    size_t at = 0;
    for (size_t pair : {0, 10, 20, 30, 40, 50, 63}) {
      double expected = one.expected[at++];
      EXPECT_NEAR(got.inverse_frequencies[pair], expected, 1e-6 * expected) << one.name << " pair " << pair;
    }
  }
}

TEST(Rope, TablesGrowAndKeepWhatTheyHad) {
  ThreadPool threads(2);
  RopeConfig config = yarn(1e4, 4.0, 128);
  auto tables = RopeTables::create(config, 16, 5000);
  ASSERT_TRUE(tables.ok()) << tables.status().to_string();
  tables->ensure(1, threads);
  EXPECT_GE(tables->view().max_positions, 1);
  std::vector<float> first(tables->view().cos, tables->view().cos + 8);
  tables->ensure(5000, threads);
  RopeTable view = tables->view();
  EXPECT_EQ(view.max_positions, 5000);
  EXPECT_EQ(std::vector<float>(view.cos, view.cos + 8), first);
  RopeFrequencies frequencies = rope_frequencies(config, 16);
  for (int64_t position : {0, 1, 2047, 2048, 4999}) {
    for (size_t pair = 0; pair < 8; pair++) {
      double angle = static_cast<double>(position) * frequencies.inverse_frequencies[pair];
      EXPECT_NEAR(view.cos[static_cast<size_t>(position) * 8 + pair], std::cos(angle) * frequencies.attention_factor, 1e-3);
      EXPECT_NEAR(view.sin[static_cast<size_t>(position) * 8 + pair], std::sin(angle) * frequencies.attention_factor, 1e-3);
    }
  }
}

}  // namespace
}  // namespace baton
