#include "transfer/fabric/rail_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <vector>

namespace baton::transfer::fabric {
namespace {

constexpr int64_t kMs = 1'000'000;

/// Rails that deliver in order, each at its own rate.
struct World {
  struct Under {
    uint64_t bytes;
    int64_t done_ns;
  };
  std::vector<RailState> rails;
  std::vector<double> rates;
  std::vector<std::deque<Under>> queues;
  std::vector<int64_t> free_ns;
  int64_t now_ns = 0;

  explicit World(std::vector<double> bytes_per_s)
      : rails(bytes_per_s.size()), rates(std::move(bytes_per_s)), queues(rails.size()), free_ns(rails.size()) {}

  void post(uint32_t rail, uint64_t bytes) {
    rails[rail].meter.posted(bytes, now_ns);
    free_ns[rail] = std::max(free_ns[rail], now_ns) + static_cast<int64_t>(static_cast<double>(bytes) / rates[rail] * 1e9);
    queues[rail].push_back({bytes, free_ns[rail]});
  }
  /// To the next delivery; false when nothing is under way.
  bool step() {
    std::optional<size_t> next;
    for (size_t i = 0; i < queues.size(); ++i) {
      if (!queues[i].empty() && (!next || queues[i].front().done_ns < queues[*next].front().done_ns)) next = i;
    }
    if (!next) return false;
    now_ns = std::max(now_ns, queues[*next].front().done_ns);
    rails[*next].meter.delivered(queues[*next].front().bytes, now_ns);
    rails[*next].probing = false;
    queues[*next].pop_front();
    return true;
  }
  /// Bytes per second of one transfer.
  double transfer(uint64_t messages, uint64_t bytes) {
    const int64_t start_ns = now_ns;
    for (uint64_t left = messages; left > 0;) {
      auto rail = choose_rail(rails, bytes, {});
      if (rail) {
        post(*rail, bytes);
        --left;
      } else {
        EXPECT_TRUE(step());
      }
    }
    while (step()) {
    }
    return static_cast<double>(messages * bytes) * 1e9 / static_cast<double>(now_ns - start_ns);
  }
};

TEST(RailSchedule, EqualRailsAddUp) {
  World world({125e6, 125e6, 125e6, 125e6});
  world.transfer(64, 256 << 10);
  EXPECT_GT(world.transfer(1000, 256 << 10), 0.97 * 500e6);
}

TEST(RailSchedule, UnevenRailsGetWhatTheyDeliver) {
  World world({50e6, 50e6, 50e6, 12.5e6});
  EXPECT_GT(world.transfer(400, 256 << 10), 0.90 * 162.5e6) << "with rates unknown at first";
  EXPECT_GT(world.transfer(400, 256 << 10), 0.95 * 162.5e6);
}

TEST(RailSchedule, ARateThatChangesIsFollowed) {
  World world({50e6, 50e6});
  world.transfer(200, 256 << 10);
  world.rates[1] = 5e6;
  world.transfer(200, 256 << 10);
  EXPECT_GT(world.transfer(400, 256 << 10), 0.90 * 55e6);
  world.rates[1] = 50e6;
  world.transfer(400, 256 << 10);
  EXPECT_GT(world.transfer(400, 256 << 10), 0.90 * 100e6);
}

TEST(RailSchedule, WindowsAreBounded) {
  std::vector<RailState> rails(2);
  RailWindow window{.max_messages = 3, .max_bytes = 1 << 20};
  int posted = 0;
  while (auto rail = choose_rail(rails, 4096, window)) {
    rails[*rail].meter.posted(4096, 0);
    ASSERT_LE(++posted, 6);
  }
  EXPECT_EQ(posted, 6);
  // One that is larger than any window still goes, alone.
  std::vector<RailState> one(1);
  EXPECT_TRUE(choose_rail(one, 8 << 20, window).has_value());
  one[0].meter.posted(8 << 20, 0);
  EXPECT_FALSE(choose_rail(one, 1, window).has_value());
}

TEST(RailSchedule, ARailThatIsOutGetsNothingAndAProbeGetsOne) {
  std::vector<RailState> rails(2);
  rails[0].usable = false;
  rails[1].probing = true;
  ASSERT_EQ(choose_rail(rails, 4096, {}), 1u);
  rails[1].meter.posted(4096, 0);
  EXPECT_FALSE(choose_rail(rails, 4096, {}).has_value());
  EXPECT_FALSE(choose_rail({}, 4096, {}).has_value());
}

TEST(RailSchedule, AStallIsOneRailsOnlyIfAnotherWorks) {
  std::vector<RailState> rails(2);
  rails[0].meter.posted(4096, 0);
  rails[1].meter.posted(4096, 0);
  EXPECT_FALSE(find_stalled_rail(rails, 10'000 * kMs).has_value()) << "the peer stands still";
  rails[1].meter.delivered(4096, 590 * kMs);
  EXPECT_EQ(find_stalled_rail(rails, 600 * kMs), 0u) << "the other is idle";
  EXPECT_FALSE(find_stalled_rail(rails, 400 * kMs).has_value()) << "too early";
  rails[1].meter.posted(4096, 600 * kMs);
  EXPECT_EQ(find_stalled_rail(rails, 700 * kMs), 0u) << "the other works";
  EXPECT_FALSE(find_stalled_rail(rails, 900 * kMs).has_value()) << "now both are silent";
}

TEST(RailSchedule, AProbeIsGivenUpSooner) {
  std::vector<RailState> rails(2);
  rails[0].probing = true;
  rails[0].meter.posted(4096, 0);
  EXPECT_FALSE(find_stalled_rail(rails, 100 * kMs).has_value());
  EXPECT_EQ(find_stalled_rail(rails, 200 * kMs), 0u);
}

TEST(RailSchedule, ASlowRailIsNotAStalledOne) {
  World world({100e6, 1e6});
  world.transfer(100, 256 << 10);
  const int64_t start_ns = world.now_ns;
  world.post(1, 256 << 10);  // takes 262 ms
  world.post(1, 256 << 10);
  world.post(1, 256 << 10);
  for (int64_t ms = 0; ms < 780; ms += 10) {
    world.now_ns = start_ns + ms * kMs;
    while (!world.queues[1].empty() && world.queues[1].front().done_ns <= world.now_ns) {
      world.rails[1].meter.delivered(world.queues[1].front().bytes, world.queues[1].front().done_ns);
      world.queues[1].pop_front();
    }
    EXPECT_FALSE(find_stalled_rail(world.rails, world.now_ns).has_value()) << ms;
  }
}

TEST(RailSchedule, ResetForgetsTheRateAndKeepsTheTotal) {
  RailMeter meter;
  for (int i = 1; i <= 100; ++i) {
    meter.posted(1000, i * kMs);
    meter.delivered(1000, (i + 1) * kMs);
  }
  EXPECT_GT(meter.bytes_per_s(), 0);
  meter.posted(5, 0);
  meter.reset();
  EXPECT_EQ(meter.bytes_per_s(), 0);
  EXPECT_EQ(meter.outstanding_messages(), 0u);
  EXPECT_EQ(meter.delivered_bytes(), 100'000u);
}

}  // namespace
}  // namespace baton::transfer::fabric
