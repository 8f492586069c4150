#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "base/mapped_memory.h"
#include "base/log.h"
#include "base/random.h"
#include "transfer/include/baton/transfer.h"
#include "transfer/shm/doorbell_ring.h"
#include "transfer/shm/shared_pool.h"
#include "transfer/shm/stream_copy.h"

namespace baton::transfer {
namespace {

using ::testing::HasSubstr;

TEST(StreamCopy, CopiesAnyLengthAndAlignmentAndNothingElse) {
  Random random(3);
  std::vector<std::byte> from(8192), to(8192);
  for (std::byte& b : from) b = static_cast<std::byte>(random());
  for (int round = 0; round < 2000; ++round) {
    size_t at = random.below(100), source = random.below(100);
    size_t bytes = round % 2 == 0 ? random.below(700) : random.below(8000);
    std::memset(to.data(), 0x55, to.size());
    stream_copy(to.data() + at, from.data() + source, bytes);
    stream_fence();
    ASSERT_EQ(std::memcmp(to.data() + at, from.data() + source, bytes), 0) << at << " " << source << " " << bytes;
    for (size_t i = 0; i < to.size(); ++i) {
      bool inside = i >= at && i < at + bytes;
      ASSERT_TRUE(inside || to[i] == std::byte{0x55}) << i;
    }
  }
}

MappedMemory shared(size_t bytes) {
  Result<MappedMemory> memory = MappedMemory::create_shared("shm-test", bytes);
  EXPECT_TRUE(memory.ok()) << memory.status().to_string();
  return std::move(*memory);
}

TEST(SharedPool, IsFoundFromTheMemoryAloneAndMapped) {
  MappedMemory memory = shared(1 << 20);
  // Cut the mapping into several lines of /proc/self/maps, and take a piece that starts in the middle of a page.
  ASSERT_EQ(::madvise(memory.data() + (256 << 10), 64 << 10, MADV_DONTDUMP), 0);
  std::span<std::byte> part = memory.span().subspan(5000, 700'000);
  Result<SharedSource> source = find_shared_source(part);
  ASSERT_TRUE(source.ok()) << source.status().to_string();
  EXPECT_EQ(source->ticket.offset, 5000u);
  EXPECT_EQ(source->ticket.bytes, 700'000u);
  Result<SharedTicket> ticket = parse_ticket(encode_ticket(source->ticket));
  ASSERT_TRUE(ticket.ok());
  EXPECT_EQ(*ticket, source->ticket);
  Result<MappedPool> pool = MappedPool::open(::getpid(), *ticket);
  ASSERT_TRUE(pool.ok()) << pool.status().to_string();
  EXPECT_NE(pool->data(), part.data());
  pool->data()[699'999] = std::byte{9};
  EXPECT_EQ(part[699'999], std::byte{9});
}

TEST(SharedPool, PrivateAndUnsealedMemoryIsNot) {
  Result<MappedMemory> own = MappedMemory::create_private(1 << 20);
  ASSERT_TRUE(own.ok());
  EXPECT_EQ(find_shared_source(own->span()).status().code(), StatusCode::kNotFound);

  FileDescriptor fd(::memfd_create("unsealed", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(fd.get(), 1 << 20), 0);
  void* data = ::mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  ASSERT_NE(data, MAP_FAILED);
  EXPECT_THAT(find_shared_source({static_cast<std::byte*>(data), 1 << 20}).status().message(), HasSubstr("sealed"));
  fd.reset();
  EXPECT_THAT(find_shared_source({static_cast<std::byte*>(data), 1 << 20}).status().message(), HasSubstr("descriptor"));
  ::munmap(data, 1 << 20);
}

TEST(SharedPool, ATicketIsCheckedAgainstTheFile) {
  MappedMemory memory = shared(1 << 20), other = shared(1 << 20);
  Result<SharedSource> source = find_shared_source(memory.span());
  ASSERT_TRUE(source.ok());
  auto refused = [&](auto change) {
    SharedTicket ticket = source->ticket;
    change(ticket);
    return !MappedPool::open(::getpid(), ticket).ok();
  };
  EXPECT_FALSE(refused([](SharedTicket&) {}));
  EXPECT_TRUE(refused([&](SharedTicket& t) { t.fd = static_cast<uint64_t>(other.fd()); }));
  EXPECT_TRUE(refused([](SharedTicket& t) { t.fd = 0x7fffffff; }));
  EXPECT_TRUE(refused([](SharedTicket& t) { t.bytes += 1; }));
  EXPECT_TRUE(refused([](SharedTicket& t) { t.offset = 4096; }));
  EXPECT_TRUE(refused([](SharedTicket& t) { ++t.inode; }));
  std::string wire = encode_ticket(source->ticket);
  for (size_t size = 0; size < wire.size(); ++size) EXPECT_FALSE(parse_ticket(std::string_view(wire).substr(0, size)).ok());
  EXPECT_FALSE(parse_ticket(wire + "x").ok());
  SharedTicket absurd = source->ticket;
  absurd.offset = ~0ull;
  EXPECT_FALSE(parse_ticket(encode_ticket(absurd)).ok());
}

/// Both kinds of memory, in messages that are streamed and in small ones, through real agents.
TEST(ShmBackend, WritesIntoAndReadsFromSharedAndPrivateMemoryAlike) {
  constexpr uint64_t kStride = 12'000, kCount = 300;
  for (bool is_shared : {true, false}) {
    MappedMemory target_memory = is_shared ? shared(kStride * kCount) : std::move(*MappedMemory::create_private(kStride * kCount));
    MappedMemory source_memory = std::move(*MappedMemory::create_private(kStride * kCount));
    Random random(5);
    for (std::byte& b : source_memory.span()) b = static_cast<std::byte>(random());
    AgentConfig config;
    config.transport = "shm";
    config.name = "target";
    auto target = Agent::create(config);
    config.name = "source";
    auto source = Agent::create(config);
    ASSERT_TRUE(target.ok() && source.ok());
    auto add = [](Agent& agent, MappedMemory& memory) {
      MemoryRegion region = *agent.register_memory(memory.span(), MemoryKind::kHost);
      return *agent.add_pool({region, kStride, kCount});
    };
    add(**target, target_memory);
    add(**source, source_memory);
    Result<Peer> peer = (*source)->connect((*target)->metadata());
    ASSERT_TRUE(peer.ok()) << peer.status().to_string();
    for (uint32_t blocks : {1u, 5u, 300u}) {
      std::memset(target_memory.data(), 0, target_memory.bytes());
      BlockWrite write;
      for (uint32_t i = 0; i < blocks; ++i) write.blocks.push_back({i, (i * 7 + 3) % static_cast<uint32_t>(kCount)});
      write.offset_bytes = 8;
      write.length_bytes = kStride - 16;
      Result<Transfer> transfer = peer->write(write);
      ASSERT_TRUE(transfer.ok());
      ASSERT_TRUE(transfer->wait().ok()) << transfer->status().to_string();
      for (const BlockPair& pair : write.blocks) {
        const std::byte* there = target_memory.data() + pair.remote_block * kStride;
        ASSERT_EQ(std::memcmp(there + 8, source_memory.data() + pair.local_block * kStride + 8, kStride - 16), 0);
        ASSERT_EQ(there[7], std::byte{0});
        ASSERT_EQ(there[kStride - 8], std::byte{0});
      }
      // And back. The owner has no part in it.
      std::memset(source_memory.data(), 0, source_memory.bytes());
      BlockRead read;
      read.blocks = write.blocks;
      read.offset_bytes = 100;
      read.length_bytes = kStride - 200;
      Result<Transfer> back = peer->read(read);
      ASSERT_TRUE(back.ok());
      ASSERT_TRUE(back->wait().ok()) << back->status().to_string();
      for (const BlockPair& pair : write.blocks) {
        const std::byte* here = source_memory.data() + pair.local_block * kStride;
        ASSERT_EQ(std::memcmp(here + 100, target_memory.data() + pair.remote_block * kStride + 100, kStride - 200), 0);
        ASSERT_EQ(here[99], std::byte{0});
        ASSERT_EQ(here[kStride - 100], std::byte{0});
      }
      EXPECT_EQ((*target)->stats().served_reads, 0u);
      for (std::byte& b : source_memory.span()) b = static_cast<std::byte>(random());
    }
    EXPECT_TRUE(peer->close().ok());
  }
}

int doorbells_of_this_process() {
  for (int fd = 3; fd < 1024; ++fd) {
    char name[64] = "";
    const std::string link = "/proc/self/fd/" + std::to_string(fd);
    if (::readlink(link.c_str(), name, sizeof(name) - 1) > 0 && std::string_view(name).find("baton-doorbells") != std::string_view::npos) return fd;
  }
  return -1;
}

TEST(ShmBackend, AWriterThatDamagesItsRingIsShutOutAndOthersAreNot) {
  set_log_level(LogLevel::kError);
  MappedMemory memory = shared(64 << 10);
  AgentConfig config;
  config.transport = "shm";
  const auto make = [&](const char* name) {
    config.name = name;
    Result<std::unique_ptr<Agent>> agent = Agent::create(config);
    EXPECT_TRUE(agent.ok()) << agent.status().to_string();
    EXPECT_TRUE((*agent)->add_pool({*(*agent)->register_memory(memory.span(), MemoryKind::kHost), 4096, 16}).ok());
    return std::move(*agent);
  };
  auto owner = make("owner");
  const int doorbells = doorbells_of_this_process();
  ASSERT_GE(doorbells, 0);
  auto bad = make("bad"), good = make("good");
  const auto write = [](const Peer& peer, Tag tag) {
    BlockWrite write;
    write.blocks = {{0, 1}};
    write.length_bytes = 4096;
    write.tag = tag;
    Result<Transfer> transfer = peer.write(std::move(write));
    return transfer.ok() ? transfer->wait() : transfer.status();
  };
  Result<Tag> tag = owner->open_inbox();
  Result<Peer> from_bad = bad->connect(owner->metadata());
  ASSERT_TRUE(from_bad.ok() && write(*from_bad, *tag).ok());
  Result<Peer> from_good = good->connect(owner->metadata());
  ASSERT_TRUE(from_good.ok() && write(*from_good, *tag).ok());
  ASSERT_TRUE(owner->wait(*tag, 2).ok());
  // The first ring behind the head is that of the first writer.
  const uint64_t garbage = 0x5555555555555555;
  for (uint64_t word = 0; word < 512; ++word) {
    ASSERT_EQ(::pwrite(doorbells, &garbage, sizeof(garbage), static_cast<off_t>(4096 + 8 * word)), 8);
  }
  // And its bit. (It takes its ring for full, and goes on by socket.)
  const uint64_t rung = 1;
  ASSERT_EQ(::pwrite(doorbells, &rung, sizeof(rung), sizeof(uint64_t) * BellHead::kBitWords), 8);
  ASSERT_TRUE(write(*from_good, *tag).ok());
  const Deadline deadline = Deadline::after_ms(SteadyClock::instance(), 20'000);
  while (from_bad->alive() && !deadline.expired(SteadyClock::instance())) (void)write(*from_bad, *tag);
  EXPECT_FALSE(from_bad->alive());
  const uint64_t before = owner->arrived(*tag);
  EXPECT_FALSE(write(*from_bad, *tag).ok());
  EXPECT_TRUE(write(*from_good, *tag).ok());
  EXPECT_TRUE(owner->wait(*tag, before + 1).ok());
  set_log_level(LogLevel::kInfo);
}

}  // namespace
}  // namespace baton::transfer
