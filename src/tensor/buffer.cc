#include "tensor/buffer.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

namespace baton {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

Result<Buffer> Buffer::allocate(size_t bytes) {
  if (bytes > std::numeric_limits<size_t>::max() / 2) {
    return resource_exhausted("cannot allocate {} bytes: more than the address space", bytes);
  }
  Buffer buffer;
  if (bytes == 0) return buffer;
  // Map one huge page too many, then give back what lies before and after the aligned part.
  const size_t mapped = round_up(bytes);
  const size_t total = mapped + kHugePage;
  void* base = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) {
    return resource_exhausted("cannot allocate {} bytes ({:.1f} MiB): {}", bytes,
                              static_cast<double>(bytes) / (1 << 20), std::strerror(errno));
  }
  auto* const start = static_cast<std::byte*>(base);
  const size_t misaligned = reinterpret_cast<uintptr_t>(base) % kHugePage;
  const size_t before = misaligned == 0 ? 0 : kHugePage - misaligned;
  if (before != 0) munmap(start, before);
  munmap(start + before + mapped, total - before - mapped);
  buffer.data_ = start + before;
  buffer.bytes_ = bytes;
  // Only a wish: without transparent huge pages the memory is as good, only slower. Not for the tail: a small
  // model has a hundred matrices, and a huge page for the end of each would be most of its memory.
  if (bytes >= kHugePage) madvise(buffer.data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
  return buffer;
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr) munmap(data_, round_up(bytes_));
}

}  // namespace baton
