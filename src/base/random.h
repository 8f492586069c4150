#pragma once

#include <cstdint>

namespace baton {

/// Mixes 64 bits well (splitmix64's finaliser, Steele et al. 2014). A pure function: the sampler draws
/// mix(seed, position), so a sequence gives the same tokens wherever and however often it is computed.
constexpr uint64_t mix_bits(uint64_t value) {
  value += 0x9e3779b97f4a7c15ull;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
  return value ^ (value >> 31);
}
constexpr uint64_t mix_bits(uint64_t a, uint64_t b) { return mix_bits(mix_bits(a) ^ b); }

/// A small, fast, seeded generator (splitmix64) for tests, simulation and policies. Not for secrets.
/// Satisfies UniformRandomBitGenerator. One thread at a time.
class Random {
 public:
  using result_type = uint64_t;
  explicit Random(uint64_t seed) : state_(seed) {}
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~0ull; }
  uint64_t operator()() {
    uint64_t value = mix_bits(state_);
    state_ += 0x9e3779b97f4a7c15ull;
    return value;
  }
  /// In [0, bound); bound must be positive.
  uint64_t below(uint64_t bound) {
    return (*this)() % bound;  // the bias is below 2^-32 for every bound we use
  }
  /// In [0, 1).
  double uniform() { return static_cast<double>((*this)() >> 11) * 0x1.0p-53; }
  bool chance(double probability) { return uniform() < probability; }

 private:
  uint64_t state_;
};

/// 64 unpredictable bits from the kernel, never 0: epochs, request ids.
uint64_t random_id();

/// Tells one life of a process from the next at the same address. 0 means "none".
enum class Epoch : uint64_t { kNone = 0 };
inline Epoch new_epoch() { return static_cast<Epoch>(random_id()); }

}  // namespace baton
