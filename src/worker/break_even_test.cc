#include "worker/break_even.h"

#include <gtest/gtest.h>

namespace baton::worker {
namespace {

TEST(BreakEven, AFixedValueStaysFixed) {
  BreakEven fixed(100);
  for (int i = 0; i < 20; ++i) fixed.observe(1.0, 0, 0.1, 1000);
  EXPECT_EQ(fixed.tokens(), 100);
  EXPECT_EQ(BreakEven(0).tokens(), 0);
}

TEST(BreakEven, LearnsOverheadTimesSpeed) {
  BreakEven learned(BreakEven::kMeasured);
  for (int i = 0; i < 7; ++i) learned.observe(0.110, 0.005, 0.100, 5000);
  EXPECT_EQ(learned.tokens(), BreakEven::kUnmeasured) << "too few to believe";
  // 5 ms of overhead at 50,000 tokens/s.
  learned.observe(0.110, 0.005, 0.100, 5000);
  EXPECT_NEAR(learned.tokens(), 250, 1);
  learned.observe(9.0, 0, 0.001, 5000);  // one that was held up does not count for much
  EXPECT_NEAR(learned.tokens(), 250, 1);
}

TEST(BreakEven, IsBounded) {
  BreakEven fast(BreakEven::kMeasured), slow(BreakEven::kMeasured);
  for (int i = 0; i < 40; ++i) {
    fast.observe(0.1, 0.0, 0.1, 100000);
    slow.observe(60, 0, 0.01, 100000);
    slow.observe(1, 0, 0, 0);  // nothing was computed: says nothing
  }
  EXPECT_EQ(fast.tokens(), BreakEven::kMin);
  EXPECT_EQ(slow.tokens(), BreakEven::kMax);
}

}  // namespace
}  // namespace baton::worker
