#include "transfer/cuda/staged_memory.h"

#include <utility>

#include "base/log.h"

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

Result<std::unique_ptr<SlotMemory>> SlotMemory::create(const std::string& name,
                                                       const std::shared_ptr<const cuda::Device>& device) {
  constexpr size_t kBytes = kSlots * kSlotStride;
  auto slots = std::make_unique<SlotMemory>();
  BATON_ASSIGN_OR_RETURN(slots->memory_, MappedMemory::create_shared(name, kBytes));
  std::span<std::byte> bytes = slots->memory_.span();
  Status pinned = device != nullptr ? slots->pin(device) : Status();
  if (!pinned.ok()) {
    BATON_ASSIGN_OR_RETURN(slots->of_driver_, cuda::PinnedMemory::allocate(device, kBytes));
    slots->memory_ = {};
    bytes = {slots->of_driver_.data(), kBytes};
    log_warning("transfer: staging slots are memory of cuMemHostAlloc, which peers on this host cannot map: {}",
                pinned.to_string());
  }
  slots->region_ = MemoryRegion(std::make_shared<MemoryRegion::Impl>(bytes, MemoryKind::kHost));
  return slots;
}

Status SlotMemory::pin(const std::shared_ptr<const cuda::Device>& device) {
  if (pinned_ || !memory_) return Status();
  BATON_ASSIGN_OR_RETURN(pinned_, cuda::PinnedRange::pin(device, memory_.span()));
  return Status();
}

}  // namespace baton::transfer::staged
