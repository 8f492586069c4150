#include <cuda_bf16.h>

#include "kernels/cuda/gemv_arguments.h"

// y = x W^T for a few rows: a matter of reading W once, as fast as the memory gives it. Each warp has a ring of its own
// in shared memory, filled by cp.async `kStages` steps ahead, so that the loads in flight neither cost registers nor wait
// at a barrier: the ring runs on through the sums at the end of a unit and through the prologue, and (programmatic
// dependent launch) it is filled before the previous kernel's results can be read. Tensor cores multiply: with one row as
// with 16.
//
// The order of the sums depends on `in` only: steps of 128 inputs, step s to warp s % 8, a warp's steps in order, the 8
// warps' sums in order. So a row's result depends neither on the other rows nor on the shape of the grid.
namespace baton::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLines = 2;  // of 64 inputs, 128 bytes, of a row in a step

__device__ __forceinline__ unsigned long long read_once_policy() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void copy_async(unsigned shared, const void* global, bool valid, unsigned long long policy) {
  const int bytes = valid ? 16 : 0;  // the rest is filled with zeros
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
               "r"(bytes), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ __forceinline__ uint4 load_shared(unsigned shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

// c[16 rows, 8 features] += a[16, 16] b[16, 8]; low, high: rows 0-7, 8-15. Which of the inputs a register holds is ours to
// say as long as a and b agree: a lane has 8 neighbours, and gives 4 of them to each of two products.
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

__device__ __forceinline__ float rounded(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

__device__ __forceinline__ float sum_of_squares(float4 v, float sum) {
  return __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmaf_rn(v.x, v.x, sum))));
}
__device__ __forceinline__ uint2 scaled(float4 v, float scale, float4 w) {
  __nv_bfloat162 low = __floats2bfloat162_rn(v.x * scale * w.x, v.y * scale * w.y);
  __nv_bfloat162 high = __floats2bfloat162_rn(v.z * scale * w.z, v.w * scale * w.w);
  return make_uint2(*reinterpret_cast<unsigned*>(&low), *reinterpret_cast<unsigned*>(&high));
}

// RMSNorm by a block, of up to kRows rows at once. The weight is loaded before the previous kernel has ended, and what
// fits in registers (4096 inputs) is read once. The bits of a row are the same for every kRows.
template <int kRows>
class RowNorm {
 public:
  __device__ RowNorm(const float* weight, int in) : weight_(reinterpret_cast<const float4*>(weight)), quads_(in / 4) {
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      if (quad(j) < quads_) kept_weight_[j] = weight_[quad(j)];
    }
  }

  // scratch: kRows * kGemvWarps floats of shared memory. write(row, quad, four bf16)
  template <typename Write>
  __device__ void run(const float* x, int rows, float eps, float* scratch, Write write) const {
    const int in = quads_ * 4;
    float4 kept[kRows][kKept];
    float squares[kRows] = {};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int j = 0; j < kKept; ++j) {
        kept[row][j] = row < rows && quad(j) < quads_ ? row_of(x, row)[quad(j)] : make_float4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int j = 0; j < kKept; ++j) squares[row] = sum_of_squares(kept[row][j], squares[row]);
      if (row < rows) {
        for (int i = quad(kKept); i < quads_; i += kGemvThreads) squares[row] = sum_of_squares(row_of(x, row)[i], squares[row]);
      }
      for (int offset = 16; offset > 0; offset /= 2) squares[row] += __shfl_xor_sync(kAllLanes, squares[row], offset);
      if (threadIdx.x % 32 == 0) scratch[row * kGemvWarps + threadIdx.x / 32] = squares[row];
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows) break;
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kGemvWarps; ++warp) sum += scratch[row * kGemvWarps + warp];
      const float scale = rsqrtf(sum / static_cast<float>(in) + eps);
#pragma unroll
      for (int j = 0; j < kKept; ++j) {
        if (quad(j) < quads_) write(row, quad(j), scaled(kept[row][j], scale, kept_weight_[j]));
      }
      for (int i = quad(kKept); i < quads_; i += kGemvThreads) write(row, i, scaled(row_of(x, row)[i], scale, weight_[i]));
    }
  }

 private:
  static constexpr int kKept = 4;
  __device__ static int quad(int j) { return static_cast<int>(threadIdx.x) + j * kGemvThreads; }
  __device__ const float4* row_of(const float* x, int row) const {
    return reinterpret_cast<const float4*>(x) + static_cast<size_t>(row) * quads_;
  }

  const float4* weight_;
  int quads_;
  float4 kept_weight_[kKept];
};

// A unit of work is kTiles tiles of 8 features; with kSiluBf16 the first half of the tiles are of the gate, the others
// the same features of up. What a block does: units blockIdx, blockIdx + gridDim, ...
template <int kTiles>
struct Units {
  static constexpr int kHalf = kTiles > 1 ? kTiles / 2 : 1;

  __device__ explicit Units(const GemvArguments& args)
      : silu(args.output == GemvOutput::kSiluBf16),
        features(silu ? args.out / 2 : args.out),
        unit_features((silu ? kHalf : kTiles) * kGemvTileFeatures),
        count((features + unit_features - 1) / unit_features),
        second_half(silu ? features : kHalf * kGemvTileFeatures) {}

  // The feature of y that row `row` (0..7) of a tile belongs to, and where its weights are.
  __device__ int feature(int unit, int tile, int row) const {
    return unit * unit_features + (tile % kHalf + (silu ? 0 : tile / kHalf * kHalf)) * kGemvTileFeatures + row;
  }
  __device__ size_t weight_row(int unit, int tile, int row) const {
    return static_cast<size_t>(unit) * unit_features + tile % kHalf * kGemvTileFeatures + row + tile / kHalf * second_half;
  }

  bool silu;
  int features;  // of y
  int unit_features;
  int count;
  int second_half;
};

// A warp's loads: a lane copies piece lane % 8 of the 128-byte lines of rows lane / 8 and lane / 8 + 4 of each tile. Pieces
// of odd rows change places (0-3 with 4-7), so that eight lanes that read two rows find eight different banks.
template <int kTiles, int kStages>
class WeightRing {
 public:
  static constexpr int kLineBytes = 8 * 128;  // of one tile
  static constexpr int kStepBytes = kTiles * kLines * kLineBytes;

  __device__ WeightRing(const GemvArguments& args, const Units<kTiles>& units, unsigned shared, int warp, int lane)
      : weight_(static_cast<const __nv_bfloat16*>(args.weight)),
        units_(units),
        in_(args.in),
        steps_((args.in + kGemvStepInputs - 1) / kGemvStepInputs),
        warp_(warp),
        row_(lane / 8),
        piece_(lane % 8),
        shared_(shared + warp * kStages * kStepBytes),
        to_(shared_ + row_ * 128 + (piece_ ^ (row_ % 2 * 4)) * 16),
        from_(shared_ + lane / 4 * 128),
        place_(lane % 4 ^ (lane / 4 % 2 * 4)),
        policy_(read_once_policy()),
        unit_(warp < steps_ ? static_cast<int>(blockIdx.x) : units.count),
        step_(warp) {}

  __device__ int steps() const { return steps_; }

  // Starts the loads of the next step into `stage`, or none at the end: a group of copies in any case.
  __device__ __forceinline__ void load(int stage) {
    if (unit_ < units_.count) {
      const int k = step_ * kGemvStepInputs + piece_ * 8;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool in_range = units_.feature(unit_, tile, row_ + half * 4) < units_.features;
          const __nv_bfloat16* from = weight_ + units_.weight_row(unit_, tile, row_ + half * 4) * in_ + k;
#pragma unroll
          for (int line = 0; line < kLines; ++line) {
            const bool valid = in_range && k + line * 64 < in_;
            copy_async(to_ + stage * kStepBytes + (tile * kLines + line) * kLineBytes + half * 512,
                       valid ? from + line * 64 : weight_, valid, policy_);
          }
        }
      }
      step_ += kGemvWarps;
      if (step_ >= steps_) {
        step_ = warp_;
        unit_ += gridDim.x;
      }
    }
    commit_copies();
  }

  // Eight inputs of feature lane / 4 of a tile: those at chunk * 32 + lane % 4 * 8 of the step.
  __device__ __forceinline__ uint4 read(int stage, int tile, int chunk) const {
    return load_shared(from_ + stage * kStepBytes + (tile * kLines + chunk / 2) * kLineBytes + (place_ ^ (chunk % 2 * 4)) * 16);
  }

 private:
  const __nv_bfloat16* weight_;
  const Units<kTiles>& units_;
  int in_, steps_, warp_, row_, piece_;
  unsigned shared_, to_, from_;
  int place_;
  unsigned long long policy_;
  int unit_, step_;
};

constexpr int kChunks = kGemvStepInputs / 32;

// A lane's part of x: eight inputs of every chunk, of row lane / 4 and, with more than 8 rows, of row lane / 4 + 8. It
// comes from shared memory or through L1, a step before it is needed.
template <int kMaxRows>
struct Inputs {
  struct Step {
    uint4 low[kChunks];
    uint4 more[kMaxRows > 8 ? kChunks : 1];
    __device__ __forceinline__ uint4 high(int chunk) const { return kMaxRows > 8 ? more[chunk] : make_uint4(0, 0, 0, 0); }
  };

  __device__ __forceinline__ Step load(int step) const {
    Step result;
    const int k = step * kGemvStepInputs;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const bool valid = k + chunk * 32 < in_left;
      const unsigned char* at = from + (k + chunk * 32) * 2;
      result.low[chunk] = has_low && valid ? *reinterpret_cast<const uint4*>(at) : make_uint4(0, 0, 0, 0);
      if (kMaxRows > 8) {
        result.more[chunk] = has_high && valid ? *reinterpret_cast<const uint4*>(at + high_offset) : make_uint4(0, 0, 0, 0);
      }
    }
    return result;
  }

  const unsigned char* from;
  size_t high_offset;
  int in_left;  // inputs from this lane's first one on
  bool has_low, has_high;
};

template <int kMaxRows, int kTiles, int kStages>
__device__ __forceinline__ void gemv(const GemvArguments& args) {
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int kPartials = kTiles * kMaxRows * kGemvTileFeatures;  // of one warp
  constexpr int kNormedRows = kMaxRows < kGemvMaxNormedRows ? kMaxRows : kGemvMaxNormedRows;
  auto* partials = reinterpret_cast<float*>(memory + gemv_ring_bytes(kStages, kTiles));
  unsigned char* x_shared = memory + gemv_ring_bytes(kStages, kTiles) + gemv_partials_bytes(kMaxRows, kTiles);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, place = lane % 4;
  const Units<kTiles> units(args);
  WeightRing<kTiles, kStages> ring(args, units, static_cast<unsigned>(__cvta_generic_to_shared(memory)), warp, lane);
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) ring.load(stage);

  const unsigned char* x = static_cast<const unsigned char*>(args.x);
  size_t x_stride = static_cast<size_t>(args.in) * 2;
  if (args.norm_weight != nullptr) {
    const RowNorm<kNormedRows> norm(args.norm_weight, args.in);
    allow_next_kernel();
    wait_for_previous_kernel();
    norm.run(static_cast<const float*>(args.x), args.rows, args.norm_eps, partials, [&](int row, int quad, uint2 four) {
      reinterpret_cast<uint2*>(x_shared + static_cast<size_t>(row) * args.x_shared_stride)[quad] = four;
    });
    __syncthreads();
    x = x_shared;
    x_stride = args.x_shared_stride;
  } else {
    allow_next_kernel();
    wait_for_previous_kernel();
  }
  const Inputs<kMaxRows> inputs{x + group * x_stride + place * 16, 8 * x_stride, args.in - place * 8, group < args.rows,
                                kMaxRows > 8 && group + 8 < args.rows};
  typename Inputs<kMaxRows>::Step next = inputs.load(warp);

  int stage = 0, buffer = 0;
  for (int unit = blockIdx.x; unit < units.count; unit += gridDim.x, buffer ^= 1) {
    float sums[kTiles][4] = {};
    for (int step = warp; step < ring.steps(); step += kGemvWarps) {
      const typename Inputs<kMaxRows>::Step now = next;
      next = inputs.load(step + kGemvWarps < ring.steps() ? step + kGemvWarps : warp);
      wait_copies<kStages - 1>();
      __syncwarp();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          const uint4 w = ring.read(stage, tile, chunk);
          multiply(sums[tile], now.low[chunk].x, now.high(chunk).x, now.low[chunk].y, now.high(chunk).y, w.x, w.y);
          multiply(sums[tile], now.low[chunk].z, now.high(chunk).z, now.low[chunk].w, now.high(chunk).w, w.z, w.w);
        }
      }
      __syncwarp();
      ring.load(stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    // One barrier a unit: the partial sums have two buffers.
    float* mine = partials + (buffer * kGemvWarps + warp) * kPartials;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float* at = mine + (tile * kMaxRows + group) * kGemvTileFeatures + place * 2;
      if (group < kMaxRows) *reinterpret_cast<float2*>(at) = make_float2(sums[tile][0], sums[tile][1]);
      if (kMaxRows > 8) *reinterpret_cast<float2*>(at + 8 * kGemvTileFeatures) = make_float2(sums[tile][2], sums[tile][3]);
    }
    __syncthreads();
    const float* all = partials + buffer * kGemvWarps * kPartials;
    auto total = [&](int index) {
      float sum = 0.0f;
#pragma unroll
      for (int from = 0; from < kGemvWarps; ++from) sum += all[from * kPartials + index];
      return sum;
    };
    const int outputs = units.silu ? kPartials / 2 : kPartials;
    for (int index = threadIdx.x; index < outputs; index += kGemvThreads) {
      const int column = index % kGemvTileFeatures;
      const int row = index / kGemvTileFeatures % kMaxRows;
      const int feature = unit * units.unit_features + index / (kGemvTileFeatures * kMaxRows) * kGemvTileFeatures + column;
      if (row >= args.rows || feature >= units.features) continue;
      const size_t at = static_cast<size_t>(row) * units.features + feature;
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

#define BATON_GEMV(rows, tiles, stages)                                                                     \
  extern "C" __global__ void __launch_bounds__(kGemvThreads, 1) baton_gemv_r##rows##_t##tiles##_s##stages( \
      const __grid_constant__ GemvArguments args) {                                                         \
    gemv<rows, tiles, stages>(args);                                                                        \
  }
#define BATON_GEMV_ROWS(rows) \
  BATON_GEMV(rows, 1, 8)      \
  BATON_GEMV(rows, 2, 4)      \
  BATON_GEMV(rows, 4, 2)      \
  BATON_GEMV(rows, 1, 4)      \
  BATON_GEMV(rows, 2, 2)
BATON_GEMV_ROWS(1)
BATON_GEMV_ROWS(8)
BATON_GEMV_ROWS(16)

extern "C" __global__ void __launch_bounds__(kGemvThreads) baton_norm_rows(const __grid_constant__ NormRowsArguments args) {
  __shared__ float scratch[kGemvWarps];
  const RowNorm<1> norm(args.weight, args.in);
  allow_next_kernel();
  wait_for_previous_kernel();
  const size_t first = static_cast<size_t>(blockIdx.x) * args.in;
  auto* out = reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(args.out) + first);
  norm.run(args.x + first, 1, args.eps, scratch, [&](int, int quad, uint2 four) { out[quad] = four; });
}

}  // namespace baton::cuda
