#pragma once

#include <cstdint>
#include <optional>
#include <span>

/// Which rail takes the next message, and when a rail is given up: arithmetic alone, so that it can be tested without a
/// network. Times are of one clock, in ns.
namespace baton::transfer::fabric {

/// What one rail of a pair delivers, and what is under way on it.
class RailMeter {
 public:
  void posted(uint64_t bytes, int64_t now_ns);
  void delivered(uint64_t bytes, int64_t now_ns);
  /// What was under way is not any more. The rate is forgotten: a rail that comes back may have another one.
  void reset();

  /// Bytes per second over the time in which something was under way; 0: nothing measured yet.
  double bytes_per_s() const { return bytes_per_s_; }
  uint64_t outstanding_bytes() const { return outstanding_bytes_; }
  uint32_t outstanding_messages() const { return outstanding_messages_; }
  uint64_t delivered_bytes() const { return delivered_bytes_; }
  /// When something came back, or when the first of what is under way was posted.
  int64_t last_sign_ns() const { return last_sign_ns_; }

 private:
  double bytes_per_s_ = 0;
  uint64_t outstanding_bytes_ = 0;
  uint32_t outstanding_messages_ = 0;
  uint64_t delivered_bytes_ = 0;
  int64_t last_sign_ns_ = 0;
  uint64_t sample_bytes_ = 0;
  int64_t sample_ns_ = 0;
};

struct RailState {
  RailMeter meter;
  bool usable = true;
  bool probing = false;  ///< back after a failure: one message at a time until it has delivered one
};

struct RailWindow {
  uint32_t max_messages = 256;
  uint64_t max_bytes = 32u << 20;
};

/// The rail on which `bytes` more are there first, by what each has delivered lately; none when all windows are full. A
/// window is as many bytes as the rail delivers in 40 ms: enough to keep any fabric busy, little enough that the last
/// messages of a transfer don't queue on a slow rail while the others have nothing to do.
std::optional<uint32_t> choose_rail(std::span<const RailState> rails, uint64_t bytes, const RailWindow& window);

/// A rail on which nothing came back for far longer than what is under way takes, while another one works or is idle.
/// Without such another one it may as well be the peer that stands still, and that is not for a rail to judge.
std::optional<uint32_t> find_stalled_rail(std::span<const RailState> rails, int64_t now_ns);

}  // namespace baton::transfer::fabric
