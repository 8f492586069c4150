#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/mapped_memory.h"
#include "base/status.h"
#include "transfer/agent_impl.h"
#include "transfer/backend.h"
#include "transfer/cuda/device.h"
#include "transfer/cuda/read_back.h"
#include "transfer/cuda/staged_wire.h"
#include "transfer/cuda/staging.h"

namespace baton::transfer::staged {

/// A GPU of this process. Lives as long as its backend.
struct StagedDevice {
  std::shared_ptr<const cuda::Device> device;
  std::unique_ptr<cuda::Stager> stager;
  std::unique_ptr<cuda::ReadBack> read_back;  ///< integrity mode
  int64_t last_end_ns = 0;  ///< when a copy ended, or the first one was started
  Status broken;            ///< the GPU's context is: nothing that was started writes any more

  /// Asks the driver when a copy takes too long. True once it is broken.
  bool check(int64_t now_ns);
};

/// Of slots that begin at `slots`, here or in the mapping of a peer's.
inline std::atomic_ref<uint64_t> slot_busy(std::byte* slots, uint32_t index) {
  return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(slots + index * kSlotStride));
}

class StagedRegion final : public BackendRegion {
 public:
  StagedDevice* device = nullptr;  ///< null: host memory
};

/// kSlots slots of host memory, one behind the other: memory that other processes can map, page-locked for the GPUs when
/// there is one. Where the driver does not take such memory it is the driver's own, which others reach through the kernel.
class SlotMemory {
 public:
  /// `device`: any GPU of this process, or null.
  static Result<std::unique_ptr<SlotMemory>> create(const std::string& name,
                                                    const std::shared_ptr<const cuda::Device>& device);
  /// For the GPU that comes later.
  Status pin(const std::shared_ptr<const cuda::Device>& device);

  /// Where its data begins; the descriptor ends there.
  std::byte* data(uint32_t index) const { return region_.data() + index * kSlotStride + kHeaderBytes; }
  /// See cuda/staged_wire.h.
  std::atomic_ref<uint64_t> busy(uint32_t index) const { return slot_busy(region_.data(), index); }
  /// data() for a GPU. REQUIRES: pin() was ok.
  cuda::CUdeviceptr address(uint32_t index) const {
    return (pinned_ ? pinned_.address() : of_driver_.address()) + index * kSlotStride + kHeaderBytes;
  }
  const MemoryRegion& region() const { return region_; }

 private:
  MappedMemory memory_;
  cuda::PinnedRange pinned_;
  cuda::PinnedMemory of_driver_;
  MemoryRegion region_;
};

/// Where a writer keeps descriptors whose data does not pass through slots of its own. [kSlots][kHeaderBytes]
class DescriptorMemory {
 public:
  DescriptorMemory()
      : bytes_(kSlots * kHeaderBytes),
        region_(std::make_shared<MemoryRegion::Impl>(std::span(bytes_), MemoryKind::kHost)) {}
  std::span<std::byte> of(uint32_t index, size_t bytes) { return std::span(bytes_).subspan(index * kHeaderBytes, bytes); }
  const MemoryRegion& region() const { return region_; }

 private:
  std::vector<std::byte> bytes_;
  MemoryRegion region_;
};

}  // namespace baton::transfer::staged
