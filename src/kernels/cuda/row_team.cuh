#pragma once

#include <cstdint>

/// The thread blocks that work on one row of logits: a cluster, which reads each other's shared memory, where there are
/// clusters, and one block elsewhere. Device code only.
namespace baton::cuda {

__device__ __forceinline__ uint32_t team_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
__device__ __forceinline__ uint32_t team_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}
/// A barrier of all threads of the team; what they wrote before it is visible after it. Also to be passed before a block ends
/// whose shared memory others may read.
__device__ __forceinline__ void team_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
/// `mine`, a variable in shared memory, as block `rank` of the team has it.
__device__ __forceinline__ uint64_t team_load(const uint64_t* mine, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  uint64_t value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
  return value;
#else
  return *mine;
#endif
}

/// The sum over all blocks of the team: the loads are all on their way at once.
__device__ __forceinline__ uint64_t team_sum(const uint64_t* mine) {
  constexpr uint32_t kLargest = 8;
  const uint32_t size = team_size();
  uint64_t values[kLargest], sum = 0;
#pragma unroll
  for (uint32_t rank = 0; rank < kLargest; ++rank) values[rank] = team_load(mine, rank < size ? rank : 0);
#pragma unroll
  for (uint32_t rank = 0; rank < kLargest; ++rank) sum += rank < size ? values[rank] : 0;
  return sum;
}

/// Floats as unsigned numbers of the same order.
__device__ __forceinline__ uint32_t order_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float value_of_order(uint32_t order) {
  return __uint_as_float(order ^ (order >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

/// A value and where it stands as one number: larger is a larger value or, of equals, an earlier place.
__device__ __forceinline__ uint64_t ranked(float value, uint32_t index) {
  return (static_cast<uint64_t>(order_of(value == 0.0f ? 0.0f : value)) << 32) | (0xffffffffu - index);
}
__device__ __forceinline__ float ranked_value(uint64_t r) { return value_of_order(static_cast<uint32_t>(r >> 32)); }
__device__ __forceinline__ uint32_t ranked_index(uint64_t r) { return 0xffffffffu - static_cast<uint32_t>(r); }

__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
/// The best of a row's logits, of which this block looks at [begin, end). A NaN or +infinity counts as best of all and comes back as
/// +infinity. `slots`: 33 numbers in shared memory, not in use by others. All threads of all blocks get it.
__device__ __forceinline__ uint64_t team_best(const float* row, int64_t begin, int64_t end, uint64_t* slots) {
  const float infinity = __int_as_float(0x7f800000);
  float best = -infinity;
  uint32_t index = 0xffffffffu;
  const auto take = [&](float v, int64_t i) {
    if (!(v <= 3.402823466e38f)) v = infinity;
    if (v > best || index == 0xffffffffu) best = v, index = static_cast<uint32_t>(i);  // places only grow in a thread
  };
  // Rows of an odd width begin anywhere: up to three elements come before the first aligned one.
  const int64_t misaligned = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(row + begin) % 16) % 16 / 4);
  const int64_t head = begin + (misaligned < end - begin ? misaligned : max(end - begin, int64_t{0}));
  const int64_t vectors = end > head ? (end - head) / 4 : 0;
  const float4* aligned = reinterpret_cast<const float4*>(row + head);
  if (begin + threadIdx.x < head) take(row[begin + threadIdx.x], begin + threadIdx.x);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
    const float4 v = aligned[i];
    const int64_t at = head + 4 * i;
    take(v.x, at), take(v.y, at + 1), take(v.z, at + 2), take(v.w, at + 3);
  }
  for (int64_t i = head + 4 * vectors + threadIdx.x; i < end; i += blockDim.x) take(row[i], i);

  uint64_t r = index == 0xffffffffu ? 0 : ranked(best, index);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) r = larger(r, __shfl_xor_sync(0xffffffffu, r, step));
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = r;
  __syncthreads();
  if (threadIdx.x < 32) {
    r = threadIdx.x < blockDim.x / 32 ? slots[threadIdx.x] : 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) r = larger(r, __shfl_xor_sync(0xffffffffu, r, step));
    if (threadIdx.x == 0) slots[32] = r;
  }
  team_sync();
  for (uint32_t rank = 0; rank < team_size(); ++rank) r = rank == 0 ? team_load(slots + 32, 0) : larger(r, team_load(slots + 32, rank));
  return r;
}

}  // namespace baton::cuda
