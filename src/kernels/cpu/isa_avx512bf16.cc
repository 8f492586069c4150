// AVX-512 with BF16 (Zen 4, Cooper Lake, Sapphire Rapids and later): vdpbf16ps multiplies 16 pairs of bf16 and adds
// both products to 16 float32 sums. Every kernel gives one sum one chain of vdpbf16ps, k ascending, whatever the
// number of rows: that is all that batch invariance takes.

#include <immintrin.h>

#include "kernels/cpu/attention_kernel.h"
#include "kernels/cpu/vector_kernels.h"

namespace baton::cpu {
namespace {

struct VecAvx512 {
  static constexpr int kWidth = 16;
  __m512 v;

  static __mmask16 part_mask(int64_t count) {
    return count >= kWidth ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1u);
  }
  static VecAvx512 set(float x) { return {_mm512_set1_ps(x)}; }
  static VecAvx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void store(float* p, VecAvx512 a) { _mm512_storeu_ps(p, a.v); }
  // A masked store costs many times a whole one on Zen 4, and nearly all are whole.
  static VecAvx512 load_part(const float* p, int64_t count) {
    if (count >= kWidth) return load(p);
    return {_mm512_maskz_loadu_ps(part_mask(count), p)};
  }
  static void store_part(float* p, VecAvx512 a, int64_t count) {
    if (count >= kWidth) return store(p, a);
    _mm512_mask_storeu_ps(p, part_mask(count), a.v);
  }
  static VecAvx512 add(VecAvx512 a, VecAvx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  static VecAvx512 sub(VecAvx512 a, VecAvx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static VecAvx512 mul(VecAvx512 a, VecAvx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static VecAvx512 div(VecAvx512 a, VecAvx512 b) { return {_mm512_div_ps(a.v, b.v)}; }
  static VecAvx512 fma(VecAvx512 a, VecAvx512 b, VecAvx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static VecAvx512 max(VecAvx512 a, VecAvx512 b) { return {_mm512_max_ps(a.v, b.v)}; }
  static VecAvx512 min(VecAvx512 a, VecAvx512 b) { return {_mm512_min_ps(a.v, b.v)}; }
  static float reduce_add(VecAvx512 a) {
    const __m512 x = _mm512_add_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, _MM_SHUFFLE(1, 0, 3, 2)));
    const __m512 y = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(2, 3, 0, 1)));
    const __m512 z = _mm512_add_ps(y, _mm512_permute_ps(y, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm512_cvtss_f32(_mm512_add_ps(z, _mm512_permute_ps(z, _MM_SHUFFLE(2, 3, 0, 1))));
  }
  static float reduce_max(VecAvx512 a) {
    const __m512 x = _mm512_max_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, _MM_SHUFFLE(1, 0, 3, 2)));
    const __m512 y = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(2, 3, 0, 1)));
    const __m512 z = _mm512_max_ps(y, _mm512_permute_ps(y, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm512_cvtss_f32(_mm512_max_ps(z, _mm512_permute_ps(z, _MM_SHUFFLE(2, 3, 0, 1))));
  }
  static VecAvx512 round(VecAvx512 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static VecAvx512 power_of_two(VecAvx512 n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
  }
  static void store_bf16_part(uint16_t* p, VecAvx512 a, int64_t count) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(a.v);
    if (count >= kWidth) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
    _mm256_mask_storeu_epi16(p, part_mask(count), half);
  }
};

inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
inline __m512i broadcast_pair(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }

// ------------------------------------------------------------------------------------------------ linear

constexpr int kBlockRows = 12;  // 12 x 2 sums, 2 weights, 1 activation: 27 of 32 registers
constexpr int64_t kStreamAheadBytes = 8192;
constexpr int64_t kMaxDepthPairs = 256;  // of k at a time: 32 KiB of weights, shared by all row blocks

/// Activations become [k_pairs][rows] pairs.
void pack_block_pairs(const uint16_t* x, int64_t rows, int64_t k_pairs, void* out) {
  uint32_t* const a = static_cast<uint32_t*>(out);
  if (rows == 1) {
    __builtin_memcpy(a, x, static_cast<size_t>(k_pairs) * 4);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* const row = x + r * k_pairs * 2;
    for (int64_t kk = 0; kk < k_pairs; ++kk) {
      __builtin_memcpy(a + kk * rows + r, row + 2 * kk, 4);
    }
  }
}

struct LinearBlock {
  const uint32_t* a;  // [depth][rows]
  const uint32_t* b;  // [depth][32]
  int64_t depth;
  const char* ahead;  // memory to prefetch, ahead_step bytes per step of k
  int64_t ahead_step;
  float* sums;  // [rows][32]: where the sums rest between blocks of k
  bool first;   // begins at zero instead of `sums`
  bool last;    // ends in y instead of `sums`
  int64_t row;
  int64_t column;
};

template <int kRows>
inline void finish_linear(__m512 (&acc)[kRows][2], const LinearBlock& block, const LinearTask& t) {
  for (int v = 0; v < 2; ++v) {
    const int64_t column = block.column + v * 16;
    if (column >= t.out_features) return;
    const __mmask16 mask = VecAvx512::part_mask(t.out_features - column);
    const __m512 bias = t.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, t.bias + column);
    for (int r = 0; r < kRows; ++r) {
      float* const y = t.y + (block.row + r) * t.out_features + column;
      __m512 value = _mm512_add_ps(acc[r][v], bias);
      if (t.accumulate) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), value);
      _mm512_mask_storeu_ps(y, mask, value);
    }
  }
}

template <int kRows>
void linear_block(const LinearBlock& block, const LinearTask& t) {
  __m512 acc[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = block.first ? _mm512_setzero_ps() : _mm512_loadu_ps(block.sums + r * kPanelLanes);
    acc[r][1] = block.first ? _mm512_setzero_ps() : _mm512_loadu_ps(block.sums + r * kPanelLanes + 16);
  }
  const uint32_t* a = block.a;
  const uint32_t* b = block.b;
  const char* ahead = block.ahead;
  for (int64_t kk = 0; kk < block.depth; ++kk, a += kRows, b += kPanelLanes, ahead += block.ahead_step) {
    // With few rows the hardware prefetchers see a stream at full speed, and ours would only be in their way.
    if constexpr (kRows >= 6) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + 64, 0, 2);
    }
    const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512i pair = broadcast_pair(a + r);
      acc[r][0] = dot_pairs(acc[r][0], pair, b0);
      acc[r][1] = dot_pairs(acc[r][1], pair, b1);
    }
  }
  if (block.last) {
    finish_linear<kRows>(acc, block, t);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(block.sums + r * kPanelLanes, acc[r][0]);
    _mm512_storeu_ps(block.sums + r * kPanelLanes + 16, acc[r][1]);
  }
}

using LinearBlockFunction = void (*)(const LinearBlock&, const LinearTask&);
constexpr LinearBlockFunction kLinearBlocks[kBlockRows + 1] = {
    nullptr,          linear_block<1>,  linear_block<2>, linear_block<3>, linear_block<4>,
    linear_block<5>,  linear_block<6>,  linear_block<7>, linear_block<8>, linear_block<9>,
    linear_block<10>, linear_block<11>, linear_block<12>};

void linear_bf16(const LinearTask& t) {
  const RowBlocks rows(t.rows, kBlockRows);
  // With one block of rows nothing is shared, and the longest stream is the best.
  const int64_t max_depth = rows.count == 1 ? t.k_pairs : kMaxDepthPairs;
  const int64_t depth_blocks = (t.k_pairs + max_depth - 1) / max_depth;
  for (int64_t panel = t.panel_begin; panel < t.panel_end; ++panel) {
    const uint32_t* const weights = t.weights + panel * t.k_pairs * kPanelLanes;
    for (int64_t j = 0; j < depth_blocks; ++j) {
      const int64_t begin = t.k_pairs * j / depth_blocks, end = t.k_pairs * (j + 1) / depth_blocks;
      // What follows this block in memory is the next one: every block of rows fetches its share of it.
      const int64_t share = (end - begin) * kPanelLanes * 4 / rows.count;
      const char* const ahead =
          reinterpret_cast<const char*>(weights + (rows.count == 1 ? begin * kPanelLanes : end * kPanelLanes)) +
          (rows.count == 1 ? kStreamAheadBytes : 0);
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t row = rows.begin(i), count = rows.begin(i + 1) - row;
        const LinearBlock block = {.a = static_cast<const uint32_t*>(t.a) + row * t.k_pairs + begin * count,
                                   .b = weights + begin * kPanelLanes,
                                   .depth = end - begin,
                                   .ahead = ahead + i * share,
                                   .ahead_step = kPanelLanes * 4 / rows.count,
                                   .sums = t.scratch + row * kPanelLanes,
                                   .first = j == 0,
                                   .last = j + 1 == depth_blocks,
                                   .row = row,
                                   .column = panel * kPanelLanes};
        kLinearBlocks[count](block, t);
      }
    }
  }
}

// --------------------------------------------------------------------------------------------- attention

/// c[r] = c[r] * scale[r] + a[r] B, or a[r] B when scale is null. a [rows][depth] pairs, b [depth][b_stride] pairs.
struct PairProduct {
  const uint32_t* a;
  int64_t a_stride;
  const uint32_t* b;
  int64_t b_stride;
  int64_t depth;
  const float* scale;
  float* c;
  int64_t c_stride;
};

template <int kRows, int kVectors>
inline void pair_product(const PairProduct& t, int64_t row, TileAhead& prefetch) {
  const uint32_t* const a = t.a + row * t.a_stride;
  float* const c = t.c + row * t.c_stride;
  __m512 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = t.scale == nullptr
                      ? _mm512_setzero_ps()
                      : _mm512_mul_ps(_mm512_loadu_ps(c + r * t.c_stride + v * 16), _mm512_set1_ps(t.scale[row + r]));
    }
  }
  TileAhead ahead = prefetch;  // a copy, so that it lives in registers
  for (int64_t kk = 0; kk < t.depth; ++kk) {
    if constexpr (kRows <= 4) ahead.step();
    __m512i lanes[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) lanes[v] = _mm512_loadu_si512(t.b + kk * t.b_stride + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i pair = broadcast_pair(a + r * t.a_stride + kk);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = dot_pairs(acc[r][v], pair, lanes[v]);
    }
  }
  prefetch.resume(ahead);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * t.c_stride + v * 16, acc[r][v]);
  }
}

template <int kVectors>
inline void pair_product_rows(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t b_stride,
                              int64_t depth, const float* scale, float* c, int64_t c_stride, TileAhead& ahead) {
  const PairProduct t = {a, a_stride, b, b_stride, depth, scale, c, c_stride};
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) pair_product<6, kVectors>(t, r, ahead);
  switch (rows - r) {
    case 1: return pair_product<1, kVectors>(t, r, ahead);
    case 2: return pair_product<2, kVectors>(t, r, ahead);
    case 3: return pair_product<3, kVectors>(t, r, ahead);
    case 4: return pair_product<4, kVectors>(t, r, ahead);
    case 5: return pair_product<5, kVectors>(t, r, ahead);
    default: return;
  }
}

/// Rows (of 32-bit words) become columns, in registers: 16 x 16, in four rounds of 16 shuffles.
inline void transpose_16x16(__m512i (&m)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(m[2 * i], m[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(m[2 * i], m[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    m[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    m[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    m[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    m[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // m[4i + j] holds, in its four 128-bit parts p, column 4p + j of rows 4i..4i+3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(m[j], m[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(m[8 + j], m[12 + j], 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(m[j], m[4 + j], 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(m[8 + j], m[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    m[j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88);
    m[8 + j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
    m[4 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
    m[12 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
  }
}

struct PairAttention {
  using V = VecAvx512;
  using Word = uint32_t;
  static constexpr int kWordElements = 2;

  static void load_query(const uint16_t* src, int head_dim, uint32_t* dst) {
    __builtin_memcpy(dst, src, static_cast<size_t>(head_dim) * 2);
  }

  static void pack_keys(const TileRows& now, int head_dim, uint32_t* tile, TileAhead& ahead) {
    const int words = head_dim / 2;
    if (now.count == kTileKeys && words % 16 == 0) {
      pack_keys_of<true>(now, words, tile, ahead);
    } else {
      pack_keys_of<false>(now, words, tile, ahead);
    }
  }

  /// kFull: all keys exist and a row is whole vectors.
  template <bool kFull>
  static void pack_keys_of(const TileRows& now, int words, uint32_t* tile, TileAhead& ahead) {
    for (int key = 0; key < (kFull ? kTileKeys : now.count); key += 16) {
      for (int word = 0; word < words; word += 16) {
        const __mmask16 mask = VecAvx512::part_mask(words - word);
        __m512i m[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const __mmask16 row_mask = key + i < now.count ? mask : static_cast<__mmask16>(0);
          m[i] = kFull ? _mm512_loadu_si512(now.k[key + i] + 2 * word)
                       : _mm512_maskz_loadu_epi32(row_mask, now.k[key + i] + 2 * word);
          if (i % 4 == 3) ahead.step();
        }
        transpose_16x16(m);
        const int count = kFull || words - word >= 16 ? 16 : words - word;
        uint32_t* const out = tile + word * kTileKeys + key;
        if (count == 16) {
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * kTileKeys, m[i]);
        } else {
          for (int i = 0; i < count; ++i) _mm512_storeu_si512(out + i * kTileKeys, m[i]);
        }
      }
    }
  }

  static void pack_values(const TileRows& now, int head_dim, int padded, uint32_t* tile, TileAhead& ahead) {
    if (now.count == kTileKeys && head_dim % 32 == 0) {
      pack_values_of<true>(now, head_dim, padded, tile, ahead);
    } else {
      pack_values_of<false>(now, head_dim, padded, tile, ahead);
    }
  }

  template <bool kFull>
  static void pack_values_of(const TileRows& now, int head_dim, int padded, uint32_t* tile, TileAhead& ahead) {
    // Interleave elements 0..15 (16..31) of two rows; index 32 + i is element i of the second.
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int key = 0; key < (kFull ? kTileKeys : now.count); key += 2) {
      uint32_t* const out = tile + key / 2 * padded;
      const uint16_t* const even_row = now.k[key] + now.v_offset;
      const uint16_t* const odd_row = now.k[key + 1] + now.v_offset;
      for (int i = 0; i < head_dim; i += 64) ahead.step();
      for (int i = 0; i < padded; i += 32) {
        const __mmask32 mask = head_dim - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (head_dim - i)) - 1;
        const __m512i even = kFull ? _mm512_loadu_si512(even_row + i)
                                   : _mm512_maskz_loadu_epi16(key < now.count ? mask : __mmask32{0}, even_row + i);
        const __m512i odd = kFull ? _mm512_loadu_si512(odd_row + i)
                                  : _mm512_maskz_loadu_epi16(key + 1 < now.count ? mask : __mmask32{0}, odd_row + i);
        _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(even, low, odd));
        if (i + 16 < padded) _mm512_storeu_si512(out + i + 16, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
  }

  static void scores(const uint32_t* q, int q_stride, int rows, const uint32_t* tile, int head_dim, float* s,
                     TileAhead& ahead) {
    pair_product_rows<4>(q, q_stride, rows, tile, kTileKeys, head_dim / 2, nullptr, s, kTileKeys, ahead);
  }

  static void store_weights(V a, V b, uint32_t* dst) {
    _mm512_storeu_si512(dst, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
  }

  static void weighted_sum(const uint32_t* p, int rows, int count, const uint32_t* tile, int padded,
                           const float* corrections, float* o, TileAhead& ahead) {
    constexpr int kStride = kTileKeys / 2;
    const int depth = (count + 1) / 2;
    const auto columns = [&](auto product, int column) {
      product(p, kStride, rows, tile + column, padded, depth, corrections, o + column, padded, ahead);
    };
    int column = 0;
    for (; column + 64 <= padded; column += 64) columns(pair_product_rows<4>, column);
    switch ((padded - column) / 16) {
      case 1: return columns(pair_product_rows<1>, column);
      case 2: return columns(pair_product_rows<2>, column);
      case 3: return columns(pair_product_rows<3>, column);
      default: return;
    }
  }
};

}  // namespace

const IsaOps kAvx512Bf16Ops = {
    .name = "cpu/avx512bf16",
    .max_block_rows = kBlockRows,
    .activation_pair_bytes = 4,
    .pack_block = pack_block_pairs,
    .linear = linear_bf16,
    .rms_norm = rms_norm_row<VecAvx512>,
    .silu_mul = silu_mul_range<VecAvx512>,
    .qkv_row = qkv_one_row<VecAvx512>,
    .attention_scratch_bytes = attention_scratch_bytes<PairAttention>,
    .attention = attention_task<PairAttention>,
    .attention_merge = attention_merge_task<PairAttention>,
};

}  // namespace baton::cpu
