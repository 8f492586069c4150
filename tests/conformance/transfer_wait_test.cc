#include "transfer_fixture.h"

/// Agent::wait() and the ways that are taken while somebody waits: whoever waits moves things along, small writes are posted by whoever
/// writes them, and the end of some is confirmed later.
namespace baton::transfer::conformance {
namespace {

class TransferWait : public TransferConformance {};

TEST_P(TransferWait, EndsWhenAllIsThereAndNotBefore) {
  auto sender = make_node("sender", 8, 4096), receiver = make_node("receiver", 8, 4096);
  Peer peer = connect(*sender, *receiver);
  sender->fill(1);
  Result<Tag> tag = receiver->agent->open_inbox();
  ASSERT_TRUE(tag.ok());
  Result<Transfer> first = peer.write(whole(*sender, *receiver, {{0, 1}}, *tag));
  ASSERT_TRUE(first.ok());
  ASSERT_TRUE(receiver->agent->wait(*tag, first->messages()).ok());
  EXPECT_EQ(receiver->agent->arrived(*tag), first->messages());
  EXPECT_TRUE(first->wait().ok());
  EXPECT_EQ(std::memcmp(sender->block(0), receiver->block(1), 4096), 0);
  const Status late = receiver->agent->wait(*tag, first->messages() + 1, Deadline::after_ms(SteadyClock::instance(), 5));
  EXPECT_EQ(late.code(), StatusCode::kDeadlineExceeded) << late.to_string();
  EXPECT_TRUE(receiver->agent->wait(*tag, 0).ok());
  receiver->agent->close_inbox(*tag);
  EXPECT_EQ(receiver->agent->wait(*tag, 0).code(), StatusCode::kNotFound);
}

TEST_P(TransferWait, IsEndedByCloseInbox) {
  auto node = make_node("receiver", 8, 4096);
  Result<Tag> tag = node->agent->open_inbox();
  ASSERT_TRUE(tag.ok());
  std::thread waiter([&] { EXPECT_EQ(node->agent->wait(*tag, 1).code(), StatusCode::kNotFound); });
  std::this_thread::yield();
  node->agent->close_inbox(*tag);
  waiter.join();
}

/// Every message is looked at when its wait has ended: what a wait says is true.
TEST_P(TransferWait, AConversationOfTwoThreads) {
  constexpr uint64_t kRounds = 300;
  for (int64_t poll_us : {0, 50, 20'000}) {
    AgentConfig config;
    config.poll_us = poll_us;
    auto a = make_node("a", 4, 4096, config), b = make_node("b", 4, 4096, config);
    Peer to_b = connect(*a, *b), to_a = connect(*b, *a);
    Result<Tag> tag_a = a->agent->open_inbox(), tag_b = b->agent->open_inbox();
    ASSERT_TRUE(tag_a.ok() && tag_b.ok());
    const auto talk = [&](Node& own, Node& other, Peer& peer, Tag mine, Tag theirs, bool begins) {
      Status status;
      std::atomic<uint64_t> ended{0};
      uint64_t expected = 0, with_callback = 0;
      Transfer spoken[2];  // by block
      for (uint64_t round = 1; round <= kRounds && status.ok(); ++round) {
        std::vector<std::byte> mark(4096, static_cast<std::byte>(begins ? round : ~round));
        // Of two blocks in turn, so that the one before may still be on its way.
        const auto block = static_cast<uint32_t>(round % 2);
        const auto speak = [&] {
          if (spoken[block]) status = spoken[block].wait();  // its memory is written again
          std::memcpy(own.block(block), mark.data(), mark.size());
          BlockWrite write = whole(own, other, {{block, block + 2}}, theirs);
          Result<Transfer> transfer =
              round % 16 == 0 ? peer.write(std::move(write), [&](const Status&) { ++ended; }) : peer.write(std::move(write));
          with_callback += round % 16 == 0;
          if (!status.ok()) return;
          status = transfer.status();
          if (transfer.ok()) spoken[block] = *transfer;
        };
        if (begins) speak();
        if (status.ok()) status = own.agent->wait(mine, expected += GetParam().integrity ? 2 : 1);
        const auto wanted = static_cast<std::byte>(begins ? ~round : round);
        const std::byte* got = own.block(block + 2);
        if (status.ok() && !std::all_of(got, got + 4096, [&](std::byte byte) { return byte == wanted; })) {
          status = data_loss("round {}: not what was sent", round);
        }
        if (!begins && status.ok()) speak();
      }
      EXPECT_TRUE(status.ok()) << status.to_string();
      for (const Transfer& last : spoken) EXPECT_TRUE(last.wait().ok());
      EXPECT_TRUE(wait_until([&] { return ended == with_callback; }));
    };
    std::thread other([&] { talk(*b, *a, to_a, *tag_b, *tag_a, false); });
    talk(*a, *b, to_b, *tag_a, *tag_b, true);
    other.join();
    // When it is over nobody polls, and everything goes on by the agents' own threads.
    Result<Tag> tag = b->agent->open_inbox();
    ASSERT_TRUE(tag.ok());
    Result<Transfer> after = to_b.write(whole(*a, *b, {{0, 1}}, *tag));
    ASSERT_TRUE(after.ok());
    EXPECT_TRUE(wait_for(*b->agent, *tag, after->messages()));
    EXPECT_TRUE(wait_until([&] { return after->done(); }));
    EXPECT_TRUE(after->status().ok());
  }
}

TEST_P(TransferWait, CallbacksRunWhileOthersWait) {
  auto sender = make_node("sender", 64, 4096), receiver = make_node("receiver", 64, 4096);
  Peer peer = connect(*sender, *receiver);
  Result<Tag> awaited = receiver->agent->open_inbox(), called = receiver->agent->open_inbox();
  ASSERT_TRUE(awaited.ok() && called.ok());
  std::atomic<int> calls{0};
  std::thread::id waiter = std::this_thread::get_id();
  uint64_t messages = 0;
  for (uint32_t i = 0; i < 50; ++i) {
    Result<Transfer> write = peer.write(whole(*sender, *receiver, {{i, i}}, *called), [&](const Status& status) {
      EXPECT_TRUE(status.ok());
      EXPECT_NE(std::this_thread::get_id(), waiter) << "callbacks belong to the agent's thread";
      ++calls;
    });
    ASSERT_TRUE(write.ok());
    messages += write->messages();
  }
  ASSERT_TRUE(receiver->agent->expect(*called, messages, [&] { ++calls; }).ok());
  Result<Transfer> last = peer.write(whole(*sender, *receiver, {{0, 0}}, *awaited));
  ASSERT_TRUE(last.ok());
  EXPECT_TRUE(receiver->agent->wait(*awaited, last->messages()).ok());
  EXPECT_TRUE(receiver->agent->wait(*called, messages).ok());
  EXPECT_TRUE(wait_until([&] { return calls == 51; }));
}

std::vector<Network> all_networks() {
  std::vector<Network> networks;
  for (const char* transport : {"sim", "shm", "tcp", "cuda_ipc", "staged:shm", "staged:tcp"}) {
    Network network;
    network.transport = transport;
    networks.push_back(network);
  }
  Network rails;
  rails.transport = "tcp";
  rails.addresses = "127.0.0.1,127.0.0.2";
  networks.push_back(rails);
  for (const char* transport : {"shm", "tcp"}) {
    Network checked;
    checked.transport = transport;
    checked.integrity = true;
    networks.push_back(checked);
  }
  return networks;
}

INSTANTIATE_TEST_SUITE_P(Transports, TransferWait, ::testing::ValuesIn(all_networks()), [](const auto& info) {
  std::string name = info.param.transport + (info.param.integrity ? "_integrity" : "") + (info.param.addresses.find(',') != std::string::npos ? "_rails" : "");
  std::replace(name.begin(), name.end(), ':', '_');
  return name;
});

}  // namespace
}  // namespace baton::transfer::conformance
