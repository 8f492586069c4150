#include "transfer/cuda/staging.h"

#include "base/check.h"

namespace baton::transfer::cuda {

Status StagingRing::Options::validate() const {
  if (slots == 0 || slots > 1024) return invalid_argument("{} staging slots; 1 to 1024 are possible", slots);
  if (slot_bytes < 4096 || slot_bytes % 4096 != 0 || slot_bytes > CopyEngine::kMaxListBytes) {
    return invalid_argument("staging slots of {} bytes; multiples of 4096 up to {} are possible", slot_bytes,
                            CopyEngine::kMaxListBytes);
  }
  return Status();
}

Result<std::unique_ptr<StagingRing>> StagingRing::create(std::shared_ptr<const Device> device, Options options) {
  BATON_RETURN_IF_ERROR(options.validate());
  std::unique_ptr<StagingRing> ring(new StagingRing(options));
  BATON_ASSIGN_OR_RETURN(ring->memory_, PinnedMemory::allocate(device, options.slots * options.slot_bytes));
  BATON_ASSIGN_OR_RETURN(ring->engine_, CopyEngine::create(device, {.max_ctas = options.max_ctas}));
  for (uint32_t slot = options.slots; slot > 0; --slot) ring->free_.push_back(slot - 1);
  ring->scratch_.reserve(CopyEngine::kMaxListPieces);
  return ring;
}

std::optional<uint32_t> StagingRing::acquire() {
  if (free_.empty()) return std::nullopt;
  uint32_t slot = free_.back();
  free_.pop_back();
  slots_[slot] = {.taken = true, .copy = {}};
  return slot;
}

void StagingRing::release(uint32_t slot) {
  BATON_CHECK(slots_[slot].taken && ended(slot)) << "slot " << slot << " is free or in use";
  slots_[slot].taken = false;
  free_.push_back(slot);
}

bool StagingRing::ended(uint32_t slot) const { return engine_->done(slots_[slot].copy); }

Result<std::optional<uint32_t>> StagingRing::gather(CUdeviceptr source, std::span<const Segment> pieces) {
  std::optional<uint32_t> slot = acquire();
  if (!slot) return slot;
  Result<bool> started = start(*slot, source, pieces, true);
  if (started.ok() && *started) return slot;
  release(*slot);
  if (!started.ok()) return started.status();
  return std::optional<uint32_t>();
}

Result<bool> StagingRing::scatter(uint32_t slot, CUdeviceptr target, std::span<const Segment> pieces) {
  BATON_CHECK(slots_[slot].taken && ended(slot)) << "slot " << slot << " is free or in use";
  return start(slot, target, pieces, false);
}

Result<bool> StagingRing::start(uint32_t slot, CUdeviceptr device_memory, std::span<const Segment> pieces,
                                bool gathers) {
  if (pieces.size() > CopyEngine::kMaxListPieces) {
    return invalid_argument("{} pieces for one staging slot, {} are possible", pieces.size(),
                            CopyEngine::kMaxListPieces);
  }
  scratch_.clear();
  uint64_t at = 0;
  for (const Segment& piece : pieces) {
    if (piece.bytes > options_.slot_bytes - at) {
      return invalid_argument("the pieces do not fit into a staging slot of {} bytes", options_.slot_bytes);
    }
    scratch_.push_back(gathers ? Segment{piece.local_offset, at, piece.bytes}
                               : Segment{at, piece.remote_offset, piece.bytes});
    at += piece.bytes;
  }
  CUdeviceptr staged = memory_.address() + slot * options_.slot_bytes;
  BATON_ASSIGN_OR_RETURN(std::optional<CopyEngine::Ticket> ticket,
                         engine_->start(gathers ? device_memory : staged, gathers ? staged : device_memory, scratch_,
                                        false));
  if (!ticket) return false;
  slots_[slot].copy = *ticket;
  return true;
}

}  // namespace baton::transfer::cuda
