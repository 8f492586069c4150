#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/status.h"
#include "transfer/cuda/copy_engine.h"

namespace baton::transfer::cuda {

/// Carries scattered pieces of one GPU's memory into one contiguous stretch of pinned host memory, and from there back.
///
/// PCIe is the limit, and the copy engines come nearer to it than a kernel that reads or writes host memory (on an H200
/// 55 GB/s against 51 and 48). So the kernel gathers and scatters inside the GPU, where a few thread blocks are enough,
/// and the copy engine carries whole stretches between there and the host. What is one piece already needs no kernel.
///
/// Bounded: `copies` x `copy_bytes` of device memory, nothing else. Not thread-safe. Its destructor waits for the GPU.
class Stager {
 public:
  struct Options {
    uint32_t copies = 16;  ///< under way at a time
    uint64_t copy_bytes = 2u << 20;
    uint32_t max_ctas = 8;
    Status validate() const;
  };

  /// So much in all goes through the kernel alone: one call of the driver instead of three.
  static constexpr uint64_t kKernelBytes = 128u << 10;

  static Result<std::unique_ptr<Stager>> create(std::shared_ptr<const Device> device, Options options);

  /// Starts copying [source + local_offset, + bytes) of every piece to `host`, one behind the other. Returns the number
  /// of the copy, or nothing when too much is under way. invalid_argument: more than copy_bytes or kMaxListPieces.
  Result<std::optional<uint32_t>> gather(CUdeviceptr source, std::span<const Segment> pieces, CUdeviceptr host);
  /// The other way: the bytes at `host` go to target + remote_offset, in the order of the pieces.
  Result<std::optional<uint32_t>> scatter(CUdeviceptr host, CUdeviceptr target, std::span<const Segment> pieces);
  /// True when the copy has ended and what it wrote can be seen by everybody.
  bool ended(uint32_t copy) const { return engine_->done(copies_[copy].ticket); }
  /// Its number may be given to another one. REQUIRES: ended(copy), or the GPU is broken.
  void release(uint32_t copy);
  bool idle() const { return free_.size() == copies_.size(); }
  /// See CopyEngine::health().
  Status health() const { return engine_->health(); }
  const Options& options() const { return options_; }

 private:
  struct Copy {
    bool taken = false;
    CopyEngine::Ticket ticket;
  };
  Stager(Options options) : options_(options), copies_(options.copies) {}
  Result<std::optional<uint32_t>> start(CUdeviceptr memory, std::span<const Segment> pieces, CUdeviceptr host,
                                        bool gathers);
  CUdeviceptr buffer(uint32_t copy) const { return buffers_.address() + copy * options_.copy_bytes; }

  const Options options_;
  std::vector<Copy> copies_;
  std::vector<uint32_t> free_;
  std::vector<Segment> laid_out_;
  std::vector<CopyEngine::Bulk> bulks_;
  DeviceMemory buffers_;
  std::unique_ptr<CopyEngine> engine_;  // goes first: it waits for what uses the memory
};

}  // namespace baton::transfer::cuda
