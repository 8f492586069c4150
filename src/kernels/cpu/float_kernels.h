// Matrix kernels for instruction sets without a bf16 dot product: bf16 is widened to float32 (exact) and
// multiplied with V::fma, even element first, then odd, k ascending. Included by isa_*.cc only (see isa.h).
// Beyond vector_kernels.h, V provides:
//   split_pairs(const uint32_t*, V* even, V* odd)   kWidth bf16 pairs to two float vectors
//   kRowsPerBlock, kVectorsPerBlock                  register block: rows x vectors

#pragma once

#include "kernels/cpu/attention_kernel.h"
#include "kernels/cpu/vector_kernels.h"

namespace baton::cpu {
namespace {

inline float widen(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

/// Activations become float32 [k_pairs][rows][even, odd].
inline void pack_block_f32(const uint16_t* x, int64_t rows, int64_t k_pairs, void* out) {
  float* const a = static_cast<float*>(out);
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* const row = x + r * k_pairs * 2;
    for (int64_t kk = 0; kk < k_pairs; ++kk) {
      a[(kk * rows + r) * 2] = widen(row[2 * kk]);
      a[(kk * rows + r) * 2 + 1] = widen(row[2 * kk + 1]);
    }
  }
}

/// acc [kRows][kVectors] over the whole of k for lanes [lane, lane + kVectors * kWidth) of a panel.
template <typename V, int kRows, int kVectors>
inline void linear_block_f32(const float* a, const uint32_t* b, int64_t k_pairs, int64_t lane, int64_t row,
                             int64_t column, const LinearTask& t) {
  V acc[kRows][kVectors];
  for (auto& line : acc) {
    for (V& value : line) value = V::set(0);
  }
  const uint32_t* w = b + lane;
  for (int64_t kk = 0; kk < k_pairs; ++kk, w += kPanelLanes, a += 2 * kRows) {
    for (int v = 0; v < kVectors; ++v) {
      V even, odd;
      V::split_pairs(w + v * V::kWidth, &even, &odd);
      for (int r = 0; r < kRows; ++r) acc[r][v] = V::fma(even, V::set(a[2 * r]), acc[r][v]);
      for (int r = 0; r < kRows; ++r) acc[r][v] = V::fma(odd, V::set(a[2 * r + 1]), acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = column + lane + v * V::kWidth;
      const int64_t n = min64(V::kWidth, t.out_features - first);
      if (n <= 0) break;
      V value = acc[r][v];
      float* const y = t.y + (row + r) * t.out_features + first;
      if (t.bias != nullptr) value = V::add(value, V::load_part(t.bias + first, n));
      if (t.accumulate) value = V::add(V::load_part(y, n), value);
      V::store_part(y, value, n);
    }
  }
}

template <typename V, int kRows>
inline void linear_rows_f32(int64_t rows, const float* a, const uint32_t* b, int64_t row, int64_t column,
                            const LinearTask& t) {
  if constexpr (kRows > 0) {
    if (rows != kRows) return linear_rows_f32<V, kRows - 1>(rows, a, b, row, column, t);
    constexpr int kLanes = V::kVectorsPerBlock * V::kWidth;
    for (int64_t lane = 0; lane < kPanelLanes; lane += kLanes) {
      linear_block_f32<V, kRows, V::kVectorsPerBlock>(a, b, t.k_pairs, lane, row, column, t);
    }
  }
}

template <typename V>
void linear_f32(const LinearTask& t) {
  const RowBlocks blocks(t.rows, V::kRowsPerBlock);
  const float* const a = static_cast<const float*>(t.a);
  for (int64_t panel = t.panel_begin; panel < t.panel_end; ++panel) {
    const uint32_t* const b = t.weights + panel * t.k_pairs * kPanelLanes;
    for (int64_t i = 0; i < blocks.count; ++i) {
      const int64_t row = blocks.begin(i);
      linear_rows_f32<V, V::kRowsPerBlock>(blocks.begin(i + 1) - row, a + row * t.k_pairs * 2, b, row,
                                           panel * kPanelLanes, t);
    }
  }
}

/// c[r] = c[r] * scale[r] + a[r] B, or a[r] B when scale is null. a [rows][k], b [k][b_stride], c [rows][c_stride].
template <typename V, int kRows, int kVectors>
inline void outer_product_f32(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k,
                              const float* scale, float* c, int64_t c_stride) {
  V acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = scale == nullptr ? V::set(0) : V::mul(V::load(c + r * c_stride + v * V::kWidth), V::set(scale[r]));
    }
  }
  for (int64_t i = 0; i < k; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const V lanes = V::load(b + i * b_stride + v * V::kWidth);
      for (int r = 0; r < kRows; ++r) acc[r][v] = V::fma(lanes, V::set(a[r * a_stride + i]), acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) V::store(c + r * c_stride + v * V::kWidth, acc[r][v]);
  }
}

/// The same for any number of rows and `columns` (a multiple of 16).
template <typename V>
inline void matrix_product_f32(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride,
                               int64_t k, const float* scale, float* c, int64_t c_stride, int64_t columns) {
  constexpr int kRows = V::kRowsPerBlock, kVectors = 16 / V::kWidth;
  for (int64_t column = 0; column < columns; column += 16) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      outer_product_f32<V, kRows, kVectors>(a + r * a_stride, a_stride, b + column, b_stride, k,
                                            scale == nullptr ? nullptr : scale + r, c + r * c_stride + column,
                                            c_stride);
    }
    for (; r < rows; ++r) {
      outer_product_f32<V, 1, kVectors>(a + r * a_stride, a_stride, b + column, b_stride, k,
                                        scale == nullptr ? nullptr : scale + r, c + r * c_stride + column, c_stride);
    }
  }
}

/// The Isa of attention_kernel.h over float32 tiles.
template <typename Vector>
struct FloatAttention {
  using V = Vector;
  using Word = float;
  static constexpr int kWordElements = 1;

  static void load_query(const uint16_t* src, int head_dim, float* dst) {
    for (int i = 0; i < head_dim; ++i) dst[i] = widen(src[i]);
  }
  struct Products {
    Products(const Tile& tile, int head_dim, float* k, float* v, TileAhead& ahead)
        : k_(k), v_(v), head_dim_(head_dim), padded_(padded_dim(head_dim)) {
      for (int key = 0; key < kTileKeys; ++key) {
        for (int i = 0; i < head_dim; i += 64) ahead.step();
        const bool exists = key < tile.count;
        const int group = tile.grouped ? key & ~15 : key, in_group = key - group;
        const uint16_t* const from = tile.keys[group] + 2 * in_group;
        for (int i = 0; i < head_dim; ++i) {
          k[i * kTileKeys + key] = exists ? widen(from[i / 2 * tile.pair_stride + i % 2]) : 0.0f;
        }
      }
      for (int key = 0; key < kTileKeys; ++key) {
        for (int i = 0; i < head_dim; i += 64) ahead.step();
        const int group = tile.grouped ? key & ~15 : key, in_group = key - group;
        const uint16_t* const from = tile.values[group] + int64_t{in_group} / 2 * 2 * head_dim + in_group % 2;
        const int step = tile.value_steps[group];
        float* const line = v + int64_t{key} * padded_;
        const int count = key < tile.count ? head_dim : 0;
        for (int i = 0; i < count; ++i) line[i] = widen(from[i * step]);
        for (int i = count; i < padded_; ++i) line[i] = 0;
      }
    }
    void scores(const float* q, int q_stride, int rows, float* s) const {
      matrix_product_f32<V>(q, q_stride, rows, k_, kTileKeys, head_dim_, nullptr, s, kTileKeys, kTileKeys);
    }
    void weighted_sum(const float* p, int rows, const float* corrections, float* o) const {
      matrix_product_f32<V>(p, kTileKeys, rows, v_, padded_, kTileKeys, corrections, o, padded_, padded_);
    }

   private:
    const float *k_, *v_;
    int head_dim_, padded_;
  };
  static void store_weights(V a, V b, float* dst) {
    V::store(dst, a);
    V::store(dst + V::kWidth, b);
  }
};

template <typename V>
constexpr IsaOps float_ops(const char* name) {
  return {
      .name = name,
      .max_block_rows = V::kRowsPerBlock,
      .activation_pair_bytes = 8,
      .pack_block = pack_block_f32,
      .linear = linear_f32<V>,
      .rms_norm = rms_norm_row<V>,
      .silu_mul = silu_mul_range<V>,
      .qkv_row = qkv_one_row<V>,
      .attention_scratch_bytes = attention_scratch_bytes<FloatAttention<V>>,
      .attention = attention_task<FloatAttention<V>>,
      .attention_merge = attention_merge_task<FloatAttention<V>>,
  };
}

}  // namespace
}  // namespace baton::cpu
