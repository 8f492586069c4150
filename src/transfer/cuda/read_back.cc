#include "transfer/cuda/read_back.h"

#include <algorithm>

namespace baton::transfer::cuda {

Result<std::unique_ptr<ReadBack>> ReadBack::create(std::shared_ptr<const Device> device) {
  std::unique_ptr<ReadBack> made(new ReadBack(device));
  BATON_ASSIGN_OR_RETURN(made->host_, PinnedMemory::allocate(device, kBytes));
  CurrentDevice current(*device);
  const Driver& cu = device->driver();
  BATON_RETURN_IF_ERROR(cu.check(cu.stream_create(&made->stream_, kStreamNonBlocking, 0), "cuStreamCreate"));
  return made;
}

ReadBack::~ReadBack() {
  if (stream_ == nullptr) return;
  CurrentDevice current(*device_);
  (void)device_->driver().stream_destroy(stream_);
}

Result<std::span<const std::byte>> ReadBack::read(CUdeviceptr from, uint64_t bytes) {
  bytes = std::min(bytes, kBytes);
  CurrentDevice current(*device_);
  const Driver& cu = device_->driver();
  BATON_RETURN_IF_ERROR(cu.check(cu.copy_async(host_.address(), from, bytes, stream_), "cuMemcpyAsync to the host"));
  BATON_RETURN_IF_ERROR(cu.check(cu.stream_synchronize(stream_), "cuStreamSynchronize"));
  return std::span<const std::byte>(host_.data(), bytes);
}

}  // namespace baton::transfer::cuda
