#include "transfer/fabric/rail_schedule.h"

#include <algorithm>

namespace baton::transfer::fabric {
namespace {

constexpr int64_t kSampleNs = 5'000'000;
constexpr double kNewSampleWeight = 0.3;
constexpr double kWindowS = 0.040;
constexpr uint64_t kFirstMessages = 4;  // while the rate is unknown, and at least
constexpr double kUnknownBytesPerS = 1e9;
constexpr int64_t kStallNs = 500'000'000;
constexpr int64_t kProbeStallNs = 150'000'000;  // somebody's transfer waits for it
constexpr int64_t kLongestStallNs = 3'000'000'000;
constexpr int64_t kRecentNs = 250'000'000;

}  // namespace

void RailMeter::posted(uint64_t bytes, int64_t now_ns) {
  if (outstanding_messages_ == 0) last_sign_ns_ = now_ns;
  ++outstanding_messages_;
  outstanding_bytes_ += bytes;
}

void RailMeter::delivered(uint64_t bytes, int64_t now_ns) {
  outstanding_messages_ -= std::min<uint32_t>(outstanding_messages_, 1);
  outstanding_bytes_ -= std::min(outstanding_bytes_, bytes);
  delivered_bytes_ += bytes;
  sample_bytes_ += bytes;
  sample_ns_ += std::max<int64_t>(now_ns - last_sign_ns_, 0);
  last_sign_ns_ = now_ns;
  if (sample_ns_ < kSampleNs) return;
  const double sample = static_cast<double>(sample_bytes_) * 1e9 / static_cast<double>(sample_ns_);
  bytes_per_s_ = bytes_per_s_ == 0 ? sample : bytes_per_s_ + kNewSampleWeight * (sample - bytes_per_s_);
  sample_bytes_ = 0;
  sample_ns_ = 0;
}

void RailMeter::reset() {
  const uint64_t delivered = delivered_bytes_;
  *this = RailMeter();
  delivered_bytes_ = delivered;
}

std::optional<uint32_t> choose_rail(std::span<const RailState> rails, uint64_t bytes, const RailWindow& window) {
  // A rail of unknown rate is taken for as fast as the fastest: it is found out soon.
  double fastest = 0;
  for (const RailState& rail : rails) fastest = std::max(fastest, rail.usable ? rail.meter.bytes_per_s() : 0);
  if (fastest == 0) fastest = kUnknownBytesPerS;
  std::optional<uint32_t> best;
  double best_s = 0;
  for (uint32_t i = 0; i < rails.size(); ++i) {
    const RailState& rail = rails[i];
    if (!rail.usable) continue;
    const uint32_t under_way = rail.meter.outstanding_messages();
    const double rate = rail.meter.bytes_per_s() > 0 ? rail.meter.bytes_per_s() : fastest;
    const bool unknown = rail.meter.bytes_per_s() == 0;
    const uint64_t by_rate = std::max(unknown ? 0 : static_cast<uint64_t>(rate * kWindowS), 2 * bytes);
    const uint64_t room = std::min(window.max_bytes, unknown ? kFirstMessages * bytes : by_rate);
    if (under_way > 0 && (rail.probing || under_way >= window.max_messages ||
                          rail.meter.outstanding_bytes() + bytes > room)) {
      continue;
    }
    const double s = static_cast<double>(rail.meter.outstanding_bytes() + bytes) / rate;
    if (!best || s < best_s) {
      best = i;
      best_s = s;
    }
  }
  return best;
}

std::optional<uint32_t> find_stalled_rail(std::span<const RailState> rails, int64_t now_ns) {
  for (uint32_t i = 0; i < rails.size(); ++i) {
    const RailState& rail = rails[i];
    if (!rail.usable || rail.meter.outstanding_messages() == 0) continue;
    const double rate = rail.meter.bytes_per_s();
    const double expected_ns = rate > 0 ? static_cast<double>(rail.meter.outstanding_bytes()) / rate * 4e9 : 0;
    const int64_t patience_ns = (rail.probing ? kProbeStallNs : kStallNs) + static_cast<int64_t>(std::min<double>(expected_ns, kLongestStallNs));
    if (now_ns - rail.meter.last_sign_ns() < patience_ns) continue;
    for (uint32_t j = 0; j < rails.size(); ++j) {
      const RailState& other = rails[j];
      if (j == i || !other.usable || other.probing) continue;
      if (other.meter.outstanding_messages() == 0 || now_ns - other.meter.last_sign_ns() < kRecentNs) return i;
    }
  }
  return std::nullopt;
}

}  // namespace baton::transfer::fabric
