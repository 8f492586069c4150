#include "ops/raw_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>
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

namespace {

/// Two words, on pages of their own, and room for what either side writes.
constexpr uint64_t kThereAt = 0, kBackAt = 4096, kDataAt = 8192;

}  // namespace

Status RawBounce::check(uint64_t bytes) const {
  if (shared_.size() >= kDataAt + 2 * bytes) return {};
  return failed_precondition("a shared pool of {} bytes has no room for two blocks of {}", shared_.size(), bytes);
}

Status RawBounce::await(uint64_t* word, uint64_t value, int64_t timeout_ms) const {
  std::atomic_ref<uint64_t> there(*word);
  int64_t deadline_ns = 0;
  for (uint64_t turn = 1; there.load(std::memory_order_acquire) != value; ++turn) {
    if (turn % (1u << 16) != 0) continue;
    const int64_t now_ns = SteadyClock::instance().now_ns();
    if (deadline_ns == 0) deadline_ns = now_ns + timeout_ms * 1'000'000;
    if (now_ns > deadline_ns) return deadline_exceeded("the other process has said nothing for {} ms", timeout_ms);
    std::this_thread::yield();
  }
  return {};
}

Result<std::vector<double>> RawBounce::ping(uint64_t bytes, uint64_t count, int64_t timeout_ms) const {
  BATON_RETURN_IF_ERROR(check(bytes));
  auto* there = reinterpret_cast<uint64_t*>(shared_.data() + kThereAt);
  auto* back = reinterpret_cast<uint64_t*>(shared_.data() + kBackAt);
  std::vector<std::byte> own(bytes);
  std::vector<double> round_trips_us;
  BATON_RETURN_IF_ERROR(await(back, ~uint64_t{0}, timeout_ms));  // it is there, and begins at 0
  for (uint64_t i = 1; i <= count; ++i) {
    const int64_t begin_ns = SteadyClock::instance().now_ns();
    std::memcpy(shared_.data() + kDataAt, own.data(), bytes);
    std::atomic_ref<uint64_t>(*there).store(i, std::memory_order_release);
    BATON_RETURN_IF_ERROR(await(back, i, timeout_ms));
    round_trips_us.push_back(static_cast<double>(SteadyClock::instance().now_ns() - begin_ns) * 1e-3);
  }
  return round_trips_us;
}

Status RawBounce::pong(uint64_t bytes, uint64_t count, int64_t timeout_ms) const {
  BATON_RETURN_IF_ERROR(check(bytes));
  auto* there = reinterpret_cast<uint64_t*>(shared_.data() + kThereAt);
  auto* back = reinterpret_cast<uint64_t*>(shared_.data() + kBackAt);
  std::vector<std::byte> own(bytes);
  std::atomic_ref<uint64_t>(*there).store(0, std::memory_order_relaxed);
  std::atomic_ref<uint64_t>(*back).store(~uint64_t{0}, std::memory_order_release);
  for (uint64_t i = 1; i <= count; ++i) {
    BATON_RETURN_IF_ERROR(await(there, i, timeout_ms));
    std::memcpy(shared_.data() + kDataAt + bytes, own.data(), bytes);
    std::atomic_ref<uint64_t>(*back).store(i, std::memory_order_release);
  }
  return {};
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
