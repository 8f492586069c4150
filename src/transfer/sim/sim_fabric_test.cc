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

  std::unique_ptr<Node> make(SimFabric& fabric, const std::string& name, bool integrity = false) {
    auto node = std::make_unique<Node>();
    AgentConfig config;
    config.integrity = integrity;
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

/// Integrity mode in slow motion: `reach_check` stops where all data is delivered and its check is not answered.
class SimIntegrityTest : public SimTest {
 protected:
  static constexpr LogLevel kQuiet = static_cast<LogLevel>(static_cast<int>(LogLevel::kError) + 1);

  void open(SimOptions options = slow()) {
    peer_ = {};  // all of an earlier fabric goes before it
    sender_.reset();
    receiver_.reset();
    fabric_ = std::make_unique<SimFabric>(options);
    sender_ = make(*fabric_, "sender", true);
    receiver_ = make(*fabric_, "receiver");
    Random random(3);
    for (std::byte& byte : sender_->memory) byte = static_cast<std::byte>(random());
    peer_ = *sender_->agent->connect(receiver_->agent->metadata());
    tag_ = *receiver_->agent->open_inbox();
  }
  Transfer write(int64_t timeout_ms = 1000) {
    BlockWrite write = everything(tag_);
    write.deadline = Deadline::after_ms(clock_, timeout_ms);
    Transfer transfer = *peer_.write(write);
    (void)receiver_->agent->expect(tag_, transfer.messages(), [this] { complete_ = true; });
    return transfer;
  }
  /// One event after the other, until `is_true`.
  template <typename Condition>
  bool step_until(Condition is_true) {
    for (int i = 0; i < 10'000; ++i) {
      settle({sender_.get(), receiver_.get()});
      if (is_true()) return true;
      if (fabric_->next_event_ns() == INT64_MAX) return false;
      clock_.advance_ns(std::max<int64_t>(fabric_->next_event_ns() - clock_.now_ns(), 0));
    }
    return false;
  }
  bool reach_check(const Transfer& transfer) {
    // Each message is one event for its delivery and one for its completion; the check is the event after those.
    return step_until([&] { return sender_->agent->stats().messages_sent == transfer.messages() - 1; }) && !transfer.done();
  }
  void run_out() { run(*fabric_, {sender_.get(), receiver_.get()}); }

  std::unique_ptr<SimFabric> fabric_;
  std::unique_ptr<Node> sender_, receiver_;
  Peer peer_;
  Tag tag_{};
  bool complete_ = false;
};

TEST_F(SimIntegrityTest, ARightTransferCountsOneMoreAndOnlyAfterTheCheck) {
  open();
  Transfer transfer = write();
  EXPECT_EQ(transfer.messages(), kBlocks + 1);
  ASSERT_TRUE(reach_check(transfer));
  EXPECT_EQ(receiver_->agent->arrived(tag_), kBlocks);
  EXPECT_FALSE(complete_);
  run_out();
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status(), Status());
  EXPECT_TRUE(complete_);
  EXPECT_EQ(receiver_->agent->arrived(tag_), kBlocks + 1);
  EXPECT_EQ(receiver_->agent->stats().checked_blocks, kBlocks);
  EXPECT_EQ(receiver_->agent->stats().corrupt_blocks, 0u);
}

TEST_F(SimIntegrityTest, AnUntaggedWriteIsCheckedAsWell) {
  open();
  Transfer transfer = *peer_.write(everything());
  EXPECT_EQ(transfer.messages(), 0u);
  run_out();
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status(), Status());
  EXPECT_EQ(receiver_->agent->stats().checked_blocks, kBlocks);
  EXPECT_EQ(receiver_->agent->stats().messages_received, 0u);
}

TEST_F(SimIntegrityTest, AFlippedBitOfTheFabricIsFound) {
  SimOptions options = slow();
  options.corrupt = 0.1;
  open(options);
  set_log_level(kQuiet);
  Transfer transfer = write();
  run_out();
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status().code(), StatusCode::kDataLoss) << transfer.status().to_string();
  EXPECT_TRUE(transfer.settled());
  EXPECT_FALSE(complete_);
  uint64_t wrong = 0;
  for (uint32_t i = 0; i < kBlocks; ++i) {
    wrong += std::memcmp(sender_->memory.data() + i * kStride, receiver_->memory.data() + (kBlocks - 1 - i) * kStride, kStride) != 0 ? 1 : 0;
  }
  EXPECT_GT(wrong, 0u);
  EXPECT_EQ(receiver_->agent->stats().corrupt_blocks, wrong);
  EXPECT_THAT(transfer.status().message(), HasSubstr(fmt::format("{} of {} blocks", wrong, kBlocks)));
}

TEST_F(SimIntegrityTest, ASourceThatChangesUnderWayIsFound) {
  open();
  set_log_level(kQuiet);
  Transfer transfer = write();
  settle({sender_.get()});
  sender_->memory[5 * kStride + 77] ^= std::byte{1};  // posted, and not delivered
  run_out();
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status().code(), StatusCode::kDataLoss) << transfer.status().to_string();
  EXPECT_THAT(transfer.status().message(), HasSubstr(fmt::format("block {} of its pool 0", kBlocks - 1 - 5)));
  EXPECT_FALSE(complete_);
}

TEST_F(SimIntegrityTest, ACancelDuringTheCheckTakesItBack) {
  open();
  Transfer transfer = write();
  ASSERT_TRUE(reach_check(transfer));
  transfer.cancel();
  sender_->agent->progress();
  EXPECT_FALSE(transfer.done()) << "the peer may be reading";
  run_out();
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status().code(), StatusCode::kCancelled) << transfer.status().to_string();
  EXPECT_TRUE(transfer.settled());
  EXPECT_TRUE(peer_.alive());
  Transfer next = write();
  run_out();
  EXPECT_TRUE(next.done() && next.status().ok());
}

TEST_F(SimIntegrityTest, AStalledOwnerMeetsTheDeadlineAndNothingIsUnsettled) {
  open();
  Transfer transfer = write(50);
  ASSERT_TRUE(reach_check(transfer));
  fabric_->stall(receiver_->agent->epoch());
  run(*fabric_, {sender_.get()});
  clock_.advance_ms(60);
  settle({sender_.get()});
  EXPECT_FALSE(transfer.done());
  clock_.advance_ms(100);
  settle({sender_.get()});
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status().code(), StatusCode::kDeadlineExceeded) << transfer.status().to_string();
  EXPECT_THAT(transfer.status().message(), HasSubstr("the peer has not said that it is right"));
  EXPECT_TRUE(transfer.settled()) << "its bytes are all delivered";
  fabric_->resume(receiver_->agent->epoch());
  run_out();
  EXPECT_FALSE(complete_);
}

TEST_F(SimIntegrityTest, TheOwnersDeathDuringTheCheckIsNoticed) {
  open();
  Transfer transfer = write();
  ASSERT_TRUE(reach_check(transfer));
  fabric_->kill(receiver_->agent->epoch());
  receiver_->agent.reset();
  run(*fabric_, {sender_.get()});
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status().code(), StatusCode::kUnavailable) << transfer.status().to_string();
  EXPECT_TRUE(transfer.settled());
}

TEST_F(SimIntegrityTest, TheWritersDeathOrFenceDuringTheCheckCountsNothing) {
  for (bool fence : {false, true}) {
    open();
    set_log_level(kQuiet);
    Transfer transfer = write();
    ASSERT_TRUE(reach_check(transfer));
    if (fence) {
      ASSERT_TRUE(receiver_->agent->fence(sender_->agent->epoch()).ok());
    } else {
      fabric_->kill(sender_->agent->epoch());
      sender_->agent.reset();
    }
    std::fill(receiver_->memory.begin(), receiver_->memory.end(), std::byte{0});  // ours again
    run_out();
    EXPECT_TRUE(transfer.done() && !transfer.status().ok());
    EXPECT_FALSE(complete_);
    EXPECT_EQ(receiver_->agent->arrived(tag_), kBlocks);
    EXPECT_EQ(receiver_->agent->stats().checked_blocks, 0u);
    EXPECT_EQ(receiver_->agent->stats().corrupt_blocks, 0u);
  }
}

TEST_F(SimIntegrityTest, AClosedInboxEndsItsChecksUnread) {
  open();
  set_log_level(kQuiet);
  Transfer transfer = write();
  ASSERT_TRUE(reach_check(transfer));
  receiver_->agent->close_inbox(tag_);
  std::fill(receiver_->memory.begin(), receiver_->memory.end(), std::byte{0});  // ours again
  run_out();
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status(), Status()) << "as without integrity: nobody waits for it any more";
  EXPECT_EQ(receiver_->agent->stats().stray_messages, 1u);
  EXPECT_EQ(receiver_->agent->stats().checked_blocks, 0u);
}

TEST_F(SimIntegrityTest, ALargeCheckIsDoneInPiecesBetweenOtherWork) {
  constexpr uint64_t kLarge = 40u << 20;
  SimOptions options = slow();
  options.max_message_bytes = 4u << 20;
  SimFabric fabric(options);
  std::vector<std::byte> from(2 * kLarge, std::byte{1}), to(2 * kLarge);
  auto agent_with = [&](const char* name, std::vector<std::byte>& memory, bool integrity) {
    AgentConfig config;
    config.name = name;
    config.integrity = integrity;
    config.manual_progress = true;
    std::unique_ptr<Agent> agent = *create_sim_agent(fabric, config, clock_);
    EXPECT_TRUE(agent->add_pool({*agent->register_memory(memory, MemoryKind::kHost), kLarge, 2}).ok());
    return agent;
  };
  auto sender = agent_with("sender", from, true);
  auto receiver = agent_with("receiver", to, false);
  Peer peer = *sender->connect(receiver->metadata());
  Tag tag = *receiver->open_inbox();
  BlockWrite write;
  write.blocks = {{0, 1}, {1, 0}};
  write.length_bytes = kLarge;
  write.tag = tag;
  Transfer transfer = *peer.write(write);
  int busy_turns = 0;
  for (int i = 0; i < 100'000 && !transfer.done(); ++i) {
    sender->progress();
    const uint64_t before = receiver->arrived(tag);
    const size_t count = receiver->progress();
    if (count == 0) {
      if (fabric.next_event_ns() != INT64_MAX) clock_.advance_ns(std::max<int64_t>(fabric.next_event_ns() - clock_.now_ns(), 0));
    } else if (before == transfer.messages() - 1) {
      ++busy_turns;
    }
  }
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status(), Status());
  EXPECT_EQ(receiver->stats().checked_blocks, 2u);
  EXPECT_GE(busy_turns, 20);  // 80 MiB, 4 at a time
}

}  // namespace
}  // namespace baton::transfer
