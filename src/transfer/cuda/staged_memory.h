#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

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
  /// The same for a GPU. REQUIRES: pin() was ok.
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

}  // namespace baton::transfer::staged
