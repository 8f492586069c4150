#include "tensor/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>

#include "tensor/buffer.h"

namespace baton {
namespace {

/// Reads [begin, end), a multiple of 64 bytes.
uint64_t read_range(const std::byte* begin, const std::byte* end) {
  uint64_t sums[8] = {};
  for (; begin < end; begin += 64) {
    uint64_t line[8];
    std::memcpy(line, begin, sizeof(line));
    for (int i = 0; i < 8; ++i) sums[i] |= line[i];
    // The line after the next page's worth: a stream that the hardware prefetchers would find anyway, found sooner.
    __builtin_prefetch(begin + 4096, 0, 2);
  }
  return sums[0] | sums[1] | sums[2] | sums[3] | sums[4] | sums[5] | sums[6] | sums[7];
}

}  // namespace

Result<double> measure_read_gbps(ThreadPool& threads, size_t bytes, int repeats) {
  const size_t count = static_cast<size_t>(threads.threads());
  const size_t share = std::max<size_t>(64, bytes / count / 64 * 64);
  BATON_ASSIGN_OR_RETURN(Buffer buffer, Buffer::allocate(share * count));
  std::atomic<uint64_t> sink{0};
  // Written once, else all of it is the kernel's one page of zeros.
  const auto fill = [&](int thread, int) {
    std::memset(buffer.data() + share * static_cast<size_t>(thread), 1, share);
  };
  const auto read = [&](int thread, int) {
    const std::byte* const begin = buffer.data() + share * static_cast<size_t>(thread);
    sink.fetch_or(read_range(begin, begin + share), std::memory_order_relaxed);
  };
  threads.run(std::cref(fill));
  double best = 0;
  for (int i = 0; i < std::max(1, repeats); ++i) {
    const auto start = std::chrono::steady_clock::now();
    threads.run(std::cref(read));
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(share * count) / std::max(took.count(), 1e-9) / 1e9);
  }
  if (sink.load() == 0) return internal_error("the memory that was read is not what was written");
  return best;
}

}  // namespace baton
