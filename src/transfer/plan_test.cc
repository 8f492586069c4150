#include "transfer/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "base/random.h"

namespace baton::transfer {
namespace {

using ::testing::ElementsAre;

BlockWrite write_of(std::vector<BlockPair> blocks, uint64_t offset, uint64_t length) {
  BlockWrite write;
  write.blocks = std::move(blocks);
  write.offset_bytes = offset;
  write.length_bytes = length;
  return write;
}

TEST(PlanWrite, NeighboursOnBothSidesBecomeOnePiece) {
  WritePlan plan = plan_write(write_of({{1, 5}, {2, 6}, {3, 7}}, 0, 100), 100, 100, {});
  EXPECT_THAT(plan.segments, ElementsAre(Segment{100, 500, 300}));
  EXPECT_THAT(plan.messages, ElementsAre(PlannedMessage{0, 1, 300}));
  EXPECT_EQ(plan.bytes, 300u);
}

TEST(PlanWrite, AGapOnOneSideKeepsThemApart) {
  EXPECT_EQ(plan_write(write_of({{1, 5}, {2, 7}}, 0, 100), 100, 100, {}).segments.size(), 2u);
  EXPECT_EQ(plan_write(write_of({{1, 5}, {3, 6}}, 0, 100), 100, 100, {}).segments.size(), 2u);
  EXPECT_EQ(plan_write(write_of({{1, 5}, {2, 6}}, 0, 99), 100, 100, {}).segments.size(), 2u);
  EXPECT_EQ(plan_write(write_of({{1, 5}, {2, 6}}, 0, 100), 100, 200, {}).segments.size(), 2u);
  EXPECT_EQ(plan_write(write_of({{2, 6}, {1, 5}}, 0, 100), 100, 100, {}).segments.size(), 2u);
}

TEST(PlanWrite, LongPiecesAreCut) {
  PlanLimits limits{.max_message_bytes = 250};
  WritePlan plan = plan_write(write_of({{0, 0}, {1, 1}, {2, 2}}, 0, 200), 200, 200, limits);
  EXPECT_THAT(plan.segments, ElementsAre(Segment{0, 0, 250}, Segment{250, 250, 250}, Segment{500, 500, 100}));
  EXPECT_EQ(plan.messages.size(), 3u);
}

TEST(PlanWrite, SmallPiecesSharePackets) {
  PlanLimits limits{.max_message_bytes = 1000, .max_segments = 4, .max_packed_segment_bytes = 300};
  std::vector<BlockPair> pairs;
  for (uint32_t i = 0; i < 10; ++i) pairs.push_back({2 * i, 3 * i});
  WritePlan plan = plan_write(write_of(pairs, 10, 300), 400, 400, limits);
  EXPECT_THAT(plan.messages, ElementsAre(PlannedMessage{0, 3, 900}, PlannedMessage{3, 3, 900},
                                         PlannedMessage{6, 3, 900}, PlannedMessage{9, 1, 300}));
  plan = plan_write(write_of(pairs, 10, 301), 400, 400, limits);
  EXPECT_EQ(plan.messages.size(), 10u);
}

TEST(PlanWrite, EveryByteIsMovedOnceWhateverTheLimits) {
  Random random(5);
  for (int round = 0; round < 300; ++round) {
    uint64_t stride = 1 + random.below(64);
    uint64_t offset = random.below(stride);
    uint64_t length = 1 + random.below(stride - offset);
    PlanLimits limits{.max_message_bytes = 1 + random.below(200),
                      .max_segments = static_cast<uint32_t>(1 + random.below(5)),
                      .max_packed_segment_bytes = random.below(100)};
    std::vector<BlockPair> pairs;
    std::map<uint64_t, uint64_t> expected;  // remote byte -> local byte
    uint32_t local = 0, remote = 0;
    for (uint64_t i = random.below(20); i > 0; --i) {
      local += random.chance(0.7) ? 1 : static_cast<uint32_t>(1 + random.below(3));
      remote += random.chance(0.7) ? 1 : static_cast<uint32_t>(1 + random.below(3));
      pairs.push_back({local, remote});
      for (uint64_t b = 0; b < length; ++b) expected[remote * stride + offset + b] = local * stride + offset + b;
    }
    WritePlan plan = plan_write(write_of(pairs, offset, length), stride, stride, limits);
    std::map<uint64_t, uint64_t> moved;
    uint32_t next = 0;
    for (const PlannedMessage& message : plan.messages) {
      ASSERT_EQ(message.first_segment, next);
      ASSERT_LE(message.segment_count, limits.max_segments);
      ASSERT_LE(message.bytes, limits.max_message_bytes);
      uint64_t bytes = 0;
      for (; next < message.first_segment + message.segment_count; ++next) {
        const Segment& segment = plan.segments[next];
        bytes += segment.bytes;
        for (uint64_t b = 0; b < segment.bytes; ++b) {
          ASSERT_TRUE(moved.emplace(segment.remote_offset + b, segment.local_offset + b).second);
        }
      }
      ASSERT_EQ(bytes, message.bytes);
    }
    ASSERT_EQ(next, plan.segments.size());
    ASSERT_EQ(moved, expected);
    ASSERT_EQ(plan.bytes, expected.size());
  }
}

TEST(Plan, BlocksOfATransportThatTakesThemStayBlocks) {
  PlanLimits limits{.max_message_bytes = 1000, .max_segments = 4, .max_packed_segment_bytes = 1000,
                    .min_listed_bytes = 100, .max_listed_bytes = 900};
  std::vector<BlockPair> pairs;
  for (uint32_t i = 0; i < 10; ++i) pairs.push_back({i, i + 1});
  WritePlan plan = plan_write(write_of(pairs, 10, 200), 400, 500, limits);
  EXPECT_TRUE(plan.segments.empty());
  EXPECT_EQ(plan.blocks.size(), 10u);
  EXPECT_EQ(plan.bytes, 2000u);
  EXPECT_EQ(plan.range.remote_stride_bytes, 500u);
  EXPECT_THAT(plan.messages, ElementsAre(PlannedMessage{0, 4, 800}, PlannedMessage{4, 4, 800}, PlannedMessage{8, 2, 400}));
  plan = plan_write(write_of(pairs, 10, 400), 400, 500, limits);
  EXPECT_THAT(plan.messages, ElementsAre(PlannedMessage{0, 2, 800}, PlannedMessage{2, 2, 800}, PlannedMessage{4, 2, 800},
                                         PlannedMessage{6, 2, 800}, PlannedMessage{8, 2, 800}));
  // Too small, and too large for one message.
  EXPECT_TRUE(plan_write(write_of(pairs, 0, 99), 400, 500, limits).blocks.empty());
  EXPECT_TRUE(plan_write(write_of(pairs, 0, 901), 2000, 2000, limits).blocks.empty());
  EXPECT_TRUE(plan_write(write_of({}, 0, 200), 400, 500, limits).messages.empty());
  EXPECT_EQ(bounds_of(pairs).local, 9u);
  EXPECT_EQ(bounds_of(pairs).remote, 10u);
}

}  // namespace
}  // namespace baton::transfer
