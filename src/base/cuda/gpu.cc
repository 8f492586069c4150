#include "base/cuda/gpu.h"

#include <utility>

namespace baton::cuda {

Result<std::shared_ptr<const Gpu>> Gpu::open(std::shared_ptr<const Driver> driver, int ordinal) {
  std::shared_ptr<Gpu> device(new Gpu(std::move(driver), ordinal));
  BATON_RETURN_IF_ERROR(device->init());
  return std::shared_ptr<const Gpu>(std::move(device));
}

Status Gpu::init() {
  const Driver& cu = *driver_;
  BATON_RETURN_IF_ERROR(cu.check(cu.device_get(&handle_, ordinal_), fmt::format("cuDeviceGet({})", ordinal_)));
  BATON_ASSIGN_OR_RETURN(uuid_, device_uuid(cu, ordinal_));
  char model[128] = {};
  char bus[32] = {};
  BATON_RETURN_IF_ERROR(cu.check(cu.device_name(model, sizeof(model), handle_), "cuDeviceGetName"));
  BATON_RETURN_IF_ERROR(cu.check(cu.device_pci_bus_id(bus, sizeof(bus), handle_), "cuDeviceGetPCIBusId"));
  name_ = fmt::format("GPU {} ({}, {})", ordinal_, model, bus);
  BATON_RETURN_IF_ERROR(cu.check(
      cu.device_attribute(&multiprocessors_, kAttributeMultiprocessorCount, handle_), "cuDeviceGetAttribute"));
  return cu.check(cu.primary_context_retain(&context_, handle_), fmt::format("cuDevicePrimaryCtxRetain of {}", name_));
}

Gpu::~Gpu() {
  if (context_ != nullptr) (void)driver_->primary_context_release(handle_);
}

Result<std::string> device_uuid(const Driver& driver, int ordinal) {
  CUdevice handle = 0;
  CUuuid uuid{};
  BATON_RETURN_IF_ERROR(driver.check(driver.device_get(&handle, ordinal), fmt::format("cuDeviceGet({})", ordinal)));
  BATON_RETURN_IF_ERROR(driver.check(driver.device_uuid(&uuid, handle), "cuDeviceGetUuid"));
  return std::string(uuid.bytes, sizeof(uuid.bytes));
}

Result<int> find_device(const Driver& driver, CUdeviceptr address) {
  unsigned type = 0;
  int ordinal = -1;
  if (driver.pointer_attribute(&type, kPointerMemoryType, address) != kSuccess || type != kMemoryTypeDevice ||
      driver.pointer_attribute(&ordinal, kPointerDeviceOrdinal, address) != kSuccess) {
    return invalid_argument("{:#x} is not an address of GPU memory of this process", address);
  }
  return ordinal;
}

CurrentDevice::CurrentDevice(const Gpu& device) : driver_(device.driver()) {
  (void)driver_.context_push(device.context());
  (void)driver_.exchange_capture_mode(&capture_mode_);
}

CurrentDevice::~CurrentDevice() {
  (void)driver_.exchange_capture_mode(&capture_mode_);
  CUcontext context = nullptr;
  (void)driver_.context_pop(&context);
}

Result<DeviceMemory> DeviceMemory::allocate(std::shared_ptr<const Gpu> device, size_t bytes) {
  CurrentDevice current(*device);
  DeviceMemory memory;
  BATON_RETURN_IF_ERROR(device->driver().check(device->driver().memory_alloc(&memory.memory_, bytes),
                                               fmt::format("cuMemAlloc of {} bytes on {}", bytes, device->name())));
  memory.bytes_ = bytes;
  memory.device_ = std::move(device);
  return memory;
}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  if (this == &other) return *this;
  free();
  device_ = std::exchange(other.device_, nullptr);
  memory_ = std::exchange(other.memory_, 0);
  bytes_ = std::exchange(other.bytes_, 0);
  return *this;
}

void DeviceMemory::free() {
  if (device_ == nullptr) return;
  CurrentDevice current(*device_);
  (void)device_->driver().memory_free(memory_);
}

Result<PinnedMemory> PinnedMemory::allocate(std::shared_ptr<const Gpu> device, size_t bytes) {
  CurrentDevice current(*device);
  const Driver& cu = device->driver();
  void* data = nullptr;
  BATON_RETURN_IF_ERROR(cu.check(cu.host_alloc(&data, bytes, kHostAllocPortable | kHostAllocDeviceMap),
                                 fmt::format("cuMemHostAlloc of {} bytes", bytes)));
  PinnedMemory memory;
  memory.data_ = static_cast<std::byte*>(data);
  memory.bytes_ = bytes;
  memory.device_ = device;
  BATON_RETURN_IF_ERROR(cu.check(cu.host_device_pointer(&memory.address_, data, 0), "cuMemHostGetDevicePointer"));
  return memory;
}

PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  if (this == &other) return *this;
  free();
  device_ = std::exchange(other.device_, nullptr);
  data_ = std::exchange(other.data_, nullptr);
  address_ = std::exchange(other.address_, 0);
  bytes_ = std::exchange(other.bytes_, 0);
  return *this;
}

void PinnedMemory::free() {
  if (device_ == nullptr) return;
  CurrentDevice current(*device_);
  (void)device_->driver().host_free(data_);
}

Result<PinnedRange> PinnedRange::pin(std::shared_ptr<const Gpu> device, std::span<std::byte> memory) {
  CurrentDevice current(*device);
  const Driver& cu = device->driver();
  BATON_RETURN_IF_ERROR(cu.check(cu.host_register(memory.data(), memory.size(), kHostAllocPortable | kHostAllocDeviceMap),
                                 fmt::format("cuMemHostRegister of {} bytes", memory.size())));
  PinnedRange range;
  range.data_ = memory.data();
  range.device_ = device;
  BATON_RETURN_IF_ERROR(
      cu.check(cu.host_device_pointer(&range.address_, memory.data(), 0), "cuMemHostGetDevicePointer"));
  return range;
}

PinnedRange& PinnedRange::operator=(PinnedRange&& other) noexcept {
  if (this == &other) return *this;
  unpin();
  device_ = std::exchange(other.device_, nullptr);
  data_ = std::exchange(other.data_, nullptr);
  address_ = std::exchange(other.address_, 0);
  return *this;
}

void PinnedRange::unpin() {
  if (device_ == nullptr) return;
  CurrentDevice current(*device_);
  (void)device_->driver().host_unregister(data_);
}

}  // namespace baton::cuda
