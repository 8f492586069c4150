#include "transfer/shm/stream_copy.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace baton::transfer {

#if defined(__x86_64__)
namespace {

constexpr size_t kLine = 64;
constexpr size_t kStep = 4 * kLine;
/// The hardware's own prefetch stops at 4 KiB; this far ahead was the best of 1, 2 and 4 KiB.
constexpr size_t kAhead = 2048;

inline void prefetch_step(const std::byte* from) {
  for (size_t line = 0; line < kStep; line += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(from + kAhead + line), _MM_HINT_NTA);
  }
}

/// `to` on a line, `bytes` whole steps.
__attribute__((target("avx512f"))) void copy_steps_avx512(std::byte* to, const std::byte* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += kStep) {
    prefetch_step(from + at);
    for (size_t line = 0; line < kStep; line += kLine) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at + line), _mm512_loadu_si512(from + at + line));
    }
  }
}

void copy_steps_sse2(std::byte* to, const std::byte* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += kStep) {
    prefetch_step(from + at);
    for (size_t part = 0; part < kStep; part += sizeof(__m128i)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + at + part),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at + part)));
    }
  }
}

using CopySteps = void (*)(std::byte*, const std::byte*, size_t);
CopySteps best_copy() { return __builtin_cpu_supports("avx512f") ? copy_steps_avx512 : copy_steps_sse2; }

}  // namespace

void stream_copy(std::byte* to, const std::byte* from, size_t bytes) {
  static const CopySteps copy_steps = best_copy();
  size_t head = (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine;
  if (bytes < head + kStep) {
    std::memcpy(to, from, bytes);
    return;
  }
  std::memcpy(to, from, head);
  size_t steps = (bytes - head) / kStep * kStep;
  copy_steps(to + head, from + head, steps);
  std::memcpy(to + head + steps, from + head + steps, bytes - head - steps);
}

void stream_fence() { _mm_sfence(); }

#else

void stream_copy(std::byte* to, const std::byte* from, size_t bytes) { std::memcpy(to, from, bytes); }
void stream_fence() {}

#endif

}  // namespace baton::transfer
