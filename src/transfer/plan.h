#pragma once

#include <cstdint>
#include <span>
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

/// The same bytes of every block of two pools.
struct BlockRange {
  uint64_t local_stride_bytes = 0;
  uint64_t remote_stride_bytes = 0;
  uint64_t offset_bytes = 0;
  uint64_t length_bytes = 0;
};

/// One operation of the backend: `segment_count` segments from `first_segment`, or so many blocks.
struct PlannedMessage {
  uint32_t first_segment = 0;
  uint32_t segment_count = 0;
  uint64_t bytes = 0;
  bool operator==(const PlannedMessage&) const = default;
};

struct WritePlan {
  /// Either the one or the other.
  std::vector<Segment> segments;
  std::vector<BlockPair> blocks;
  BlockRange range;  // of `blocks`
  std::vector<PlannedMessage> messages;
  uint64_t bytes = 0;
};

struct PlanLimits {
  uint64_t max_message_bytes = 4u << 20;
  /// Segments that one message may carry, and the size up to which that pays.
  uint32_t max_segments = 1;
  uint64_t max_packed_segment_bytes = 0;
  /// Ranges from here to there are left as blocks, which costs next to nothing; 0: the backend knows segments only.
  uint64_t min_listed_bytes = 0;
  uint64_t max_listed_bytes = 0;
};

/// The largest numbers in a list of blocks.
struct BlockBounds {
  uint32_t local = 0;
  uint32_t remote = 0;
};
BlockBounds bounds_of(std::span<const BlockPair> blocks);

/// Joins blocks that are neighbours on both sides, cuts what is too long, packs what is small.
/// REQUIRES: every block and the byte range were checked against both pools.
WritePlan plan_write(BlockWrite write, uint64_t local_stride_bytes,
                     uint64_t remote_stride_bytes, const PlanLimits& limits);

}  // namespace baton::transfer
