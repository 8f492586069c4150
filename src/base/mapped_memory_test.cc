#include "base/mapped_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

namespace baton {
namespace {

TEST(MappedMemory, SharedMemoryIsSeenThroughASecondMapping) {
  Result<MappedMemory> memory = MappedMemory::create_shared("test", 1 << 20);
  ASSERT_TRUE(memory.ok()) << memory.status().to_string();
  void* second = ::mmap(nullptr, memory->bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, memory->fd(), 0);
  ASSERT_NE(second, MAP_FAILED);
  static_cast<std::byte*>(second)[12345] = std::byte{7};
  EXPECT_EQ(memory->data()[12345], std::byte{7});
  ::munmap(second, memory->bytes());
}

TEST(MappedMemory, SharedMemoryKeepsItsSize) {
  Result<MappedMemory> memory = MappedMemory::create_shared("test", 1 << 20);
  ASSERT_TRUE(memory.ok());
  EXPECT_NE(::ftruncate(memory->fd(), 0), 0);
  EXPECT_NE(::ftruncate(memory->fd(), 2 << 20), 0);
  EXPECT_NE(::fcntl(memory->fd(), F_GET_SEALS) & F_SEAL_SHRINK, 0);
}

TEST(MappedMemory, MovesAndRefusesNothing) {
  EXPECT_FALSE(MappedMemory::create_private(0).ok());
  EXPECT_FALSE(MappedMemory::create_shared("test", 0).ok());
  EXPECT_FALSE(MappedMemory::create_for_peers("test", 0).ok());
  EXPECT_FALSE(MappedMemory::map_shared(FileDescriptor(), 0, 4096).ok());
  Result<MappedMemory> memory = MappedMemory::create_private(1 << 16);
  ASSERT_TRUE(memory.ok());
  EXPECT_EQ(memory->fd(), -1);
  MappedMemory moved = std::move(*memory);
  EXPECT_FALSE(*memory);
  moved.data()[0] = std::byte{1};
  moved = MappedMemory();
  EXPECT_FALSE(moved);
}

TEST(MappedMemory, APartOfAFileIsMappedWhereHugePagesCanBe) {
  constexpr size_t kHuge = size_t{2} << 20;
  MappedMemory memory = std::move(*MappedMemory::create_shared("test", 4 * kHuge));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.data()) % kHuge, 0u);
  constexpr uint64_t kOffset = 12 << 12;
  Result<MappedMemory> part = MappedMemory::map_shared(FileDescriptor(::dup(memory.fd())), kOffset, 3 * kHuge);
  ASSERT_TRUE(part.ok()) << part.status().to_string();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(part->data()) % kHuge, kOffset);
  part->data()[5] = std::byte{1};
  EXPECT_EQ(memory.data()[kOffset + 5], std::byte{1});
}

TEST(MappedMemory, ForPeersIsEitherKind) {
  Result<MappedMemory> memory = MappedMemory::create_for_peers("test", 1 << 20);
  ASSERT_TRUE(memory.ok()) << memory.status().to_string();
  EXPECT_EQ(memory->data()[(1 << 20) - 1], std::byte{0});
}

}  // namespace
}  // namespace baton
