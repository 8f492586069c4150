#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "base/clock.h"
#include "base/log.h"
#include "base/random.h"
#include "transfer/sim/sim_fabric.h"

/// Reads on the simulated network: slow motion, and a model of who owns which block when.
namespace baton::transfer {
namespace {

using ::testing::HasSubstr;

constexpr uint32_t kBlocks = 48;
constexpr uint64_t kStride = 256;

class SimReads : public ::testing::Test {
 protected:
  struct Node {
    std::vector<std::byte> memory = std::vector<std::byte>(kBlocks * kStride);
    std::unique_ptr<Agent> agent;
    std::byte* block(uint32_t index) { return memory.data() + index * kStride; }
    void fill(uint32_t index, std::byte value) { std::fill_n(block(index), kStride, value); }
    bool holds(uint32_t index, std::byte value) {
      return std::all_of(block(index), block(index) + kStride, [value](std::byte byte) { return byte == value; });
    }
    bool is_all(std::byte value) {
      return std::all_of(memory.begin(), memory.end(), [value](std::byte byte) { return byte == value; });
    }
  };

  SimReads() { set_log_level(LogLevel::kError); }

  static SimOptions slow(uint64_t seed = 1) {
    SimOptions options;
    options.seed = seed;
    options.min_delay_ns = 1'000'000;
    options.max_delay_ns = 5'000'000;
    options.reorder = true;
    return options;
  }
  std::unique_ptr<Node> make(SimFabric& fabric, const std::string& name, bool integrity = false) {
    auto node = std::make_unique<Node>();
    AgentConfig config;
    config.name = name;
    config.integrity = integrity;
    config.manual_progress = true;
    config.stall_timeout_ms = 100;
    config.default_timeout_ms = 500;
    auto agent = create_sim_agent(fabric, config, clock_);
    EXPECT_TRUE(agent.ok()) << agent.status().to_string();
    node->agent = std::move(*agent);
    EXPECT_TRUE(node->agent->add_pool({*node->agent->register_memory(node->memory, MemoryKind::kHost), kStride, kBlocks}).ok());
    return node;
  }
  static BlockRead everything() {
    BlockRead read;
    for (uint32_t i = 0; i < kBlocks; ++i) read.blocks.push_back({i, kBlocks - 1 - i});
    read.length_bytes = kStride;
    return read;
  }
  /// Until nothing happens at this instant.
  template <typename Nodes>
  static void settle(const Nodes& nodes) {
    for (size_t count = 1; count > 0;) {
      count = 0;
      for (const auto& node : nodes) count += node->agent ? node->agent->progress() : 0;
    }
  }
  void settle_all(std::initializer_list<Node*> nodes) { settle(nodes); }
  /// Jumps from event to event, `limit_ms` of simulated time at most.
  void run(SimFabric& fabric, std::initializer_list<Node*> nodes, int64_t limit_ms = 10'000) {
    const int64_t end_ns = clock_.now_ns() + limit_ms * 1'000'000;
    while (true) {
      settle(nodes);
      const int64_t next_ns = std::min(fabric.next_event_ns(), end_ns);
      if (fabric.next_event_ns() == INT64_MAX || clock_.now_ns() >= end_ns) break;
      clock_.advance_ns(std::max<int64_t>(next_ns - clock_.now_ns(), 0));
    }
    settle(nodes);
  }

  ManualClock clock_;
};

TEST_F(SimReads, AStalledOwnerMeetsTheDeadlineUnsettledAndOnlyAFenceStopsTheBytes) {
  for (bool fence : {false, true}) {
    SimFabric fabric(slow());
    auto reader = make(fabric, "reader");
    auto owner = make(fabric, "owner");
    std::fill(owner->memory.begin(), owner->memory.end(), std::byte{1});
    Peer peer = *reader->agent->connect(owner->agent->metadata());
    BlockRead read = everything();
    read.deadline = Deadline::after_ms(clock_, 50);
    Transfer transfer = *peer.read(read);
    // Until its data is under way.
    for (int i = 0; i < 20 && owner->agent->stats().peers == 0; ++i) {
      clock_.advance_ns(500'000);
      settle_all({reader.get(), owner.get()});
    }
    ASSERT_FALSE(transfer.done());
    fabric.stall(owner->agent->epoch());
    clock_.advance_ms(60);
    settle_all({reader.get()});
    EXPECT_FALSE(transfer.done()) << "the owner's word is waited for";
    clock_.advance_ms(110);
    settle_all({reader.get()});
    ASSERT_TRUE(transfer.done());
    EXPECT_EQ(transfer.status().code(), StatusCode::kDeadlineExceeded) << transfer.status().to_string();
    EXPECT_THAT(transfer.status().message(), HasSubstr("read from 'owner' over sim"));
    EXPECT_FALSE(transfer.settled());
    EXPECT_FALSE(peer.alive());
    if (fence) {
      ASSERT_TRUE(reader->agent->fence(owner->agent->epoch()).ok());
    }
    std::fill(reader->memory.begin(), reader->memory.end(), std::byte{2});
    fabric.resume(owner->agent->epoch());
    run(fabric, {reader.get(), owner.get()});
    EXPECT_EQ(reader->is_all(std::byte{2}), fence);
  }
}

TEST_F(SimReads, ACancelWaitsForTheOwnersWord) {
  SimFabric fabric(slow());
  auto reader = make(fabric, "reader");
  auto owner = make(fabric, "owner");
  std::fill(owner->memory.begin(), owner->memory.end(), std::byte{1});
  Peer peer = *reader->agent->connect(owner->agent->metadata());
  Transfer asked = *peer.read(everything());
  settle_all({reader.get()});
  Transfer unasked = *peer.read(everything());
  asked.cancel();
  unasked.cancel();
  reader->agent->progress();
  EXPECT_FALSE(asked.done());
  EXPECT_TRUE(unasked.done());
  run(fabric, {reader.get(), owner.get()});
  ASSERT_TRUE(asked.done());
  EXPECT_EQ(asked.status().code(), StatusCode::kCancelled);
  EXPECT_TRUE(asked.settled() && unasked.settled());
  EXPECT_TRUE(peer.alive());
  EXPECT_EQ(peer.stats().cancelled, 2u);
  std::fill(reader->memory.begin(), reader->memory.end(), std::byte{2});
  run(fabric, {reader.get(), owner.get()});
  EXPECT_TRUE(reader->is_all(std::byte{2}));
}

TEST_F(SimReads, TheOwnersDeathIsNoticedAndNamed) {
  SimFabric fabric(slow());
  auto reader = make(fabric, "reader");
  auto victim = make(fabric, "victim");
  Peer peer = *reader->agent->connect(victim->agent->metadata());
  Transfer bad = *peer.read(everything());
  settle_all({reader.get(), victim.get()});
  const Epoch epoch = victim->agent->epoch();
  fabric.kill(epoch);
  victim.reset();
  run(fabric, {reader.get()});
  ASSERT_TRUE(bad.done());
  EXPECT_EQ(bad.status().code(), StatusCode::kUnavailable) << bad.status().to_string();
  EXPECT_THAT(bad.status().message(), HasSubstr("victim"));
  EXPECT_FALSE(bad.settled());
  EXPECT_TRUE(reader->agent->fence(epoch).ok());
}

TEST_F(SimReads, AFlippedBitIsFoundWhicheverSideAsksForIt) {
  for (bool reader_asks : {true, false}) {
    set_log_level(static_cast<LogLevel>(static_cast<int>(LogLevel::kError) + 1));  // it is an error, and meant
    SimOptions options = slow();
    options.corrupt = 1;
    SimFabric fabric(options);
    auto reader = make(fabric, "reader", reader_asks);
    auto owner = make(fabric, "owner", !reader_asks);
    Peer peer = *reader->agent->connect(owner->agent->metadata());
    Transfer transfer = *peer.read(everything());
    run(fabric, {reader.get(), owner.get()}, 400);
    ASSERT_TRUE(transfer.done());
    EXPECT_EQ(transfer.status().code(), StatusCode::kDataLoss) << transfer.status().to_string();
    EXPECT_THAT(transfer.status().message(), HasSubstr("read from 'owner'"));
    EXPECT_TRUE(transfer.settled());
    EXPECT_EQ(reader->agent->stats().corrupt_blocks, kBlocks);
  }
}

/// Every block has an owner: the test, or an operation that may write it. What the test owns never changes.
TEST_F(SimReads, ModelOfManyReadsAndWritesWithFaults) {
  constexpr uint32_t kNodes = 3, kSources = kBlocks / 2;
  struct Operation {
    Transfer transfer;
    bool is_read;
    uint32_t from, to;  // nodes, by the direction of the data
    std::vector<BlockPair> blocks;  // local: at `from`, remote: at `to`
  };
  uint64_t ended_ok = 0, ended_unsettled = 0, refused = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    SimOptions options = slow(seed);
    options.again = 0.1;
    options.late_writes = random.chance(0.8);
    SimFabric fabric(options);
    std::array<std::unique_ptr<Node>, kNodes> nodes;
    std::array<std::array<std::optional<std::byte>, kBlocks>, kNodes> pattern;  // empty: an operation has it
    std::array<std::array<Peer, kNodes>, kNodes> peers;
    std::array<bool, kNodes> stalled{};
    uint8_t next_pattern = 1;
    for (uint32_t n = 0; n < kNodes; ++n) {
      nodes[n] = make(fabric, fmt::format("node-{}", n), n == 0 && random.chance(0.3));
      for (uint32_t block = 0; block < kBlocks; ++block) {
        pattern[n][block] = static_cast<std::byte>(block < kSources ? 200 + n : 0);
        nodes[n]->fill(block, *pattern[n][block]);
      }
    }
    std::vector<Operation> operations;
    const auto start = [&] {
      const uint32_t a = static_cast<uint32_t>(random.below(kNodes));
      const uint32_t b = (a + 1 + static_cast<uint32_t>(random.below(kNodes - 1))) % kNodes;
      const bool is_read = random.chance(0.6);
      Operation operation{{}, is_read, is_read ? b : a, is_read ? a : b, {}};
      for (uint32_t block = kSources; block < kBlocks; ++block) {
        if (!pattern[operation.to][block] || !random.chance(0.2)) continue;
        operation.blocks.push_back({static_cast<uint32_t>(random.below(kSources)), block});
      }
      if (!peers[a][b] || !peers[a][b].alive()) {
        Result<Peer> peer = nodes[a]->agent->connect(nodes[b]->agent->metadata());
        ASSERT_TRUE(peer.ok()) << peer.status().to_string();
        peers[a][b] = *peer;
      }
      const Deadline deadline = Deadline::after_ms(clock_, 5 + static_cast<int64_t>(random.below(100)));
      Result<Transfer> transfer = unavailable("");
      if (is_read) {
        BlockRead read;
        for (const BlockPair& pair : operation.blocks) read.blocks.push_back({pair.remote_block, pair.local_block});
        read.length_bytes = kStride;
        read.deadline = deadline;
        transfer = peers[a][b].read(read);
      } else {
        BlockWrite write;
        write.blocks = operation.blocks;
        write.length_bytes = kStride;
        write.deadline = deadline;
        transfer = peers[a][b].write(write);
      }
      if (!transfer.ok()) {
        ++refused;
        return;
      }
      for (const BlockPair& pair : operation.blocks) pattern[operation.to][pair.remote_block].reset();
      operation.transfer = *transfer;
      operations.push_back(std::move(operation));
    };
    const auto collect = [&] {
      for (Operation& operation : operations) {
        if (!operation.transfer.done()) continue;
        const Status status = operation.transfer.status();
        if (status.ok()) {
          ++ended_ok;
          ASSERT_TRUE(operation.transfer.settled());
          for (const BlockPair& pair : operation.blocks) {
            ASSERT_TRUE(nodes[operation.to]->holds(pair.remote_block, static_cast<std::byte>(200 + operation.from)))
                << (operation.is_read ? "read" : "write") << " of " << operation.transfer.bytes() << " bytes is not there";
          }
        } else if (!operation.transfer.settled()) {
          ++ended_unsettled;
          ASSERT_TRUE(nodes[operation.to]->agent->fence(nodes[operation.from]->agent->epoch()).ok());
        }
        for (const BlockPair& pair : operation.blocks) {
          pattern[operation.to][pair.remote_block] = static_cast<std::byte>(next_pattern);
          nodes[operation.to]->fill(pair.remote_block, static_cast<std::byte>(next_pattern));
        }
        next_pattern = static_cast<uint8_t>(next_pattern % 199 + 1);
      }
      std::erase_if(operations, [](const Operation& operation) { return operation.transfer.done(); });
      for (uint32_t n = 0; n < kNodes; ++n) {
        for (uint32_t block = 0; block < kBlocks; ++block) {
          if (pattern[n][block]) {
            ASSERT_TRUE(nodes[n]->holds(block, *pattern[n][block])) << "block " << block << " of node " << n << " was written";
          }
        }
      }
    };
    for (int step = 0; step < 300 && !HasFatalFailure(); ++step) {
      const uint64_t what = random.below(100);
      const uint32_t n = static_cast<uint32_t>(random.below(kNodes));
      if (what < 40 && operations.size() < 12) {
        start();
      } else if (what < 45 && !operations.empty()) {
        operations[random.below(operations.size())].transfer.cancel();
      } else if (what < 47) {
        stalled[n] = !stalled[n];
        stalled[n] ? fabric.stall(nodes[n]->agent->epoch()) : fabric.resume(nodes[n]->agent->epoch());
      } else if (what < 49) {
        ASSERT_TRUE(nodes[n]->agent->fence(nodes[(n + 1) % kNodes]->agent->epoch()).ok());
      } else if (what < 50 && peers[n][(n + 1) % kNodes]) {
        ASSERT_TRUE(peers[n][(n + 1) % kNodes].close().ok());
      } else {
        clock_.advance_ns(static_cast<int64_t>(random.below(4'000'000)));
        settle(nodes);
        collect();
      }
    }
    for (uint32_t n = 0; n < kNodes; ++n) fabric.resume(nodes[n]->agent->epoch());
    for (int i = 0; i < 2000 && !operations.empty() && !HasFatalFailure(); ++i) {
      clock_.advance_ms(1);
      settle(nodes);
      collect();
    }
    ASSERT_TRUE(operations.empty()) << operations.size() << " did not end";
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(ended_ok, 1000u);
  EXPECT_GT(ended_unsettled, 50u);
  EXPECT_LT(refused, ended_ok);
}

}  // namespace
}  // namespace baton::transfer
