#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "base/status.h"
#include "base/cuda/driver.h"

namespace baton::cuda {

/// One GPU, through its primary context (the one that the CUDA runtime and PyTorch use). Safe from any thread.
class Gpu {
 public:
  static Result<std::shared_ptr<const Gpu>> open(std::shared_ptr<const Driver> driver, int ordinal);
  virtual ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  const Driver& driver() const { return *driver_; }
  int ordinal() const { return ordinal_; }
  CUcontext context() const { return context_; }
  int multiprocessors() const { return multiprocessors_; }
  const std::string& uuid() const { return uuid_; }  ///< 16 bytes
  /// "GPU 0 (NVIDIA H200, 0000:04:00.0)"
  const std::string& name() const { return name_; }

 protected:
  explicit Gpu(std::shared_ptr<const Driver> driver, int ordinal) : driver_(std::move(driver)), ordinal_(ordinal) {}
  Status init();

 private:
  const std::shared_ptr<const Driver> driver_;
  const int ordinal_;
  CUdevice handle_ = 0;
  CUcontext context_ = nullptr;
  int multiprocessors_ = 0;
  std::string uuid_;
  std::string name_;
};

/// The uuid of a visible device, without opening it.
Result<std::string> device_uuid(const Driver& driver, int ordinal);

/// The ordinal of the device that `address` belongs to. invalid_argument: it is not GPU memory of this process.
Result<int> find_device(const Driver& driver, CUdeviceptr address);

/// Makes a device's context current on this thread, and lets the thread work while another one captures a CUDA graph.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Gpu& device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  const Driver& driver_;
  int capture_mode_ = kCaptureModeRelaxed;
};

/// Gpu memory of cuMemAlloc: the kind that can be exported to other processes.
class DeviceMemory {
 public:
  static Result<DeviceMemory> allocate(std::shared_ptr<const Gpu> device, size_t bytes);
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  ~DeviceMemory() { free(); }

  CUdeviceptr address() const { return memory_; }
  size_t bytes() const { return bytes_; }
  /// Not readable by the CPU: for register_memory().
  std::span<std::byte> span() const { return {reinterpret_cast<std::byte*>(memory_), bytes_}; }

 private:
  void free();
  std::shared_ptr<const Gpu> device_;
  CUdeviceptr memory_ = 0;
  size_t bytes_ = 0;
};

/// Page-locked host memory that the GPU reads and writes through `address()`.
class PinnedMemory {
 public:
  static Result<PinnedMemory> allocate(std::shared_ptr<const Gpu> device, size_t bytes);
  PinnedMemory() = default;
  PinnedMemory(PinnedMemory&& other) noexcept { *this = std::move(other); }
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;
  ~PinnedMemory() { free(); }

  std::byte* data() const { return data_; }
  CUdeviceptr address() const { return address_; }
  size_t bytes() const { return bytes_; }

 private:
  void free();
  std::shared_ptr<const Gpu> device_;
  std::byte* data_ = nullptr;
  CUdeviceptr address_ = 0;
  size_t bytes_ = 0;
};

/// Makes memory of this process, page-locked from here on, readable and writable for every GPU through `address()`. The
/// memory belongs to the caller and must outlive it.
class PinnedRange {
 public:
  static Result<PinnedRange> pin(std::shared_ptr<const Gpu> device, std::span<std::byte> memory);
  PinnedRange() = default;
  PinnedRange(PinnedRange&& other) noexcept { *this = std::move(other); }
  PinnedRange& operator=(PinnedRange&& other) noexcept;
  ~PinnedRange() { unpin(); }

  explicit operator bool() const { return device_ != nullptr; }
  CUdeviceptr address() const { return address_; }

 private:
  void unpin();
  std::shared_ptr<const Gpu> device_;
  std::byte* data_ = nullptr;
  CUdeviceptr address_ = 0;
};

}  // namespace baton::cuda
