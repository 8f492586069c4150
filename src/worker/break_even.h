#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace baton::worker {

/// From how many tokens on a prompt is worth a handoff.
///
/// A prompt of n tokens that the decode worker computes itself holds up its running sequences for n / speed; a handoff
/// holds up nobody, but costs the request its overhead (everything but waiting and computing at the peer: messages,
/// the part of the transfer that isn't hidden, admission). Both are equal at n = overhead * speed. The median over the last
/// handoffs is used once there are enough of them; until then, and when a fixed value is configured, that.
class BreakEven {
 public:
  static constexpr int32_t kMeasured = -1;      ///< as the configured value: learn it
  static constexpr int32_t kUnmeasured = 256;   ///< until it is learned
  static constexpr int32_t kMin = 16, kMax = 4096;

  explicit BreakEven(int32_t configured) : configured_(configured) {}

  /// One handoff that went well. Times in seconds, `computed_tokens` by the peer.
  void observe(double handoff_s, double queue_s, double compute_s, int64_t computed_tokens) {
    if (compute_s <= 0 || computed_tokens <= 0) return;
    double overhead_s = std::max(0.0, handoff_s - queue_s - compute_s);
    samples_[count_++ % samples_.size()] = overhead_s * static_cast<double>(computed_tokens) / compute_s;
  }

  int32_t tokens() const {
    if (configured_ >= 0) return configured_;
    if (count_ < kEnough) return kUnmeasured;
    std::array<double, 32> sorted = samples_;
    size_t size = std::min(count_, samples_.size());
    std::nth_element(sorted.begin(), sorted.begin() + size / 2, sorted.begin() + size);
    return static_cast<int32_t>(std::clamp<double>(sorted[size / 2], kMin, kMax));
  }

 private:
  static constexpr size_t kEnough = 8;
  int32_t configured_;
  size_t count_ = 0;
  std::array<double, 32> samples_{};
};

}  // namespace baton::worker
