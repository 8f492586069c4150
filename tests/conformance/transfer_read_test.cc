#include <algorithm>
#include <atomic>
#include <cstring>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/conformance/transfer_fixture.h"

/// Peer::read() on every transport.
namespace baton::transfer::conformance {
namespace {

class TransferReads : public TransferConformance {
 protected:
  static BlockRead whole_read(Node& into, Node& from, std::vector<BlockPair> blocks) {
    BlockRead read;
    read.local_pool = into.pool;
    read.remote_pool = from.pool;
    read.blocks = std::move(blocks);
    read.length_bytes = std::min(into.stride_bytes, from.stride_bytes);
    return read;
  }
  /// Without the peer's agent: it copies by itself.
  static bool direct() { return GetParam().transport == "shm" && !GetParam().integrity; }
};

TEST_P(TransferReads, OneBlockIsThereWhenItIsDone) {
  auto owner = make_node("receiver", 8, 4096);
  auto reader = make_node("sender", 8, 4096);
  owner->fill(1);
  Peer peer = connect(*reader, *owner);
  std::promise<Status> done;
  Result<Transfer> transfer =
      peer.read(whole_read(*reader, *owner, {{3, 5}}), [&](const Status& status) { done.set_value(status); });
  ASSERT_TRUE(transfer.ok()) << transfer.status().to_string();
  EXPECT_EQ(transfer->messages(), 0u);
  EXPECT_EQ(transfer->bytes(), 4096u);
  EXPECT_EQ(transfer->wait(), Status());
  EXPECT_EQ(std::memcmp(reader->block(3), owner->block(5), 4096), 0);
  EXPECT_TRUE(transfer->settled());
  EXPECT_EQ(done.get_future().get(), Status());
  EXPECT_EQ(peer.stats().reads, 1u);
  EXPECT_EQ(peer.stats().read_bytes, 4096u);
  EXPECT_EQ(peer.stats().writes, 0u);
  // The last word about it may be under way.
  ASSERT_TRUE(wait_until([&] { return owner->agent->stats().served_reads == (direct() ? 0u : 1u); }));
  EXPECT_EQ(peer.read(whole_read(*reader, *owner, {}))->wait(), Status());
}

TEST_P(TransferReads, ScatteredBlocksLandWhereTheyBelongAndNowhereElse) {
  constexpr uint32_t kBlocks = 12'000, kCount = 9'000;  // three requests
  auto owner = make_node("receiver", kBlocks, 2048);
  auto reader = make_node("sender", kBlocks, 4096);  // strides differ: the range is what counts
  owner->fill(2);
  reader->fill(3);
  std::vector<std::byte> expected = reader->memory.copy();
  Peer peer = connect(*reader, *owner);
  BlockRead read = whole_read(*reader, *owner, scattered(3, kCount, kBlocks, kBlocks));
  read.offset_bytes = 513;
  read.length_bytes = 1001;
  ASSERT_EQ(peer.read(read)->wait(), Status());
  for (const BlockPair& pair : read.blocks) {
    std::memcpy(expected.data() + pair.local_block * 4096 + 513, owner->block(pair.remote_block) + 513, 1001);
  }
  EXPECT_TRUE(reader->memory == expected);
}

TEST_P(TransferReads, ManyAtOnceAndWritesBetweenThem) {
  constexpr uint32_t kBlocks = 64, kRounds = 60;
  auto owner = make_node("receiver", 2 * kBlocks, 16 << 10);
  auto reader = make_node("sender", 2 * kBlocks, 16 << 10);
  owner->fill(4);
  reader->fill(5);
  Peer peer = connect(*reader, *owner);
  std::vector<Transfer> transfers;
  for (uint32_t round = 0; round < kRounds; ++round) {
    std::vector<BlockPair> pairs = scattered(round, kBlocks / 2, kBlocks, kBlocks);
    // Lower halves are read from there to here, upper halves written from here to there.
    std::vector<BlockPair> upper = pairs;
    for (BlockPair& pair : upper) pair = {pair.local_block + kBlocks, pair.local_block + kBlocks};
    for (BlockPair& pair : pairs) pair.local_block = pair.remote_block;
    transfers.push_back(*peer.read(whole_read(*reader, *owner, pairs)));
    transfers.push_back(*peer.write(whole(*reader, *owner, upper)));
  }
  for (const Transfer& transfer : transfers) EXPECT_EQ(transfer.wait(), Status());
  std::vector<std::byte> here = reader->memory.copy(), there = owner->memory.copy();
  std::vector<bool> read_blocks(kBlocks), written_blocks(kBlocks);
  for (uint32_t round = 0; round < kRounds; ++round) {
    for (const BlockPair& pair : scattered(round, kBlocks / 2, kBlocks, kBlocks)) {
      read_blocks[pair.remote_block] = true;
      written_blocks[pair.local_block] = true;
    }
  }
  for (uint32_t i = 0; i < kBlocks; ++i) {
    const size_t lower = i * (16 << 10), upper = (i + kBlocks) * (16 << 10);
    EXPECT_EQ(std::memcmp(&here[lower], &there[lower], 16 << 10) == 0, read_blocks[i]) << i;
    EXPECT_EQ(std::memcmp(&here[upper], &there[upper], 16 << 10) == 0, written_blocks[i]) << i;
  }
}

TEST_P(TransferReads, WhatDoesNotFitIsRefused) {
  auto owner = make_node("receiver", 16, 4096);
  auto reader = make_node("sender", 8, 8192);
  Peer peer = connect(*reader, *owner);
  const BlockRead good = whole_read(*reader, *owner, {{0, 0}});
  auto code = [&](BlockRead read) { return peer.read(std::move(read)).status().code(); };
  for (auto [local, remote] : {std::pair(8u, 0u), {0u, 16u}, {0xffffffffu, 0u}, {0u, 0xffffffffu}}) {
    BlockRead bad = good;
    bad.blocks = {{0, 1}, {local, remote}};
    EXPECT_EQ(code(bad), StatusCode::kInvalidArgument) << local << " " << remote;
  }
  for (auto [offset, length] : std::vector<std::pair<uint64_t, uint64_t>>{
           {0, 0}, {0, 4097}, {4096, 1}, {4000, 97}, {~0ull, 2}, {2, ~0ull}}) {
    BlockRead bad = good;
    bad.offset_bytes = offset;
    bad.length_bytes = length;
    EXPECT_EQ(code(bad), StatusCode::kInvalidArgument) << offset << " " << length;
  }
  BlockRead bad = good;
  bad.local_pool = static_cast<PoolId>(1);
  EXPECT_EQ(code(bad), StatusCode::kInvalidArgument);
  bad = good;
  bad.remote_pool = static_cast<PoolId>(99);
  EXPECT_EQ(code(bad), StatusCode::kInvalidArgument);
  EXPECT_EQ(peer.read(good)->wait(), Status());
}

TEST_P(TransferReads, AnOwnerBoundsWhatItServes) {
  if (direct()) GTEST_SKIP() << "the owner has no part in it";
  AgentConfig closed, narrow;
  closed.max_served_reads = 0;
  narrow.max_served_reads = 1;
  auto shut = make_node("receiver-shut", 8, 4096, closed);
  auto owner = make_node("receiver", 512, 64 << 10, narrow);
  auto reader = make_node("sender", 512, 64 << 10);
  Peer to_shut = connect(*reader, *shut);
  BlockRead read = whole_read(*reader, *shut, {{0, 0}});
  Status refused = to_shut.read(read)->wait();
  EXPECT_EQ(refused.code(), StatusCode::kFailedPrecondition) << refused.to_string();
  EXPECT_THAT(refused.message(), HasSubstr("read from 'receiver-shut'"));
  EXPECT_THAT(refused.message(), HasSubstr("max_served_reads"));
  EXPECT_EQ(shut->agent->stats().refused_reads, 1u);

  Peer peer = connect(*reader, *owner);
  std::vector<Transfer> transfers;
  for (int i = 0; i < 100; ++i) transfers.push_back(*peer.read(whole_read(*reader, *owner, scattered(6, 512, 512, 512))));
  int good = 0;
  for (const Transfer& transfer : transfers) {
    const Status status = transfer.wait();
    EXPECT_TRUE(status.ok() || status.code() == StatusCode::kResourceExhausted) << status.to_string();
    EXPECT_TRUE(transfer.settled());
    good += status.ok() ? 1 : 0;
  }
  EXPECT_GE(good, 1);
  // Everybody has his turn again.
  ASSERT_TRUE(wait_until([&] { return peer.read(whole_read(*reader, *owner, {{1, 2}}))->wait().ok(); }));
  EXPECT_TRUE(peer.alive());
}

TEST_P(TransferReads, CancelEndsAndNothingIsTouchedAfterwards) {
  constexpr uint32_t kBlocks = 256;
  auto owner = make_node("receiver", kBlocks, 64 << 10);
  auto reader = make_node("sender", kBlocks, 64 << 10);
  owner->fill(9);
  Peer peer = connect(*reader, *owner);
  const auto pairs = scattered(10, kBlocks, kBlocks, kBlocks);
  for (int round = 0; round < 10; ++round) {
    std::vector<Transfer> transfers;
    for (int i = 0; i < 6; ++i) transfers.push_back(*peer.read(whole_read(*reader, *owner, pairs)));
    if (round % 2 == 1) {
      EXPECT_EQ(transfers.front().wait(), Status());
    }
    for (const Transfer& transfer : transfers) transfer.cancel();
    for (const Transfer& transfer : transfers) {
      const Status status = transfer.wait();
      EXPECT_TRUE(status.ok() || status.code() == StatusCode::kCancelled) << status.to_string();
      EXPECT_TRUE(transfer.settled());
    }
    std::fill(reader->memory.begin(), reader->memory.end(), std::byte{0x5a});
    ASSERT_EQ(peer.read(whole_read(*reader, *owner, {{0, 1}}))->wait(), Status());
    EXPECT_EQ(std::memcmp(reader->block(0), owner->block(1), 64 << 10), 0);
    EXPECT_TRUE(is_all(reader->block(1), reader->memory.size() - (64 << 10), std::byte{0x5a}));
  }
  EXPECT_TRUE(peer.alive());
  EXPECT_EQ(reader->agent->stats().stray_messages, 0u) << "messages came after the end of their read";
}

TEST_P(TransferReads, CancelRacesWithItsOwnRead) {
  auto owner = make_node("receiver", 4, 1024);
  auto reader = make_node("sender", 4, 1024);
  Peer peer = connect(*reader, *owner);
  for (int round = 0; round < 2000; ++round) {
    Result<Transfer> transfer = peer.read(whole_read(*reader, *owner, {{0, 0}}));
    ASSERT_TRUE(transfer.ok()) << transfer.status().to_string();
    transfer->cancel();
    if (round % 16 == 0) {
      const Status status = transfer->wait();
      EXPECT_TRUE(status.ok() || status.code() == StatusCode::kCancelled) << status.to_string();
    }
  }
  EXPECT_EQ(peer.read(whole_read(*reader, *owner, {{0, 0}}))->wait(), Status());
}

TEST_P(TransferReads, APassedDeadlineIsAnError) {
  auto owner = make_node("receiver", 4, 1024);
  auto reader = make_node("sender", 4, 1024);
  Peer peer = connect(*reader, *owner);
  BlockRead read = whole_read(*reader, *owner, {{0, 0}});
  read.deadline = Deadline{1};  // long ago
  Result<Transfer> transfer = peer.read(read);
  ASSERT_TRUE(transfer.ok());
  const Status status = transfer->wait();
  EXPECT_TRUE(status.ok() || status.code() == StatusCode::kDeadlineExceeded) << status.to_string();
  EXPECT_TRUE(transfer->settled());
  EXPECT_TRUE(peer.alive());
}

TEST_P(TransferReads, TheOwnersEndEndsItsReadsOnly) {
  auto lives = make_node("receiver-lives", 64, 64 << 10);
  auto dies = make_node("receiver-dies", 64, 64 << 10);
  auto reader = make_node("sender", 128, 64 << 10);
  lives->fill(20);
  Peer to_live = connect(*reader, *lives);
  Peer to_dead = connect(*reader, *dies);
  auto pairs = scattered(21, 64, 64, 64), upper = pairs;
  for (BlockPair& pair : upper) pair.local_block += 64;
  std::vector<Transfer> good, bad;
  for (int i = 0; i < 10; ++i) {
    bad.push_back(*to_dead.read(whole_read(*reader, *dies, upper)));
    good.push_back(*to_live.read(whole_read(*reader, *lives, pairs)));
  }
  const Epoch epoch = dies->agent->epoch();
  dies.reset();
  for (const Transfer& transfer : good) EXPECT_EQ(transfer.wait(), Status());
  Status last;
  for (const Transfer& transfer : bad) {
    const Status status = transfer.wait();
    EXPECT_TRUE(status.ok() || status.code() == StatusCode::kUnavailable || status.code() == StatusCode::kAborted)
        << status.to_string();
    if (!status.ok()) last = status;
  }
  if (!last.ok()) {
    EXPECT_THAT(last.message(), HasSubstr("receiver-dies"));
  }
  ASSERT_EQ(reader->agent->fence(epoch), Status());
  std::fill(reader->block(64), reader->block(128), std::byte{0x33});
  EXPECT_EQ(to_live.read(whole_read(*reader, *lives, pairs))->wait(), Status());
  EXPECT_TRUE(is_all(reader->block(64), 64 * (64 << 10), std::byte{0x33}));
  for (const BlockPair& pair : pairs) {
    EXPECT_EQ(std::memcmp(reader->block(pair.local_block), lives->block(pair.remote_block), 64 << 10), 0);
  }
}

TEST_P(TransferReads, TheReadersEndLeavesTheOwnerAlone) {
  auto owner = make_node("receiver", 64, 64 << 10);
  auto other = make_node("sender-other", 64, 64 << 10);
  owner->fill(22);
  const std::vector<std::byte> before = owner->memory.copy();
  Peer to_owner = connect(*other, *owner);
  for (int round = 0; round < 5; ++round) {
    auto reader = make_node("sender", 64, 64 << 10);
    Peer peer = connect(*reader, *owner);
    std::vector<Transfer> transfers;
    for (int i = 0; i < 10; ++i) {
      transfers.push_back(*peer.read(whole_read(*reader, *owner, scattered(21, 64, 64, 64))));
    }
    if (round % 2 == 1) {
      EXPECT_EQ(transfers.front().wait(), Status());
    }
    reader->agent.reset();
    for (const Transfer& transfer : transfers) {
      ASSERT_TRUE(transfer.done());
      EXPECT_TRUE(transfer.status().ok() || transfer.status().code() == StatusCode::kCancelled ||
                  transfer.status().code() == StatusCode::kAborted) << transfer.status().to_string();
    }
    // Whoever owns that memory now finds it as he left it.
    std::fill(reader->memory.begin(), reader->memory.end(), std::byte{0x44});
    ASSERT_EQ(to_owner.read(whole_read(*other, *owner, {{0, 1}, {5, 6}}))->wait(), Status());
    EXPECT_TRUE(is_all(reader->memory.data(), reader->memory.size(), std::byte{0x44}));
  }
  EXPECT_TRUE(owner->memory == before);
  // Nothing is kept of those who have gone.
  ASSERT_TRUE(wait_until([&] {
    const AgentStats stats = owner->agent->stats();
    return stats.peers <= 1 && stats.inbound_peers <= 2;
  }));
}

TEST_P(TransferReads, AReaderThatIsFencedGetsNothingMore) {
  auto owner = make_node("receiver", 64, 64 << 10);
  auto reader = make_node("sender", 64, 64 << 10);
  owner->fill(23);
  Peer peer = connect(*reader, *owner);
  ASSERT_EQ(peer.read(whole_read(*reader, *owner, {{0, 0}}))->wait(), Status());
  std::vector<Transfer> transfers;
  for (int i = 0; i < 10; ++i) {
    transfers.push_back(*peer.read(whole_read(*reader, *owner, scattered(24, 64, 64, 64))));
  }
  ASSERT_EQ(owner->agent->fence(reader->agent->epoch()), Status());
  for (const Transfer& transfer : transfers) (void)transfer.wait();
  ASSERT_TRUE(wait_until([&] { return !peer.alive(); }));
  EXPECT_FALSE(peer.read(whole_read(*reader, *owner, {{0, 0}})).ok());
  // What may still be on its way is shut out by the reader, as any writer is.
  ASSERT_EQ(reader->agent->fence(owner->agent->epoch()), Status());
  std::fill(reader->memory.begin(), reader->memory.end(), std::byte{0x66});
  Peer again = connect(*reader, *owner);
  // With its introduction the owner gets new metadata: so it is let in although it was fenced.
  ASSERT_EQ(again.read(whole_read(*reader, *owner, {{7, 9}}))->wait(), Status());
  EXPECT_EQ(std::memcmp(reader->block(7), owner->block(9), 64 << 10), 0);
  EXPECT_TRUE(is_all(reader->block(8), reader->memory.size() - 8 * (64 << 10), std::byte{0x66}));
}

TEST_P(TransferReads, CloseEndsThemAndTheOwnerIsShutOut) {
  auto owner = make_node("receiver", 64, 64 << 10);
  auto reader = make_node("sender", 64, 64 << 10);
  owner->fill(25);
  for (int round = 0; round < 5; ++round) {
    Peer peer = connect(*reader, *owner);
    std::vector<Transfer> transfers;
    std::atomic<int> called{0};
    for (int i = 0; i < 6; ++i) {
      transfers.push_back(*peer.read(whole_read(*reader, *owner, scattered(26, 64, 64, 64)), [&](const Status&) { ++called; }));
    }
    if (round % 2 == 1) {
      EXPECT_EQ(transfers.front().wait(), Status());
    }
    const Status closed = peer.close();
    ASSERT_TRUE(closed.ok()) << closed.to_string();
    for (const Transfer& transfer : transfers) {
      ASSERT_TRUE(transfer.done());
      EXPECT_TRUE(transfer.status().ok() || transfer.status().code() == StatusCode::kCancelled) << transfer.status().to_string();
    }
    std::fill(reader->memory.begin(), reader->memory.end(), std::byte{0x11});
    while (called < 6) std::this_thread::yield();
    Peer again = connect(*reader, *owner);
    ASSERT_EQ(again.read(whole_read(*reader, *owner, {{1, 1}}))->wait(), Status());
    EXPECT_TRUE(is_all(reader->block(2), reader->memory.size() - 2 * (64 << 10), std::byte{0x11}));
    ASSERT_TRUE(again.close().ok());
  }
}

TEST_P(TransferReads, APoolThatIsAddedLaterIsReadInto) {
  auto owner = make_node("receiver", 64, 4096);
  auto reader = make_node("sender", 64, 4096);
  owner->fill(27);
  Peer peer = connect(*reader, *owner);
  ASSERT_EQ(peer.read(whole_read(*reader, *owner, {{0, 0}}))->wait(), Status());
  const bool host = GetParam().mixed;
  testing::PoolMemory more(16 * 4096, host ? "shm" : GetParam().transport);
  Result<MemoryRegion> region = reader->agent->register_memory(more, more.kind());
  ASSERT_TRUE(region.ok());
  Result<PoolId> pool = reader->agent->add_pool({*region, 4096, 16});
  ASSERT_TRUE(pool.ok());
  BlockRead read = whole_read(*reader, *owner, {{3, 30}});
  read.local_pool = *pool;
  ASSERT_EQ(peer.read(read)->wait(), Status());
  EXPECT_EQ(std::memcmp(more.data() + 3 * 4096, owner->block(30), 4096), 0);
  ASSERT_EQ(peer.read(whole_read(*reader, *owner, {{1, 1}}))->wait(), Status());
  EXPECT_EQ(std::memcmp(reader->block(1), owner->block(1), 4096), 0);
}

TEST_P(TransferReads, TwoAgentsReadFromEachOtherAtOnce) {
  constexpr uint32_t kBlocks = 100;
  auto a = make_node("a", 2 * kBlocks, 16 << 10);
  auto b = make_node("b", 2 * kBlocks, 16 << 10);
  a->fill(15);
  b->fill(16);
  Peer to_b = connect(*a, *b);
  Peer to_a = connect(*b, *a);
  // Lower halves are sources, upper halves are read into.
  std::vector<BlockPair> pairs = scattered(17, kBlocks, kBlocks, kBlocks);
  for (BlockPair& pair : pairs) pair.local_block += kBlocks;
  for (int round = 0; round < 5; ++round) {
    Result<Transfer> here = to_b.read(whole_read(*a, *b, pairs));
    Result<Transfer> there = to_a.read(whole_read(*b, *a, pairs));
    ASSERT_TRUE(here.ok() && there.ok());
    ASSERT_EQ(here->wait(), Status());
    ASSERT_EQ(there->wait(), Status());
    for (const BlockPair& pair : pairs) {
      ASSERT_EQ(std::memcmp(a->block(pair.local_block), b->block(pair.remote_block), 16 << 10), 0);
      ASSERT_EQ(std::memcmp(b->block(pair.local_block), a->block(pair.remote_block), 16 << 10), 0);
    }
    std::fill(a->block(kBlocks), a->block(2 * kBlocks), std::byte{0});
    std::fill(b->block(kBlocks), b->block(2 * kBlocks), std::byte{0});
  }
}

TEST_P(TransferReads, AnAgentCanReadFromItself) {
  auto node = make_node("self", 8, 4096);
  node->fill(21);
  Peer peer = connect(*node, *node);
  ASSERT_EQ(peer.read(whole_read(*node, *node, {{0, 7}, {1, 6}}))->wait(), Status());
  EXPECT_EQ(std::memcmp(node->block(0), node->block(7), 4096), 0);
  EXPECT_EQ(std::memcmp(node->block(1), node->block(6), 4096), 0);
}

TEST_P(TransferReads, ManyThreadsShareOneAgent) {
  constexpr uint32_t kThreads = 4, kReads = 30, kBlocks = 64;
  auto owner = make_node("receiver", kThreads * kBlocks, 2048);
  auto reader = make_node("sender", kThreads * kBlocks, 2048);
  owner->fill(18);
  std::vector<std::thread> threads;
  std::atomic<uint32_t> good{0};
  for (uint32_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Peer peer = connect(*reader, *owner);
      for (uint32_t i = 0; i < kReads; ++i) {
        std::vector<BlockPair> pairs = scattered(i, kBlocks / 2, kBlocks, kBlocks);
        for (BlockPair& pair : pairs) {
          pair.local_block += t * kBlocks;
          pair.remote_block += t * kBlocks;
        }
        Result<Transfer> transfer = peer.read(whole_read(*reader, *owner, pairs));
        bool ok = transfer.ok() && transfer->wait().ok();
        for (const BlockPair& pair : pairs) {
          ok = ok && std::memcmp(reader->block(pair.local_block), owner->block(pair.remote_block), 2048) == 0;
        }
        good += ok ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good.load(), kThreads * kReads);
}

INSTANTIATE_TEST_SUITE_P(Transports, TransferReads, ::testing::ValuesIn(networks()), network_name);

}  // namespace
}  // namespace baton::transfer::conformance
