#include <cuda_bf16.h>

#include "kernels/cuda/prefill_arguments.h"

/// Causal attention of query tiles over a paged cache, for any GPU with bf16 tensor cores (sm_80).
///
/// A thread block takes one tile and one head, a warp 16 or 32 of its query rows: what it reads of K and V from shared memory
/// is used for all of them. Keys come in tiles at multiples of Keys, in
/// ascending order, whatever the query tile is; a masked key weighs exactly 0 and a tile without visible keys leaves a row
/// as it was. So a row's bits depend on its query, its position and the keys alone. K and V beyond the sequence's end
/// are not read: blocks hold there what an earlier owner left.
namespace {

using baton::cuda::DeviceSequence;
using baton::cuda::PrefillArguments;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// 16 bytes; zeros when !valid.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

/// d[16, 8] += a[16, 16] b[16, 8]
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

/// Of the four threads that hold a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <int Width>
struct Tile {
  static constexpr int kRows = baton::cuda::prefill_rows(Width);
  static constexpr int kThreads = baton::cuda::kPrefillThreads;
  static constexpr int kKeys = baton::cuda::prefill_keys(Width);
  static constexpr int kStride = baton::cuda::prefill_stride(Width);
  static constexpr int kWords = Width / 8;  // of 16 bytes
  static constexpr int kSteps = Width / 16;
  static constexpr int kWarpRows = kRows / (kThreads / 32);
  static constexpr int kSlabs = kWarpRows / 16;
  static constexpr uint32_t kTileBytes = kKeys * kStride * 2;
};

/// Keys [first_key, first_key + kKeys) of K or of V into shared memory; zeros beyond key_end and head_dim. A warp takes eight
/// tokens at a time: they lie in one block.
template <int Width>
__device__ __forceinline__ void load_keys(const PrefillArguments& a, const unsigned char* pool, const int32_t* table,
                                          int32_t kv_head, int32_t first_key, int32_t key_end, uint32_t to) {
  using T = Tile<Width>;
  const int32_t head_dim = a.kv.head_dim, block_tokens = a.kv.block_tokens;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < T::kKeys / 8; i += T::kThreads / 32) {
    const int group = i + threadIdx.x / 32;
    const int32_t key = first_key + group * 8;
    const unsigned char* from = pool;
    if (key < key_end) {
      const int32_t place = key / block_tokens;
      from += table[place] * a.kv.block_stride_bytes +
              (static_cast<int64_t>(kv_head) * block_tokens + (key - place * block_tokens)) * head_dim * 2;
    }
#pragma unroll
    for (int j = 0; j < Width; j += 32) {
      const int row = (j + lane) / T::kWords, word = (j + lane) % T::kWords;
      const bool valid = key + row < key_end && word * 8 < head_dim;
      copy_async(to + ((group * 8 + row) * T::kStride + word * 8) * 2, from + (valid ? (row * head_dim + word * 8) * 2 : 0),
                 valid);
    }
  }
}

/// 16 query rows of a warp: a thread has two of them, 8 apart, and of these two columns of every eight.
template <int Width>
struct Slab {
  using T = Tile<Width>;
  float o[Width / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  /// `pos`: of the first row.
  __device__ __forceinline__ static void mask(float (&s)[T::kKeys / 8][4], int32_t pos, int32_t first_key, int32_t window) {
    if (first_key + T::kKeys - 1 <= pos && (window <= 0 || first_key > pos + 15 - window)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t last = pos + threadIdx.x % 32 / 4 + r * 8 - first_key - threadIdx.x % 4 * 2;
      const int32_t before = window > 0 ? last - window : -1;
#pragma unroll
      for (int n = 0; n < T::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (n * 8 + i > last || n * 8 + i <= before) s[n][2 * r + i] = -INFINITY;
        }
      }
    }
  }

  /// Scores become weights; O and the sum so far are scaled to the new maximum.
  __device__ __forceinline__ void weigh(float (&s)[T::kKeys / 8][4], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = maximum[r];
#pragma unroll
      for (int n = 0; n < T::kKeys / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      largest = row_max(largest);
      // Exactly 1 when the maximum stays: a product fused with this difference would not give 0.
      const float finite = largest == -INFINITY ? 0.0f : largest;
      const float correction = exp2_fast((maximum[r] - finite) * scale_log2);
      maximum[r] = largest;
      const float reference = finite * scale_log2;
      sum[r] *= correction;
#pragma unroll
      for (int n = 0; n < Width / 8; ++n) {
        o[n][2 * r] *= correction;
        o[n][2 * r + 1] *= correction;
      }
#pragma unroll
      for (int n = 0; n < T::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          s[n][i] = exp2_fast(fmaf(s[n][i], scale_log2, -reference));
          sum[r] += s[n][i];
        }
      }
    }
  }

  /// `out`: of the first row.
  __device__ __forceinline__ void store(uint16_t* out, int64_t row_stride, int32_t rows, int32_t head_dim) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = 1.0f / row_sum(sum[r]);
      const int32_t row = threadIdx.x % 32 / 4 + r * 8;
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < Width / 8; ++n) {
        const int32_t column = n * 8 + threadIdx.x % 4 * 2;
        if (column < head_dim) {
          *reinterpret_cast<uint32_t*>(out + row * row_stride + column) =
              pack(o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse);
        }
      }
    }
  }
};

template <int Width>
__device__ __forceinline__ void attend(const PrefillArguments& a) {
  using T = Tile<Width>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int32_t head = blockIdx.x % a.heads;
  const int32_t tile = blockIdx.x / a.heads;
  const int32_t sequence_index = a.tiles[2 * tile];
  const int32_t token_begin = a.tiles[2 * tile + 1];
  if (sequence_index < 0 || sequence_index >= a.sequences_count) return;
  const DeviceSequence sequence = a.sequences[sequence_index];
  if (token_begin >= sequence.rows) return;

  const int32_t head_dim = a.kv.head_dim;
  const int32_t kv_head = head / (a.heads / a.kv.kv_heads);
  const int32_t* table = a.block_tables + sequence.table_offset;
  const int32_t tokens = min(T::kRows, sequence.rows - token_begin);
  const int32_t first_pos = sequence.start_pos + token_begin;
  const int32_t key_end = first_pos + tokens;
  const int32_t key_begin = a.window > 0 ? max(0, first_pos - a.window + 1) / T::kKeys * T::kKeys : 0;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t warp_pos = first_pos + warp * T::kWarpRows;
  const unsigned char* k_pool = a.kv.pool + a.kv.k_offset_bytes;
  const unsigned char* v_pool = a.kv.pool + a.kv.v_offset_bytes;
  const uint32_t k_shared = shared_address(shared);
  const uint32_t v_shared = k_shared + T::kTileBytes;
  const uint32_t q_shared = v_shared + T::kTileBytes;

  // Rows of the tile that are no rows of the sequence are computed with the last one's query and not stored.
  const int64_t row_stride = static_cast<int64_t>(a.heads) * head_dim;
  const int64_t first_element = (static_cast<int64_t>(sequence.first_row) + token_begin) * row_stride + head * head_dim;
  for (int i = threadIdx.x; i < T::kRows * T::kWords; i += T::kThreads) {
    const int row = i / T::kWords, word = i % T::kWords;
    const bool valid = word * 8 < head_dim;
    copy_async(q_shared + (row * T::kStride + word * 8) * 2,
               a.q + first_element + (valid ? min(row, tokens - 1) * row_stride + word * 8 : 0), valid);
  }
  load_keys<Width>(a, k_pool, table, kv_head, key_begin, key_end, k_shared);
  copy_commit();

  Slab<Width> slabs[T::kSlabs];
  for (int32_t first_key = key_begin; first_key < key_end; first_key += T::kKeys) {
    copy_wait<0>();
    __syncthreads();  // K is there, and V of the tile before is not needed any more
    load_keys<Width>(a, v_pool, table, kv_head, first_key, key_end, v_shared);
    copy_commit();

    const bool visible =
        first_key <= warp_pos + T::kWarpRows - 1 && (a.window <= 0 || first_key + T::kKeys > warp_pos - a.window + 1);
    float s[T::kSlabs][T::kKeys / 8][4] = {};
    if (visible) {
      // S = Q K^T
#pragma unroll
      for (int step = 0; step < T::kSteps; ++step) {
        uint32_t q[T::kSlabs][4];
#pragma unroll
        for (int slab = 0; slab < T::kSlabs; ++slab) {
          const int row = warp * T::kWarpRows + slab * 16 + lane % 16;
          load_matrices(q[slab], q_shared + (row * T::kStride + step * 16 + (lane / 16) * 8) * 2);
        }
#pragma unroll
        for (int n = 0; n < T::kKeys / 16; ++n) {
          uint32_t b[4];
          const int row = n * 16 + (lane % 8) + (lane / 16) * 8;
          load_matrices(b, k_shared + (row * T::kStride + step * 16 + (lane / 8 % 2) * 8) * 2);
#pragma unroll
          for (int slab = 0; slab < T::kSlabs; ++slab) {
            multiply(s[slab][2 * n], q[slab], b[0], b[1]);
            multiply(s[slab][2 * n + 1], q[slab], b[2], b[3]);
          }
        }
      }
#pragma unroll
      for (int slab = 0; slab < T::kSlabs; ++slab) {
        slabs[slab].mask(s[slab], warp_pos + slab * 16, first_key, a.window);
        slabs[slab].weigh(s[slab], a.scale_log2);
      }
    }

    copy_wait<0>();
    __syncthreads();  // V is there, and K is not needed any more
    if (first_key + T::kKeys < key_end) {
      load_keys<Width>(a, k_pool, table, kv_head, first_key + T::kKeys, key_end, k_shared);
      copy_commit();
    }
    if (visible) {
      // O += P V
#pragma unroll
      for (int step = 0; step < T::kKeys / 16; ++step) {
        uint32_t p[T::kSlabs][4];
#pragma unroll
        for (int slab = 0; slab < T::kSlabs; ++slab) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* weights = &s[slab][2 * step + i / 2][i % 2 * 2];
            p[slab][i] = pack(weights[0], weights[1]);
          }
        }
#pragma unroll
        for (int n = 0; n < Width / 16; ++n) {
          uint32_t b[4];
          const int row = step * 16 + lane % 16;
          load_matrices_transposed(b, v_shared + (row * T::kStride + n * 16 + (lane / 16) * 8) * 2);
#pragma unroll
          for (int slab = 0; slab < T::kSlabs; ++slab) {
            multiply(slabs[slab].o[2 * n], p[slab], b[0], b[1]);
            multiply(slabs[slab].o[2 * n + 1], p[slab], b[2], b[3]);
          }
        }
      }
    }
  }

#pragma unroll
  for (int slab = 0; slab < T::kSlabs; ++slab) {
    const int32_t row = warp * T::kWarpRows + slab * 16;
    slabs[slab].store(a.out + first_element + row * row_stride, row_stride, tokens - row, head_dim);
  }
}

}  // namespace

#define BATON_PREFILL_KERNEL(width)                                                                             \
  extern "C" __global__ void __launch_bounds__(baton::cuda::kPrefillThreads)                                    \
      baton_attention_prefill_##width(const __grid_constant__ PrefillArguments a) {                             \
    attend<width>(a);                                                                                           \
  }
BATON_PREFILL_KERNEL(32)
BATON_PREFILL_KERNEL(64)
BATON_PREFILL_KERNEL(96)
BATON_PREFILL_KERNEL(128)
BATON_PREFILL_KERNEL(192)
BATON_PREFILL_KERNEL(256)
