#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <future>
#include <iostream>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/log.h"
#include "base/random.h"
#include "tests/support/child_process.h"
#include "transfer/cuda/testing/pool_memory.h"
#include "transfer/include/baton/transfer.h"

/// The agent between real processes that are killed, stopped and restarted. This program starts itself
/// as the other process and talks to it in lines over pipes.
namespace baton::transfer {
namespace {

using ::testing::HasSubstr;
using baton::testing::from_hex;
using baton::testing::shared_memory_files;
using baton::testing::to_hex;

bool is_child = false;
constexpr Tag kNobodysTag = static_cast<Tag>(7);
constexpr uint32_t kBlocks = 256;
constexpr uint64_t kStride = 256 << 10;  // 64 MiB: more than all socket buffers hold

std::string transport_of(const std::string& spec) { return spec.substr(0, spec.find('+')); }

struct Node {
  testing::PoolMemory memory;
  std::unique_ptr<Agent> agent;
  PoolId pool{};

  /// `spec`: a transport, or "tcp+integrity".
  Status open(const std::string& name, const std::string& spec) {
    const std::string transport = transport_of(spec);
    AgentConfig config;
    config.integrity = transport != spec;
    config.name = name;
    config.transport = transport;
    config.bind_address = "127.0.0.1";
    config.cuda_library = testing::cuda_library();
    // Of two real GPUs each process takes one.
    memory = testing::PoolMemory(kBlocks * kStride, transport, is_child ? 1 : 0);
    BATON_ASSIGN_OR_RETURN(agent, Agent::create(config));
    BATON_ASSIGN_OR_RETURN(MemoryRegion region, agent->register_memory(memory, memory.kind()));
    BATON_ASSIGN_OR_RETURN(pool, agent->add_pool({region, kStride, kBlocks}));
    return Status();
  }
  void fill(std::byte value) {
    // What was sent from here was sent before the other process asked for this; only the thread sanitizer does not know.
    (void)agent->stats();
    memory.fill(value);
    (void)agent->stats();  // as in is_all()
  }
  bool is_all(std::byte value) const {
    // What orders this read and the writes around it are words between processes, which the thread sanitizer
    // does not see; the agent's lock it does.
    (void)agent->stats();
    bool all = memory.is_all(value);
    (void)agent->stats();
    return all;
  }
  /// Until somebody who writes with a tag that is not open has really written.
  void wait_for_strays() const {
    uint64_t before = agent->stats().stray_messages;
    while (agent->stats().stray_messages == before) std::this_thread::yield();
  }
  BlockWrite everything(Tag tag = Tag::kNone) const {
    BlockWrite write;
    write.local_pool = pool;
    write.remote_pool = static_cast<PoolId>(0);
    for (uint32_t i = 0; i < kBlocks; ++i) write.blocks.push_back({i, (i * 7) % kBlocks});
    write.length_bytes = kStride;
    write.tag = tag;
    return write;
  }
  BlockRead everything_back(int64_t timeout_ms = 20'000) const {
    BlockRead read;
    read.local_pool = pool;
    read.remote_pool = static_cast<PoolId>(0);
    read.blocks = everything().blocks;
    read.length_bytes = kStride;
    read.deadline = Deadline::after_ms(SteadyClock::instance(), timeout_ms);
    return read;
  }
};

/// The other process: one line in, one line out.
int child_main(const std::string& name, const std::string& transport) {
  baton::testing::die_with_parent();
  is_child = true;
  set_log_level(LogLevel::kError);
  Node node;
  if (Status status = node.open(name, transport); !status.ok()) {
    std::cout << "error " << status.to_string() << std::endl;
    return 1;
  }
  std::cout << "ready " << to_hex(node.agent->metadata()) << std::endl;
  Peer peer;
  std::thread writer;
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> reads{0};
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    std::string command, argument;
    in >> command >> argument;
    if (command == "inbox") {
      std::cout << static_cast<uint32_t>(*node.agent->open_inbox()) << std::endl;
    } else if (command == "expect") {
      uint64_t messages = 0;
      in >> messages;
      std::promise<void> arrived;
      (void)node.agent->expect(static_cast<Tag>(std::stoul(argument)), messages, [&] { arrived.set_value(); });
      bool good = arrived.get_future().wait_for(std::chrono::seconds(20)) == std::future_status::ready;
      std::cout << (good ? "arrived" : "missing") << std::endl;
    } else if (command == "fill") {
      node.fill(static_cast<std::byte>(std::stoi(argument)));
      std::cout << "ok" << std::endl;
    } else if (command == "is_all") {
      std::cout << (node.is_all(static_cast<std::byte>(std::stoi(argument))) ? "yes" : "no") << std::endl;
    } else if (command == "fence") {
      Status status = node.agent->fence(static_cast<Epoch>(std::stoull(argument)));
      std::cout << (status.ok() ? "ok" : status.to_string()) << std::endl;
    } else if (command == "metadata") {
      std::cout << to_hex(node.agent->metadata()) << std::endl;
    } else if (command == "write_for_ever") {
      Result<Peer> connected = node.agent->connect(from_hex(argument));
      if (!connected.ok()) {
        std::cout << connected.status().to_string() << std::endl;
        continue;
      }
      peer = *connected;
      writer = std::thread([&] {
        while (!stop) {
          std::vector<Transfer> transfers;
          for (int i = 0; i < 4; ++i) {
            Result<Transfer> transfer = peer.write(node.everything(kNobodysTag));
            if (!transfer.ok()) return;
            transfers.push_back(*transfer);
          }
          for (const Transfer& transfer : transfers) (void)transfer.wait();
        }
      });
      std::cout << "writing" << std::endl;
    } else if (command == "read_for_ever") {
      Result<Peer> connected = node.agent->connect(from_hex(argument));
      if (!connected.ok()) {
        std::cout << connected.status().to_string() << std::endl;
        continue;
      }
      peer = *connected;
      writer = std::thread([&] {
        while (!stop) {
          std::vector<Transfer> transfers;
          for (int i = 0; i < 2; ++i) {
            Result<Transfer> transfer = peer.read(node.everything_back());
            if (!transfer.ok()) return;
            transfers.push_back(*transfer);
          }
          for (const Transfer& transfer : transfers) {
            if (transfer.wait().ok()) ++reads;
          }
        }
      });
      std::cout << "reading" << std::endl;
    } else if (command == "one_more_read") {
      const uint64_t before = reads;
      while (reads == before && peer.alive()) std::this_thread::yield();
      std::cout << (reads > before ? "yes" : "no") << std::endl;
    } else if (command == "alive") {
      std::cout << (peer.alive() ? "yes" : "no") << std::endl;
    } else if (command == "exit") {
      break;
    }
  }
  stop = true;
  if (writer.joinable()) writer.join();
  return 0;
}

class Child : public baton::testing::ChildProcess {
 public:
  Child(const std::string& name, const std::string& transport) : ChildProcess({name, transport}) {
    std::string ready = read_line();
    EXPECT_THAT(ready, ::testing::StartsWith("ready "));
    metadata = from_hex(ready.substr(std::min<size_t>(6, ready.size())));
  }

  std::string metadata;
};

class TransferProcess : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    set_log_level(LogLevel::kError);
    if (transport().starts_with("ucx")) {
      AgentConfig probe;
      probe.transport = "ucx:tcp";
      static const Status ucx = Agent::create(probe).status();
      if (!ucx.ok()) GTEST_SKIP() << ucx.to_string();
    }
    shared_memory_before_ = shared_memory_files();
  }
  void TearDown() override { EXPECT_EQ(shared_memory_files(), shared_memory_before_); }
  std::string transport() const { return transport_of(GetParam()); }
  bool integrity() const { return transport() != GetParam(); }
  /// Copies into a stopped process just work where the writer makes them itself.
  bool needs_the_receiver() const { return transport() != "shm" && transport() != "cuda_ipc"; }
  bool reads_directly() const { return GetParam() == "shm"; }
  /// Closing the owner's socket is enough; elsewhere the writer has to say that it stopped.
  bool owner_fences_alone() const { return transport().ends_with("tcp"); }

  std::set<std::string> shared_memory_before_;
};

TEST_P(TransferProcess, WritesArriveAndBothLeaveCleanly) {
  Child receiver("receiver", GetParam());
  Node sender;
  ASSERT_EQ(sender.open("sender", GetParam()), Status());
  sender.fill(std::byte{42});
  Result<Peer> peer = sender.agent->connect(receiver.metadata);
  ASSERT_TRUE(peer.ok()) << peer.status().to_string();
  std::string tag = receiver.ask("inbox");
  Result<Transfer> transfer = peer->write(sender.everything(static_cast<Tag>(std::stoul(tag))));
  ASSERT_TRUE(transfer.ok());
  EXPECT_EQ(receiver.ask(fmt::format("expect {} {}", tag, transfer->messages())), "arrived");
  EXPECT_EQ(receiver.ask("is_all 42"), "yes");
  EXPECT_EQ(transfer->wait(), Status());
  EXPECT_EQ(receiver.exit(), 0);
}

TEST_P(TransferProcess, AKilledReceiverFailsItsTransfersOnly) {
  auto victim = std::make_unique<Child>("victim", GetParam());
  Child other("other", GetParam());
  Node sender;
  ASSERT_EQ(sender.open("sender", GetParam()), Status());
  Peer to_victim = *sender.agent->connect(victim->metadata);
  Peer to_other = *sender.agent->connect(other.metadata);
  for (int round = 0; round < 3; ++round) {
    std::vector<Transfer> bad, good;
    std::atomic<int> called{0};
    for (int i = 0; i < 6; ++i) {
      bad.push_back(*to_victim.write(sender.everything(), [&](const Status&) { ++called; }));
      good.push_back(*to_other.write(sender.everything()));
    }
    while (to_victim.stats().messages == 0) std::this_thread::yield();  // it is really under way
    int64_t killed_ns = SteadyClock::instance().now_ns();
    victim->kill();
    for (const Transfer& transfer : bad) (void)transfer.wait();
    double seconds = static_cast<double>(SteadyClock::instance().now_ns() - killed_ns) * 1e-9;
    EXPECT_LT(seconds, 5.0);
    Status last = bad.back().status();
    // Where the writer copies by itself, everything can have been there before the kill: then the next one tells.
    while (last.ok() && SteadyClock::instance().now_ns() - killed_ns < 5'000'000'000) {
      Result<Transfer> next = to_victim.write(sender.everything());
      last = next.ok() ? next->wait() : next.status();
    }
    EXPECT_EQ(last.code(), StatusCode::kUnavailable) << last.to_string();
    EXPECT_THAT(last.message(), HasSubstr("victim"));
    EXPECT_FALSE(to_victim.alive());
    for (const Transfer& transfer : good) EXPECT_EQ(transfer.wait(), Status());
    EXPECT_TRUE(to_other.alive());
    EXPECT_TRUE(to_victim.close().ok());
    // A new life of it is used again.
    victim = std::make_unique<Child>("victim", GetParam());
    to_victim = *sender.agent->connect(victim->metadata);
    ASSERT_EQ(to_victim.write(sender.everything())->wait(), Status());
    while (called < 6) std::this_thread::yield();
  }
}

TEST_P(TransferProcess, AStoppedReceiverHangsNobody) {
  Child receiver("receiver", GetParam());
  Node sender;
  ASSERT_EQ(sender.open("sender", GetParam()), Status());
  sender.fill(std::byte{1});
  Peer peer = *sender.agent->connect(receiver.metadata);
  ASSERT_EQ(peer.write(sender.everything())->wait(), Status());
  receiver.stop();
  std::vector<Transfer> transfers;
  for (int i = 0; i < 4; ++i) {
    BlockWrite write = sender.everything();
    write.deadline = Deadline::after_ms(SteadyClock::instance(), 300);
    transfers.push_back(*peer.write(write));
  }
  bool all_settled = true;
  for (const Transfer& transfer : transfers) {
    Status status = transfer.wait();
    all_settled = all_settled && transfer.settled();
    if (needs_the_receiver()) {  // what lies between the two fills up
      EXPECT_FALSE(status.ok());
    } else {
      EXPECT_TRUE(status.ok() || status.code() == StatusCode::kDeadlineExceeded) << status.to_string();
    }
  }
  if (needs_the_receiver()) {
    EXPECT_FALSE(peer.alive());
    EXPECT_FALSE(all_settled);  // bytes are on the way, and the sender says so
    sender.fill(std::byte{2});  // ours again
    receiver.resume();
    // The owner of the memory shuts the door; then its memory is its own again.
    ASSERT_EQ(receiver.ask(fmt::format("fence {}", static_cast<uint64_t>(sender.agent->epoch()))), "ok");
    EXPECT_EQ(receiver.ask("is_all 1"), "yes");  // no byte of what was written into the buffers afterwards
  } else {
    EXPECT_EQ(peer.alive(), !integrity());  // the bytes are there, but nobody says that they are right
    EXPECT_TRUE(all_settled);
    receiver.resume();
  }
  // With integrity it may still be reading what it was asked to check.
  if (!integrity()) receiver.ask("fill 9");
  Peer again = *sender.agent->connect(from_hex(receiver.ask("metadata")));
  EXPECT_EQ(receiver.ask(integrity() ? "is_all 1" : "is_all 9"), "yes");
  sender.fill(std::byte{3});
  Status status = again.write(sender.everything())->wait();
  ASSERT_TRUE(status.ok()) << status.to_string();
  EXPECT_EQ(receiver.ask("is_all 3"), "yes");
}

TEST_P(TransferProcess, AKilledWriterCanBeFencedAtOnce) {
  Node receiver;
  ASSERT_EQ(receiver.open("receiver", GetParam()), Status());
  for (int round = 0; round < 3; ++round) {
    Child writer("writer", GetParam());
    ASSERT_EQ(writer.ask("fill 77"), "ok");
    ASSERT_EQ(writer.ask("write_for_ever " + to_hex(receiver.agent->metadata())), "writing");
    Result<Peer> back = receiver.agent->connect(writer.metadata);
    ASSERT_TRUE(back.ok());
    receiver.wait_for_strays();
    writer.kill();
    Status fenced = receiver.agent->fence(back->epoch());
    ASSERT_TRUE(fenced.ok()) << fenced.to_string();
    receiver.fill(std::byte{5});
    // Another pair at work gives late bytes every chance.
    Child next("next", GetParam());
    ASSERT_EQ(next.ask("fill 5"), "ok");
    ASSERT_EQ(next.ask("write_for_ever " + to_hex(receiver.agent->metadata())), "writing");
    receiver.wait_for_strays();
    Result<Peer> to_next = receiver.agent->connect(next.metadata);
    ASSERT_TRUE(to_next.ok());
    ASSERT_EQ(receiver.agent->fence(to_next->epoch()), Status());
    EXPECT_TRUE(receiver.is_all(std::byte{5}));
    EXPECT_FALSE(back->alive() && back->write(receiver.everything()).ok() &&
                 back->write(receiver.everything())->wait().ok());
  }
}

TEST_P(TransferProcess, AStoppedWriterIsFencedOrKeptInQuarantine) {
  Node receiver;
  ASSERT_EQ(receiver.open("receiver", GetParam()), Status());
  Child writer("writer", GetParam());
  ASSERT_EQ(writer.ask("fill 77"), "ok");
  Result<Peer> back = receiver.agent->connect(writer.metadata);
  ASSERT_TRUE(back.ok());
  ASSERT_EQ(writer.ask("write_for_ever " + to_hex(receiver.agent->metadata())), "writing");
  receiver.wait_for_strays();
  writer.stop();
  Status fenced = receiver.agent->fence(back->epoch());
  if (owner_fences_alone()) {
    ASSERT_TRUE(fenced.ok()) << fenced.to_string();
  } else {
    // It could be in the middle of a copy: nobody but the writer can know.
    EXPECT_EQ(fenced.code(), StatusCode::kUnavailable) << fenced.to_string();
    writer.resume();
    for (int i = 0; i < 10 && !fenced.ok(); ++i) fenced = receiver.agent->fence(back->epoch());
    ASSERT_TRUE(fenced.ok()) << fenced.to_string();
  }
  receiver.fill(std::byte{6});
  writer.resume();
  EXPECT_EQ(writer.ask("is_all 77"), "yes");  // it is back at work
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(receiver.is_all(std::byte{6}));
  EXPECT_EQ(writer.ask("alive"), "no");
  EXPECT_EQ(receiver.agent->stats().inbound_peers, 0u);
}

TEST_P(TransferProcess, ReadsBringWhatIsThere) {
  Child owner("owner", GetParam());
  Node reader;
  ASSERT_EQ(reader.open("reader", GetParam()), Status());
  Result<Peer> peer = reader.agent->connect(owner.metadata);
  ASSERT_TRUE(peer.ok()) << peer.status().to_string();
  for (int value : {42, 43}) {
    ASSERT_EQ(owner.ask(fmt::format("fill {}", value)), "ok");
    Result<Transfer> transfer = peer->read(reader.everything_back());
    ASSERT_TRUE(transfer.ok());
    ASSERT_EQ(transfer->wait(), Status());
    EXPECT_TRUE(reader.is_all(static_cast<std::byte>(value)));
  }
  EXPECT_EQ(owner.exit(), 0);
}

TEST_P(TransferProcess, AKilledOwnerFailsItsReadsOnly) {
  Child other("other", GetParam());
  Node reader, quiet;
  ASSERT_EQ(reader.open("reader", GetParam()), Status());
  ASSERT_EQ(quiet.open("quiet", GetParam()), Status());
  Peer to_other = *quiet.agent->connect(other.metadata);
  for (int round = 0; round < 3; ++round) {
    Child victim("victim", GetParam());
    ASSERT_EQ(victim.ask("fill 7"), "ok");
    Peer peer = *reader.agent->connect(victim.metadata);
    std::vector<Transfer> bad;
    for (int i = 0; i < 6; ++i) bad.push_back(*peer.read(reader.everything_back()));
    Transfer good = *to_other.read(quiet.everything_back());
    while (peer.stats().read_bytes == 0) std::this_thread::yield();
    const int64_t killed_ns = SteadyClock::instance().now_ns();
    victim.kill();
    for (const Transfer& transfer : bad) (void)transfer.wait();
    EXPECT_LT(SteadyClock::instance().now_ns() - killed_ns, 5'000'000'000);
    Status last = bad.back().status();
    while (last.ok() && SteadyClock::instance().now_ns() - killed_ns < 5'000'000'000) {
      Result<Transfer> next = peer.read(reader.everything_back());
      last = next.ok() ? next->wait() : next.status();
    }
    EXPECT_TRUE(last.code() == StatusCode::kUnavailable || last.code() == StatusCode::kAborted) << last.to_string();
    EXPECT_THAT(last.message(), HasSubstr("victim"));
    EXPECT_EQ(good.wait(), Status());
    // Where they are not settled a fence makes the memory ours again.
    const bool settled = std::all_of(bad.begin(), bad.end(), [](const Transfer& transfer) { return transfer.settled(); });
    EXPECT_TRUE(settled || !reads_directly());
    if (!settled) {
      ASSERT_EQ(reader.agent->fence(peer.epoch()), Status());
    }
    reader.fill(std::byte{9});
    EXPECT_EQ(to_other.read(quiet.everything_back())->wait(), Status());
    EXPECT_TRUE(reader.is_all(std::byte{9}));
    EXPECT_TRUE(peer.close().ok());
  }
}

TEST_P(TransferProcess, AStoppedOwnerHangsNoReader) {
  Child owner("owner", GetParam());
  Node reader;
  ASSERT_EQ(owner.ask("fill 7"), "ok");
  ASSERT_EQ(reader.open("reader", GetParam()), Status());
  Peer peer = *reader.agent->connect(owner.metadata);
  ASSERT_EQ(peer.read(reader.everything_back())->wait(), Status());
  std::vector<Transfer> transfers;
  for (int i = 0; i < 4; ++i) transfers.push_back(*peer.read(reader.everything_back(300)));
  owner.stop();
  bool settled = true;
  for (const Transfer& transfer : transfers) {
    const Status status = transfer.wait();
    EXPECT_TRUE(status.ok() || status.code() == StatusCode::kDeadlineExceeded || status.code() == StatusCode::kUnavailable)
        << status.to_string();
    settled = settled && transfer.settled();
  }
  EXPECT_EQ(peer.alive(), reads_directly());
  EXPECT_EQ(settled, reads_directly());
  Status fenced = reader.agent->fence(peer.epoch());
  if (owner_fences_alone() || reads_directly()) {
    ASSERT_TRUE(fenced.ok()) << fenced.to_string();
  } else {
    EXPECT_EQ(fenced.code(), StatusCode::kUnavailable) << fenced.to_string();  // it may be in the middle of a copy
    owner.resume();
    for (int i = 0; i < 10 && !fenced.ok(); ++i) fenced = reader.agent->fence(peer.epoch());
    ASSERT_TRUE(fenced.ok()) << fenced.to_string();
  }
  reader.fill(std::byte{6});
  owner.resume();
  EXPECT_EQ(owner.ask("is_all 7"), "yes");  // it is back at work
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(reader.is_all(std::byte{6}));
  Peer again = *reader.agent->connect(from_hex(owner.ask("metadata")));
  ASSERT_EQ(again.read(reader.everything_back())->wait(), Status());
  EXPECT_TRUE(reader.is_all(std::byte{7}));
}

TEST_P(TransferProcess, AKilledReaderIsForgotten) {
  Node owner;
  ASSERT_EQ(owner.open("owner", GetParam()), Status());
  owner.fill(std::byte{3});
  const std::string metadata = to_hex(owner.agent->metadata());
  Child other("other", GetParam());
  ASSERT_EQ(other.ask("read_for_ever " + metadata), "reading");
  for (int round = 0; round < 3; ++round) {
    Child reader("reader", GetParam());
    ASSERT_EQ(reader.ask("read_for_ever " + metadata), "reading");
    ASSERT_EQ(reader.ask("one_more_read"), "yes");
    if (round == 1) {
      reader.stop();
      EXPECT_EQ(other.ask("one_more_read"), "yes");
    }
    reader.kill();
    EXPECT_EQ(other.ask("one_more_read"), "yes");
    const int64_t begin_ns = SteadyClock::instance().now_ns();
    auto forgotten = [&] {
      const AgentStats stats = owner.agent->stats();
      return stats.inbound_peers <= 2 && stats.peers <= 1;  // with staged: two connections of one reader
    };
    while (!forgotten() && SteadyClock::instance().now_ns() - begin_ns < 20'000'000'000) std::this_thread::yield();
    EXPECT_TRUE(forgotten());
  }
  EXPECT_TRUE(owner.is_all(std::byte{3}));
}

TEST_P(TransferProcess, AReaderThatIsFencedInTheMiddleReadsNoMore) {
  Node owner;
  ASSERT_EQ(owner.open("owner", GetParam()), Status());
  owner.fill(std::byte{3});
  Child reader("reader", GetParam());
  Result<Peer> to_reader = owner.agent->connect(reader.metadata);
  ASSERT_TRUE(to_reader.ok());
  ASSERT_EQ(reader.ask("read_for_ever " + to_hex(owner.agent->metadata())), "reading");
  ASSERT_EQ(reader.ask("one_more_read"), "yes");
  Status fenced = owner.agent->fence(to_reader->epoch());
  for (int i = 0; i < 10 && !fenced.ok(); ++i) fenced = owner.agent->fence(to_reader->epoch());
  ASSERT_TRUE(fenced.ok()) << fenced.to_string();
  owner.fill(std::byte{4});
  EXPECT_EQ(reader.ask("one_more_read"), "no");
  EXPECT_EQ(reader.ask("alive"), "no");
  EXPECT_EQ(reader.exit(), 0);
}

TEST_P(TransferProcess, AutoTakesSharedMemoryOnOneHost) {
  Child receiver("receiver", "auto");
  Node sender;
  ASSERT_EQ(sender.open("sender", "auto"), Status());
  Result<Peer> peer = sender.agent->connect(receiver.metadata);
  ASSERT_TRUE(peer.ok()) << peer.status().to_string();
  EXPECT_EQ(peer->path().transport, "shm");
  EXPECT_EQ(peer->path().reason, "same host");
  ASSERT_EQ(peer->write(sender.everything())->wait(), Status());

  // A transport that was asked for and is not there is an error, never replaced.
  Node tcp_only;
  ASSERT_EQ(tcp_only.open("tcp-only", "tcp"), Status());
  Result<Peer> over_tcp = tcp_only.agent->connect(receiver.metadata);
  ASSERT_TRUE(over_tcp.ok()) << over_tcp.status().to_string();
  EXPECT_EQ(over_tcp->path().transport, "tcp");
  EXPECT_THAT(over_tcp->path().reason, HasSubstr("--transport tcp"));
  ASSERT_EQ(over_tcp->write(tcp_only.everything())->wait(), Status());
  Node shm_only;
  ASSERT_EQ(shm_only.open("shm-only", "shm"), Status());
  Result<Peer> none = shm_only.agent->connect(tcp_only.agent->metadata());
  ASSERT_FALSE(none.ok());
  EXPECT_THAT(none.status().message(), HasSubstr("the peer does not offer it"));
}

INSTANTIATE_TEST_SUITE_P(Transports, TransferProcess,
                         ::testing::Values("shm", "cuda_ipc", "tcp", "staged:shm", "staged:tcp", "ucx:tcp", "shm+integrity",
                                           "cuda_ipc+integrity", "tcp+integrity"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), ':', '_');
                           std::replace(name.begin(), name.end(), '+', '_');
                           return name;
                         });

}  // namespace
}  // namespace baton::transfer

int main(int argc, char** argv) {
  if (argc == 4 && std::strcmp(argv[1], "--child") == 0) {
    return baton::transfer::child_main(argv[2], argv[3]);
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
