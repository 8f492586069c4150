#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/kernel_arguments.h"

/// Attention of one query row per sequence over the paged cache, bound by reading it.
///
/// Work. A context is cut into splits by its length alone. The splits of all (sequence, KV head, head block) triples,
/// "pairs" below, stand in one line, and each thread block of a grid that fills the GPU once takes an equal share of it. A
/// pair that lies in one share is finished there; the others leave one partial result per split in the workspace, and the last
/// thread block to arrive folds them. Both fold the same partials in the same order with the same roundings: the bits of a row
/// do not depend on where the cuts between shares fall, hence not on the rest of the batch.
///
/// Inside a split the four warps take 16 tokens in turn, each through its own ring of cp.async stages, so nothing
/// waits for other warps until the split ends. All query heads of a KV head are rows of one mma.m16n8k16.
namespace baton::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = kDecodeThreads / 32;
constexpr int kTile = kDecodeTileTokens;
constexpr float kMinusInfinity = -3.402823466e38f;  // finite, so that differences are numbers

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/// 16 bytes, zeros when not `valid`.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// What a query row sees: positions [begin, end), of which [origin, end) is cut into splits of `split` tokens.
struct Context {
  int32_t begin, end, origin, split, splits;
};

__device__ __forceinline__ Context context_of(const DeviceSequence& sequence, int32_t sliding_window) {
  Context c = {0, 0, 0, kDecodeSplitTokens, 0};
  if (sequence.rows != 1) return c;
  c.end = sequence.start_pos + 1;
  c.begin = sliding_window > 0 ? max(0, c.end - sliding_window) : 0;
  c.origin = c.begin / kTile * kTile;
  const int32_t tokens = c.end - c.origin, unit = kTile * kWarps;
  c.split = max(kDecodeSplitTokens, (tokens + kDecodeMaxSplits * unit - 1) / (kDecodeMaxSplits * unit) * unit);
  c.splits = (tokens + c.split - 1) / c.split;
  return c;
}

/// A running softmax-weighted sum of one output element. Roundings are written out: two places compute it.
struct Folded {
  float maximum, sum, value;
  __device__ __forceinline__ void fold(float m, float l, float v) {
    const float top = fmaxf(maximum, m);
    const float old_factor = exp2f(maximum - top), factor = exp2f(m - top);
    sum = __fmaf_rn(sum, old_factor, __fmul_rn(l, factor));
    value = __fmaf_rn(value, old_factor, __fmul_rn(v, factor));
    maximum = top;
  }
};

template <int kHeadDim, int kRows>
struct Shape {
  static constexpr int kStages = decode_stages(kHeadDim);
  static constexpr int kStride = kHeadDim + 8;  // in elements: rows of 16-byte units, an odd number, fall into different banks
  static constexpr int kMatrixBytes = kTile * kStride * 2;
  static constexpr int kStageBytes = 2 * kMatrixBytes;
  static constexpr int kChunks = kRows / 4;               // the output is merged in so many column ranges
  static constexpr int kColumns = kHeadDim / kChunks;
  static constexpr int kElements = (kRows * kColumns + kDecodeThreads - 1) / kDecodeThreads;  // of a range, per thread
  static constexpr size_t kPartialFloats = decode_partial_floats(kHeadDim, kRows);
  static constexpr int kVectors = kHeadDim / 8;           // 16-byte units of a row
  static constexpr int kCopies = kTile * kVectors / 32;   // per lane, for K and again for V
  static_assert(kTile * kVectors % 32 == 0 && kRows * kColumns % kDecodeThreads == 0 && kColumns % 8 == 0);
};

/// The tiles of one warp, in order: through the splits of the share, and in each from its warp's first tile by fours.
/// Runs ahead of the arithmetic, with the block ids of its tile already asked for.
struct Cursor {
  int32_t item, sequence, kv_head;
  int32_t token, split_end;
  const int32_t* table;
  int32_t blocks[2];
};

template <int kHeadDim, int kRows>
__device__ __forceinline__ void decode(const DecodeArguments& a) {
  using S = Shape<kHeadDim, kRows>;
  extern __shared__ __align__(128) unsigned char shared[];
  float* const merge = reinterpret_cast<float*>(shared + kWarps * S::kStages * S::kStageBytes);  // [warps][rows][columns]
  float* const warp_maxima = merge + kWarps * 4 * kHeadDim;                                         // [warps][16]
  float* const warp_sums = warp_maxima + kWarps * 16;                                               // [warps][16]
  int32_t* const first_split = reinterpret_cast<int32_t*>(warp_sums + kWarps * 16);                 // [count + 1]
  __shared__ int32_t warp_totals[kWarps];
  __shared__ int32_t last_to_arrive;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t pairs_per_sequence = a.kv.kv_heads * a.head_blocks;

  // Where each sequence's splits begin in the line, in splits of one pair.
  {
    constexpr int kEach = kDecodeMaxSequences / kDecodeThreads;
    int32_t splits[kEach], total = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int32_t index = static_cast<int32_t>(threadIdx.x) * kEach + i;
      splits[i] = index < a.count ? context_of(a.sequences[index], a.sliding_window).splits : 0;
      total += splits[i];
    }
    int32_t before = total;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, before, step);
      if (lane >= step) before += other;
    }
    if (lane == 31) warp_totals[warp] = before;
    __syncthreads();
    before -= total;
    for (int w = 0; w < warp; ++w) before += warp_totals[w];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int32_t index = static_cast<int32_t>(threadIdx.x) * kEach + i;
      if (index <= a.count) first_split[index] = before;
      before += splits[i];
    }
    if (a.count == kDecodeMaxSequences && threadIdx.x == kDecodeThreads - 1) first_split[a.count] = before;
    __syncthreads();
  }

  // This block's share: `each` items, one more for the first `more` blocks.
  const int32_t items = first_split[a.count] * pairs_per_sequence;
  const int32_t blocks = static_cast<int32_t>(gridDim.x), each = items / blocks, more = items % blocks;
  const auto block_of = [&](int32_t item) {
    const int32_t longer = more * (each + 1);
    return item < longer ? item / (each + 1) : more + (item - longer) / each;
  };
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int32_t item_begin = block * each + min(block, more);
  const int32_t item_end = item_begin + each + (block < more ? 1 : 0);
  if (item_begin == item_end) return;

  // Of the first item: the last sequence that begins at or before it and has splits.
  int32_t sequence_begin = 0;
  for (int32_t high = a.count; high - sequence_begin > 1;) {
    const int32_t middle = (sequence_begin + high) / 2;
    (first_split[middle] * pairs_per_sequence <= item_begin ? sequence_begin : high) = middle;
  }

  const auto enter = [&](Cursor& c) {  // c.item is set, c.sequence is right or too small
    while (first_split[c.sequence + 1] * pairs_per_sequence <= c.item) ++c.sequence;
    const DeviceSequence sequence = a.sequences[c.sequence];
    const Context context = context_of(sequence, a.sliding_window);
    const int32_t place = c.item - first_split[c.sequence] * pairs_per_sequence;
    const int32_t split = place % context.splits;
    c.kv_head = place / context.splits / a.head_blocks;
    c.split_end = min(context.end, context.origin + (split + 1) * context.split);
    c.token = context.origin + split * context.split + warp * kTile;
    c.table = a.block_tables + sequence.table_offset;
  };
  const auto ask_for_blocks = [&](Cursor& c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t token = min(c.token + 8 * i, c.split_end - 1);
      c.blocks[i] = c.table[token / a.kv.block_tokens];
    }
  };
  // To the next tile of this warp in the share; item == item_end when there is none.
  const auto settle = [&](Cursor& c) {
    while (c.token >= c.split_end) {
      if (++c.item == item_end) return;
      enter(c);
    }
    ask_for_blocks(c);
  };

  unsigned char* const ring = shared + warp * S::kStages * S::kStageBytes;
  const uint32_t ring_address = shared_address(ring);
  const int32_t head_vectors = a.kv.head_dim / 8;
  const int64_t v_from_k = a.kv.v_offset_bytes - a.kv.k_offset_bytes;
  const auto fetch = [&](Cursor& c, int stage) {
    if (c.item < item_end) {
      const unsigned char* rows[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t place = (c.token + 8 * i) % a.kv.block_tokens;
        rows[i] = a.kv.pool + c.blocks[i] * a.kv.block_stride_bytes + a.kv.k_offset_bytes +
                  (c.kv_head * static_cast<int64_t>(a.kv.block_tokens) + place) * (a.kv.head_dim * 2);
      }
      const uint32_t stage_address = ring_address + stage * S::kStageBytes;
#pragma unroll
      for (int i = 0; i < S::kCopies; ++i) {
        const int unit = i * 32 + lane, row = unit / S::kVectors, vector = unit % S::kVectors;
        const bool valid = c.token + row < c.split_end && vector < head_vectors;
        const unsigned char* from = valid ? (row < 8 ? rows[0] : rows[1]) + ((row % 8) * head_vectors + vector) * 16 : a.kv.pool;
        const uint32_t to = stage_address + (row * S::kStride + vector * 8) * 2;
        copy_async(to, from, valid);
        copy_async(to + S::kMatrixBytes, valid ? from + v_from_k : from, valid);
      }
      c.token += kTile * kWarps;
      settle(c);
    }
    commit_copies();
  };

  Cursor ahead = {item_begin, sequence_begin, 0, 0, 0, nullptr, {0, 0}};
  enter(ahead);
  settle(ahead);
#pragma unroll
  for (int stage = 0; stage < S::kStages - 1; ++stage) fetch(ahead, stage);
  int stage = 0;

  uint32_t q[kHeadDim / 16][4];
  Folded folded[S::kChunks * S::kElements];
  int32_t sequence_index = sequence_begin;

  for (int32_t item = item_begin; item < item_end; ++item) {
    while (first_split[sequence_index + 1] * pairs_per_sequence <= item) ++sequence_index;
    const DeviceSequence sequence = a.sequences[sequence_index];
    const Context context = context_of(sequence, a.sliding_window);
    const int32_t sequence_item = first_split[sequence_index] * pairs_per_sequence;
    const int32_t pair = (item - sequence_item) / context.splits, split = (item - sequence_item) % context.splits;
    const int32_t pair_begin = sequence_item + pair * context.splits, pair_end = pair_begin + context.splits;
    const bool whole = pair_begin >= item_begin && pair_end <= item_end;
    const int32_t kv_head = pair / a.head_blocks, head_in_group = pair % a.head_blocks * kRows;
    const int32_t head = kv_head * a.group + head_in_group;
    const int32_t rows = min(kRows, a.group - head_in_group);
    const int64_t q_row = (static_cast<int64_t>(sequence.first_row) * a.heads + head) * a.kv.head_dim;

    if (item == item_begin || item == pair_begin) {
      const auto load = [&](int32_t row, int32_t d) -> uint32_t {
        if (row >= rows || d >= a.kv.head_dim) return 0;
        return *reinterpret_cast<const uint32_t*>(a.q + q_row + row * a.kv.head_dim + d);
      };
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        const int32_t d = k * 16 + lane % 4 * 2;
        q[k][0] = load(lane / 4, d);
        q[k][1] = kRows > 8 ? load(lane / 4 + 8, d) : 0;
        q[k][2] = load(lane / 4, d + 8);
        q[k][3] = kRows > 8 ? load(lane / 4 + 8, d + 8) : 0;
      }
#pragma unroll
      for (int i = 0; i < S::kChunks * S::kElements; ++i) folded[i] = {kMinusInfinity, 0, 0};
    }

    // The warp's own part of the split; of rows lane / 4 and lane / 4 + 8.
    float maximum[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {0, 0};
    float acc[kHeadDim / 8][4];
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
    const int32_t split_end = min(context.end, context.origin + (split + 1) * context.split);
    for (int32_t token = context.origin + split * context.split + warp * kTile; token < split_end; token += kTile * kWarps) {
      wait_copies<S::kStages - 2>();
      __syncwarp();
      const uint32_t k_address = ring_address + stage * S::kStageBytes, v_address = k_address + S::kMatrixBytes;
      float s[2][4] = {};
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        // Matrices: tokens 0-7 and 8-15, each with dimensions 0-7 and 8-15 of the step.
        uint32_t b[4];
        load_matrices(b, k_address + ((lane % 8 + lane / 16 * 8) * S::kStride + k * 16 + lane / 8 % 2 * 8) * 2);
        multiply_add(s[0], q[k], b[0], b[1]);
        multiply_add(s[1], q[k], b[2], b[3]);
      }
      const bool edge = token < context.begin || token + kTile > split_end;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t t = token + n * 8 + lane % 4 * 2 + i % 2;
          s[n][i] = edge && (t < context.begin || t >= split_end) ? kMinusInfinity : s[n][i] * a.scale_log2;
        }
      }
      float decay[2];
#pragma unroll
      for (int r = 0; r < (kRows > 8 ? 2 : 1); ++r) {
        float top = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
        top = fmaxf(top, maximum[r]);
        decay[r] = exp2f(maximum[r] - top);
        maximum[r] = top;
        float part = 0;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float weight = s[n][2 * r + i] > kMinusInfinity ? exp2f(s[n][2 * r + i] - top) : 0.0f;
            s[n][2 * r + i] = weight;
            part += weight;
          }
        }
        sum[r] = sum[r] * decay[r] + part;
      }
      if constexpr (kRows <= 8) decay[1] = 1.0f, s[0][2] = s[0][3] = s[1][2] = s[1][3] = 0;
      if (__any_sync(kAllLanes, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          acc[n][0] *= decay[0], acc[n][1] *= decay[0];
          if constexpr (kRows > 8) acc[n][2] *= decay[1], acc[n][3] *= decay[1];
        }
      }
      const uint32_t p[4] = {pack_bf16(s[0][0], s[0][1]), pack_bf16(s[0][2], s[0][3]), pack_bf16(s[1][0], s[1][1]),
                             pack_bf16(s[1][2], s[1][3])};
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        // Matrices: tokens 0-7 and 8-15 of dimensions 0-7, then of 8-15 of the step.
        uint32_t b[4];
        load_matrices_transposed(b, v_address + (lane % 16 * S::kStride + n * 16 + lane / 16 * 8) * 2);
        multiply_add(acc[2 * n], p, b[0], b[1]);
        multiply_add(acc[2 * n + 1], p, b[2], b[3]);
      }
      __syncwarp();  // all have read the stage before it is written again
      fetch(ahead, (stage + S::kStages - 1) % S::kStages);
      stage = (stage + 1) % S::kStages;
    }

    // The four warps' parts become the split's.
    sum[0] = group_sum(sum[0], 4);
    if constexpr (kRows > 8) sum[1] = group_sum(sum[1], 4);
    if (lane % 4 == 0) {
      warp_maxima[warp * 16 + lane / 4] = maximum[0], warp_sums[warp * 16 + lane / 4] = sum[0];
      if constexpr (kRows > 8) warp_maxima[warp * 16 + lane / 4 + 8] = maximum[1], warp_sums[warp * 16 + lane / 4 + 8] = sum[1];
    }
    const int32_t owner = whole ? 0 : block_of(pair_begin);
    float* const partial = a.partials + (static_cast<size_t>(owner) * kDecodeMaxSplits + split) * S::kPartialFloats;
#pragma unroll
    for (int chunk = 0; chunk < S::kChunks; ++chunk) {
      if (chunk > 0) __syncthreads();
#pragma unroll
      for (int n = 0; n < S::kColumns / 8; ++n) {
        const float(&c)[4] = acc[chunk * S::kColumns / 8 + n];
        const int row = lane / 4, column = n * 8 + lane % 4 * 2;
        float* to = merge + (warp * kRows + row) * S::kColumns + column;
        if (row < kRows) *reinterpret_cast<float2*>(to) = make_float2(c[0], c[1]);
        if constexpr (kRows > 8) *reinterpret_cast<float2*>(to + 8 * S::kColumns) = make_float2(c[2], c[3]);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < S::kElements; ++i) {
        const int element = i * kDecodeThreads + static_cast<int>(threadIdx.x);
        const int row = element / S::kColumns, column = element % S::kColumns;
        Folded part = {kMinusInfinity, 0, 0};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          part.fold(warp_maxima[w * 16 + row], warp_sums[w * 16 + row], merge[(w * kRows + row) * S::kColumns + column]);
        }
        if (whole) {
          folded[chunk * S::kElements + i].fold(part.maximum, part.sum, part.value);
        } else if (row < rows) {
          partial[row * kHeadDim + chunk * S::kColumns + column] = part.value;
          if (chunk == 0 && column == 0) {
            partial[kRows * kHeadDim + row] = part.maximum;
            partial[kRows * kHeadDim + kRows + row] = part.sum;
          }
        }
      }
    }
    __syncthreads();  // before warp_maxima and merge are written again
    if (item + 1 != pair_end && item + 1 != item_end) continue;

    if (!whole) {
      if (threadIdx.x == 0) {
        __threadfence();
        const uint32_t sharers = static_cast<uint32_t>(block_of(pair_end - 1) - owner) + 1;
        last_to_arrive = atomicInc(a.arrivals + owner, sharers - 1) == sharers - 1;  // the last one wraps it back to 0
        __threadfence();
      }
      __syncthreads();
      if (!last_to_arrive) continue;
      const float* const first = a.partials + static_cast<size_t>(owner) * kDecodeMaxSplits * S::kPartialFloats;
#pragma unroll
      for (int i = 0; i < S::kChunks * S::kElements; ++i) folded[i] = {kMinusInfinity, 0, 0};
#pragma unroll 4
      for (int32_t s = 0; s < context.splits; ++s) {
        const float* from = first + s * S::kPartialFloats;
#pragma unroll
        for (int i = 0; i < S::kChunks * S::kElements; ++i) {
          const int element = i % S::kElements * kDecodeThreads + static_cast<int>(threadIdx.x);
          const int row = element / S::kColumns, column = i / S::kElements * S::kColumns + element % S::kColumns;
          if (row < rows) {
            folded[i].fold(__ldcg(from + kRows * kHeadDim + row), __ldcg(from + kRows * kHeadDim + kRows + row),
                           __ldcg(from + row * kHeadDim + column));
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < S::kChunks * S::kElements; ++i) {
      const int element = i % S::kElements * kDecodeThreads + static_cast<int>(threadIdx.x);
      const int row = element / S::kColumns, column = i / S::kElements * S::kColumns + element % S::kColumns;
      if (row < rows && column < a.kv.head_dim) {
        a.out[q_row + row * a.kv.head_dim + column] = to_bf16(folded[i].value / folded[i].sum);
      }
    }
  }
}

}  // namespace

#define BATON_DECODE(head_dim, rows)                                                                               \
  extern "C" __global__ void __launch_bounds__(kDecodeThreads)                                                     \
      baton_attention_decode_##head_dim##_##rows(const __grid_constant__ DecodeArguments a) {                      \
    decode<head_dim, rows>(a);                                                                                     \
  }
#define BATON_DECODE_ROWS(head_dim) BATON_DECODE(head_dim, 4) BATON_DECODE(head_dim, 8) BATON_DECODE(head_dim, 16)
BATON_DECODE_ROWS(32)
BATON_DECODE_ROWS(64)
BATON_DECODE_ROWS(96)
BATON_DECODE_ROWS(128)
BATON_DECODE_ROWS(256)

}  // namespace baton::cuda
