#pragma once

#include <cstddef>

namespace baton {

/// The loops over a whole vocabulary, in SIMD for the machine at hand (chosen once, at run time). Same bits on each: the
/// order of every sum is fixed, nothing is fused, exp is our own polynomial.
struct SamplerLoops {
  static constexpr size_t kChunk = 128;

  /// maxima[c] = the largest of chunk c. False when a value is NaN or +infinity.
  bool (*maxima)(const float* x, size_t count, float* maxima);
  /// weights[i] = exp((x[i] - maximum) * scale), to 2 ulp, 0 below exp(-87.7); sums[c] = the sum of chunk c.
  /// x <= maximum. `weights` [count] is written.
  void (*weigh)(const float* x, size_t count, float maximum, float scale, float* weights, double* sums);
  /// Weights below `least` become 0; sums[c] = the sum of what is left of chunk c.
  void (*cut)(float* weights, size_t count, float least, double* sums);
};

const SamplerLoops& sampler_loops();
/// Those for any machine; for tests.
const SamplerLoops& plain_sampler_loops();

/// exp(x) for x <= 0, as SamplerLoops::weigh computes it.
float exp_nonpositive(float x);

}  // namespace baton
