#include <cuda_bf16.h>

#include "kernels/cuda/prefill_arguments.h"

/// Causal attention of query tiles over a paged cache, for any GPU with bf16 tensor cores (sm_80).
///
/// A thread block takes one tile and one head, a warp 16 of its query rows. Keys come in tiles at multiples of Keys, in
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
  static constexpr int kThreads = baton::cuda::prefill_threads(Width);
  static constexpr int kKeys = baton::cuda::prefill_keys(Width);
  static constexpr int kStride = baton::cuda::prefill_stride(Width);
  static constexpr bool kQInRegisters = baton::cuda::prefill_q_in_registers(Width);
  static constexpr int kWords = Width / 8;  // of 16 bytes
  static constexpr int kSteps = Width / 16;
  static constexpr uint32_t kStageBytes = kKeys * kStride * 2;
};

/// Keys [first_key, first_key + kKeys) of K and V into shared memory; zeros beyond key_end and head_dim.
template <int Width>
__device__ __forceinline__ void load_keys(const PrefillArguments& a, const int32_t* table, int32_t kv_head, int32_t first_key,
                                          int32_t key_end, uint32_t k_shared, uint32_t v_shared) {
  using T = Tile<Width>;
  const int32_t head_dim = a.kv.head_dim;
  for (int i = threadIdx.x; i < T::kKeys * T::kWords; i += T::kThreads) {
    const int row = i / T::kWords, word = i % T::kWords;
    const int32_t key = first_key + row;
    const bool valid = key < key_end && word * 8 < head_dim;
    int64_t offset = 0;
    if (valid) {
      const int32_t block = key / a.kv.block_tokens;
      offset = table[block] * a.kv.block_stride_bytes +
               ((static_cast<int64_t>(kv_head) * a.kv.block_tokens + (key - block * a.kv.block_tokens)) * head_dim + word * 8) * 2;
    }
    const uint32_t to = (row * T::kStride + word * 8) * 2;
    copy_async(k_shared + to, a.kv.pool + (valid ? a.kv.k_offset_bytes + offset : 0), valid);
    copy_async(v_shared + to, a.kv.pool + (valid ? a.kv.v_offset_bytes + offset : 0), valid);
  }
}

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
  const int group = lane / 4, quad = lane % 4;
  const int32_t warp_pos = first_pos + warp * 16;

  const uint32_t k_shared = shared_address(shared);
  const uint32_t v_shared = k_shared + 2 * T::kStageBytes;
  const uint32_t q_shared = k_shared + 4 * T::kStageBytes;
  load_keys<Width>(a, table, kv_head, key_begin, key_end, k_shared, v_shared);
  copy_commit();

  // Rows of the tile that are no rows of the sequence are computed with the last one's query and not stored.
  const int64_t q_row_stride = static_cast<int64_t>(a.heads) * head_dim;
  const uint16_t* q = a.q + (static_cast<int64_t>(sequence.first_row) + token_begin) * q_row_stride + head * head_dim;
  uint32_t q_fragments[T::kQInRegisters ? T::kSteps : 1][4];
  if constexpr (T::kQInRegisters) {
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t row = min(warp * 16 + group + (i % 2) * 8, tokens - 1);
        const int32_t column = step * 16 + (i / 2) * 8 + quad * 2;
        q_fragments[step][i] = column < head_dim ? *reinterpret_cast<const uint32_t*>(q + row * q_row_stride + column) : 0;
      }
    }
  } else {
    for (int i = threadIdx.x; i < T::kRows * T::kWords; i += T::kThreads) {
      const int row = i / T::kWords, word = i % T::kWords;
      const bool valid = word * 8 < head_dim;
      copy_async(q_shared + (row * T::kStride + word * 8) * 2,
                 q + (valid ? min(row, tokens - 1) * q_row_stride + word * 8 : 0), valid);
    }
    copy_commit();
  }

  float o[Width / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  int stage = 0;
  for (int32_t first_key = key_begin; first_key < key_end; first_key += T::kKeys, stage ^= 1) {
    if (first_key + T::kKeys < key_end) {
      load_keys<Width>(a, table, kv_head, first_key + T::kKeys, key_end, k_shared + (stage ^ 1) * T::kStageBytes,
                       v_shared + (stage ^ 1) * T::kStageBytes);
    }
    copy_commit();
    copy_wait<1>();
    __syncthreads();

    const bool visible = first_key <= warp_pos + 15 && (a.window <= 0 || first_key + T::kKeys > warp_pos - a.window + 1);
    if (visible) {
      // S[16, kKeys] = Q K^T
      float s[T::kKeys / 8][4] = {};
      const uint32_t k_tile = k_shared + stage * T::kStageBytes;
#pragma unroll
      for (int step = 0; step < T::kSteps; ++step) {
        uint32_t q_loaded[4];
        if constexpr (!T::kQInRegisters) {
          load_matrices(q_loaded, q_shared + ((warp * 16 + lane % 16) * T::kStride + step * 16 + (lane / 16) * 8) * 2);
        }
#pragma unroll
        for (int n = 0; n < T::kKeys / 16; ++n) {
          uint32_t b[4];
          const int row = n * 16 + (lane % 8) + (lane / 16) * 8;
          load_matrices(b, k_tile + (row * T::kStride + step * 16 + (lane / 8 % 2) * 8) * 2);
          const uint32_t(&fragment)[4] = T::kQInRegisters ? q_fragments[T::kQInRegisters ? step : 0] : q_loaded;
          multiply(s[2 * n], fragment, b[0], b[1]);
          multiply(s[2 * n + 1], fragment, b[2], b[3]);
        }
      }

      const bool all_visible = first_key + T::kKeys - 1 <= warp_pos && (a.window <= 0 || first_key > warp_pos + 15 - a.window);
      if (!all_visible) {
#pragma unroll
        for (int n = 0; n < T::kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int32_t key = first_key + n * 8 + quad * 2 + i % 2;
            const int32_t pos = warp_pos + group + (i / 2) * 8;
            if (key > pos || (a.window > 0 && key <= pos - a.window)) s[n][i] = -INFINITY;
          }
        }
      }

      // Weights; O and the sum so far are scaled to the new maximum.
      float negative_maximum[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = maximum[r];
#pragma unroll
        for (int n = 0; n < T::kKeys / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        largest = row_max(largest);
        const float reference = largest == -INFINITY ? 0.0f : largest;
        const float correction = exp2_fast((maximum[r] - reference) * a.scale_log2);
        maximum[r] = largest;
        negative_maximum[r] = -reference * a.scale_log2;
        sum[r] *= correction;
#pragma unroll
        for (int n = 0; n < Width / 8; ++n) {
          o[n][2 * r] *= correction;
          o[n][2 * r + 1] *= correction;
        }
      }
#pragma unroll
      for (int n = 0; n < T::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[n][i] = exp2_fast(fmaf(s[n][i], a.scale_log2, negative_maximum[i / 2]));
          sum[i / 2] += s[n][i];
        }
      }

      // O[16, Width] += P V
      const uint32_t v_tile = v_shared + stage * T::kStageBytes;
#pragma unroll
      for (int step = 0; step < T::kKeys / 16; ++step) {
        const uint32_t p[4] = {pack(s[2 * step][0], s[2 * step][1]), pack(s[2 * step][2], s[2 * step][3]),
                               pack(s[2 * step + 1][0], s[2 * step + 1][1]), pack(s[2 * step + 1][2], s[2 * step + 1][3])};
#pragma unroll
        for (int n = 0; n < Width / 16; ++n) {
          uint32_t b[4];
          const int row = step * 16 + lane % 16;
          load_matrices_transposed(b, v_tile + (row * T::kStride + n * 16 + (lane / 16) * 8) * 2);
          multiply(o[2 * n], p, b[0], b[1]);
          multiply(o[2 * n + 1], p, b[2], b[3]);
        }
      }
    }
    __syncthreads();
  }
  copy_wait<0>();

  uint16_t* out = a.out + (static_cast<int64_t>(sequence.first_row) + token_begin) * q_row_stride + head * head_dim;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float inverse = 1.0f / row_sum(sum[r]);
    const int32_t row = warp * 16 + group + r * 8;
    if (row >= tokens) continue;
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
      const int32_t column = n * 8 + quad * 2;
      if (column < head_dim) {
        *reinterpret_cast<uint32_t*>(out + row * q_row_stride + column) =
            pack(o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse);
      }
    }
  }
}

}  // namespace

#define BATON_PREFILL_KERNEL(width)                                                                             \
  extern "C" __global__ void __launch_bounds__(baton::cuda::prefill_threads(width))                             \
      baton_attention_prefill_##width(const __grid_constant__ PrefillArguments a) {                             \
    attend<width>(a);                                                                                           \
  }
BATON_PREFILL_KERNEL(32)
BATON_PREFILL_KERNEL(64)
BATON_PREFILL_KERNEL(96)
BATON_PREFILL_KERNEL(128)
BATON_PREFILL_KERNEL(192)
BATON_PREFILL_KERNEL(256)
