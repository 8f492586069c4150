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
    // It may still be reading what it was asked to check.
    if (integrity()) {
      ASSERT_EQ(receiver.ask(fmt::format("fence {}", static_cast<uint64_t>(sender.agent->epoch()))), "ok");
    }
  }
  receiver.ask("fill 9");
  Peer again = *sender.agent->connect(from_hex(receiver.ask("metadata")));
  EXPECT_EQ(receiver.ask("is_all 9"), "yes");
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
