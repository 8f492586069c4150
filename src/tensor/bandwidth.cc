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

/// Reads [begin, end), a multiple of 64 bytes, begin on a 64-byte boundary. Not a bare load loop: a few dependent
/// operations per line pace the loads, and the prefetchers follow that a few percent faster.
template <typename Line>
inline __attribute__((always_inline)) uint64_t read_lines(const std::byte* begin, const std::byte* end) {
  Line sum[64 / sizeof(Line)] = {};
  for (; begin < end; begin += 64) {
    for (size_t i = 0; i < 64 / sizeof(Line); ++i) {
      const Line line = *reinterpret_cast<const Line*>(begin + i * sizeof(Line));
      sum[i] = ((sum[i] << 1) ^ line) + line;
    }
  }
  uint64_t result = 0;
  for (const Line& line : sum) {
    for (size_t i = 0; i < sizeof(Line) / 8; ++i) result |= line[i];
  }
  return result;
}

typedef uint64_t Line16 __attribute__((vector_size(16), may_alias));
typedef uint64_t Line64 __attribute__((vector_size(64), may_alias));

#if defined(__x86_64__)
__attribute__((target("avx512f"))) uint64_t read_range_avx512(const std::byte* begin, const std::byte* end) {
  return read_lines<Line64>(begin, end);
}
#endif

uint64_t read_range(const std::byte* begin, const std::byte* end) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return read_range_avx512(begin, end);
#endif
  return read_lines<Line16>(begin, end);
}

}  // namespace

Result<double> measure_read_gbps(ThreadPool& threads, size_t bytes, int repeats) {
  BATON_ASSIGN_OR_RETURN(Buffer buffer, Buffer::allocate(std::max<size_t>(bytes, 64)));
  // Written once, else all of it is the kernel's one page of zeros.
  const auto fill = [&](int64_t begin, int64_t end, int) {
    std::memset(buffer.data() + begin, 1, static_cast<size_t>(end - begin));
  };
  threads.parallel_for(static_cast<int64_t>(buffer.bytes()), int64_t{2} << 20, std::cref(fill));
  const std::span<const std::byte> region = buffer.span();
  return measure_read_gbps(threads, {&region, 1}, repeats);
}

namespace {

/// `share(thread, threads)` reads that thread's part and returns something that depends on it.
double best_gbps(ThreadPool& threads, std::span<const std::span<const std::byte>> regions, int repeats,
                 const std::function<uint64_t(size_t thread, size_t threads)>& share) {
  std::atomic<uint64_t> sink{0};
  const auto read = [&](int thread, int count) {
    // Kept, or the compiler would see that nobody wants to know.
    sink.fetch_or(share(static_cast<size_t>(thread), static_cast<size_t>(count)), std::memory_order_relaxed);
  };
  size_t bytes = 0;
  for (const std::span<const std::byte> region : regions) bytes += region.size() / 64 * 64;
  double best = 0;
  for (int i = 0; i < std::max(1, repeats); ++i) {
    const auto start = std::chrono::steady_clock::now();
    threads.run(std::cref(read));
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(bytes) / std::max(took.count(), 1e-9) / 1e9);
  }
  return best;
}

}  // namespace

double measure_read_gbps(ThreadPool& threads, std::span<const std::span<const std::byte>> regions, int repeats) {
  return best_gbps(threads, regions, repeats, [&](size_t thread, size_t count) {
    uint64_t seen = 0;
    for (const std::span<const std::byte> region : regions) {
      const size_t lines = region.size() / 64;
      seen |= read_range(region.data() + lines * thread / count * 64, region.data() + lines * (thread + 1) / count * 64);
    }
    return seen;
  });
}

double measure_piecewise_read_gbps(ThreadPool& threads, std::span<const std::span<const std::byte>> pieces, int repeats) {
  return best_gbps(threads, pieces, repeats, [&](size_t thread, size_t count) {
    uint64_t seen = 0;
    for (size_t i = pieces.size() * thread / count; i < pieces.size() * (thread + 1) / count; ++i) {
      seen |= read_range(pieces[i].data(), pieces[i].data() + pieces[i].size() / 64 * 64);
    }
    return seen;
  });
}

}  // namespace baton
