#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/cuda/gpu.h"
#include "base/status.h"
#include "transfer/include/baton/transfer.h"

/// GPU memory for `baton bench transfer --memory cuda`, and what the driver's own copies do with it. Plain calls on purpose.
namespace baton::ops {

/// The pool of one side.
class GpuPool {
 public:
  /// `library` empty: libcuda.so.1. `ordinal` negative: the one behind `-ordinal - 1`, or the same when there is only one.
  static Result<GpuPool> open(const std::string& library, int32_t ordinal, uint64_t bytes);

  const std::shared_ptr<const cuda::Gpu>& gpu() const { return gpu_; }
  cuda::CUdeviceptr address() const { return memory_.address(); }
  uint64_t bytes() const { return memory_.bytes(); }
  /// For register_memory(); the CPU cannot read it.
  std::span<std::byte> span() const { return memory_.span(); }
  Status upload(std::span<const std::byte> from) const;
  Status fill(uint64_t offset, uint64_t bytes, uint8_t value) const;
  Status download(uint64_t offset, std::span<std::byte> to) const;
  /// Until this process's kernels run there: two processes have one GPU in turn, and the change takes longer than a copy.
  Status take_turn() const;
  /// For RawGpuCopy in another process.
  Result<std::string> ipc_handle() const;

 private:
  std::shared_ptr<const cuda::Gpu> gpu_;
  cuda::DeviceMemory memory_, scratch_;
};

/// cuMemcpyAsync from a GPU pool into another process's, or into page-locked host memory.
class RawGpuCopy {
 public:
  /// unavailable: the two GPUs do not reach each other, or CUDA IPC does not work between the two processes.
  static Result<std::unique_ptr<RawGpuCopy>> into_peer(const GpuPool& pool, std::string_view ipc_handle, uint64_t bytes);
  static Result<std::unique_ptr<RawGpuCopy>> into_host(const GpuPool& pool, uint64_t bytes);
  ~RawGpuCopy();
  RawGpuCopy(const RawGpuCopy&) = delete;
  RawGpuCopy& operator=(const RawGpuCopy&) = delete;

  /// All of it with one call, from the start of the pool. Both return seconds, until the stream is done.
  Result<double> bulk(uint64_t bytes) const;
  /// One call a block. Into the host they lie one behind the other.
  Result<double> each(std::span<const transfer::BlockPair> blocks, uint64_t block_bytes) const;

 private:
  explicit RawGpuCopy(const GpuPool& pool) : pool_(pool) {}
  Status open_stream();
  Status finish() const;

  const GpuPool& pool_;
  cuda::PinnedMemory host_;
  cuda::CUdeviceptr target_ = 0;
  uint64_t target_bytes_ = 0;
  bool mapped_ = false;
  cuda::CUstream stream_ = nullptr;
};

}  // namespace baton::ops
