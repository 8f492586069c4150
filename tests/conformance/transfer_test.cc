#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/conformance/transfer_fixture.h"

namespace baton::transfer::conformance {
namespace {

TEST_P(TransferConformance, OneBlockArrivesWhole) {
  auto receiver = make_node("receiver", 8, 4096);
  auto sender = make_node("sender", 8, 4096);
  sender->fill(1);
  Peer peer = connect(*sender, *receiver);
  EXPECT_EQ(peer.epoch(), receiver->agent->epoch());
  EXPECT_EQ(peer.name(), "receiver");
  Tag tag = *receiver->agent->open_inbox();
  Result<Transfer> transfer = peer.write(whole(*sender, *receiver, {{3, 5}}, tag));
  ASSERT_TRUE(transfer.ok()) << transfer.status().to_string();
  EXPECT_EQ(transfer->messages(), 1u + extra_messages());
  EXPECT_EQ(transfer->bytes(), 4096u);
  ASSERT_TRUE(wait_for(*receiver->agent, tag, transfer->messages()));
  EXPECT_EQ(std::memcmp(sender->block(3), receiver->block(5), 4096), 0);
  EXPECT_EQ(transfer->wait(), Status());
  EXPECT_TRUE(transfer->settled());
  EXPECT_EQ(peer.path().transport, GetParam().transport);
  EXPECT_FALSE(peer.path().reason.empty());
}

TEST_P(TransferConformance, ScatteredBlocksLandWhereTheyBelongAndNowhereElse) {
  constexpr uint32_t kBlocks = 6000, kCount = 4000;
  auto receiver = make_node("receiver", kBlocks, 4096);
  auto sender = make_node("sender", kBlocks, 4096);
  sender->fill(2);
  Peer peer = connect(*sender, *receiver);
  Tag tag = *receiver->agent->open_inbox();
  std::vector<BlockPair> pairs = scattered(3, kCount, kBlocks, kBlocks);
  Result<Transfer> transfer = peer.write(whole(*sender, *receiver, pairs, tag));
  ASSERT_TRUE(transfer.ok()) << transfer.status().to_string();
  ASSERT_TRUE(wait_for(*receiver->agent, tag, transfer->messages()));
  std::vector<bool> written(kBlocks, false);
  for (const BlockPair& pair : pairs) {
    written[pair.remote_block] = true;
    ASSERT_EQ(std::memcmp(sender->block(pair.local_block), receiver->block(pair.remote_block), 4096), 0);
  }
  std::vector<std::byte> zero(4096);
  for (uint32_t i = 0; i < kBlocks; ++i) {
    ASSERT_TRUE(written[i] || std::memcmp(receiver->block(i), zero.data(), 4096) == 0) << i;
  }
  EXPECT_EQ(transfer->wait(), Status());
  EXPECT_EQ(receiver->agent->arrived(tag), transfer->messages());
  EXPECT_EQ(peer.stats().bytes, kCount * 4096u);
}

TEST_P(TransferConformance, OnlyTheRangeInsideTheBlocksIsWritten) {
  auto receiver = make_node("receiver", 64, 2048);  // strides differ: the range is what counts
  auto sender = make_node("sender", 64, 4096);
  sender->fill(4);
  receiver->fill(5);
  std::vector<std::byte> before = receiver->memory.copy();
  Peer peer = connect(*sender, *receiver);
  Tag tag = *receiver->agent->open_inbox();
  BlockWrite write = whole(*sender, *receiver, {{7, 1}, {8, 2}, {60, 63}}, tag);
  write.offset_bytes = 513;
  write.length_bytes = 1001;
  Result<Transfer> transfer = peer.write(write);
  ASSERT_TRUE(transfer.ok());
  ASSERT_TRUE(wait_for(*receiver->agent, tag, transfer->messages()));
  for (const BlockPair& pair : write.blocks) {
    std::memcpy(before.data() + pair.remote_block * 2048 + 513, sender->block(pair.local_block) + 513, 1001);
  }
  EXPECT_TRUE(receiver->memory == before);
}

TEST_P(TransferConformance, LargeBlocksAreCutAndNeighboursJoined) {
  auto receiver = make_node("receiver", 16, 1u << 20);
  auto sender = make_node("sender", 16, 1u << 20);
  sender->fill(6);
  Peer peer = connect(*sender, *receiver);
  Tag tag = *receiver->agent->open_inbox();
  std::vector<BlockPair> pairs;
  for (uint32_t i = 0; i < 16; ++i) pairs.push_back({i, i});
  Result<Transfer> transfer = peer.write(whole(*sender, *receiver, pairs, tag));
  ASSERT_TRUE(transfer.ok());
  EXPECT_LE(transfer->messages(), 72u + extra_messages());  // of 240 KiB at least
  EXPECT_GE(transfer->messages(), GetParam().transport == "cuda_ipc" ? 1u : 4u);
  ASSERT_TRUE(wait_for(*receiver->agent, tag, transfer->messages()));
  EXPECT_TRUE(sender->memory == receiver->memory);
}

TEST_P(TransferConformance, ExpectWorksBeforeAndAfterArrival) {
  auto receiver = make_node("receiver", 256, 1024);
  auto sender = make_node("sender", 256, 1024);
  Peer peer = connect(*sender, *receiver);
  Tag early = *receiver->agent->open_inbox();
  Tag late = *receiver->agent->open_inbox();
  EXPECT_NE(early, late);
  auto pairs = scattered(7, 100, 256, 256);

  // The number is known only after write(), so "before" means: announced too high, then corrected.
  std::atomic<int> calls{0};
  ASSERT_TRUE(receiver->agent->expect(early, 1'000'000, [&] { calls += 100; }).ok());
  Result<Transfer> first = peer.write(whole(*sender, *receiver, pairs, early));
  ASSERT_TRUE(first.ok());
  ASSERT_TRUE(wait_for(*receiver->agent, early, first->messages()));
  EXPECT_EQ(calls.load(), 0);

  Result<Transfer> second = peer.write(whole(*sender, *receiver, pairs, late));
  ASSERT_TRUE(second.ok());
  ASSERT_EQ(second->wait(), Status());
  ASSERT_TRUE(wait_for(*receiver->agent, late, second->messages()));
  bool at_once = false;
  ASSERT_TRUE(receiver->agent->expect(late, 1, [&] { at_once = true; }).ok());
  EXPECT_TRUE(at_once);
  receiver->agent->close_inbox(early);
  receiver->agent->close_inbox(late);
  EXPECT_EQ(receiver->agent->expect(late, 1, [] {}).code(), StatusCode::kNotFound);
}

TEST_P(TransferConformance, SeveralTransfersCountInOneInbox) {
  auto receiver = make_node("receiver", 64, 8192);
  auto sender = make_node("sender", 64, 8192);
  sender->fill(8);
  Peer peer = connect(*sender, *receiver);
  Tag tag = *receiver->agent->open_inbox();
  uint64_t messages = 0;
  for (uint64_t layer = 0; layer < 8; ++layer) {  // as a handoff does it: one write per layer
    BlockWrite write = whole(*sender, *receiver, {{1, 2}, {3, 4}, {9, 50}}, tag);
    write.offset_bytes = layer * 1024;
    write.length_bytes = 1024;
    Result<Transfer> transfer = peer.write(write);
    ASSERT_TRUE(transfer.ok());
    messages += transfer->messages();
  }
  ASSERT_TRUE(wait_for(*receiver->agent, tag, messages));
  for (auto [local, remote] : {std::pair(1, 2), {3, 4}, {9, 50}}) {
    EXPECT_EQ(std::memcmp(sender->block(local), receiver->block(remote), 8192), 0);
  }
}

TEST_P(TransferConformance, WhatDoesNotFitIsRefused) {
  auto receiver = make_node("receiver", 16, 4096);
  auto sender = make_node("sender", 8, 8192);
  Peer peer = connect(*sender, *receiver);
  auto code = [&](BlockWrite write) { return peer.write(std::move(write)).status().code(); };
  BlockWrite good = whole(*sender, *receiver, {{0, 0}});
  EXPECT_EQ(code(good), StatusCode::kOk);
  for (auto [local, remote] : {std::pair(8u, 0u), {0u, 16u}, {0xffffffffu, 0u}, {0u, 0xffffffffu}}) {
    BlockWrite bad = good;
    bad.blocks = {{0, 1}, {local, remote}};
    EXPECT_EQ(code(bad), StatusCode::kInvalidArgument) << local << " " << remote;
  }
  for (auto [offset, length] : std::vector<std::pair<uint64_t, uint64_t>>{
           {0, 0}, {0, 4097}, {4096, 1}, {4000, 97}, {~0ull, 2}, {2, ~0ull}}) {
    BlockWrite bad = good;
    bad.offset_bytes = offset;
    bad.length_bytes = length;
    EXPECT_EQ(code(bad), StatusCode::kInvalidArgument) << offset << " " << length;
  }
  BlockWrite bad = good;
  bad.local_pool = static_cast<PoolId>(1);
  EXPECT_EQ(code(bad), StatusCode::kInvalidArgument);
  bad = good;
  bad.remote_pool = static_cast<PoolId>(99);
  EXPECT_EQ(code(bad), StatusCode::kInvalidArgument);

  Agent& agent = *sender->agent;
  Result<MemoryRegion> region = agent.register_memory(sender->memory, sender->memory.kind());
  ASSERT_TRUE(region.ok());
  EXPECT_FALSE(agent.add_pool({*region, 4096, 17}).ok());
  EXPECT_FALSE(agent.add_pool({*region, 0, 1}).ok());
  EXPECT_FALSE(agent.add_pool({*region, uint64_t{1} << 63, 4}).ok());
  EXPECT_FALSE(agent.add_pool({MemoryRegion(), 1, 1}).ok());
  EXPECT_FALSE(agent.register_memory({}, MemoryKind::kHost).ok());
  EXPECT_FALSE(agent.connect("").ok());
  EXPECT_FALSE(agent.connect("not metadata").ok());
  std::string metadata = receiver->agent->metadata();
  for (size_t i = 0; i < metadata.size(); i += 7) {
    std::string damaged = metadata;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x20);
    EXPECT_FALSE(agent.connect(damaged).ok()) << i;
    EXPECT_FALSE(agent.connect(metadata.substr(0, i)).ok()) << i;
  }
}

TEST_P(TransferConformance, AnEmptyWriteIsDoneAtOnce) {
  auto receiver = make_node("receiver", 2, 64);
  auto sender = make_node("sender", 2, 64);
  Peer peer = connect(*sender, *receiver);
  std::promise<Status> done;
  Result<Transfer> transfer = peer.write(whole(*sender, *receiver, {}, *receiver->agent->open_inbox()),
                                         [&](const Status& status) { done.set_value(status); });
  ASSERT_TRUE(transfer.ok());
  EXPECT_EQ(transfer->messages(), 0u);
  EXPECT_EQ(transfer->wait(), Status());
  EXPECT_EQ(done.get_future().get(), Status());
}

TEST_P(TransferConformance, MessagesForNobodyAreStray) {
  auto receiver = make_node("receiver", 16, 1024);
  auto sender = make_node("sender", 16, 1024);
  Peer peer = connect(*sender, *receiver);
  Tag closed = *receiver->agent->open_inbox();
  std::atomic<bool> called{false};
  ASSERT_TRUE(receiver->agent->expect(closed, 1, [&] { called = true; }).ok());
  receiver->agent->close_inbox(closed);
  Result<Transfer> stray = peer.write(whole(*sender, *receiver, {{0, 0}}, closed));
  ASSERT_TRUE(stray.ok());
  Tag open = *receiver->agent->open_inbox();
  Result<Transfer> counted = peer.write(whole(*sender, *receiver, {{1, 1}}, open));
  Result<Transfer> plain = peer.write(whole(*sender, *receiver, {{2, 2}}));
  ASSERT_TRUE(counted.ok() && plain.ok());
  EXPECT_EQ(plain->messages(), 0u);
  EXPECT_EQ(plain->wait(), Status());
  EXPECT_EQ(stray->wait(), Status());
  ASSERT_TRUE(wait_for(*receiver->agent, open, counted->messages()));
  EXPECT_EQ(counted->wait(), Status());
  EXPECT_FALSE(called);
  EXPECT_EQ(receiver->agent->arrived(closed), 0u);
  // Two transfers arrive in any order, and the writer's end of one says nothing of its count.
  ASSERT_TRUE(wait_until([&] { return receiver->agent->stats().stray_messages == 1 + extra_messages(); }));
  EXPECT_EQ(receiver->agent->stats().messages_received, 2u * (1 + extra_messages()));
}

TEST_P(TransferConformance, CancelEndsAndNothingIsTouchedAfterwards) {
  constexpr uint32_t kBlocks = 512;
  auto receiver = make_node("receiver", kBlocks, 64 << 10);
  auto sender = make_node("sender", kBlocks, 64 << 10);
  sender->fill(9);
  Peer peer = connect(*sender, *receiver);
  auto pairs = scattered(10, kBlocks, kBlocks, kBlocks);
  for (int round = 0; round < 10; ++round) {
    std::vector<Transfer> transfers;
    for (int i = 0; i < 8; ++i) {
      Result<Transfer> transfer = peer.write(whole(*sender, *receiver, pairs));
      ASSERT_TRUE(transfer.ok());
      transfers.push_back(*transfer);
    }
    for (const Transfer& transfer : transfers) transfer.cancel();
    for (const Transfer& transfer : transfers) {
      Status status = transfer.wait();
      EXPECT_TRUE(status.ok() || status.code() == StatusCode::kCancelled) << status.to_string();
      EXPECT_TRUE(transfer.settled());
    }
    // All of them have ended, so from here on both sides' memory is ours again.
    std::fill(receiver->memory.begin(), receiver->memory.end(), std::byte{0x5a});
    std::fill(sender->memory.begin(), sender->memory.end(), std::byte{0x77});
    Tag tag = *receiver->agent->open_inbox();
    Result<Transfer> after = peer.write(whole(*sender, *receiver, {{0, 0}}, tag));
    ASSERT_TRUE(after.ok());
    ASSERT_TRUE(wait_for(*receiver->agent, tag, after->messages()));
    EXPECT_TRUE(is_all(receiver->block(1), receiver->memory.size() - (64 << 10), std::byte{0x5a}));
  }
  EXPECT_TRUE(peer.alive());
}

TEST_P(TransferConformance, CancelRacesWithItsOwnWrite) {
  auto receiver = make_node("receiver", 4, 1024);
  auto sender = make_node("sender", 4, 1024);
  Peer peer = connect(*sender, *receiver);
  for (int round = 0; round < 5000; ++round) {
    Result<Transfer> transfer = peer.write(whole(*sender, *receiver, {{0, 0}}));
    ASSERT_TRUE(transfer.ok());
    transfer->cancel();
    if (round % 16 == 0) {
      Status status = transfer->wait();
      EXPECT_TRUE(status.ok() || status.code() == StatusCode::kCancelled) << status.to_string();
    }
  }
  EXPECT_TRUE(peer.alive());
}

TEST_P(TransferConformance, APassedDeadlineIsAnError) {
  auto receiver = make_node("receiver", 4, 1024);
  auto sender = make_node("sender", 4, 1024);
  Peer peer = connect(*sender, *receiver);
  BlockWrite write = whole(*sender, *receiver, {{0, 0}});
  write.deadline = Deadline{1};  // long ago
  std::promise<Status> called;
  Result<Transfer> transfer = peer.write(write, [&](const Status& status) { called.set_value(status); });
  ASSERT_TRUE(transfer.ok());
  Status status = transfer->wait();
  // It may have been quicker than the check.
  EXPECT_TRUE(status.ok() || status.code() == StatusCode::kDeadlineExceeded) << status.to_string();
  EXPECT_EQ(called.get_future().get(), status);
  EXPECT_TRUE(transfer->settled());
}

TEST_P(TransferConformance, TheQueueIsBounded) {
  AgentConfig config;
  config.max_queued_transfers = 10;
  // Too large for a thread that writes to post them itself.
  auto receiver = make_node("receiver", 4, 128 << 10);
  auto sender = make_node("sender", 4, 128 << 10, config);
  Peer peer = connect(*sender, *receiver);
  // A callback that does not return keeps everything after it in the queue.
  std::promise<void> go;
  std::shared_future<void> gate = go.get_future().share();
  ASSERT_TRUE(peer.write(whole(*sender, *receiver, {}), [gate](const Status&) { gate.wait(); }).ok());
  Status last;
  int accepted = 0;
  for (int i = 0; i < 30 && last.ok(); ++i) {
    last = peer.write(whole(*sender, *receiver, {{0, 0}})).status();
    accepted += last.ok() ? 1 : 0;
  }
  go.set_value();
  EXPECT_EQ(last.code(), StatusCode::kResourceExhausted);
  EXPECT_LE(accepted, 30);
  EXPECT_THAT(last.message(), HasSubstr("max_queued_transfers"));
}

TEST_P(TransferConformance, CloseFailsWhatIsUnderWayAndTheNextConnectWorks) {
  constexpr uint32_t kBlocks = 256;
  auto receiver = make_node("receiver", kBlocks, 64 << 10);
  auto sender = make_node("sender", kBlocks, 64 << 10);
  sender->fill(11);
  auto pairs = scattered(12, kBlocks, kBlocks, kBlocks);
  for (int round = 0; round < 5; ++round) {
    Peer peer = connect(*sender, *receiver);
    std::vector<Transfer> transfers;
    std::atomic<int> called{0};
    for (int i = 0; i < 6; ++i) {
      Result<Transfer> transfer = peer.write(whole(*sender, *receiver, pairs), [&](const Status&) { ++called; });
      ASSERT_TRUE(transfer.ok());
      transfers.push_back(*transfer);
    }
    if (round % 2 == 1) {
      ASSERT_EQ(transfers.front().wait(), Status());
    }
    Status closed = peer.close();
    ASSERT_TRUE(closed.ok()) << closed.to_string();
    EXPECT_FALSE(peer.alive());
    for (const Transfer& transfer : transfers) {
      ASSERT_TRUE(transfer.done());
      Status status = transfer.status();
      EXPECT_TRUE(status.ok() || status.code() == StatusCode::kCancelled ||
                  status.code() == StatusCode::kUnavailable) << status.to_string();
    }
    EXPECT_EQ(peer.write(whole(*sender, *receiver, {{0, 0}})).status().code(), StatusCode::kUnavailable);
    // What was on the way is the receiver's to stop.
    ASSERT_TRUE(receiver->agent->fence(sender->agent->epoch()).ok());
    std::fill(receiver->memory.begin(), receiver->memory.end(), std::byte{0x11});
    Peer again = connect(*sender, *receiver);
    Tag tag = *receiver->agent->open_inbox();
    Result<Transfer> after = again.write(whole(*sender, *receiver, {{1, 1}}, tag));
    ASSERT_TRUE(after.ok()) << after.status().to_string();
    ASSERT_TRUE(wait_for(*receiver->agent, tag, after->messages()));
    EXPECT_EQ(std::memcmp(sender->block(1), receiver->block(1), 64 << 10), 0);
    std::fill(receiver->block(1), receiver->block(2), std::byte{0x11});
    EXPECT_TRUE(is_all(receiver->memory.data(), receiver->memory.size(), std::byte{0x11}));
    ASSERT_EQ(after->wait(), Status());
    while (called < 6) std::this_thread::yield();
    ASSERT_TRUE(again.close().ok());
  }
}

TEST_P(TransferConformance, AFencedWriterIsKeptOutUntilItGetsNewMetadata) {
  auto receiver = make_node("receiver", 64, 64 << 10);
  auto sender = make_node("sender", 64, 64 << 10);
  sender->fill(13);
  std::string old_metadata = receiver->agent->metadata();
  Peer peer = *sender->agent->connect(old_metadata);
  ASSERT_EQ(peer.write(whole(*sender, *receiver, {{0, 0}}))->wait(), Status());
  std::vector<Transfer> transfers;
  for (int i = 0; i < 20; ++i) {
    Result<Transfer> transfer = peer.write(whole(*sender, *receiver, scattered(21, 64, 64, 64)));
    if (transfer.ok()) transfers.push_back(*transfer);
  }
  Status fenced = receiver->agent->fence(sender->agent->epoch());
  ASSERT_TRUE(fenced.ok()) << fenced.to_string();
  std::fill(receiver->memory.begin(), receiver->memory.end(), std::byte{0x22});

  for (const Transfer& transfer : transfers) (void)transfer.wait();
  // The old metadata lets nobody in any more, whether that shows in connect() or in the write.
  Result<Peer> stale = sender->agent->connect(old_metadata);
  if (stale.ok()) {
    Result<Transfer> write = stale->write(whole(*sender, *receiver, {{1, 1}}));
    EXPECT_FALSE(write.ok() && write->wait().ok());
  }
  EXPECT_TRUE(is_all(receiver->memory.data(), receiver->memory.size(), std::byte{0x22}));
  Peer fresh = connect(*sender, *receiver);
  EXPECT_EQ(fresh.write(whole(*sender, *receiver, {{2, 2}}))->wait(), Status());
  EXPECT_EQ(std::memcmp(sender->block(2), receiver->block(2), 64 << 10), 0);
  // Somebody who was never here can be fenced as well.
  EXPECT_TRUE(receiver->agent->fence(new_epoch()).ok());
}

TEST_P(TransferConformance, AWriterFencedWhileItConnectsTouchesNothing) {
  auto receiver = make_node("receiver", 16, 4096);
  receiver->fill(31);
  const std::vector<std::byte> before(receiver->memory.begin(), receiver->memory.end());
  for (int round = 0; round < 20; ++round) {
    auto sender = make_node("sender", 16, 4096);
    Result<Peer> peer = sender->agent->connect(receiver->agent->metadata());
    ASSERT_TRUE(peer.ok()) << peer.status().to_string();
    Tag tag = *receiver->agent->open_inbox();
    for (int i = 0; i < round * 20; ++i) std::this_thread::yield();  // a little later each time
    const Status fenced = receiver->agent->fence(sender->agent->epoch());
    ASSERT_TRUE(fenced.ok()) << fenced.to_string();
    Result<Transfer> transfer = peer->write(whole(*sender, *receiver, {{0, 0}, {3, 5}}, tag));
    if (transfer.ok()) {
      EXPECT_FALSE(transfer->wait().ok());
    }
    EXPECT_EQ(receiver->agent->arrived(tag), 0u);
    EXPECT_EQ(std::memcmp(receiver->memory.data(), before.data(), before.size()), 0) << round;
    receiver->agent->close_inbox(tag);
  }
}

TEST_P(TransferConformance, ARestartedPeerIsANewPeer) {
  auto sender = make_node("sender", 16, 4096);
  sender->fill(14);
  auto first = make_node("receiver", 16, 4096);
  std::string first_metadata = first->agent->metadata();
  Peer old_peer = connect(*sender, *first);
  ASSERT_EQ(old_peer.write(whole(*sender, *first, {{0, 0}}))->wait(), Status());
  first.reset();

  auto second = make_node("receiver", 16, 4096);
  Peer new_peer = connect(*sender, *second);
  EXPECT_NE(new_peer.epoch(), old_peer.epoch());
  Tag tag = *second->agent->open_inbox();
  Result<Transfer> transfer = new_peer.write(whole(*sender, *second, {{4, 6}}, tag));
  ASSERT_TRUE(transfer.ok());
  ASSERT_TRUE(wait_for(*second->agent, tag, transfer->messages()));
  EXPECT_EQ(std::memcmp(sender->block(4), second->block(6), 4096), 0);

  // The old one fails, soon and for good, and says whom it was about.
  Status status;
  for (int i = 0; i < 1000 && status.ok(); ++i) {
    Result<Transfer> write = old_peer.write(whole(*sender, *second, {{1, 1}}));
    status = write.ok() ? write->wait() : write.status();
  }
  EXPECT_EQ(status.code(), StatusCode::kUnavailable) << status.to_string();
  EXPECT_THAT(status.message(), HasSubstr("receiver"));
  EXPECT_FALSE(old_peer.alive());
  Result<Peer> stale = sender->agent->connect(first_metadata);
  if (stale.ok()) {
    Result<Transfer> write = stale->write(whole(*sender, *second, {{1, 1}}));
    EXPECT_FALSE(write.ok() && write->wait().ok());
  }
  EXPECT_TRUE(new_peer.alive());
  EXPECT_EQ(new_peer.write(whole(*sender, *second, {{5, 5}}))->wait(), Status());
}

TEST_P(TransferConformance, TwoAgentsWriteToEachOtherAtOnce) {
  constexpr uint32_t kBlocks = 400;
  auto a = make_node("a", 2 * kBlocks, 16 << 10);
  auto b = make_node("b", 2 * kBlocks, 16 << 10);
  a->fill(15);
  b->fill(16);
  Peer to_b = connect(*a, *b);
  Peer to_a = connect(*b, *a);
  // Lower halves are sent, upper halves written.
  std::vector<BlockPair> pairs = scattered(17, kBlocks, kBlocks, kBlocks);
  for (BlockPair& pair : pairs) pair.remote_block += kBlocks;
  for (int round = 0; round < 5; ++round) {
    Tag in_a = *a->agent->open_inbox();
    Tag in_b = *b->agent->open_inbox();
    Result<Transfer> there = to_b.write(whole(*a, *b, pairs, in_b));
    Result<Transfer> back = to_a.write(whole(*b, *a, pairs, in_a));
    ASSERT_TRUE(there.ok() && back.ok());
    ASSERT_TRUE(wait_for(*b->agent, in_b, there->messages()));
    ASSERT_TRUE(wait_for(*a->agent, in_a, back->messages()));
    for (const BlockPair& pair : pairs) {
      ASSERT_EQ(std::memcmp(a->block(pair.local_block), b->block(pair.remote_block), 16 << 10), 0);
      ASSERT_EQ(std::memcmp(b->block(pair.local_block), a->block(pair.remote_block), 16 << 10), 0);
    }
    ASSERT_EQ(there->wait(), Status());
    ASSERT_EQ(back->wait(), Status());
  }
}

TEST_P(TransferConformance, ManyThreadsShareOneAgent) {
  constexpr uint32_t kThreads = 4, kWrites = 50, kBlocks = 64;
  auto receiver = make_node("receiver", kThreads * kBlocks, 2048);
  auto sender = make_node("sender", kThreads * kBlocks, 2048);
  sender->fill(18);
  std::vector<std::thread> threads;
  std::atomic<uint32_t> good{0};
  for (uint32_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Peer peer = connect(*sender, *receiver);
      for (uint32_t i = 0; i < kWrites; ++i) {
        Tag tag = *receiver->agent->open_inbox();
        std::vector<BlockPair> pairs = scattered(i, kBlocks / 2, kBlocks, kBlocks);
        for (BlockPair& pair : pairs) {
          pair.local_block += t * kBlocks;
          pair.remote_block += t * kBlocks;
        }
        Result<Transfer> transfer = peer.write(whole(*sender, *receiver, pairs, tag));
        bool ok = transfer.ok() && wait_for(*receiver->agent, tag, transfer->messages());
        for (const BlockPair& pair : pairs) {
          ok = ok && std::memcmp(sender->block(pair.local_block), receiver->block(pair.remote_block), 2048) == 0;
        }
        receiver->agent->close_inbox(tag);
        if (i % 7 == 0) transfer->cancel();  // too late to matter: everything has arrived
        Status status = transfer->wait();
        ok = ok && (status.ok() || status.code() == StatusCode::kCancelled);
        good += ok ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good.load(), kThreads * kWrites);
}

TEST_P(TransferConformance, SixtyFourPeersOfOneAgent) {
  constexpr uint32_t kPeers = 64;
  auto receiver = make_node("receiver", kPeers, 4096);
  std::vector<std::unique_ptr<Node>> senders;
  std::vector<Peer> peers;
  std::vector<Transfer> transfers;
  Tag tag = *receiver->agent->open_inbox();
  uint64_t messages = 0;
  for (uint32_t i = 0; i < kPeers; ++i) {
    senders.push_back(make_node(fmt::format("sender-{}", i), 1, 4096));
    senders.back()->fill(100 + i);
    peers.push_back(connect(*senders.back(), *receiver));
  }
  for (uint32_t i = 0; i < kPeers; ++i) {
    Result<Transfer> transfer = peers[i].write(whole(*senders[i], *receiver, {{0, i}}, tag));
    ASSERT_TRUE(transfer.ok());
    messages += transfer->messages();
    transfers.push_back(*transfer);
  }
  ASSERT_TRUE(wait_for(*receiver->agent, tag, messages));
  for (uint32_t i = 0; i < kPeers; ++i) {
    EXPECT_EQ(std::memcmp(senders[i]->block(0), receiver->block(i), 4096), 0);
    EXPECT_EQ(transfers[i].wait(), Status());
  }
  // And all the other way, from one agent.
  std::vector<Peer> back;
  for (uint32_t i = 0; i < kPeers; ++i) back.push_back(connect(*receiver, *senders[i]));
  receiver->fill(19);
  for (uint32_t i = 0; i < kPeers; ++i) {
    ASSERT_EQ(back[i].write(whole(*receiver, *senders[i], {{i, 0}}))->wait(), Status());
    EXPECT_EQ(std::memcmp(senders[i]->block(0), receiver->block(i), 4096), 0);
  }
  EXPECT_EQ(receiver->agent->stats().peers, kPeers);
}

TEST_P(TransferConformance, OneAgentsDeathLeavesTheOthersAlone) {
  auto lives = make_node("lives", 64, 64 << 10);
  auto dies = make_node("dies", 64, 64 << 10);
  auto sender = make_node("sender", 64, 64 << 10);
  sender->fill(20);
  Peer to_live = connect(*sender, *lives);
  Peer to_dead = connect(*sender, *dies);
  std::vector<Transfer> good, bad;
  for (int i = 0; i < 10; ++i) {
    bad.push_back(*to_dead.write(whole(*sender, *dies, scattered(21, 64, 64, 64))));
    good.push_back(*to_live.write(whole(*sender, *lives, scattered(21, 64, 64, 64))));
  }
  dies.reset();
  for (const Transfer& transfer : good) EXPECT_EQ(transfer.wait(), Status());
  for (const Transfer& transfer : bad) {
    Status status = transfer.wait();
    EXPECT_TRUE(status.ok() || status.code() == StatusCode::kUnavailable) << status.to_string();
  }
  EXPECT_TRUE(to_live.alive());
}

TEST_P(TransferConformance, DestroyingAnAgentEndsItsTransfers) {
  auto receiver = make_node("receiver", 64, 64 << 10);
  auto sender = make_node("sender", 64, 64 << 10);
  Peer peer = connect(*sender, *receiver);
  std::vector<Transfer> transfers;
  std::atomic<int> called{0};
  for (int i = 0; i < 20; ++i) {
    transfers.push_back(*peer.write(whole(*sender, *receiver, scattered(21, 64, 64, 64)), [&](const Status&) { ++called; }));
  }
  sender->agent.reset();
  for (const Transfer& transfer : transfers) {
    ASSERT_TRUE(transfer.done());
    EXPECT_TRUE(transfer.status().ok() || transfer.status().code() == StatusCode::kCancelled);
  }
  EXPECT_EQ(called.load(), 20);
  EXPECT_EQ(peer.write(whole(*sender, *receiver, {{0, 0}})).status().code(), StatusCode::kUnavailable);
  EXPECT_TRUE(peer.close().ok());
}

TEST_P(TransferConformance, AnAgentCanWriteIntoItself) {
  auto node = make_node("self", 8, 4096);
  node->fill(21);
  Peer peer = connect(*node, *node);
  Tag tag = *node->agent->open_inbox();
  Result<Transfer> transfer = peer.write(whole(*node, *node, {{0, 7}, {1, 6}}, tag));
  ASSERT_TRUE(transfer.ok());
  ASSERT_TRUE(wait_for(*node->agent, tag, transfer->messages()));
  EXPECT_EQ(std::memcmp(node->block(0), node->block(7), 4096), 0);
  EXPECT_EQ(std::memcmp(node->block(1), node->block(6), 4096), 0);
}

TEST_P(TransferConformance, ABlockThatIsNotWhatWasSentIsFound) {
  if (!GetParam().integrity) GTEST_SKIP() << "only integrity mode looks at it";
  set_log_level(static_cast<LogLevel>(static_cast<int>(LogLevel::kError) + 1));  // it is an error, and meant
  constexpr uint32_t kBlocks = 40;
  AgentConfig config;
  config.manual_progress = true;  // so that the check comes when the block has been changed
  auto receiver = make_node("receiver", kBlocks, 8192, config);
  auto sender = make_node("sender", kBlocks, 8192);
  sender->fill(22);
  Peer peer = connect(*sender, *receiver);
  auto pump = [&](const std::function<bool()>& is_true) {
    return wait_until([&] {
      receiver->agent->progress();
      return is_true();
    });
  };
  Transfer first = *peer.write(whole(*sender, *receiver, {{0, 0}}));
  ASSERT_TRUE(pump([&] { return first.done(); }));
  ASSERT_EQ(first.status(), Status());
  EXPECT_EQ(receiver->agent->stats().checked_blocks, 1u);

  std::vector<BlockPair> pairs;
  for (uint32_t i = 1; i < kBlocks; ++i) pairs.push_back({i, kBlocks - i});
  Tag tag = *receiver->agent->open_inbox();
  Transfer transfer = *peer.write(whole(*sender, *receiver, pairs, tag));
  bool complete = false;
  ASSERT_TRUE(receiver->agent->expect(tag, transfer.messages(), [&] { complete = true; }).ok());
  auto delivered = [&] {
    if (GetParam().transport == "sim") return fabric_->delivered_messages() == transfer.messages();  // one before it, and it without its check
    return std::all_of(pairs.begin(), pairs.end(), [&](const BlockPair& pair) {
      return std::memcmp(sender->block(pair.local_block), receiver->block(pair.remote_block), 8192) == 0;
    });
  };
  // Where the receiver has a part in the delivery, a check does not come in the same turn. Elsewhere it must not look.
  const std::string& transport = GetParam().transport;
  const bool takes_part = transport == "tcp" || transport.starts_with("ucx") || transport.starts_with("staged:");
  ASSERT_TRUE(takes_part ? pump(delivered) : wait_until(delivered));
  receiver->block(17)[4711] ^= std::byte{0x04};
  receiver->block(20)[0] ^= std::byte{0x80};
  ASSERT_TRUE(pump([&] { return transfer.done(); }));
  EXPECT_EQ(transfer.status().code(), StatusCode::kDataLoss) << transfer.status().to_string();
  EXPECT_THAT(transfer.status().message(), HasSubstr("'receiver' over " + transport));
  EXPECT_THAT(transfer.status().message(), HasSubstr("2 of 39 blocks"));
  EXPECT_THAT(transfer.status().message(), HasSubstr("block 20 of its pool 0"));  // they were sent from the last to the first
  EXPECT_TRUE(transfer.settled());
  EXPECT_EQ(receiver->agent->stats().corrupt_blocks, 2u);
  EXPECT_EQ(receiver->agent->arrived(tag), transfer.messages() - 1);
  EXPECT_FALSE(complete);

  // The pair goes on, and what is written again is right.
  Result<Transfer> again = peer.write(whole(*sender, *receiver, pairs, tag));
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  ASSERT_TRUE(receiver->agent->expect(tag, 2 * transfer.messages() - 1, [&] { complete = true; }).ok());
  ASSERT_TRUE(pump([&] { return again->done() && complete; }));
  EXPECT_EQ(again->status(), Status());
  EXPECT_TRUE(peer.alive());
}

INSTANTIATE_TEST_SUITE_P(Transports, TransferConformance, ::testing::ValuesIn(networks()), network_name);

}  // namespace
}  // namespace baton::transfer::conformance
