#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "base/mapped_memory.h"
#include "base/random.h"
#include "transfer/include/baton/transfer.h"
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

}  // namespace
}  // namespace baton::transfer
