#include "transfer/shm/doorbell.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <semaphore>
#include <thread>

#include "base/random.h"

namespace baton::transfer {
namespace {

using ::testing::HasSubstr;

struct alignas(64) Memory {
  std::array<uint64_t, kBellPageWords> words{};
  BellHead::Page page() { return BellHead::Page(words); }
};

TEST(BellRing, KeepsOrderThroughManyLaps) {
  Memory memory;
  BellRingWriter writer(memory.page());
  BellRingReader reader(memory.page());
  Random random(1);
  uint32_t sent = 0, received = 0;
  std::vector<Arrival> arrivals;
  while (received < 200 * kBellPageWords) {
    for (uint64_t i = random.below(700); i > 0; --i) {
      if (!writer.push({sent + 1, sent % BellWord::kMaxCount + 1})) break;
      ++sent;
    }
    arrivals.clear();
    bool more = true;
    while (more) ASSERT_TRUE(reader.take(arrivals, &more).ok());
    for (const Arrival& arrival : arrivals) {
      ++received;
      ASSERT_EQ(arrival.tag, received);
      ASSERT_EQ(arrival.count, (received - 1) % BellWord::kMaxCount + 1);
    }
    ASSERT_EQ(received, sent);
  }
}

TEST(BellRing, AFullOneTakesNothingMoreUntilThereIsRoom) {
  Memory memory;
  BellRingWriter writer(memory.page());
  BellRingReader reader(memory.page());
  for (size_t i = 0; i < kBellPageWords; ++i) ASSERT_TRUE(writer.push({7, 1}));
  EXPECT_FALSE(writer.push({8, 1}));
  std::vector<Arrival> arrivals;
  bool more = false;
  EXPECT_TRUE(reader.take(arrivals, &more).ok());
  EXPECT_TRUE(more);  // a lap at a time
  EXPECT_EQ(arrivals.size(), kBellPageWords);
  EXPECT_TRUE(writer.push({8, 1}));
  EXPECT_TRUE(reader.take(arrivals, &more).ok());
  EXPECT_FALSE(more);
  EXPECT_EQ(arrivals.back().tag, 8u);
}

TEST(BellRing, WordsThatCannotStandThereAreDamage) {
  const uint64_t good = BellWord::make({1, 1}, 1);
  for (uint64_t bad : {~uint64_t{0}, uint64_t{1}, good & ~uint64_t{0xff}, BellWord::make({1, 1}, 1 + kBellPageWords),
                       BellWord::make({0, 1}, 1), BellWord::make({1, 0}, 1)}) {
    Memory memory;
    BellRingWriter writer(memory.page());
    BellRingReader reader(memory.page());
    ASSERT_TRUE(writer.push({1, 1}));
    memory.words[1] = bad;
    std::vector<Arrival> arrivals;
    bool more = false;
    EXPECT_EQ(reader.take(arrivals, &more).code(), StatusCode::kDataLoss) << bad;
    EXPECT_EQ(arrivals.size(), 1u);
  }
}

/// The race that a doorbell is about: an owner that goes to sleep while a writer rings. Sleep ends only when a writer wakes it.
TEST(BellHead, NoRingIsSleptOver) {
  constexpr uint32_t kWriters = 3, kEach = 20'000;
  Memory head_memory;
  std::array<Memory, kWriters> rings;
  std::counting_semaphore<> wakes(0);
  std::vector<std::thread> writers;
  for (uint32_t bell = 0; bell < kWriters; ++bell) {
    writers.emplace_back([&, bell] {
      BellHead head(head_memory.page());
      BellRingWriter ring(rings[bell].page());
      uint64_t woken = 0;
      for (uint32_t i = 1; i <= kEach; ++i) {
        while (!ring.push({bell + 1, i})) std::this_thread::yield();
        head.ring(bell);
        const uint64_t sleeps = head.sleeps();
        if (sleeps % 2 != 0 && std::exchange(woken, sleeps) != sleeps) wakes.release();
        if (i % 64 == 0) std::this_thread::yield();
      }
    });
  }
  BellHead head(head_memory.page());
  std::vector<BellRingReader> readers;
  for (Memory& ring : rings) readers.emplace_back(ring.page());
  std::array<uint32_t, kWriters> seen{};
  std::vector<Arrival> arrivals;
  uint64_t slept = 0;
  for (uint32_t received = 0; received < kWriters * kEach;) {
    head.wake();
    const uint64_t bits = head.take(0);
    for (uint32_t bell = 0; bell < kWriters; ++bell) {
      if ((bits >> bell & 1) == 0) continue;
      bool more = true;
      while (more) ASSERT_TRUE(readers[bell].take(arrivals, &more).ok());
    }
    for (const Arrival& arrival : arrivals) ASSERT_EQ(arrival.count, ++seen[arrival.tag - 1]);
    received += static_cast<uint32_t>(arrivals.size());
    const bool idle = arrivals.empty();
    arrivals.clear();
    if (idle && received < kWriters * kEach && head.sleep(kWriters)) {
      ++slept;
      // A late word of an earlier sleep only makes this one short.
      wakes.acquire();
    }
  }
  for (std::thread& writer : writers) writer.join();
  EXPECT_GT(slept, 0u);
}

std::unique_ptr<Doorbells> doorbells() {
  Result<std::unique_ptr<Doorbells>> made = Doorbells::create();
  EXPECT_TRUE(made.ok()) << made.status().to_string();
  return std::move(*made);
}
Doorbell open_bell(uint32_t bell, const std::string& ticket) {
  Result<Doorbell> opened = Doorbell::open(::getpid(), bell, ticket);
  EXPECT_TRUE(opened.ok()) << opened.status().to_string();
  return std::move(*opened);
}

TEST(Doorbells, CarryWhatWritersRing) {
  auto owner = doorbells();
  std::vector<Doorbell> writers;
  for (uint32_t i = 0; i < 100; ++i) {
    std::string ticket;
    Result<uint32_t> bell = owner->add(&ticket);
    ASSERT_TRUE(bell.ok());
    ASSERT_EQ(*bell, i);
    writers.push_back(open_bell(*bell, ticket));
  }
  EXPECT_TRUE(owner->sleep());
  EXPECT_TRUE(writers[3].ring({30, 2}));
  EXPECT_TRUE(writers[3].must_wake());
  EXPECT_FALSE(writers[3].must_wake()) << "once in a sleep";
  EXPECT_TRUE(writers[99].ring({99, 1}));
  EXPECT_TRUE(writers[99].must_wake()) << "the other one may be stopped before it has sent its word";
  EXPECT_FALSE(owner->sleep()) << "something was rung";
  EXPECT_FALSE(writers[98].must_wake());
  std::vector<Arrival> arrivals;
  std::vector<Doorbells::Damaged> damaged;
  owner->take(arrivals, damaged);
  ASSERT_EQ(arrivals.size(), 2u);
  EXPECT_EQ(arrivals[0].tag, 30u);
  EXPECT_EQ(arrivals[1].tag, 99u);
  EXPECT_TRUE(damaged.empty());
  EXPECT_FALSE(writers[0].ring({1, BellWord::kMaxCount + 1})) << "does not fit a word";
}

TEST(Doorbells, TheLastWordsOfAWriterCountAndItsLateOnesReachNobody) {
  auto owner = doorbells();
  std::string ticket;
  Result<uint32_t> first = owner->add(&ticket);
  Doorbell old = open_bell(*first, ticket);
  ASSERT_TRUE(old.ring({1, 1}));
  std::vector<Arrival> arrivals;
  ASSERT_TRUE(owner->remove(*first, arrivals).ok());
  EXPECT_EQ(arrivals.size(), 1u);
  // Cut off, but alive: it goes on ringing while its number belongs to another.
  std::string next_ticket;
  Result<uint32_t> second = owner->add(&next_ticket);
  ASSERT_EQ(*second, *first);
  Doorbell next = open_bell(*second, next_ticket);
  ASSERT_TRUE(old.ring({2, 2}));
  ASSERT_TRUE(next.ring({3, 3}));
  arrivals.clear();
  std::vector<Doorbells::Damaged> damaged;
  owner->take(arrivals, damaged);
  ASSERT_EQ(arrivals.size(), 1u);
  EXPECT_EQ(arrivals[0].tag, 3u);
  EXPECT_TRUE(damaged.empty());
}

TEST(Doorbells, ADamagedRingIsReportedOnceAndOthersGoOn) {
  auto owner = doorbells();
  std::string bad_ticket, good_ticket;
  Result<uint32_t> bad = owner->add(&bad_ticket), good = owner->add(&good_ticket);
  Doorbell writer = open_bell(*good, good_ticket);
  Result<SharedTicket> where = parse_ticket(bad_ticket);
  ASSERT_TRUE(where.ok());
  Result<SharedPage> head = SharedPage::map(static_cast<int>(where->fd), 0);
  Result<SharedPage> page = SharedPage::map(static_cast<int>(where->fd), where->offset);
  ASSERT_TRUE(head.ok() && page.ok());
  for (uint64_t& word : page->words()) word = 0x4141414141414141;
  for (uint64_t& word : head->words()) word = ~uint64_t{0};  // every bell that there could be
  ASSERT_TRUE(writer.ring({5, 5}));
  std::vector<Arrival> arrivals;
  std::vector<Doorbells::Damaged> damaged;
  for (int i = 0; i < 3; ++i) {
    for (size_t word = BellHead::kBitWords; word < kBellPageWords; ++word) head->words()[word] = ~uint64_t{0};
    owner->take(arrivals, damaged);
  }
  ASSERT_EQ(damaged.size(), 1u);
  EXPECT_EQ(damaged[0].bell, *bad);
  EXPECT_THAT(damaged[0].why.message(), HasSubstr("4141414141414141"));
  ASSERT_EQ(arrivals.size(), 1u);
  EXPECT_EQ(arrivals[0].tag, 5u);
  EXPECT_TRUE(owner->remove(*bad, arrivals).ok());
}

TEST(Doorbells, TicketsAreChecked) {
  auto owner = doorbells();
  std::string ticket;
  Result<uint32_t> bell = owner->add(&ticket);
  Result<SharedTicket> where = parse_ticket(ticket);
  ASSERT_TRUE(where.ok());
  const auto with = [&](auto change, uint64_t number) {
    SharedTicket changed = *where;
    change(changed);
    return Doorbell::open(::getpid(), number, encode_ticket(changed)).ok();
  };
  EXPECT_TRUE(with([](SharedTicket&) {}, *bell));
  EXPECT_FALSE(with([](SharedTicket&) {}, kMaxBells));
  EXPECT_FALSE(with([](SharedTicket& t) { t.offset = 0; }, *bell)) << "the head";
  EXPECT_FALSE(with([](SharedTicket& t) { t.offset += 8; }, *bell));
  EXPECT_FALSE(with([](SharedTicket& t) { t.offset = uint64_t{1} << 40; }, *bell)) << "behind the end";
  EXPECT_FALSE(with([](SharedTicket& t) { t.bytes *= 2; }, *bell));
  EXPECT_FALSE(with([](SharedTicket& t) { t.inode += 1; }, *bell));
  EXPECT_FALSE(Doorbell::open(::getpid(), *bell, "short").ok());
}

}  // namespace
}  // namespace baton::transfer
