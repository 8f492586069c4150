#include "ops/bench_serve.h"

#include <gtest/gtest.h>

#include "ops/svg.h"

namespace baton::ops {
namespace {

TEST(Describe, InterpolatesBetweenRanks) {
  Distribution d = describe({4, 1, 3, 2});
  EXPECT_EQ(d.count, 4u);
  EXPECT_DOUBLE_EQ(d.mean, 2.5);
  EXPECT_DOUBLE_EQ(d.p50, 2.5);
  EXPECT_DOUBLE_EQ(d.p90, 3.7);
  EXPECT_DOUBLE_EQ(d.max, 4);
  EXPECT_EQ(describe({}).count, 0u);
  EXPECT_DOUBLE_EQ(describe({7}).p99, 7);
}

BenchServeResult result_of(size_t requests, double wall_s) {
  BenchServeResult result;
  result.model = "<m>";
  result.wall_s = wall_s;
  for (size_t i = 0; i < requests; ++i) {
    RequestRecord record;
    record.start_s = wall_s * static_cast<double>(i) / static_cast<double>(requests);
    record.first_s = record.start_s + 0.01 + 0.0001 * static_cast<double>(i % 100);
    record.end_s = record.first_s + 0.02;
    record.gaps_s = {0.01f, 0.01f};
    record.ok = true;
    result.records.push_back(std::move(record));
  }
  return result;
}

TEST(BenchServeHtml, StaysSmallHoweverLongTheRun) {
  std::string small = bench_serve_html(result_of(10, 1));
  EXPECT_NE(small.find("&lt;m&gt;"), std::string::npos);
  EXPECT_EQ(small.find("http://www.example"), std::string::npos);
  std::string large = bench_serve_html(result_of(100'000, 36'000));
  EXPECT_LT(large.size(), 400'000u);
  EXPECT_EQ(large.find("nan"), std::string::npos);
  EXPECT_FALSE(bench_serve_html(result_of(0, 0)).empty());
}

TEST(BenchServeJson, HasEveryFigure) {
  std::string json = bench_serve_json(result_of(3, 1));
  for (const char* key : {"\"ttft_ms\"", "\"itl_ms\"", "\"tpot_ms\"", "\"e2e_ms\"", "\"goodput_per_s\"", "\"errors\""}) {
    EXPECT_NE(json.find(key), std::string::npos) << key;
  }
}

TEST(BenchServeOptions, RefusesWhatMakesNoSense) {
  BenchServeOptions options;
  EXPECT_TRUE(options.validate().ok());
  options.shared_prefix = options.isl + 1;
  EXPECT_NE(options.validate().message().find("--shared-prefix"), std::string::npos);
}

}  // namespace
}  // namespace baton::ops
