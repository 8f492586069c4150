#include "copy_arguments.h"

/// The one kernel of the transfer library: gathers, scatters and copies between any two memories that the GPU can
/// address (its own, a peer's over NVLink or PCIe, mapped host memory).
///
/// A warp takes one unit of a piece at a time, so nothing waits for anything but its own loads. The descriptor of the
/// next unit, which may lie across PCIe, is fetched while this one is copied.
namespace {

using baton::transfer::cuda::BlockIds;
using baton::transfer::cuda::CopyArguments;
using baton::transfer::cuda::Piece;

constexpr uint32_t kLoadsInFlight = 8;  // of 16 bytes, per thread

__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ void copy_aligned(const uint4* from, uint4* to, uint32_t count, uint32_t lane) {
  uint32_t i = lane;
  for (; i + (kLoadsInFlight - 1) * 32 < count; i += kLoadsInFlight * 32) {
    uint4 v[kLoadsInFlight];
#pragma unroll
    for (uint32_t k = 0; k < kLoadsInFlight; ++k) v[k] = load_once(from + i + k * 32);
#pragma unroll
    for (uint32_t k = 0; k < kLoadsInFlight; ++k) __stcs(to + i + k * 32, v[k]);  // 3 % inside a GPU, nothing over NVLink
  }
  for (; i < count; i += 32) to[i] = load_once(from + i);
}

/// KV blocks are aligned; this is for the caller who asks for an odd range.
__device__ __noinline__ void copy_bytes(const uint8_t* from, uint8_t* to, uint32_t bytes, uint32_t lane) {
  for (uint32_t i = lane; i < bytes; i += 32) to[i] = from[i];
}

template <typename Entry>
__device__ __forceinline__ Entry load_entry(const CopyArguments& a, uint32_t index) {
  if constexpr (sizeof(Entry) == sizeof(Piece)) {
    if (a.pieces == 0) return a.inline_pieces[index];
  } else {
    if (a.pieces == 0) return a.inline_blocks[index];
  }
  return reinterpret_cast<const Entry*>(a.pieces)[index];
}

__device__ __forceinline__ Piece piece_of(const CopyArguments&, const Piece& piece) { return piece; }
__device__ __forceinline__ Piece piece_of(const CopyArguments& a, const BlockIds& ids) {
  return {ids.source * a.source_stride, ids.target * a.target_stride, a.block_bytes};
}

/// An entry is looked into only when its turn has come: until then its load is under way.
template <typename Entry>
__device__ __forceinline__ void copy_all(const CopyArguments& a) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warps = gridDim.x * (blockDim.x / 32);
  const uint32_t units = a.piece_count * a.units_per_piece;
  uint32_t unit = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  Entry entry;
  if (unit < units) entry = load_entry<Entry>(a, unit / a.units_per_piece);
  while (unit < units) {
    const uint32_t next_unit = unit + warps;
    Entry next;
    if (next_unit < units) next = load_entry<Entry>(a, next_unit / a.units_per_piece);
    const Piece piece = piece_of(a, entry);
    const uint64_t offset = static_cast<uint64_t>(unit % a.units_per_piece) * a.unit_bytes;
    if (offset < piece.bytes) {
      const uint64_t left = piece.bytes - offset;
      const uint32_t bytes = left < a.unit_bytes ? static_cast<uint32_t>(left) : a.unit_bytes;
      const uint64_t from = a.source + piece.source_offset + offset;
      const uint64_t to = a.target + piece.target_offset + offset;
      if (((from | to | bytes) & 15) == 0) {
        copy_aligned(reinterpret_cast<const uint4*>(from), reinterpret_cast<uint4*>(to), bytes / 16, lane);
      } else {
        copy_bytes(reinterpret_cast<const uint8_t*>(from), reinterpret_cast<uint8_t*>(to), bytes, lane);
      }
    }
    entry = next;
    unit = next_unit;
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(baton::transfer::cuda::kCopyThreads)
    baton_transfer_copy(const __grid_constant__ CopyArguments a) {
  if (a.block_bytes == 0) {
    copy_all<Piece>(a);
  } else {
    copy_all<BlockIds>(a);
  }

  __syncthreads();
  if (threadIdx.x != 0) return;
  // Fences are cumulative: this one covers what the other threads of the CTA wrote before the barrier, and the last
  // CTA's covers what all the others had fenced before they counted.
  __threadfence_system();
  auto* counter = reinterpret_cast<unsigned int*>(a.cta_counter);
  if (atomicInc(counter, gridDim.x - 1) != gridDim.x - 1) return;  // the last one wraps it back to 0
  __threadfence_system();
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(a.done_flag), "l"(a.done_value) : "memory");
}
