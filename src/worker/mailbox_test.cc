#include "worker/mailbox.h"

#include <gtest/gtest.h>

#include <thread>

#include "base/clock.h"

namespace baton::worker {
namespace {

using protocol::Frame;

Frame heads_up() {
  Frame frame;
  frame.mutable_heads_up();
  return frame;
}

Frame cancel(uint64_t request) {
  Frame frame;
  frame.mutable_cancel()->set_request(request);
  return frame;
}

TEST(Mailbox, TakesEverythingInOrder) {
  Mailbox mailbox(1000);
  EXPECT_TRUE(mailbox.take(0).empty());
  EXPECT_TRUE(mailbox.post_frame(nullptr, cancel(1)));
  mailbox.post(InboxComplete{2});
  auto events = mailbox.take(1'000'000'000);
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(std::get<FrameArrived>(events[0]).frame.cancel().request(), 1u);
  EXPECT_EQ(std::get<InboxComplete>(events[1]).handoff, 2u);
  mailbox.wake();
  EXPECT_TRUE(mailbox.take(100'000'000'000).empty()) << "one wait was ended";
}

TEST(Mailbox, TakerIsAwakeFromAHeadsUpToTheNextFrame) {
  auto mailbox = std::make_shared<Mailbox>(1000);
  auto handler = Mailbox::handler(mailbox);
  handler.on_frame(nullptr, heads_up());
  EXPECT_EQ(handler.awake_until_ns->load(), 0) << "not unless it may";
  constexpr int64_t kAwakeMs = 100'000;
  mailbox->set_awake_ms(kAwakeMs);
  EXPECT_EQ(mailbox->take(0).size(), 1u);

  handler.on_frame(nullptr, heads_up());
  EXPECT_GT(handler.awake_until_ns->load(), SteadyClock::instance().now_ns());
  EXPECT_EQ(mailbox->take(kAwakeMs * 1'000'000).size(), 1u);
  std::thread network([&] { handler.on_frame(nullptr, cancel(3)); });
  auto events = mailbox->take(kAwakeMs * 1'000'000);
  network.join();
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(std::get<FrameArrived>(events[0]).frame.cancel().request(), 3u);
  EXPECT_EQ(handler.awake_until_ns->load(), 0) << "what was announced has come";

  handler.on_frame(nullptr, heads_up());
  EXPECT_EQ(mailbox->take(0).size(), 1u);
  EXPECT_TRUE(mailbox->take(1'000'000).empty()) << "awake or not, a wait ends when it should";
  std::thread transfer([&] { mailbox->post(InboxComplete{4}); });
  EXPECT_EQ(mailbox->take(kAwakeMs * 1'000'000).size(), 1u);
  transfer.join();
}

TEST(Mailbox, TheLastPartOfAWaitIsSpentAwake) {
  Mailbox mailbox(1000);
  EXPECT_TRUE(mailbox.take(2'000'000, 1'000'000).empty());
  EXPECT_TRUE(mailbox.take(1'000'000, 5'000'000).empty()) << "all of it";
  for (const int64_t awake_ns : {int64_t{0}, int64_t{50'000'000'000}, int64_t{200'000'000'000}}) {
    std::thread transfer([&] { mailbox.post(InboxComplete{4}); });
    EXPECT_EQ(mailbox.take(100'000'000'000, awake_ns).size(), 1u);
    transfer.join();
  }
}

}  // namespace
}  // namespace baton::worker
