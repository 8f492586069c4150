#include "transfer/inbox.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <thread>

namespace baton::transfer {
namespace {

TEST(InboxTable, TagsAreFreshAndSkipNoneAndTheOnesInUse) {
  InboxTable inboxes(kFirstReservedTag - 1);
  Tag first = *inboxes.open();
  Tag second = *inboxes.open();
  EXPECT_EQ(static_cast<uint32_t>(first), kFirstReservedTag - 1);
  EXPECT_EQ(static_cast<uint32_t>(second), 1u);  // 0 means "not counted", and the backends' own are left out
  inboxes.close(second);
  EXPECT_EQ(static_cast<uint32_t>(*inboxes.open()), 2u);
}

TEST(InboxTable, CallsOnceWhenTheCountIsReached) {
  InboxTable inboxes(1);
  Tag tag = *inboxes.open();
  int calls = 0;
  ASSERT_TRUE(inboxes.expect(tag, 3, [&] { ++calls; }).ok());
  inboxes.add(static_cast<uint32_t>(tag), 2);
  inboxes.run_due();
  EXPECT_EQ(calls, 0);
  inboxes.add(static_cast<uint32_t>(tag), 5);
  inboxes.add(static_cast<uint32_t>(tag), 1);
  inboxes.run_due();
  inboxes.run_due();
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(inboxes.arrived(tag), 8u);
  // Announced after arrival: at once, inside the call.
  ASSERT_TRUE(inboxes.expect(tag, 8, [&] { ++calls; }).ok());
  EXPECT_EQ(calls, 2);
}

TEST(InboxTable, ACallbackThatIsDueDoesNotRunAfterClose) {
  InboxTable inboxes(1);
  Tag tag = *inboxes.open();
  bool called = false;
  ASSERT_TRUE(inboxes.expect(tag, 1, [&] { called = true; }).ok());
  inboxes.add(static_cast<uint32_t>(tag), 1);
  inboxes.close(tag);
  inboxes.run_due();
  EXPECT_FALSE(called);
  inboxes.add(static_cast<uint32_t>(tag), 4);
  EXPECT_EQ(inboxes.stray_messages(), 4u);
}

TEST(InboxTable, CloseWaitsForACallbackThatRuns) {
  InboxTable inboxes(1);
  Tag tag = *inboxes.open();
  std::promise<void> inside, go;
  std::atomic<bool> finished{false};
  ASSERT_TRUE(inboxes.expect(tag, 1, [&] {
    inside.set_value();
    go.get_future().wait();
    finished = true;
  }).ok());
  inboxes.add(static_cast<uint32_t>(tag), 1);
  std::thread progress([&] { inboxes.run_due(); });
  inside.get_future().wait();
  std::thread closer([&] {
    inboxes.close(tag);
    EXPECT_TRUE(finished);
  });
  go.set_value();
  closer.join();
  progress.join();
}

TEST(InboxTable, ACallbackMayCloseItsOwnInboxAndOpenAnother) {
  InboxTable inboxes(1);
  Tag tag = *inboxes.open();
  bool called = false;
  ASSERT_TRUE(inboxes.expect(tag, 1, [&] {
    inboxes.close(tag);
    called = inboxes.open().ok();
  }).ok());
  inboxes.add(static_cast<uint32_t>(tag), 1);
  inboxes.run_due();
  EXPECT_TRUE(called);
  EXPECT_EQ(inboxes.size(), 1u);
}

}  // namespace
}  // namespace baton::transfer
