#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <future>
#include <memory>
#include <vector>

#include "base/clock.h"
#include "base/log.h"
#include "base/random.h"
#include "transfer/agent_impl.h"
#include "transfer/ucx/messages.h"
#include "transfer/ucx/ucx_backend.h"
#include "transfer/ucx/worker.h"

namespace baton::transfer::ucx {
namespace {

using ::testing::HasSubstr;

TEST(UcxTransports, RdmaWhereThereIsADeviceElseTcp) {
  EXPECT_EQ(choose_transports("", "", "", true)->tls, "ib");
  EXPECT_TRUE(choose_transports("", "", "", true)->one_sided);
  EXPECT_EQ(choose_transports("", "", "", false)->tls, "tcp");
  EXPECT_FALSE(choose_transports("", "", "", false)->one_sided);
  EXPECT_TRUE(choose_transports("rc,ud", "tcp", "", true)->one_sided);
  EXPECT_EQ(choose_transports("", "rc_mlx5,ud_mlx5", "", true)->tls, "");  // the environment says it already
  EXPECT_EQ(choose_transports("tcp", "", "127.0.0.1", false)->devices, "lo");
}

TEST(UcxTransports, MixturesAndSharedMemoryAreRefused) {
  for (const char* list : {"rc,tcp", "tcp,sm", "sm", "posix", "all", "^tcp"}) {
    Result<TransportChoice> choice = choose_transports(list, "", "", true);
    ASSERT_FALSE(choice.ok()) << list;
    EXPECT_THAT(choice.status().message(), HasSubstr(list));
  }
  EXPECT_EQ(choose_transports("rc", "", "", false).status().code(), StatusCode::kUnavailable);
  EXPECT_FALSE(choose_transports("tcp", "", "203.0.113.77", false).ok());
}

TEST(UcxTransports, NamesAreChecked) {
  EXPECT_TRUE(is_ucx_transport("ucx"));
  EXPECT_TRUE(is_ucx_transport("ucx:rc_mlx5,ud"));
  for (const char* name : {"ucx:", "ucxx", "ucx tcp", "ucx:tcp;x", "ucx:TCP", ""}) EXPECT_FALSE(is_ucx_transport(name));
  EXPECT_FALSE(is_ucx_transport("ucx:" + std::string(200, 'a')));
}

TEST(UcxMessages, WhatIsWrittenIsRead) {
  WriteHeader header{3, 0xfeedbeef, 77, uint64_t{1} << 40, 262144};
  std::string bytes = encode_write(header);
  EXPECT_EQ(parse_write(bytes), header);
  std::vector<Arrival> arrivals;
  EXPECT_TRUE(parse_notice(encode_notice(std::vector<Arrival>{{1, 2}, {3, 4}}), arrivals));
  ASSERT_EQ(arrivals.size(), 2u);
  EXPECT_EQ(arrivals[1].count, 4u);
}

TEST(UcxMessages, DamagedOnesAreRefused) {
  std::string bytes = encode_write({1, 2, 3, 4, 5});
  for (size_t cut = 0; cut < bytes.size(); ++cut) EXPECT_EQ(parse_write(bytes.substr(0, cut)), std::nullopt);
  EXPECT_EQ(parse_write(bytes + "x"), std::nullopt);
  std::vector<Arrival> arrivals;
  EXPECT_FALSE(parse_notice("1234567", arrivals));
  EXPECT_FALSE(parse_notice(std::string(kMaxNoticeBytes + kNoticePairBytes, 'x'), arrivals));
  EXPECT_TRUE(arrivals.empty());
}

/// What runs on RDMA (puts, one worker for all, notices after the flush), over tcp, where UCX emulates the puts.
class UcxOneSided : public ::testing::Test {
 protected:
  struct Node {
    std::vector<std::byte> memory = std::vector<std::byte>(kBlocks * kStride);
    std::unique_ptr<Agent> agent;
    PoolId pool{};
  };
  static constexpr uint32_t kBlocks = 64;
  static constexpr uint64_t kStride = 16 << 10;

  void SetUp() override {
    set_log_level(LogLevel::kError);
    if (Result<const Library*> library = Library::load(); !library.ok()) GTEST_SKIP() << library.status().to_string();
  }
  static std::unique_ptr<Node> open(const std::string& name) {
    auto node = std::make_unique<Node>();
    AgentConfig config;
    config.name = name;
    config.transport = "ucx";
    TransportChoice choice;
    choice.tls = "tcp";
    choice.devices = "lo";
    choice.one_sided = true;
    Result<std::unique_ptr<Agent>> agent =
        create_agent_with(config, SteadyClock::instance(), [&](std::shared_ptr<BackendContext> context) {
          return create_ucx_backend_with(std::move(context), "ucx", choice, "127.0.0.1");
        });
    EXPECT_TRUE(agent.ok()) << agent.status().to_string();
    node->agent = std::move(*agent);
    Result<MemoryRegion> region = node->agent->register_memory(node->memory, MemoryKind::kHost);
    EXPECT_TRUE(region.ok()) << region.status().to_string();
    node->pool = *node->agent->add_pool({*region, kStride, kBlocks});
    return node;
  }
  static BlockWrite everything(const Node& from, const Node& to, Tag tag) {
    BlockWrite write;
    write.local_pool = from.pool;
    write.remote_pool = to.pool;
    for (uint32_t i = 0; i < kBlocks; ++i) write.blocks.push_back({i, (i * 7) % kBlocks});
    write.length_bytes = kStride;
    write.tag = tag;
    return write;
  }
};

TEST_F(UcxOneSided, EverythingIsThereWhenItIsCounted) {
  auto receiver = open("receiver"), sender = open("sender");
  Random random(1);
  for (std::byte& byte : sender->memory) byte = static_cast<std::byte>(random());
  Result<Peer> peer = sender->agent->connect(receiver->agent->metadata());
  ASSERT_TRUE(peer.ok()) << peer.status().to_string();
  for (int round = 0; round < 20; ++round) {
    std::fill(receiver->memory.begin(), receiver->memory.end(), std::byte{0});
    Tag tag = *receiver->agent->open_inbox();
    Result<Transfer> transfer = peer->write(everything(*sender, *receiver, tag));
    ASSERT_TRUE(transfer.ok());
    std::promise<void> arrived;
    ASSERT_TRUE(receiver->agent->expect(tag, transfer->messages(), [&] { arrived.set_value(); }).ok());
    arrived.get_future().wait();
    for (uint32_t i = 0; i < kBlocks; ++i) {
      ASSERT_EQ(std::memcmp(&sender->memory[i * kStride], &receiver->memory[(i * 7) % kBlocks * kStride], kStride), 0);
    }
    EXPECT_EQ(transfer->wait(), Status());
    EXPECT_TRUE(transfer->settled());
    receiver->agent->close_inbox(tag);
  }
}

TEST_F(UcxOneSided, AFenceWaitsForTheWritersWord) {
  auto receiver = open("receiver"), sender = open("sender");
  Peer peer = *sender->agent->connect(receiver->agent->metadata());
  ASSERT_EQ(peer.write(everything(*sender, *receiver, Tag::kNone))->wait(), Status());
  EXPECT_EQ(receiver->agent->stats().inbound_peers, 1u);
  EXPECT_EQ(receiver->agent->fence(sender->agent->epoch()), Status());
  EXPECT_EQ(receiver->agent->stats().inbound_peers, 0u);
  Result<Transfer> refused = peer.write(everything(*sender, *receiver, Tag::kNone));
  EXPECT_FALSE(refused.ok() && refused->wait().ok());
  // New metadata lets it in again.
  Peer again = *sender->agent->connect(receiver->agent->metadata());
  EXPECT_EQ(again.write(everything(*sender, *receiver, Tag::kNone))->wait(), Status());
}

}  // namespace
}  // namespace baton::transfer::ucx
