#include <cuda_bf16.h>

#include "kernels/cuda/gemv_arguments.h"

// y = x W^T for a few rows: a matter of reading W once, as fast as the memory gives it. Each thread has a ring of its own
// in shared memory, filled by cp.async `stages` steps ahead, so that the loads in flight neither cost registers nor wait
// at a barrier: the ring runs on through the sums at the end of a unit and through the prologue, and (programmatic
// dependent launch) it is filled before the previous kernel has ended. Tensor cores multiply: with one row as with 16.
//
// The order of the sums depends on `in` only: chunks of 32 inputs, chunk c to warp c % 16, a warp's chunks in order, the 16
// warps' sums in order. So a row's result depends neither on the other rows nor on the shape of the grid.
namespace baton::cuda {
namespace {

constexpr int kChunk = 32;  // inputs; a lane holds 8 neighbours of them

__device__ __forceinline__ void copy_async(unsigned shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;  // the rest is filled with zeros
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ __forceinline__ uint4 load_shared(unsigned shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared) : "memory");
  return v;
}

// c[16 rows, 8 features] += a[16, 16] b[16, 8]; low/high: rows 0-7 / 8-15.
__device__ __forceinline__ void multiply(float (&c)[4], unsigned low0, unsigned high0, unsigned low1, unsigned high1,
                                         unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(low0), "r"(high0), "r"(low1), "r"(high1), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Where a warp's loads are: units of the block one after the other, the chunks of a unit in steps of kGemvWarps.
struct Producer {
  int unit;
  int chunk;
};

// The block's sum of a value per thread, in a fixed order.
__device__ float sum_over_block(float value, float* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < kGemvWarps; ++warp) sum += scratch[warp];
  return sum;
}

__device__ void normalise_into_shared(const GemvArguments& args, unsigned char* to, float* scratch) {
  const int quads = args.in / 4;
  const auto* norm = reinterpret_cast<const float4*>(args.norm_weight);
  for (int row = 0; row < args.rows; ++row) {
    const auto* x = reinterpret_cast<const float4*>(static_cast<const float*>(args.x) + static_cast<size_t>(row) * args.in);
    float squares = 0.0f;
    for (int i = threadIdx.x; i < quads; i += kGemvThreads) {
      const float4 v = x[i];
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    const float scale = rsqrtf(sum_over_block(squares, scratch) / static_cast<float>(args.in) + args.norm_eps);
    auto* out = reinterpret_cast<uint2*>(to + static_cast<size_t>(row) * args.x_shared_stride);
    for (int i = threadIdx.x; i < quads; i += kGemvThreads) {
      const float4 v = x[i];
      const float4 w = norm[i];
      __nv_bfloat162 low = __floats2bfloat162_rn(v.x * scale * w.x, v.y * scale * w.y);
      __nv_bfloat162 high = __floats2bfloat162_rn(v.z * scale * w.z, v.w * scale * w.w);
      out[i] = make_uint2(*reinterpret_cast<unsigned*>(&low), *reinterpret_cast<unsigned*>(&high));
    }
  }
}

__device__ void copy_into_shared(const GemvArguments& args, unsigned char* to) {
  const int pieces = args.in / 8;
  for (int row = 0; row < args.rows; ++row) {
    const auto* x = reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(args.x) + static_cast<size_t>(row) * args.in);
    auto* out = reinterpret_cast<uint4*>(to + static_cast<size_t>(row) * args.x_shared_stride);
    for (int i = threadIdx.x; i < pieces; i += kGemvThreads) out[i] = x[i];
  }
}

__device__ __forceinline__ float rounded(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

// kMaxRows: 1, 4, 8 or 16. kTiles: tiles of 8 features that a unit has; with kSiluBf16 the first half are of the gate and
// the others the same features of up.
template <int kMaxRows, int kTiles, int kStages>
__device__ __forceinline__ void gemv(const GemvArguments& args) {
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int kRingBytes = gemv_ring_bytes(kStages, kTiles);
  constexpr int kPartials = kTiles * kMaxRows * kGemvTileFeatures;  // of one warp
  constexpr int kHalf = kTiles > 1 ? kTiles / 2 : 1;
  auto* partials = reinterpret_cast<float*>(memory + kRingBytes);
  unsigned char* x_shared = memory + kRingBytes + gemv_partials_bytes(kMaxRows, kTiles);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, place = lane % 4;
  const bool silu = args.output == GemvOutput::kSiluBf16;
  const int unit_features = (silu ? kHalf : kTiles) * kGemvTileFeatures;
  const int features = silu ? args.out / 2 : args.out;
  const int units = (features + unit_features - 1) / unit_features;
  const int chunks = (args.in + kChunk - 1) / kChunk;
  const size_t in = args.in;
  const size_t second_half = (silu ? static_cast<size_t>(features) : static_cast<size_t>(kHalf * kGemvTileFeatures)) * in;

  const unsigned ring = static_cast<unsigned>(__cvta_generic_to_shared(memory)) + threadIdx.x * 16;
  const auto* weight = static_cast<const __nv_bfloat16*>(args.weight);
  Producer next{static_cast<int>(blockIdx.x), warp};
  auto load_step = [&](int stage) {
    if (next.unit < units && warp < chunks) {
      const int k = next.chunk * kChunk + place * 8;
      const int first = next.unit * unit_features + group;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int feature = first + (tile % kHalf + (silu ? 0 : tile / kHalf * kHalf)) * kGemvTileFeatures;
        const bool valid = k < args.in && feature < features;
        const __nv_bfloat16* from =
            weight + static_cast<size_t>(first + tile % kHalf * kGemvTileFeatures) * in + tile / kHalf * second_half + k;
        copy_async(ring + (stage * kTiles + tile) * kGemvThreads * 16, valid ? from : weight, valid);
      }
      next.chunk += kGemvWarps;
      if (next.chunk >= chunks) {
        next.chunk = warp;
        next.unit += gridDim.x;
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) load_step(stage);

  allow_next_kernel();
  wait_for_previous_kernel();
  const bool shared = args.x_shared_stride != 0;
  if (args.norm_weight != nullptr) {
    normalise_into_shared(args, x_shared, partials);
    __syncthreads();
  } else if (shared) {
    copy_into_shared(args, x_shared);
    __syncthreads();
  }
  const unsigned char* x = shared ? x_shared : static_cast<const unsigned char*>(args.x);
  const size_t x_stride = shared ? args.x_shared_stride : in * 2;
  const unsigned char* x_low = x + group * x_stride;
  const unsigned char* x_high = x + (group + 8) * x_stride;
  const bool has_low = group < args.rows, has_high = kMaxRows > 8 && group + 8 < args.rows;

  int stage = 0, buffer = 0;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x, buffer ^= 1) {
    float sums[kTiles][4] = {};
    for (int chunk = warp; chunk < chunks; chunk += kGemvWarps) {
      const int k = chunk * kChunk + place * 8;
      uint4 low = make_uint4(0, 0, 0, 0), high = make_uint4(0, 0, 0, 0);
      if (has_low && k < args.in) low = *reinterpret_cast<const uint4*>(x_low + k * 2);
      if (has_high && k < args.in) high = *reinterpret_cast<const uint4*>(x_high + k * 2);
      wait_copies<kStages - 1>();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 w = load_shared(ring + (stage * kTiles + tile) * kGemvThreads * 16);
        multiply(sums[tile], low.x, high.x, low.y, high.y, w.x, w.y);
        multiply(sums[tile], low.z, high.z, low.w, high.w, w.z, w.w);
      }
      load_step(stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    float* mine = partials + (buffer * kGemvWarps + warp) * kPartials;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (group < kMaxRows) {
        *reinterpret_cast<float2*>(mine + (tile * kMaxRows + group) * kGemvTileFeatures + place * 2) =
            make_float2(sums[tile][0], sums[tile][1]);
      }
      if (kMaxRows > 8) {
        *reinterpret_cast<float2*>(mine + (tile * kMaxRows + group + 8) * kGemvTileFeatures + place * 2) =
            make_float2(sums[tile][2], sums[tile][3]);
      }
    }
    __syncthreads();

    const float* all = partials + buffer * kGemvWarps * kPartials;
    auto total = [&](int index) {
      float sum = 0.0f;
#pragma unroll
      for (int from = 0; from < kGemvWarps; ++from) sum += all[from * kPartials + index];
      return sum;
    };
    const int outputs = silu ? kPartials / 2 : kPartials;
    for (int index = threadIdx.x; index < outputs; index += kGemvThreads) {
      const int column = index % kGemvTileFeatures;
      const int row = index / kGemvTileFeatures % kMaxRows;
      const int tile = index / (kGemvTileFeatures * kMaxRows);
      const int feature = unit * unit_features + tile * kGemvTileFeatures + column;
      if (row >= args.rows || feature >= features) continue;
      const size_t at = static_cast<size_t>(row) * features + feature;
      const float sum = total(index);
      if (args.output == GemvOutput::kFloat) {
        static_cast<float*>(args.y)[at] = sum;
      } else if (args.output == GemvOutput::kAddFloat) {
        static_cast<float*>(args.y)[at] += sum;
      } else if (args.output == GemvOutput::kBf16) {
        static_cast<__nv_bfloat16*>(args.y)[at] = __float2bfloat16_rn(sum);
      } else {
        const float gate = rounded(sum), up = rounded(total(index + kPartials / 2));
        static_cast<__nv_bfloat16*>(args.y)[at] = __float2bfloat16_rn(gate / (1.0f + expf(-gate)) * up);
      }
    }
  }
  wait_copies<0>();
}

}  // namespace

#define BATON_GEMV(rows, tiles, stages)                                                              \
  extern "C" __global__ void __launch_bounds__(kGemvThreads, 2) baton_gemv_r##rows##_t##tiles(const GemvArguments args) { \
    gemv<rows, tiles, stages>(args);                                                                 \
  }
BATON_GEMV(1, 1, 8)
BATON_GEMV(1, 2, 4)
BATON_GEMV(1, 4, 2)
BATON_GEMV(4, 1, 8)
BATON_GEMV(4, 2, 4)
BATON_GEMV(4, 4, 2)
BATON_GEMV(8, 1, 8)
BATON_GEMV(8, 2, 4)
BATON_GEMV(8, 4, 2)
BATON_GEMV(16, 1, 8)
BATON_GEMV(16, 2, 4)
BATON_GEMV(16, 4, 2)

}  // namespace baton::cuda
