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

/// c[r] = c[r] * scale[r] + a[r] B, or a[r] B when scale is null. a [rows][depth] pairs, c [rows][c_stride].
/// B's step kk is, in vectors of 16 pairs, at b[kk / run][v] + kk % run * b_stride; of the last step only the even halves
/// exist when `half_step`.
struct PairProduct {
  const uint32_t* a;
  int64_t a_stride;
  const uint32_t* b[4][4];
  int64_t b_stride;
  int run;
  int depth;
  bool half_step;
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
  const auto step = [&](int kk, const __m512i(&lanes)[kVectors]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i pair = broadcast_pair(a + r * t.a_stride + kk);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = dot_pairs(acc[r][v], pair, lanes[v]);
    }
  };
  const int whole = t.depth - (t.half_step ? 1 : 0);
  for (int begin = 0; begin < t.depth; begin += t.run) {
    const uint32_t* b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = t.b[begin / t.run][v];
    const int end = begin + t.run < whole ? begin + t.run : whole;
    __m512i lanes[kVectors];
    for (int kk = begin; kk < end; ++kk) {
      ahead.step();
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        lanes[v] = _mm512_loadu_si512(b[v]);
        b[v] += t.b_stride;
      }
      step(kk, lanes);
    }
    if (t.half_step && begin + t.run >= t.depth) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        lanes[v] = _mm512_and_si512(_mm512_loadu_si512(b[v]), _mm512_set1_epi32(0xffff));
      }
      step(t.depth - 1, lanes);
    }
  }
  prefetch = ahead;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * t.c_stride + v * 16, acc[r][v]);
  }
}

template <int kVectors>
inline void pair_product_rows(const PairProduct& t, int64_t rows, TileAhead& ahead) {
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

struct PairAttention {
  using V = VecAvx512;
  using Word = uint32_t;
  static constexpr int kWordElements = 2;

  static void load_query(const uint16_t* src, int head_dim, uint32_t* dst) {
    __builtin_memcpy(dst, src, static_cast<size_t>(head_dim) * 2);
  }

  /// Blocks of whole groups of 16 tokens are used where they lie; others are packed first.
  class Products {
   public:
    Products(const Tile& tile, int head_dim, uint32_t* k, uint32_t* v, TileAhead& ahead)
        : tile_(tile), words_(head_dim / 2), padded_(padded_dim(head_dim)), ahead_(ahead) {
      if (tile.grouped && head_dim % 16 == 0) {
        for (int g = 0; g < 4; ++g) {
          keys_[g] = reinterpret_cast<const uint32_t*>(tile.keys[16 * g]);
          values_[g] = reinterpret_cast<const uint32_t*>(tile.values[16 * g]);
        }
        key_stride_ = tile.pair_stride / 2;
        return;
      }
      pack(head_dim, k, v);
      for (int g = 0; g < 4; ++g) {
        keys_[g] = k + 16 * g;
        values_[g] = v + int64_t{8} * g * padded_;
      }
      key_stride_ = kTileKeys;
    }

    void scores(const uint32_t* q, int q_stride, int rows, float* s) {
      PairProduct t = {.a = q, .a_stride = q_stride, .b = {}, .b_stride = key_stride_, .run = words_, .depth = words_,
                       .half_step = false, .scale = nullptr, .c = s, .c_stride = kTileKeys};
      for (int v = 0; v < 4; ++v) t.b[0][v] = keys_[v];
      pair_product_rows<4>(t, rows, ahead_);
    }

    void weighted_sum(const uint32_t* p, int rows, const float* corrections, float* o) {
      PairProduct t = {.a = p, .a_stride = kTileKeys / 2, .b = {}, .b_stride = padded_, .run = 8,
                       .depth = (tile_.count + 1) / 2, .half_step = tile_.count % 2 != 0, .scale = corrections,
                       .c = o, .c_stride = padded_};
      const auto columns = [&](auto product, int column) {
        for (int g = 0; g < 4; ++g) {
          for (int v = 0; v < 4; ++v) t.b[g][v] = values_[g] + column + 16 * v;
        }
        t.c = o + column;
        product(t, rows, ahead_);
      };
      int column = 0;
      for (; column + 64 <= padded_; column += 64) columns(pair_product_rows<4>, column);
      switch ((padded_ - column) / 16) {
        case 1: return columns(pair_product_rows<1>, column);
        case 2: return columns(pair_product_rows<2>, column);
        case 3: return columns(pair_product_rows<3>, column);
        default: return;
      }
    }

   private:
    /// k [words][64], v [32][padded], nothing but zeros where nothing was written.
    void pack(int head_dim, uint32_t* k, uint32_t* v) {
      for (int key = 0; key < kTileKeys; ++key) {
        const int group = tile_.grouped ? key & ~15 : key, in_group = key - group;
        const bool exists = key < tile_.count;
        const uint16_t* const from = tile_.keys[group] + 2 * in_group;
        for (int word = 0; word < words_; ++word) {
          if (exists) __builtin_memcpy(k + word * kTileKeys + key, from + word * tile_.pair_stride, 4);
        }
        const uint16_t* const value = tile_.values[group] + int64_t{in_group} / 2 * 2 * head_dim + in_group % 2;
        uint16_t* const line = reinterpret_cast<uint16_t*>(v + int64_t{key} / 2 * padded_) + key % 2;
        for (int i = 0; i < padded_; ++i) {
          line[2 * i] = exists && i < head_dim ? value[i * tile_.value_steps[group]] : uint16_t{0};
        }
      }
    }

    const Tile& tile_;
    const uint32_t* keys_[4];    // 16 keys each: [words][key_stride_]
    const uint32_t* values_[4];  // 8 pairs of values each: [8][padded]
    int64_t key_stride_ = 0;
    int words_, padded_;
    TileAhead& ahead_;
  };

  static void store_weights(V a, V b, uint32_t* dst) {
    _mm512_storeu_si512(dst, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
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
