#pragma once

#include <sched.h>

#include <cstdint>
#include <span>
#include <string>

#include "base/status.h"
#include "transfer/include/baton/transfer.h"

/// What both roles of `baton bench transfer` need.
namespace baton::ops {

/// The CPU time of this process so far, all threads.
uint64_t process_cpu_ns();
uint64_t resident_bytes();
/// Which running kernel this is: equal on both sides means one host.
std::string host_id();
/// Words that differ from each other, by a seed.
void fill_words(std::span<std::byte> memory, uint64_t seed);
uint64_t hash_block(std::span<const std::byte> block);

/// While it lives the calling thread stays on the n-th (from 0) of the CPUs that it may run on, where it has as many: two threads that look
/// for each other's words on one CPU measure the scheduler.
class PinnedThread {
 public:
  explicit PinnedThread(size_t nth);
  ~PinnedThread();
  PinnedThread(const PinnedThread&) = delete;
  PinnedThread& operator=(const PinnedThread&) = delete;

 private:
  cpu_set_t before_;
  bool pinned_ = false;
};

/// An agent with one pool per block size, all over the same memory.
struct BenchAgent {
  std::unique_ptr<transfer::Agent> agent;
  std::vector<uint64_t> block_sizes;  ///< pool i has blocks of block_sizes[i] bytes

  static Result<BenchAgent> open(const transfer::AgentConfig& config, std::span<std::byte> memory, transfer::MemoryKind kind,
                                 const std::vector<uint64_t>& block_sizes);
  Result<transfer::PoolId> pool_of(uint64_t block_bytes) const;
};

}  // namespace baton::ops
