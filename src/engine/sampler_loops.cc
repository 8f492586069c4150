#include "engine/sampler_loops.h"

#include <cfloat>
#include <cstdint>
#include <cstring>
#include <limits>

namespace baton {
namespace {

constexpr size_t kChunk = SamplerLoops::kChunk;
constexpr size_t kLanes = 8;  // also of the sums, so that they are the same on every machine
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

namespace plain {
#include "engine/sampler_loops.inc"
}  // namespace plain

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BATON_SAMPLER_AVX2
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#include "engine/sampler_loops.inc"
}  // namespace avx2
#pragma GCC pop_options
#endif

}  // namespace

const SamplerLoops& sampler_loops() {
#if defined(BATON_SAMPLER_AVX2)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) return avx2::kLoops;
#endif
  return plain::kLoops;
}

const SamplerLoops& plain_sampler_loops() { return plain::kLoops; }

float exp_nonpositive(float x) {
  plain::Floats value = plain::Floats{} + x;
  plain::exp_in_place(value);
  return value[0];
}

}  // namespace baton
