#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "base/cuda/gpu.h"
#include "base/status.h"

namespace baton::cuda {

/// GPU memory for intermediate results, one piece for each stream: what one stream does is in order, so its kernels can share
/// it. Pieces stay where they are until the end (graphs that were captured hold their addresses). One thread at a time.
class StreamWorkspaces {
 public:
  static constexpr size_t kMaxStreams = 16;

  StreamWorkspaces(std::shared_ptr<const Gpu> gpu, size_t bytes) : gpu_(std::move(gpu)), bytes_(bytes) {}

  size_t bytes() const { return bytes_; }

  /// Allocates at a stream's first call, also while it is captured. resource_exhausted: more than kMaxStreams streams.
  Result<CUdeviceptr> find(CUstream stream) {
    for (const auto& [owner, memory] : pieces_) {
      if (owner == stream) return memory.address();
    }
    if (pieces_.size() >= kMaxStreams) {
      return resource_exhausted("matrix products on more than {} streams: each has a workspace of {} bytes", kMaxStreams, bytes_);
    }
    BATON_ASSIGN_OR_RETURN(DeviceMemory memory, DeviceMemory::allocate(gpu_, bytes_));
    pieces_.emplace_back(stream, std::move(memory));
    return pieces_.back().second.address();
  }

 private:
  const std::shared_ptr<const Gpu> gpu_;
  const size_t bytes_;
  std::vector<std::pair<CUstream, DeviceMemory>> pieces_;
};

}  // namespace baton::cuda
