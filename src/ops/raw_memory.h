#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/mapped_memory.h"
#include "base/status.h"
#include "transfer/include/baton/transfer.h"

/// What this machine does between two processes with nothing of ours around it: the limits that `baton bench transfer`
/// shows beside the agent. Plain loops on purpose.
namespace baton::ops {

/// One block after the other with memcpy(), from this process's memory into memory that another process has, too, or back.
class RawSharedCopy {
 public:
  /// Maps `fd` of process `pid` (both on this host, same user).
  static Result<RawSharedCopy> open(uint64_t pid, uint64_t fd, uint64_t bytes);
  RawSharedCopy(RawSharedCopy&& other) noexcept;
  RawSharedCopy& operator=(RawSharedCopy&&) = delete;
  ~RawSharedCopy();
  /// Seconds.
  double copy(const std::byte* local, std::span<const transfer::BlockPair> blocks, uint64_t block_bytes) const;
  double copy_back(std::byte* local, std::span<const transfer::BlockPair> blocks, uint64_t block_bytes) const;
  /// What both have, for RawBounce.
  std::span<std::byte> shared() const { return {remote_, bytes_}; }

 private:
  RawSharedCopy(std::byte* remote, size_t bytes) : remote_(remote), bytes_(bytes) {}
  std::byte* remote_;
  size_t bytes_;
};

/// Two processes that talk through shared memory and nothing else: a memcpy() from memory of one's own, then a word on a cache line that
/// the other one looks at all the time. What it takes there and back is the limit of any notification.
class RawBounce {
 public:
  explicit RawBounce(std::span<std::byte> shared) : shared_(shared) {}
  /// One side; `count` times there and back, each in microseconds.
  Result<std::vector<double>> ping(uint64_t bytes, uint64_t count, int64_t timeout_ms) const;
  /// The other.
  Status pong(uint64_t bytes, uint64_t count, int64_t timeout_ms) const;

 private:
  Status check(uint64_t bytes) const;
  Status await(uint64_t* word, uint64_t value, int64_t timeout_ms) const;
  std::span<std::byte> shared_;
};

/// process_vm_writev() or process_vm_readv() with as many blocks a call as come to about 2 MiB, 512 at most.
class RawProcessWrite {
 public:
  RawProcessWrite(uint64_t pid, uint64_t address) : pid_(static_cast<int>(pid)), address_(address) {}
  Result<double> copy(const std::byte* local, std::span<const transfer::BlockPair> blocks, uint64_t block_bytes) const {
    return move(const_cast<std::byte*>(local), blocks, block_bytes, false);
  }
  Result<double> copy_back(std::byte* local, std::span<const transfer::BlockPair> blocks, uint64_t block_bytes) const {
    return move(local, blocks, block_bytes, true);
  }

 private:
  Result<double> move(std::byte* local, std::span<const transfer::BlockPair> blocks, uint64_t block_bytes, bool back) const;

  int pid_;
  uint64_t address_;
};

}  // namespace baton::ops
