#include "model/cuda/cuda_weights.h"

#include <algorithm>
#include <cstring>

namespace baton {

using cuda::CurrentDevice;
using cuda::CUdeviceptr;

namespace {

constexpr int64_t kStagingBytes = int64_t{64} << 20;
constexpr int64_t kSmallBytes = int64_t{4} << 20;  // of the pieces that small tensors share
constexpr int64_t kAlignment = 256;
constexpr int64_t kGrain = int64_t{1} << 18;       // bytes that a thread converts at a time

/// `address` as what the kernels' functions take.
template <typename T>
const T* device_pointer(CUdeviceptr address) {
  return reinterpret_cast<const T*>(address);
}

}  // namespace

Result<std::unique_ptr<CudaWeightStore>> CudaWeightStore::create(std::shared_ptr<const cuda::Gpu> gpu, ThreadPool& threads) {
  std::unique_ptr<CudaWeightStore> store(new CudaWeightStore(std::move(gpu), threads));
  BATON_RETURN_IF_ERROR(store->init());
  return store;
}

Status CudaWeightStore::init() {
  CurrentDevice current(*gpu_);
  const cuda::Driver& cu = gpu_->driver();
  BATON_RETURN_IF_ERROR(cu.check(cu.stream_create(&stream_, cuda::kStreamNonBlocking, 0), "cuStreamCreate"));
  for (Staging& staging : staging_) {
    BATON_ASSIGN_OR_RETURN(staging.memory, cuda::PinnedMemory::allocate(gpu_, kStagingBytes));
    BATON_RETURN_IF_ERROR(cu.check(cu.event_create(&staging.sent, cuda::kEventDisableTiming), "cuEventCreate"));
  }
  return {};
}

CudaWeightStore::~CudaWeightStore() {
  (void)finish();
}

Status CudaWeightStore::finish() {
  if (stream_ == nullptr) return {};
  CurrentDevice current(*gpu_);
  const cuda::Driver& cu = gpu_->driver();
  Status status = cu.check(cu.stream_synchronize(stream_), "sending weights to the GPU");
  for (Staging& staging : staging_) {
    if (staging.sent != nullptr) (void)cu.event_destroy(staging.sent);
    staging = {};
  }
  (void)cu.stream_destroy(stream_);
  stream_ = nullptr;
  return status;
}

Result<CUdeviceptr> CudaWeightStore::allocate(int64_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const bool small = bytes <= kSmallBytes / 4;
  if (!small || bytes > small_left_) {
    auto memory = cuda::DeviceMemory::allocate(gpu_, static_cast<size_t>(small ? kSmallBytes : bytes));
    if (!memory.ok()) return memory.status().with_context(fmt::format("weights, {} bytes of them placed", held_bytes_));
    memory_.push_back(std::move(memory).value());
    held_bytes_ += static_cast<int64_t>(memory_.back().bytes());
    if (!small) return memory_.back().address();
    small_ = memory_.back().address();
    small_left_ = kSmallBytes;
  }
  const CUdeviceptr address = small_;
  small_ += static_cast<CUdeviceptr>(bytes);
  small_left_ -= bytes;
  return address;
}

Status CudaWeightStore::send(CUdeviceptr to, int64_t bytes,
                             const std::function<void(int64_t, int64_t, std::byte*)>& fill) {
  CurrentDevice current(*gpu_);
  const cuda::Driver& cu = gpu_->driver();
  for (int64_t begin = 0; begin < bytes; begin += kStagingBytes) {
    const int64_t count = std::min(kStagingBytes, bytes - begin);
    Staging& staging = staging_[turn_++ % 2];
    // An event that was never recorded counts as reached.
    BATON_RETURN_IF_ERROR(cu.check(cu.event_synchronize(staging.sent), "sending weights to the GPU"));
    threads_.parallel_for(count, kGrain, [&](int64_t first, int64_t last, int) {
      fill(begin + first, begin + last, staging.memory.data() + first);
    });
    BATON_RETURN_IF_ERROR(cu.check(
        cu.copy_async(to + static_cast<CUdeviceptr>(begin), staging.memory.address(), static_cast<size_t>(count), stream_),
        "sending weights to the GPU"));
    BATON_RETURN_IF_ERROR(cu.check(cu.event_record(staging.sent, stream_), "cuEventRecord"));
  }
  return {};
}

Result<CudaVector> CudaWeightStore::vector(std::span<const float> values) {
  BATON_ASSIGN_OR_RETURN(CUdeviceptr address, allocate(static_cast<int64_t>(values.size_bytes())));
  BATON_RETURN_IF_ERROR(send(address, static_cast<int64_t>(values.size_bytes()), [&](int64_t begin, int64_t end, std::byte* out) {
    std::memcpy(out, reinterpret_cast<const std::byte*>(values.data()) + begin, static_cast<size_t>(end - begin));
  }));
  return CudaVector{device_pointer<float>(address), std::ssize(values)};
}

Result<CudaMatrix> CudaWeightStore::matrix(std::span<const Kernels::MatrixPart> parts, int64_t in_features) {
  int64_t rows = 0;
  for (const Kernels::MatrixPart& part : parts) rows += part.out_features;
  constexpr int64_t kElementBytes = sizeof(bf16);
  BATON_ASSIGN_OR_RETURN(CUdeviceptr address, allocate(rows * in_features * kElementBytes));
  CUdeviceptr to = address;
  for (const Kernels::MatrixPart& part : parts) {
    const WeightView view{part.data, part.dtype};
    const int64_t bytes = part.out_features * in_features * kElementBytes;
    BATON_RETURN_IF_ERROR(send(to, bytes, [&](int64_t begin, int64_t end, std::byte* out) {
      // Pieces begin at even bytes: kGrain and kStagingBytes are.
      to_bf16(view, begin / kElementBytes, end / kElementBytes, reinterpret_cast<bf16*>(out));
    }));
    to += static_cast<CUdeviceptr>(bytes);
  }
  return CudaMatrix{device_pointer<bf16>(address), rows, in_features};
}

Result<CudaMatrix> CudaWeightStore::table(const WeightView& view, int64_t rows, int64_t width) {
  const Kernels::MatrixPart part{view.data, view.dtype, rows};
  return matrix({&part, 1}, width);
}

}  // namespace baton
