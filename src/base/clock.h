#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>

namespace baton {

/// Monotonic time in nanoseconds. Parts that have deadlines take a Clock, so that the simulation
/// can run hours of protocol in a second. Implementations are safe from any thread.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual int64_t now_ns() const = 0;
  int64_t now_ms() const { return now_ns() / 1'000'000; }
};

class SteadyClock final : public Clock {
 public:
  int64_t now_ns() const override {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  static const SteadyClock& instance();
};

/// Moves only when told to.
class ManualClock final : public Clock {
 public:
  explicit ManualClock(int64_t start_ns = 1'000'000'000) : now_ns_(start_ns) {}
  int64_t now_ns() const override { return now_ns_.load(std::memory_order_relaxed); }
  void advance_ns(int64_t delta_ns) { now_ns_.fetch_add(delta_ns, std::memory_order_relaxed); }
  void advance_ms(int64_t delta_ms) { advance_ns(delta_ms * 1'000'000); }

 private:
  std::atomic<int64_t> now_ns_;
};

/// A point in a Clock's time; the default never comes.
struct Deadline {
  int64_t at_ns = std::numeric_limits<int64_t>::max();

  static Deadline never() { return {}; }
  static Deadline after_ms(const Clock& clock, int64_t timeout_ms) {
    return {clock.now_ns() + timeout_ms * 1'000'000};
  }
  bool expired(int64_t now_ns) const { return now_ns >= at_ns; }
  bool expired(const Clock& clock) const { return expired(clock.now_ns()); }
  auto operator<=>(const Deadline&) const = default;
};

}  // namespace baton
