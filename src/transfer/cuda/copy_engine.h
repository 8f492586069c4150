#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "base/status.h"
#include "transfer/cuda/copy_arguments.h"
#include "transfer/cuda/device.h"
#include "transfer/plan.h"

namespace baton::transfer::cuda {

/// Copies lists of pieces on one GPU with one kernel per list, on streams of its own: gather, scatter, push into
/// another GPU, to and from pinned host memory. Whatever the device can address.
///
/// Two streams take turns, so that the next copy fills the GPU while the last one drains. Completion is a word in host
/// memory that the kernel's last CTA writes: asking for it costs a load, no driver call.
///
/// Not thread-safe. Its destructor waits for what is under way.
class CopyEngine {
 public:
  static constexpr uint32_t kStreams = 2;
  /// Longer lists than this do not fit; pieces beyond kMaxPieceBytes take several entries.
  static constexpr uint32_t kMaxListPieces = 8192;
  static constexpr uint64_t kMaxListBytes = uint64_t{128} << 20;
  static constexpr uint64_t kMaxPieceBytes = 256 << 10;

  struct Options {
    /// Thread blocks of 512 threads that a copy may take; 0: as many as make it fast. Few leave the GPU to others: 16
    /// of an H200's 132 still move 330 GB/s of scattered 16 KiB blocks over NVLink.
    uint32_t max_ctas = 0;
  };
  /// Names one copy.
  struct Ticket {
    uint32_t stream = 0;
    uint64_t sequence = 0;
  };

  /// Runs an empty copy, so that what does not work here shows now.
  static Result<std::unique_ptr<CopyEngine>> create(std::shared_ptr<const Device> device, Options options);
  ~CopyEngine();
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  /// A plain copy by the GPU's copy engine, before or after the pieces are copied.
  struct Bulk {
    CUdeviceptr from;
    CUdeviceptr to;
    uint64_t bytes;  // 0: nothing
  };

  /// Starts copying [source + local_offset, + bytes) to target + remote_offset for each of `pieces`. `within_device`:
  /// both sides are this device's memory. Nothing when all lists are taken: try again when something has ended.
  /// REQUIRES: at most kMaxListPieces pieces and kMaxListBytes in all, unless each is at most kMaxPieceBytes.
  Result<std::optional<Ticket>> start(CUdeviceptr source, CUdeviceptr target, std::span<const Segment> pieces,
                                      bool within_device, const Bulk& first = {}, const Bulk& last = {});
  /// The same for `range` of each of `blocks`: the kernel computes the offsets, so listing them is one memcpy.
  /// REQUIRES: at most kMaxListPieces blocks.
  Result<std::optional<Ticket>> start_blocks(CUdeviceptr source, CUdeviceptr target, std::span<const BlockPair> blocks,
                                             const BlockRange& range, bool within_device);
  /// Starts plain copies alone, for pieces so large that the GPU's copy engines do not mind their number.
  Result<Ticket> start_bulk(std::span<const Bulk> copies);
  /// True once every byte is visible to the whole system: other GPUs, their kernels, this process.
  bool done(Ticket ticket) const { return finished(ticket.stream) >= ticket.sequence; }
  /// Sequences of one stream end in their order.
  uint64_t finished(uint32_t stream) const;
  bool idle() const;
  /// Asks the driver whether the streams still work. An error is final: the GPU's context is broken and nothing that
  /// was started writes any more.
  Status health() const;
  /// Blocks until everything that was started has ended.
  Status drain() const;

  const Device& device() const { return *device_; }
  const std::shared_ptr<const Device>& shared_device() const { return device_; }

 private:
  static constexpr uint32_t kLists = 4;  // per stream
  static constexpr uint32_t kListEntries =
      kMaxListPieces + static_cast<uint32_t>(kMaxListBytes / kMaxPieceBytes);
  struct Stream {
    CUstream handle = nullptr;
    uint64_t started = 0;
    std::array<uint64_t, kLists> list_users{};  // the sequence that reads the list
  };

  CopyEngine(std::shared_ptr<const Device> device, Options options)
      : device_(std::move(device)), options_(options) {}
  Status init();
  Status launch(Stream& stream, uint32_t index, CopyArguments& arguments, uint64_t bytes, uint64_t largest,
                bool within_device);
  Status launch_empty(Stream& stream, uint32_t index);
  /// Room for a list of the next copy of this stream, and its address on the device; null: all lists are being read.
  std::byte* take_list(Stream& stream, uint32_t index, uint64_t* address);
  Status copy(const Stream& stream, const Bulk& bulk);
  std::atomic_ref<uint64_t> flag(uint32_t stream) const;

  const std::shared_ptr<const Device> device_;
  const Options options_;
  PinnedMemory host_;      // flags, each on a cache line of its own, then lists
  DeviceMemory counters_;  // one word per stream
  std::array<Stream, kStreams> streams_;
  uint32_t next_stream_ = 0;
};

}  // namespace baton::transfer::cuda
