#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/status.h"
#include "transfer/cuda/copy_engine.h"

namespace baton::transfer::cuda {

/// A ring of pinned host buffers between one GPU and a transport that moves host memory only. The sender gathers
/// scattered pieces into a slot with one kernel and hands the slot, one contiguous message, to the transport; the
/// receiver lets the transport write into a slot of its own and scatters it from there.
///
///   sender:   gather() -> ended() -> [transport reads bytes(slot)] -> release()
///   receiver: acquire() -> [transport writes bytes(slot)] -> scatter() -> ended() -> release()
///
/// PCIe is the limit, and the copy engines come nearer to it than a kernel that reads or writes host memory (on an H200
/// 55 GB/s against 51 and 48). So the kernel gathers and scatters inside the GPU, where a few thread blocks are enough,
/// and the copy engine carries whole slots between there and the host.
///
/// Bounded: slots x slot_bytes of pinned memory and as much device memory, nothing else. Not thread-safe. Its destructor waits for the GPU.
class StagingRing {
 public:
  struct Options {
    uint32_t slots = 16;
    uint64_t slot_bytes = 2u << 20;
    uint32_t max_ctas = 8;
    Status validate() const;
  };
  static Result<std::unique_ptr<StagingRing>> create(std::shared_ptr<const Device> device, Options options);

  /// A free slot, or nothing when all are taken.
  std::optional<uint32_t> acquire();
  /// REQUIRES: ended(slot).
  void release(uint32_t slot);

  /// Takes a slot and starts filling it with [source + local_offset, + bytes) of every piece, one behind the other.
  /// Nothing when all slots are taken. invalid_argument: the pieces do not fit into a slot.
  Result<std::optional<uint32_t>> gather(CUdeviceptr source, std::span<const Segment> pieces);
  /// Starts taking a slot's bytes apart again: to target + remote_offset, in the order of the pieces. False when the
  /// GPU has too much under way: try again.
  Result<bool> scatter(uint32_t slot, CUdeviceptr target, std::span<const Segment> pieces);
  /// The same with bytes that lie in a slot of another ring of this process.
  Result<bool> scatter_from(const StagingRing& other, uint32_t other_slot, uint32_t slot, CUdeviceptr target,
                            std::span<const Segment> pieces);
  /// True when what was started for the slot has ended and can be seen by everybody.
  bool ended(uint32_t slot) const;
  /// See CopyEngine::health().
  Status health() const { return engine_->health(); }

  std::span<std::byte> bytes(uint32_t slot) const {
    return {memory_.data() + slot * options_.slot_bytes, options_.slot_bytes};
  }
  /// All slots, for registering them with a transport.
  std::span<std::byte> memory() const { return {memory_.data(), memory_.bytes()}; }
  const Options& options() const { return options_; }

 private:
  StagingRing(Options options) : options_(options), slots_(options.slots) {}
  Status lay_out(std::span<const Segment> pieces, bool gathers);
  CUdeviceptr address(uint32_t slot) const { return memory_.address() + slot * options_.slot_bytes; }
  CUdeviceptr device_address(uint32_t slot) const { return on_device_.address() + slot * options_.slot_bytes; }

  struct Slot {
    bool taken = false;
    CopyEngine::Ticket copy;  // of sequence 0: none
  };
  const Options options_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  std::vector<Segment> laid_out_;
  uint64_t laid_out_bytes_ = 0;
  PinnedMemory memory_;
  DeviceMemory on_device_;  // the slots' other half
  std::unique_ptr<CopyEngine> engine_;  // goes first: it waits for what uses the memory
};

}  // namespace baton::transfer::cuda
