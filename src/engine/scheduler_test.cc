#include "engine/scheduler.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <string>

namespace baton {
namespace {

/// "run 0:1 2:16 | admit 0:8 | grow 0 | preempt 3 | blocked"
std::string show(const Plan& plan) {
  std::string text;
  const auto slices = [&](const char* name, const std::vector<Plan::Slice>& list) {
    if (list.empty()) return;
    text += text.empty() ? name : std::string(" | ") + name;
    for (const Plan::Slice& slice : list) text += fmt::format(" {}:{}", slice.index, slice.rows);
  };
  const auto indices = [&](const char* name, const std::vector<int32_t>& list) {
    if (list.empty()) return;
    text += text.empty() ? name : std::string(" | ") + name;
    for (int32_t index : list) text += fmt::format(" {}", index);
  };
  slices("run", plan.running);
  slices("admit", plan.admitted);
  indices("grow", plan.grown);
  indices("preempt", plan.preempted);
  if (plan.blocked) text += text.empty() ? "blocked" : " | blocked";
  return text;
}

RunningView decoding(int32_t computed, int32_t blocks, int32_t releasable = 0) {
  return {.tokens = computed + 1, .computed = computed, .blocks = blocks, .preemptible = true,
          .releasable_blocks = releasable};
}
RunningView prefilling(int32_t tokens, int32_t computed, bool preemptible = true) {
  return {.tokens = tokens, .computed = computed, .blocks = (tokens + 15) / 16, .preemptible = preemptible,
          .releasable_blocks = (tokens + 15) / 16};
}

struct Case {
  const char* name;
  std::vector<RunningView> running;
  std::vector<WaitingView> waiting;
  int64_t available;
  const char* expected;
  int32_t budget = 64;
  int32_t reserved = 0;
  int32_t max_sequences = 8;
  int64_t total = 100;
};

TEST(Scheduler, Table) {
  const Case cases[] = {
      {"nothing to do", {}, {}, 10, ""},
      {"one prompt that fits", {}, {{.tokens = 40}}, 10, "admit 0:40"},
      {"a long prompt is cut at a block boundary", {}, {{.tokens = 100}}, 10, "admit 0:48", 50},
      {"the next chunk, and its end", {prefilling(100, 48)}, {}, 4, "run 0:48", 50},
      {"the last chunk ends where the prompt does", {prefilling(100, 96)}, {}, 4, "run 0:4", 50},
      {"decodes come first", {prefilling(100, 0), decoding(20, 2)}, {}, 10, "run 1:1 0:48", 50},
      {"what the decodes leave is less than a block", {prefilling(100, 0), decoding(20, 2)}, {}, 10, "run 1:1", 16},
      {"prefills in order of arrival", {prefilling(100, 80), prefilling(40, 0)}, {}, 10, "run 0:20 1:32", 55},
      {"nobody overtakes a prefill that has to wait", {prefilling(100, 0), prefilling(4, 0)}, {}, 10, "", 15},
      {"a decode grows on the boundary", {decoding(32, 2), decoding(33, 3)}, {}, 1, "run 0:1 1:1 | grow 0"},
      {"who ends with the step under way takes no part", {{.tokens = 32, .computed = 32, .blocks = 2}, prefilling(40, 0)}, {}, 10, "run 1:40"},
      {"a cached prefix is not computed", {}, {{.tokens = 100, .cached_tokens = 96, .cached_idle_blocks = 6}}, 10,
       "admit 0:4"},
      {"first come first served", {}, {{.tokens = 20}, {.tokens = 20}}, 10, "admit 0:20 1:20"},
      {"the queue's head keeps its place", {}, {{.tokens = 320}, {.tokens = 16}}, 10, "blocked"},
      {"idle cached blocks are counted once", {}, {{.tokens = 160, .cached_tokens = 80, .cached_idle_blocks = 5}}, 9,
       "blocked"},
      {"shared cached blocks cost nothing", {}, {{.tokens = 160, .cached_tokens = 80}}, 5, "admit 0:64"},
      {"out of tokens is not blocked", {decoding(20, 2)}, {{.tokens = 20}}, 10, "run 0:1", 1},
      {"out of places is", {decoding(20, 2)}, {{.tokens = 20}}, 10, "run 0:1 | blocked", 64, 0, 1},
      {"reservations take places", {}, {{.tokens = 20}}, 10, "blocked", 64, 2, 2},
      {"room to grow is kept for those inside", {decoding(20, 2)}, {{.tokens = 32}}, 2, "run 0:1 | blocked"},
      {"the latest arrival is preempted", {decoding(32, 2, 2), decoding(20, 2, 2), decoding(7, 1, 1)}, {{.tokens = 8}}, 0,
       "run 0:1 1:1 | grow 0 | preempt 2 | blocked"},
      {"as many as it takes", {decoding(32, 2, 2), decoding(20, 2, 0), decoding(7, 1, 0)}, {}, 0,
       "preempt 2 1 0 | blocked"},
      {"never one that is being sent", {decoding(32, 2, 2), decoding(20, 2, 2), prefilling(100, 48, false)}, {}, 0,
       "run 0:1 2:48 | grow 0 | preempt 1 | blocked", 50},
      {"its own blocks at last", {prefilling(100, 48, false), decoding(32, 2, 2)}, {}, 0,
       "run 0:48 | preempt 1 | blocked", 50},
      {"a prefill is preempted too", {decoding(32, 2, 2), prefilling(100, 48)}, {}, 0, "run 0:1 | grow 0 | preempt 1 | blocked"},
      {"blocks of a victim serve several", {decoding(32, 2, 2), decoding(48, 3, 3), decoding(40, 3, 3)}, {}, 0,
       "run 0:1 1:1 | grow 0 1 | preempt 2 | blocked"},
  };
  for (const Case& c : cases) {
    SchedulerInput input;
    input.running = c.running;
    input.waiting = c.waiting;
    input.available_blocks = c.available;
    input.total_blocks = c.total;
    input.reserved = c.reserved;
    input.limits = {.block_tokens = 16, .max_batched_tokens = c.budget, .max_sequences = c.max_sequences};
    Plan plan;
    schedule(input, &plan);
    EXPECT_EQ(show(plan), c.expected) << c.name;
    schedule(input, &plan);  // pure: the same again
    EXPECT_EQ(show(plan), c.expected) << c.name;
  }
}

TEST(Scheduler, PlacesLeaveRoomForABlockOfPrefill) {
  EXPECT_EQ(max_sequences(256, 512, 16), 256);
  EXPECT_EQ(max_sequences(256, 64, 16), 48);
  EXPECT_EQ(max_sequences(256, 16, 16), 1);
}

}  // namespace
}  // namespace baton
