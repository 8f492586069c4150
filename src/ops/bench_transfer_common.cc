#include "ops/bench_transfer_common.h"

#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <fstream>

namespace baton::ops {

uint64_t process_cpu_ns() {
  timespec time{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
}

uint64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  uint64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

std::string host_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id.substr(0, 64);
}

void fill_words(std::span<std::byte> memory, uint64_t seed) {
  auto* words = reinterpret_cast<uint64_t*>(memory.data());
  for (size_t i = 0; i < memory.size() / sizeof(uint64_t); ++i) words[i] = mix_bits(seed + i);
}

uint64_t hash_block(std::span<const std::byte> block) { return XXH3_64bits(block.data(), block.size()); }

Result<BenchAgent> BenchAgent::open(const transfer::AgentConfig& config, std::span<std::byte> memory, transfer::MemoryKind kind,
                                    const std::vector<uint64_t>& block_sizes) {
  BenchAgent result;
  BATON_ASSIGN_OR_RETURN(result.agent, transfer::Agent::create(config));
  BATON_ASSIGN_OR_RETURN(transfer::MemoryRegion region, result.agent->register_memory(memory, kind));
  for (uint64_t bytes : block_sizes) {
    if (bytes == 0 || bytes > memory.size()) return invalid_argument("blocks of {} bytes in a pool of {}", bytes, memory.size());
    BATON_RETURN_IF_ERROR(result.agent->add_pool({region, bytes, memory.size() / bytes}).status());
  }
  result.block_sizes = block_sizes;
  return result;
}

Result<transfer::PoolId> BenchAgent::pool_of(uint64_t block_bytes) const {
  auto found = std::find(block_sizes.begin(), block_sizes.end(), block_bytes);
  if (found == block_sizes.end()) return invalid_argument("there is no pool with blocks of {} bytes", block_bytes);
  return static_cast<transfer::PoolId>(found - block_sizes.begin());
}

PinnedThread::PinnedThread(size_t nth) {
  if (::sched_getaffinity(0, sizeof(before_), &before_) != 0) return;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &before_) || nth-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pinned_ = ::sched_setaffinity(0, sizeof(one), &one) == 0;
    return;
  }
}

PinnedThread::~PinnedThread() {
  if (pinned_) (void)::sched_setaffinity(0, sizeof(before_), &before_);
}

}  // namespace baton::ops
