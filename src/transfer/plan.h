#pragma once

#include <cstdint>
#include <vector>

#include "transfer/include/baton/transfer.h"

namespace baton::transfer {

/// A contiguous piece: offsets from the start of the local and of the remote pool.
struct Segment {
  uint64_t local_offset = 0;
  uint64_t remote_offset = 0;
  uint64_t bytes = 0;
  bool operator==(const Segment&) const = default;
};

/// One operation of the backend: `segment_count` segments from `first_segment`.
struct PlannedMessage {
  uint32_t first_segment = 0;
  uint32_t segment_count = 0;
  uint64_t bytes = 0;
  bool operator==(const PlannedMessage&) const = default;
};

struct WritePlan {
  std::vector<Segment> segments;
  std::vector<PlannedMessage> messages;
  uint64_t bytes = 0;
};

struct PlanLimits {
  uint64_t max_message_bytes = 4u << 20;
  /// Segments that one message may carry, and the size up to which that pays.
  uint32_t max_segments = 1;
  uint64_t max_packed_segment_bytes = 0;
};

/// Joins blocks that are neighbours on both sides, cuts what is too long, packs what is small.
/// REQUIRES: every block and the byte range were checked against both pools.
WritePlan plan_write(const BlockWrite& write, uint64_t local_stride_bytes,
                     uint64_t remote_stride_bytes, const PlanLimits& limits);

}  // namespace baton::transfer
