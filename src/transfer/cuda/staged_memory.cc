#include "transfer/cuda/staged_memory.h"

#include <utility>

namespace baton::transfer::staged {
namespace {

/// When a copy has not ended for so long the driver is asked whether the GPU still works.
constexpr int64_t kHealthCheckNs = 50'000'000;

}  // namespace

bool StagedDevice::check(int64_t now_ns) {
  if (!broken.ok()) return true;
  if (stager->idle() || now_ns - last_end_ns < kHealthCheckNs) return false;
  last_end_ns = now_ns;
  broken = stager->health();
  return !broken.ok();
}

Result<std::unique_ptr<SlotMemory>> SlotMemory::create(const std::string& name) {
  auto slots = std::make_unique<SlotMemory>();
  BATON_ASSIGN_OR_RETURN(slots->memory_, MappedMemory::create_shared(name, kSlots * kSlotStride));
  slots->region_ = MemoryRegion(std::make_shared<MemoryRegion::Impl>(slots->memory_.span(), MemoryKind::kHost));
  return slots;
}

Status SlotMemory::pin(const std::shared_ptr<const cuda::Device>& device) {
  if (pinned_) return Status();
  BATON_ASSIGN_OR_RETURN(pinned_, cuda::PinnedRange::pin(device, memory_.span()));
  return Status();
}

}  // namespace baton::transfer::staged
