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
  BATON_ASSIGN_OR_RETURN(ring->on_device_, DeviceMemory::allocate(device, options.slots * options.slot_bytes));
  BATON_ASSIGN_OR_RETURN(ring->engine_, CopyEngine::create(device, {.max_ctas = options.max_ctas}));
  for (uint32_t slot = options.slots; slot > 0; --slot) ring->free_.push_back(slot - 1);
  ring->laid_out_.reserve(CopyEngine::kMaxListPieces);
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

Status StagingRing::lay_out(std::span<const Segment> pieces, bool gathers) {
  if (pieces.size() > CopyEngine::kMaxListPieces) {
    return invalid_argument("{} pieces for one staging slot, {} are possible", pieces.size(),
                            CopyEngine::kMaxListPieces);
  }
  laid_out_.clear();
  uint64_t at = 0;
  for (const Segment& piece : pieces) {
    if (piece.bytes > options_.slot_bytes - at) {
      return invalid_argument("the pieces do not fit into a staging slot of {} bytes", options_.slot_bytes);
    }
    laid_out_.push_back(gathers ? Segment{piece.local_offset, at, piece.bytes}
                                : Segment{at, piece.remote_offset, piece.bytes});
    at += piece.bytes;
  }
  laid_out_bytes_ = at;
  return Status();
}

Result<std::optional<uint32_t>> StagingRing::gather(CUdeviceptr source, std::span<const Segment> pieces) {
  BATON_RETURN_IF_ERROR(lay_out(pieces, true));
  std::optional<uint32_t> slot = acquire();
  if (!slot) return slot;
  Result<std::optional<CopyEngine::Ticket>> ticket = engine_->start(
      source, device_address(*slot), laid_out_, true, {}, {device_address(*slot), address(*slot), laid_out_bytes_});
  if (ticket.ok() && *ticket) {
    slots_[*slot].copy = **ticket;
    return slot;
  }
  release(*slot);
  if (!ticket.ok()) return ticket.status();
  return std::optional<uint32_t>();
}

Result<bool> StagingRing::scatter(uint32_t slot, CUdeviceptr target, std::span<const Segment> pieces) {
  return scatter_from(*this, slot, slot, target, pieces);
}

Result<bool> StagingRing::scatter_from(const StagingRing& other, uint32_t other_slot, uint32_t slot, CUdeviceptr target,
                                       std::span<const Segment> pieces) {
  BATON_CHECK(slots_[slot].taken && ended(slot)) << "slot " << slot << " is free or in use";
  BATON_RETURN_IF_ERROR(lay_out(pieces, false));
  BATON_ASSIGN_OR_RETURN(std::optional<CopyEngine::Ticket> ticket,
                         engine_->start(device_address(slot), target, laid_out_, true,
                                        {other.address(other_slot), device_address(slot), laid_out_bytes_}));
  if (!ticket) return false;
  slots_[slot].copy = *ticket;
  return true;
}

}  // namespace baton::transfer::cuda
