#include "transfer/sim/sim_fabric.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "base/log.h"
#include "base/random.h"

namespace baton::transfer {
namespace {

using ::testing::HasSubstr;

/// Agents on one simulated network and one clock, driven by one thread: as the simulation of the worker
/// does it.
class SimTest : public ::testing::Test {
 protected:
  static constexpr uint32_t kBlocks = 32;
  static constexpr uint64_t kStride = 512;

  struct Node {
    std::vector<std::byte> memory = std::vector<std::byte>(kBlocks * kStride);
    std::unique_ptr<Agent> agent;
    PoolId pool{};
    bool is_all(std::byte value) const {
      return std::all_of(memory.begin(), memory.end(), [value](std::byte b) { return b == value; });
    }
  };

  SimTest() { set_log_level(LogLevel::kError); }

  static SimOptions slow() {
    SimOptions options;
    options.min_delay_ns = 1'000'000;
    options.max_delay_ns = 5'000'000;
    options.reorder = true;
    return options;
  }

  std::unique_ptr<Node> make(SimFabric& fabric, const std::string& name) {
    auto node = std::make_unique<Node>();
    AgentConfig config;
    config.name = name;
    config.manual_progress = true;
    config.stall_timeout_ms = 100;
    auto agent = create_sim_agent(fabric, config, clock_);
    EXPECT_TRUE(agent.ok()) << agent.status().to_string();
    node->agent = std::move(*agent);
    node->pool = *node->agent->add_pool({*node->agent->register_memory(node->memory, MemoryKind::kHost), kStride, kBlocks});
    return node;
  }
  BlockWrite everything(Tag tag = Tag::kNone) {
    BlockWrite write;
    for (uint32_t i = 0; i < kBlocks; ++i) write.blocks.push_back({i, kBlocks - 1 - i});
    write.length_bytes = kStride;
    write.tag = tag;
    return write;
  }
  /// Until nothing happens at this instant.
  void settle(std::initializer_list<Node*> nodes) {
    size_t count = 1;
    while (count > 0) {
      count = 0;
      for (Node* node : nodes) count += node->agent ? node->agent->progress() : 0;
    }
  }
  /// Jumps from event to event, `limit_ms` of simulated time at most.
  void run(SimFabric& fabric, std::initializer_list<Node*> nodes, int64_t limit_ms = 10'000) {
    int64_t end_ns = clock_.now_ns() + limit_ms * 1'000'000;
    while (true) {
      settle(nodes);
      int64_t next_ns = std::min(fabric.next_event_ns(), end_ns);
      if (fabric.next_event_ns() == INT64_MAX || clock_.now_ns() >= end_ns) break;
      clock_.advance_ns(std::max<int64_t>(next_ns - clock_.now_ns(), 0));
    }
    settle(nodes);
  }
  ManualClock clock_;
};

TEST_F(SimTest, OneThreadDrivesItAndTimeIsVirtual) {
  SimFabric fabric(slow());
  auto sender = make(fabric, "sender");
  auto receiver = make(fabric, "receiver");
  Random random(1);
  for (std::byte& byte : sender->memory) byte = static_cast<std::byte>(random());
  Peer peer = *sender->agent->connect(receiver->agent->metadata());
  Tag tag = *receiver->agent->open_inbox();
  Transfer transfer = *peer.write(everything(tag));
  int64_t complete_ns = 0;
  ASSERT_TRUE(receiver->agent->expect(tag, transfer.messages(), [&] { complete_ns = clock_.now_ns(); }).ok());
  settle({sender.get(), receiver.get()});
  EXPECT_EQ(receiver->agent->arrived(tag), 0u);
  int64_t start_ns = clock_.now_ns();
  run(fabric, {sender.get(), receiver.get()});
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status(), Status());
  EXPECT_GE(complete_ns - start_ns, 1'000'000);
  for (uint32_t i = 0; i < kBlocks; ++i) {
    EXPECT_EQ(std::memcmp(sender->memory.data() + i * kStride,
                          receiver->memory.data() + (kBlocks - 1 - i) * kStride, kStride), 0);
  }
}

TEST_F(SimTest, TheSameSeedGivesTheSameRun) {
  auto once = [this](uint64_t seed) {
    SimOptions options = slow();
    options.seed = seed;
    options.again = 0.3;
    SimFabric fabric(options);
    auto sender = make(fabric, "sender");
    auto receiver = make(fabric, "receiver");
    Peer peer = *sender->agent->connect(receiver->agent->metadata());
    int64_t start_ns = clock_.now_ns();
    Transfer transfer = *peer.write(everything());
    run(fabric, {sender.get(), receiver.get()});
    EXPECT_TRUE(transfer.done() && transfer.status().ok());
    return std::pair(clock_.now_ns() - start_ns, sender->agent->stats().retries);
  };
  EXPECT_EQ(once(5), once(5));
  EXPECT_NE(once(5), once(6));
  EXPECT_GT(once(5).second, 0u);
}

TEST_F(SimTest, CountsMayComeBeforeOtherMessagesData) {
  SimFabric fabric(slow());
  auto sender = make(fabric, "sender");
  auto receiver = make(fabric, "receiver");
  std::fill(sender->memory.begin(), sender->memory.end(), std::byte{1});
  Peer peer = *sender->agent->connect(receiver->agent->metadata());
  Tag first = *receiver->agent->open_inbox();
  Tag second = *receiver->agent->open_inbox();
  BlockWrite early = everything(first), late = everything(second);
  Transfer a = *peer.write(early);
  Transfer b = *peer.write(late);
  bool overtaken = false;
  ASSERT_TRUE(receiver->agent->expect(second, 1, [&] {
    overtaken = receiver->agent->arrived(first) < a.messages();
  }).ok());
  run(fabric, {sender.get(), receiver.get()});
  EXPECT_TRUE(overtaken) << "the fabric is expected to reorder";
  EXPECT_TRUE(a.done() && b.done());
}

TEST_F(SimTest, AStalledPeerMeetsTheDeadlineUnsettledAndOnlyAFenceStopsTheBytes) {
  SimFabric fabric(slow());
  auto sender = make(fabric, "sender");
  auto receiver = make(fabric, "receiver");
  std::fill(sender->memory.begin(), sender->memory.end(), std::byte{1});
  for (bool fence : {false, true}) {
    Peer peer = *sender->agent->connect(receiver->agent->metadata());
    std::fill(receiver->memory.begin(), receiver->memory.end(), std::byte{0});
    BlockWrite write = everything();
    write.deadline = Deadline::after_ms(clock_, 50);
    Status told;
    Transfer transfer = *peer.write(write, [&](const Status& status) { told = status; });
    fabric.stall(receiver->agent->epoch());
    run(fabric, {sender.get()});
    EXPECT_FALSE(transfer.done());
    clock_.advance_ms(60);
    settle({sender.get()});
    EXPECT_FALSE(transfer.done()) << "something is under way: wait for a sign of life";
    clock_.advance_ms(100);
    settle({sender.get()});
    ASSERT_TRUE(transfer.done());
    EXPECT_EQ(transfer.status().code(), StatusCode::kDeadlineExceeded) << transfer.status().to_string();
    EXPECT_EQ(told, transfer.status());
    EXPECT_FALSE(transfer.settled());
    EXPECT_FALSE(peer.alive());
    std::fill(sender->memory.begin(), sender->memory.end(), std::byte{2});  // ours again

    if (fence) {
      ASSERT_TRUE(receiver->agent->fence(sender->agent->epoch()).ok());
    }
    fabric.resume(receiver->agent->epoch());
    run(fabric, {sender.get(), receiver.get()});
    // The unforgivable write, and its cure.
    EXPECT_TRUE(receiver->is_all(fence ? std::byte{0} : std::byte{1}));
    std::fill(sender->memory.begin(), sender->memory.end(), std::byte{1});
  }
}

TEST_F(SimTest, DeathIsNoticedAndNamed) {
  SimFabric fabric(slow());
  auto sender = make(fabric, "sender");
  auto victim = make(fabric, "victim");
  auto other = make(fabric, "other");
  Peer to_victim = *sender->agent->connect(victim->agent->metadata());
  Peer to_other = *sender->agent->connect(other->agent->metadata());
  Transfer bad = *to_victim.write(everything());
  Transfer good = *to_other.write(everything());
  settle({sender.get(), victim.get(), other.get()});
  fabric.kill(victim->agent->epoch());
  victim.reset();
  run(fabric, {sender.get(), other.get()});
  ASSERT_TRUE(bad.done() && good.done());
  EXPECT_EQ(bad.status().code(), StatusCode::kUnavailable);
  EXPECT_THAT(bad.status().message(), HasSubstr("victim"));
  EXPECT_EQ(good.status(), Status());
  EXPECT_EQ(sender->agent->stats().failed_transfers, 1u);
  // Idle peers notice as well.
  Peer idle = *other->agent->connect(sender->agent->metadata());
  fabric.kill(sender->agent->epoch());
  run(fabric, {other.get()});
  EXPECT_FALSE(idle.alive());
}

TEST_F(SimTest, ADeadWritersBytesStopAtTheFence) {
  SimFabric fabric(slow());
  auto writer = make(fabric, "writer");
  auto receiver = make(fabric, "receiver");
  std::fill(writer->memory.begin(), writer->memory.end(), std::byte{1});
  Peer peer = *writer->agent->connect(receiver->agent->metadata());
  Transfer transfer = *peer.write(everything());
  settle({writer.get(), receiver.get()});
  Epoch epoch = writer->agent->epoch();
  fabric.kill(epoch);
  writer.reset();
  ASSERT_TRUE(transfer.done());
  ASSERT_TRUE(receiver->agent->fence(epoch).ok());
  run(fabric, {receiver.get()});
  EXPECT_TRUE(receiver->is_all(std::byte{0}));
}

TEST_F(SimTest, CancelWaitsForWhatIsUnderWay) {
  SimFabric fabric(slow());
  auto sender = make(fabric, "sender");
  auto receiver = make(fabric, "receiver");
  Peer peer = *sender->agent->connect(receiver->agent->metadata());
  Transfer posted = *peer.write(everything());
  settle({sender.get()});
  Transfer unposted = *peer.write(everything());
  posted.cancel();
  unposted.cancel();
  sender->agent->progress();
  EXPECT_FALSE(posted.done());
  EXPECT_TRUE(unposted.done());
  run(fabric, {sender.get(), receiver.get()});
  ASSERT_TRUE(posted.done());
  EXPECT_EQ(posted.status().code(), StatusCode::kCancelled);
  EXPECT_TRUE(posted.settled());
  EXPECT_TRUE(peer.alive());
  EXPECT_EQ(peer.stats().cancelled, 2u);
}

}  // namespace
}  // namespace baton::transfer
