#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/check.h"
#include "transfer/cuda/device.h"
#include "transfer/include/baton/transfer.h"

namespace baton::transfer::testing {

/// The CUDA driver that tests use: the stand-in, unless BATON_TEST_CUDA_LIBRARY names another one ("libcuda.so.1").
inline std::string cuda_library() {
  const char* path = std::getenv("BATON_TEST_CUDA_LIBRARY");
  return path != nullptr ? path : BATON_FAKE_CUDA;
}

/// A pool's memory for a transport: host memory, or device memory for cuda_ipc and staged:.... The stand-in's device memory can be read
/// and written by the CPU; a real GPU's only with fill() and is_all().
class PoolMemory {
 public:
  PoolMemory() = default;
  PoolMemory(size_t bytes, const std::string& transport, int device_index = 0) {
    if (transport != "cuda_ipc" && !transport.starts_with("staged:")) {
      host_.resize(bytes);
      memory_ = host_;
      return;
    }
    auto driver = cuda::Driver::load(cuda_library());
    BATON_CHECK(driver.ok()) << driver.status().to_string();
    auto device = cuda::Device::open(*driver, device_index % (*driver)->devices);
    BATON_CHECK(device.ok()) << device.status().to_string();
    auto allocated = cuda::DeviceMemory::allocate(*device, bytes);
    BATON_CHECK(allocated.ok()) << allocated.status().to_string();
    device_ = std::move(*device);
    on_device_ = std::move(*allocated);
    memory_ = on_device_.span();
    fill(std::byte{0});
  }
  PoolMemory(PoolMemory&&) = default;
  PoolMemory& operator=(PoolMemory&&) = default;

  MemoryKind kind() const { return device_ != nullptr ? MemoryKind::kCuda : MemoryKind::kHost; }
  std::byte* data() const { return memory_.data(); }
  size_t size() const { return memory_.size(); }
  std::byte* begin() const { return memory_.data(); }
  std::byte* end() const { return memory_.data() + memory_.size(); }
  std::vector<std::byte> copy() const { return {begin(), end()}; }
  bool operator==(const PoolMemory& other) const { return *this == other.copy(); }
  bool operator==(const std::vector<std::byte>& other) const {
    return size() == other.size() && std::memcmp(data(), other.data(), size()) == 0;
  }

  void fill(std::byte value) {
    if (device_ == nullptr) {
      std::fill(begin(), end(), value);
      return;
    }
    cuda::CurrentDevice current(*device_);
    check(device_->driver().memory_set(on_device_.address(), static_cast<unsigned char>(value), size()));
  }
  bool is_all(std::byte value) const {
    const std::byte* bytes = data();
    std::vector<std::byte> copied;
    if (device_ != nullptr) {
      copied.resize(size());
      cuda::CurrentDevice current(*device_);
      check(device_->driver().copy_to_host(copied.data(), on_device_.address(), size()));
      bytes = copied.data();
    }
    return bytes[0] == value && std::memcmp(bytes, bytes + 1, size() - 1) == 0;
  }

 private:
  static void check(cuda::CUresult result) { BATON_CHECK(result == cuda::kSuccess) << "CUDA error " << result; }

  std::vector<std::byte> host_;
  std::shared_ptr<const cuda::Device> device_;
  cuda::DeviceMemory on_device_;
  std::span<std::byte> memory_;
};

}  // namespace baton::transfer::testing
