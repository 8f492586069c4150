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

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <int kCount>
__device__ __forceinline__ void load_floats(float (&to)[kCount], const float* from, bool global) {
  constexpr int kWidth = kCount % 4 == 0 ? 4 : kCount % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kCount; i += kWidth) {
    if constexpr (kWidth == 4) {
      const float4 v = global ? __ldcg(reinterpret_cast<const float4*>(from + i)) : *reinterpret_cast<const float4*>(from + i);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    } else if constexpr (kWidth == 2) {
      const float2 v = global ? __ldcg(reinterpret_cast<const float2*>(from + i)) : *reinterpret_cast<const float2*>(from + i);
      to[i] = v.x, to[i + 1] = v.y;
    } else {
      to[i] = global ? __ldcg(from + i) : from[i];
    }
  }
}

template <int kHeadDim, int kRows>
struct Shape {
  static constexpr int kStages = decode_stages(kHeadDim);
  static constexpr int kStride = kHeadDim + 8;  // in elements: rows of 16-byte units, an odd number, fall into different banks
  static constexpr int kMatrixBytes = kTile * kStride * 2;
  static constexpr int kStageBytes = 2 * kMatrixBytes;
  static constexpr int kChunks = kRows / 4;               // the output is merged in so many column ranges
  static constexpr int kColumns = kHeadDim / kChunks;     // of a range
  static constexpr int kMergeStride = kColumns + 8;
  static constexpr int kThreadsPerRow = 32 / kChunks;     // at the merge
  static constexpr int kElements = kColumns / kThreadsPerRow;  // of a range, next to each other, per thread
  static constexpr size_t kPartialFloats = decode_partial_floats(kHeadDim, kRows);
  static constexpr int kVectors = kHeadDim / 8;           // 16-byte units of a row
  static constexpr int kCopies = kTile * kVectors / 32;   // per lane, for K and again for V
  static_assert(kTile * kVectors % 32 == 0 && kColumns % 8 == 0 && kElements * kThreadsPerRow == kColumns);
};

/// An item of the line: one split of one pair of a sequence.
struct Place {
  int32_t sequence, pair, split;
  DeviceSequence info;
  Context context;
};

/// What the thread has of a pair's result: `kElements` columns of each range, of one row. Roundings are written out, since
/// two places compute this.
template <typename S>
struct Folded {
  float maximum, sum, values[S::kChunks][S::kElements];

  __device__ __forceinline__ void clear() {
    maximum = kMinusInfinity, sum = 0;
#pragma unroll
    for (auto& range : values) {
#pragma unroll
      for (float& value : range) value = 0;
    }
  }
  __device__ __forceinline__ void fold_sum(float l, float old_factor, float factor) {
    sum = __fmaf_rn(sum, old_factor, __fmul_rn(l, factor));
  }
  __device__ __forceinline__ void fold_values(int range, const float (&v)[S::kElements], float old_factor, float factor) {
#pragma unroll
    for (int e = 0; e < S::kElements; ++e) values[range][e] = __fmaf_rn(values[range][e], old_factor, __fmul_rn(v[e], factor));
  }
};

/// The tiles of one warp, in order: through the splits of the share, and in each from its warp's first tile by fours.
/// Runs ahead of the arithmetic, with the block ids of its tile already asked for.
struct Cursor {
  int32_t item;
  Place place;
  int32_t token, split_end;
  int32_t blocks[2], offsets[2];  // of the tile's halves: block ids, bytes from the start of the layer's K
};

template <int kHeadDim, int kRows>
__device__ __forceinline__ void decode(const DecodeArguments& a) {
  using S = Shape<kHeadDim, kRows>;
  extern __shared__ __align__(128) unsigned char shared[];
  float* const merge = reinterpret_cast<float*>(shared + kWarps * S::kStages * S::kStageBytes);  // [warps][rows][columns + 8]
  float* const warp_maxima = merge + kWarps * kRows * S::kMergeStride;                            // [warps][16]
  float* const warp_sums = warp_maxima + kWarps * 16;                                             // [warps][16]
  int32_t* const first_split = reinterpret_cast<int32_t*>(warp_sums + kWarps * 16);               // [count + 1]
  __shared__ int32_t warp_totals[kWarps];
  __shared__ int32_t last_to_arrive;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t pairs_per_sequence = a.kv.kv_heads * a.head_blocks;
  const auto sequence_at = [&](int32_t index) {
    const int4 v = __ldg(reinterpret_cast<const int4*>(a.sequences + index));
    return DeviceSequence{v.x, v.y, v.z, v.w};
  };

  // Where each sequence's splits begin in the line, in splits of one pair.
  {
    constexpr int kEach = kDecodeMaxSequences / kDecodeThreads;
    int32_t splits[kEach], total = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int32_t index = static_cast<int32_t>(threadIdx.x) * kEach + i;
      splits[i] = index < a.count ? context_of(sequence_at(index), a.sliding_window).splits : 0;
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
  if (item_begin == item_end) {
    wait_for_previous();
    return;
  }

  const auto enter_sequence = [&](Place& p) {
    p.info = sequence_at(p.sequence);
    p.context = context_of(p.info, a.sliding_window);
  };
  const auto advance = [&](Place& p) {
    if (++p.split < p.context.splits) return;
    p.split = 0;
    if (++p.pair < pairs_per_sequence) return;
    p.pair = 0;
    do ++p.sequence;
    while (first_split[p.sequence + 1] == first_split[p.sequence]);
    enter_sequence(p);
  };
  const auto kv_head_of = [&](const Place& p) { return a.head_blocks == 1 ? p.pair : p.pair / a.head_blocks; };

  Place place;
  {
    int32_t low = 0;  // the last sequence that begins at or before the share; it has splits
    for (int32_t high = a.count; high - low > 1;) {
      const int32_t middle = (low + high) / 2;
      (first_split[middle] * pairs_per_sequence <= item_begin ? low : high) = middle;
    }
    place.sequence = low;
    enter_sequence(place);
    const int32_t inside = item_begin - first_split[low] * pairs_per_sequence;
    place.pair = inside / place.context.splits;
    place.split = inside % place.context.splits;
  }

  const int32_t head_vectors = a.kv.head_dim / 8, row_bytes = a.kv.head_dim * 2;
  const auto begin_split = [&](Cursor& c) {
    const Context& context = c.place.context;
    c.token = context.origin + c.place.split * context.split + warp * kTile;
    c.split_end = min(context.end, context.origin + (c.place.split + 1) * context.split);
  };
  // To the next tile of this warp in the share; item == item_end when there is none.
  const auto settle = [&](Cursor& c) {
    while (c.token >= c.split_end) {
      if (++c.item == item_end) return;
      advance(c.place);
      begin_split(c);
    }
    const int32_t kv_head = kv_head_of(c.place);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t token = min(c.token + 8 * i, c.split_end - 1) & ~7;  // eight tokens lie in one block
      const int32_t index = a.block_shift >= 0 ? token >> a.block_shift : token / a.kv.block_tokens;
      c.blocks[i] = __ldg(a.block_tables + c.place.info.table_offset + index);
      c.offsets[i] = (kv_head * a.kv.block_tokens + token - index * a.kv.block_tokens) * row_bytes;
    }
  };

  unsigned char* const ring = shared + warp * S::kStages * S::kStageBytes;
  const uint32_t ring_address = shared_address(ring);
  const unsigned char* const k_base = a.kv.pool + a.kv.k_offset_bytes;
  const int64_t v_from_k = a.kv.v_offset_bytes - a.kv.k_offset_bytes;
  const auto fetch = [&](Cursor& c, int stage) {
    if (c.item < item_end) {
      const unsigned char* rows[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) rows[i] = k_base + c.blocks[i] * a.kv.block_stride_bytes + c.offsets[i];
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

  Cursor ahead;
  ahead.item = item_begin;
  ahead.place = place;
  begin_split(ahead);
  settle(ahead);
  // Nothing above was written in this step.
  wait_for_previous();
  let_next_begin();
#pragma unroll
  for (int stage = 0; stage < S::kStages - 1; ++stage) fetch(ahead, stage);
  int stage = 0;

  uint32_t q[kHeadDim / 16][4];
  Folded<S> folded;
  // At merges the thread works on this row and columns of each range.
  const int merge_row = static_cast<int>(threadIdx.x) / S::kThreadsPerRow;
  const int merge_column = static_cast<int>(threadIdx.x) % S::kThreadsPerRow * S::kElements;

  for (int32_t item = item_begin; item < item_end; ++item) {
    if (item > item_begin) advance(place);
    const Context& context = place.context;
    const int32_t pair_begin = item - place.split, pair_end = pair_begin + context.splits;
    const bool whole = pair_begin >= item_begin && pair_end <= item_end;
    const int32_t kv_head = kv_head_of(place), head_in_group = (place.pair - kv_head * a.head_blocks) * kRows;
    const int32_t rows = min(kRows, a.group - head_in_group);
    const int64_t q_row =
        (static_cast<int64_t>(place.info.first_row) * a.heads + kv_head * a.group + head_in_group) * a.kv.head_dim;

    if (item == item_begin || place.split == 0) {
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
      folded.clear();
    }

    // The warp's own part of the split; of rows lane / 4 and lane / 4 + 8.
    float maximum[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {0, 0};
    float acc[kHeadDim / 8][4];
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
    const int32_t split_end = min(context.end, context.origin + (place.split + 1) * context.split);
    for (int32_t token = context.origin + place.split * context.split + warp * kTile; token < split_end; token += kTile * kWarps) {
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
        decay[r] = power_of_two(maximum[r] - top);
        maximum[r] = top;
        float part = 0;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float weight = s[n][2 * r + i] > kMinusInfinity ? power_of_two(s[n][2 * r + i] - top) : 0.0f;
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
    float* const partial = a.partials + (static_cast<size_t>(owner) * kDecodeMaxSplits + place.split) * S::kPartialFloats;
    float factors[kWarps], old_factor = 1, new_factor = 1;
#pragma unroll
    for (int chunk = 0; chunk < S::kChunks; ++chunk) {
      if (chunk > 0) __syncthreads();
#pragma unroll
      for (int n = 0; n < S::kColumns / 8; ++n) {
        const float(&c)[4] = acc[chunk * S::kColumns / 8 + n];
        float* to = merge + (warp * kRows + lane / 4) * S::kMergeStride + n * 8 + lane % 4 * 2;
        if (lane / 4 < kRows) *reinterpret_cast<float2*>(to) = make_float2(c[0], c[1]);
        if constexpr (kRows > 8) *reinterpret_cast<float2*>(to + 8 * S::kMergeStride) = make_float2(c[2], c[3]);
      }
      __syncthreads();
      if (chunk == 0) {
        float top = kMinusInfinity, total = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) top = fmaxf(top, warp_maxima[w * 16 + merge_row]);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          factors[w] = power_of_two(warp_maxima[w * 16 + merge_row] - top);
          total = __fmaf_rn(warp_sums[w * 16 + merge_row], factors[w], total);
        }
        if (whole) {
          const float both = fmaxf(folded.maximum, top);
          old_factor = power_of_two(folded.maximum - both), new_factor = power_of_two(top - both);
          folded.maximum = both;
          folded.fold_sum(total, old_factor, new_factor);
        } else if (merge_row < rows && merge_column == 0) {
          partial[kRows * kHeadDim + merge_row] = top;
          partial[kRows * kHeadDim + kRows + merge_row] = total;
        }
      }
      float part[S::kElements] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        float v[S::kElements];
        load_floats(v, merge + (w * kRows + merge_row) * S::kMergeStride + merge_column, false);
#pragma unroll
        for (int e = 0; e < S::kElements; ++e) part[e] = __fmaf_rn(v[e], factors[w], part[e]);
      }
      if (whole) {
        folded.fold_values(chunk, part, old_factor, new_factor);
      } else if (merge_row < rows) {
        float* const to = partial + merge_row * kHeadDim + chunk * S::kColumns + merge_column;
#pragma unroll
        for (int e = 0; e < S::kElements; ++e) to[e] = part[e];
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
      // Lane s holds the factors of split s for each row of the warp; maxima are exact, so a scan finds the same ones as a fold.
      static_assert(kDecodeMaxSplits == 32);
      const float* const first = a.partials + static_cast<size_t>(owner) * kDecodeMaxSplits * S::kPartialFloats;
      float sums[S::kChunks], old_factors[S::kChunks], new_factors[S::kChunks];
#pragma unroll
      for (int j = 0; j < S::kChunks; ++j) {
        const int row = warp * S::kChunks + j;
        const bool is_split = lane < context.splits && row < rows;
        const float* const from = first + lane * S::kPartialFloats + kRows * kHeadDim + row;
        const float m = is_split ? __ldcg(from) : kMinusInfinity;
        sums[j] = is_split ? __ldcg(from + kRows) : 0.0f;
        float top = m;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const float other = __shfl_up_sync(kAllLanes, top, step);
          if (lane >= step) top = fmaxf(top, other);
        }
        float before = __shfl_up_sync(kAllLanes, top, 1);
        if (lane == 0) before = kMinusInfinity;
        old_factors[j] = power_of_two(before - top);
        new_factors[j] = power_of_two(m - top);
      }
      folded.clear();
      const float* const columns = first + merge_row * kHeadDim + merge_column;
#pragma unroll 4
      for (int32_t s = 0; s < context.splits; ++s) {
        float l = 0;
#pragma unroll
        for (int j = 0; j < S::kChunks; ++j) {
          const float l_j = __shfl_sync(kAllLanes, sums[j], s);
          const float old_j = __shfl_sync(kAllLanes, old_factors[j], s), new_j = __shfl_sync(kAllLanes, new_factors[j], s);
          if (j == merge_row % S::kChunks) l = l_j, old_factor = old_j, new_factor = new_j;
        }
        folded.fold_sum(l, old_factor, new_factor);
#pragma unroll
        for (int chunk = 0; chunk < S::kChunks; ++chunk) {
          float v[S::kElements];
          load_floats(v, columns + s * S::kPartialFloats + chunk * S::kColumns, true);
          folded.fold_values(chunk, v, old_factor, new_factor);
        }
      }
    }
    if (merge_row < rows) {
      const float inverse = 1.0f / folded.sum;
#pragma unroll
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
#pragma unroll
        for (int e = 0; e < S::kElements; ++e) {
          const int column = chunk * S::kColumns + merge_column + e;
          if (column < a.kv.head_dim) a.out[q_row + merge_row * a.kv.head_dim + column] = to_bf16(folded.values[chunk][e] * inverse);
        }
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
