#include "transfer/plan.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace baton::transfer {

namespace {

WritePlan list_blocks(BlockWrite write, uint64_t local_stride_bytes, uint64_t remote_stride_bytes, const PlanLimits& limits) {
  WritePlan plan;
  plan.bytes = write.blocks.size() * write.length_bytes;
  plan.range = {local_stride_bytes, remote_stride_bytes, write.offset_bytes, write.length_bytes};
  plan.blocks = std::move(write.blocks);
  const size_t most = std::min<uint64_t>(limits.max_segments, limits.max_message_bytes / write.length_bytes);
  for (size_t first = 0; first < plan.blocks.size(); first += most) {
    const size_t count = std::min(most, plan.blocks.size() - first);
    plan.messages.push_back({static_cast<uint32_t>(first), static_cast<uint32_t>(count), count * write.length_bytes});
  }
  return plan;
}

}  // namespace

BlockBounds bounds_of(std::span<const BlockPair> blocks) {
  BlockBounds bounds;
  for (const BlockPair& pair : blocks) {
    bounds.local = std::max(bounds.local, pair.local_block);
    bounds.remote = std::max(bounds.remote, pair.remote_block);
  }
  return bounds;
}

WritePlan plan_write(BlockWrite write, uint64_t local_stride_bytes,
                     uint64_t remote_stride_bytes, const PlanLimits& limits) {
  BATON_CHECK(limits.max_segments > 0 && limits.max_message_bytes > 0);
  if (limits.min_listed_bytes > 0 && write.length_bytes >= limits.min_listed_bytes &&
      write.length_bytes <= std::min(limits.max_listed_bytes, limits.max_message_bytes)) {
    return list_blocks(std::move(write), local_stride_bytes, remote_stride_bytes, limits);
  }
  WritePlan plan;
  plan.segments.reserve(write.blocks.size());
  plan.bytes = write.blocks.size() * write.length_bytes;

  auto emit = [&](Segment run) {
    while (run.bytes > 0) {
      Segment piece = run;
      piece.bytes = std::min(run.bytes, limits.max_message_bytes);
      plan.segments.push_back(piece);
      run.local_offset += piece.bytes;
      run.remote_offset += piece.bytes;
      run.bytes -= piece.bytes;
    }
  };
  Segment run;
  for (const BlockPair& pair : write.blocks) {
    Segment next{pair.local_block * local_stride_bytes + write.offset_bytes,
                 pair.remote_block * remote_stride_bytes + write.offset_bytes, write.length_bytes};
    if (run.bytes > 0 && run.local_offset + run.bytes == next.local_offset &&
        run.remote_offset + run.bytes == next.remote_offset) {
      run.bytes += next.bytes;
    } else {
      emit(run);
      run = next;
    }
  }
  emit(run);

  for (uint32_t i = 0; i < plan.segments.size(); ++i) {
    const Segment& segment = plan.segments[i];
    bool packs = segment.bytes <= limits.max_packed_segment_bytes;
    if (packs && !plan.messages.empty()) {
      PlannedMessage& last = plan.messages.back();
      bool last_packs = plan.segments[last.first_segment].bytes <= limits.max_packed_segment_bytes;
      if (last_packs && last.segment_count < limits.max_segments &&
          last.bytes + segment.bytes <= limits.max_message_bytes) {
        ++last.segment_count;
        last.bytes += segment.bytes;
        continue;
      }
    }
    plan.messages.push_back({i, 1, segment.bytes});
  }
  return plan;
}

}  // namespace baton::transfer
