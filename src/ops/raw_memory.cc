#include "ops/raw_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/clock.h"
#include "base/unique_handle.h"

namespace baton::ops {

namespace {

double seconds_since(int64_t begin_ns) { return static_cast<double>(SteadyClock::instance().now_ns() - begin_ns) * 1e-9; }

}  // namespace

Result<RawSharedCopy> RawSharedCopy::open(uint64_t pid, uint64_t fd, uint64_t bytes) {
  std::string path = fmt::format("/proc/{}/fd/{}", pid, fd);
  FileDescriptor file(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!file) return unavailable("opening {}: {}", path, std::strerror(errno));
  void* remote = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (remote == MAP_FAILED) return unavailable("mapping {}: {}", path, std::strerror(errno));
  (void)::madvise(remote, bytes, MADV_HUGEPAGE);
#ifdef MADV_POPULATE_WRITE
  // The limit is that of copying, not of the first touch of every page.
  (void)::madvise(remote, bytes, MADV_POPULATE_WRITE);
#endif
  return RawSharedCopy(static_cast<std::byte*>(remote), bytes);
}

RawSharedCopy::RawSharedCopy(RawSharedCopy&& other) noexcept
    : remote_(std::exchange(other.remote_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

RawSharedCopy::~RawSharedCopy() {
  if (remote_ != nullptr) ::munmap(remote_, bytes_);
}

double RawSharedCopy::copy(const std::byte* local, std::span<const transfer::BlockPair> blocks, uint64_t block_bytes) const {
  int64_t begin_ns = SteadyClock::instance().now_ns();
  for (const transfer::BlockPair& pair : blocks) {
    std::memcpy(remote_ + pair.remote_block * block_bytes, local + pair.local_block * block_bytes, block_bytes);
  }
  return seconds_since(begin_ns);
}

double RawSharedCopy::copy_back(std::byte* local, std::span<const transfer::BlockPair> blocks, uint64_t block_bytes) const {
  int64_t begin_ns = SteadyClock::instance().now_ns();
  for (const transfer::BlockPair& pair : blocks) {
    std::memcpy(local + pair.local_block * block_bytes, remote_ + pair.remote_block * block_bytes, block_bytes);
  }
  return seconds_since(begin_ns);
}

Result<double> RawProcessWrite::move(std::byte* local, std::span<const transfer::BlockPair> blocks, uint64_t block_bytes, bool back) const {
  constexpr size_t kPieces = 512, kBytes = 2u << 20;
  int64_t begin_ns = SteadyClock::instance().now_ns();
  size_t next = 0;
  while (next < blocks.size()) {
    iovec here[kPieces], there[kPieces];
    size_t count = 0, bytes = 0;
    for (; next < blocks.size() && count < kPieces && (bytes == 0 || bytes + block_bytes <= kBytes); ++next, ++count) {
      here[count] = {local + blocks[next].local_block * block_bytes, block_bytes};
      there[count] = {reinterpret_cast<void*>(address_ + blocks[next].remote_block * block_bytes), block_bytes};
      bytes += block_bytes;
    }
    ssize_t n = (back ? ::process_vm_readv : ::process_vm_writev)(pid_, here, count, there, count, 0);
    if (n != static_cast<ssize_t>(bytes)) {
      return unavailable("process_vm_{}v of process {}: {}", back ? "read" : "write", pid_, n < 0 ? std::strerror(errno) : "cut short");
    }
  }
  return seconds_since(begin_ns);
}

}  // namespace baton::ops
