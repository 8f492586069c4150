#include "ops/raw_gpu.h"

#include <cstring>
#include <utility>

#include "base/clock.h"

namespace baton::ops {

using cuda::CUdeviceptr;
using cuda::CurrentDevice;
using cuda::Driver;

namespace {

double seconds_since(int64_t begin_ns) { return static_cast<double>(SteadyClock::instance().now_ns() - begin_ns) * 1e-9; }

}  // namespace

Result<GpuPool> GpuPool::open(const std::string& library, int32_t ordinal, uint64_t bytes) {
  BATON_ASSIGN_OR_RETURN(std::shared_ptr<const Driver> driver, Driver::load(library));
  if (ordinal < 0) ordinal = -ordinal % driver->devices;
  if (ordinal >= driver->devices) return invalid_argument("there is no GPU {}: {} are visible here", ordinal, driver->devices);
  GpuPool pool;
  BATON_ASSIGN_OR_RETURN(pool.gpu_, cuda::Gpu::open(driver, ordinal));
  BATON_ASSIGN_OR_RETURN(pool.memory_, cuda::DeviceMemory::allocate(pool.gpu_, bytes));
  BATON_ASSIGN_OR_RETURN(pool.scratch_, cuda::DeviceMemory::allocate(pool.gpu_, 256));
  return pool;
}

Status GpuPool::upload(std::span<const std::byte> from) const {
  if (from.size() > bytes()) return invalid_argument("{} bytes do not fit into a pool of {}", from.size(), bytes());
  CurrentDevice current(*gpu_);
  return gpu_->driver().check(gpu_->driver().copy_to_device(address(), from.data(), from.size()), "cuMemcpyHtoD");
}

Status GpuPool::fill(uint64_t offset, uint64_t count, uint8_t value) const {
  CurrentDevice current(*gpu_);
  return gpu_->driver().check(gpu_->driver().memory_set(address() + offset, value, count), "cuMemsetD8");
}

Status GpuPool::download(uint64_t offset, std::span<std::byte> to) const {
  CurrentDevice current(*gpu_);
  return gpu_->driver().check(gpu_->driver().copy_to_host(to.data(), address() + offset, to.size()), "cuMemcpyDtoH");
}

Status GpuPool::take_turn() const {
  CurrentDevice current(*gpu_);
  const Driver& cu = gpu_->driver();
  std::byte word[8];
  BATON_RETURN_IF_ERROR(cu.check(cu.memory_set(scratch_.address(), 0, sizeof(word)), "cuMemsetD8"));
  return cu.check(cu.copy_to_host(word, scratch_.address(), sizeof(word)), "cuMemcpyDtoH");
}

Result<std::string> GpuPool::ipc_handle() const {
  CurrentDevice current(*gpu_);
  cuda::CUipcMemHandle handle{};
  BATON_RETURN_IF_ERROR(gpu_->driver().check(gpu_->driver().ipc_get_handle(&handle, address()), "cuIpcGetMemHandle"));
  return std::string(handle.bytes, sizeof(handle.bytes));
}

Status RawGpuCopy::open_stream() {
  CurrentDevice current(*pool_.gpu());
  const Driver& cu = pool_.gpu()->driver();
  return cu.check(cu.stream_create(&stream_, cuda::kStreamNonBlocking, 0), "cuStreamCreateWithPriority");
}

Result<std::unique_ptr<RawGpuCopy>> RawGpuCopy::into_peer(const GpuPool& pool, std::string_view ipc_handle, uint64_t bytes) {
  cuda::CUipcMemHandle handle;
  if (ipc_handle.size() != sizeof(handle.bytes)) return invalid_argument("a damaged handle of GPU memory");
  std::memcpy(handle.bytes, ipc_handle.data(), sizeof(handle.bytes));
  std::unique_ptr<RawGpuCopy> copy(new RawGpuCopy(pool));
  BATON_RETURN_IF_ERROR(copy->open_stream());
  CurrentDevice current(*pool.gpu());
  const Driver& cu = pool.gpu()->driver();
  BATON_RETURN_IF_ERROR(cu.check(cu.ipc_open_handle(&copy->target_, handle, cuda::kIpcLazyEnablePeerAccess), "cuIpcOpenMemHandle"));
  copy->mapped_ = true;
  copy->target_bytes_ = bytes;
  return copy;
}

Result<std::unique_ptr<RawGpuCopy>> RawGpuCopy::into_host(const GpuPool& pool, uint64_t bytes) {
  std::unique_ptr<RawGpuCopy> copy(new RawGpuCopy(pool));
  BATON_RETURN_IF_ERROR(copy->open_stream());
  BATON_ASSIGN_OR_RETURN(copy->host_, cuda::PinnedMemory::allocate(pool.gpu(), bytes));
  copy->target_ = copy->host_.address();
  copy->target_bytes_ = bytes;
  return copy;
}

RawGpuCopy::~RawGpuCopy() {
  CurrentDevice current(*pool_.gpu());
  const Driver& cu = pool_.gpu()->driver();
  if (stream_ != nullptr) {
    (void)cu.stream_synchronize(stream_);
    (void)cu.stream_destroy(stream_);
  }
  if (mapped_) (void)cu.ipc_close_handle(target_);
}

Status RawGpuCopy::finish() const {
  return pool_.gpu()->driver().check(pool_.gpu()->driver().stream_synchronize(stream_), "cuStreamSynchronize");
}

Result<double> RawGpuCopy::bulk(uint64_t bytes) const {
  if (bytes > pool_.bytes() || bytes > target_bytes_) return invalid_argument("{} bytes do not fit into the pools", bytes);
  CurrentDevice current(*pool_.gpu());
  const Driver& cu = pool_.gpu()->driver();
  const int64_t begin_ns = SteadyClock::instance().now_ns();
  BATON_RETURN_IF_ERROR(cu.check(cu.copy_async(target_, pool_.address(), bytes, stream_), "cuMemcpyAsync"));
  BATON_RETURN_IF_ERROR(finish());
  return seconds_since(begin_ns);
}

Result<double> RawGpuCopy::each(std::span<const transfer::BlockPair> blocks, uint64_t block_bytes) const {
  CurrentDevice current(*pool_.gpu());
  const Driver& cu = pool_.gpu()->driver();
  const int64_t begin_ns = SteadyClock::instance().now_ns();
  uint64_t next = 0;
  for (const transfer::BlockPair& pair : blocks) {
    const uint64_t to = mapped_ ? pair.remote_block * block_bytes : std::exchange(next, next + block_bytes);
    if (to + block_bytes > target_bytes_) return invalid_argument("block {} is outside of the target", pair.remote_block);
    BATON_RETURN_IF_ERROR(
        cu.check(cu.copy_async(target_ + to, pool_.address() + pair.local_block * block_bytes, block_bytes, stream_), "cuMemcpyAsync"));
  }
  BATON_RETURN_IF_ERROR(finish());
  return seconds_since(begin_ns);
}

}  // namespace baton::ops
