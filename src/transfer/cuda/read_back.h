#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/status.h"
#include "transfer/cuda/device.h"

namespace baton::transfer::cuda {

/// Brings GPU memory to where the CPU can read it, on a stream of its own: for integrity mode. One thread at a time.
class ReadBack {
 public:
  static constexpr uint64_t kBytes = 1u << 20;  ///< page-locked

  static Result<std::unique_ptr<ReadBack>> create(std::shared_ptr<const Device> device);
  ~ReadBack();
  ReadBack(const ReadBack&) = delete;
  ReadBack& operator=(const ReadBack&) = delete;

  /// At most the first kBytes of the `bytes` at `from`; good until the next call. Waits for the copy.
  Result<std::span<const std::byte>> read(CUdeviceptr from, uint64_t bytes);

 private:
  explicit ReadBack(std::shared_ptr<const Device> device) : device_(std::move(device)) {}
  const std::shared_ptr<const Device> device_;
  PinnedMemory host_;
  CUstream stream_ = nullptr;
};

}  // namespace baton::transfer::cuda
