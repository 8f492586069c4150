// Paged causal attention, written once over an instruction set description Isa; included by isa_*.cc only, hence
// the unnamed namespace (see isa.h).
//
// Online softmax (Milakov & Gimelshein 2018; the tiling of FlashAttention, Dao et al. 2022). For each tile of 64
// keys: S = Q K^T, row maximum m, P = 2^(S - m), l = l * c + sum(P), O = O * c + P V with c = 2^(m_old - m). After
// each segment of 512 keys (m, l, O) is merged into the row's total, so a long context can be cut over threads
// at segment borders with the same bits. A masked key has P = 0 exactly and a tile without any visible key
// leaves the state as it was, so a row doesn't notice which other rows shared its tile.
//
// Isa provides, with Word its packed element (a bf16 pair or a float) and kWordElements 2 or 1:
//   V                                              vector of float32, see vector_kernels.h
//   load_query(src, head_dim, Word* dst)           one row, head_dim / kWordElements words
//   pack_keys(const uint16_t* rows[64], head_dim, Word* tile)     [head_dim / kWordElements][64]
//   pack_values(rows, head_dim, padded, Word* tile)               [64 / kWordElements][padded]
//   scores(q, q_stride, rows, tile, head_dim, float* s)           s [rows][64]
//   store_weights(V a, V b, Word* dst)             2 * kWidth weights, in order
//   weighted_sum(p, rows, tile, padded, corrections, float* o)    o[r] = o[r] * corrections[r] + p[r] V
// rows[i] is null for keys that don't exist; they are packed as zeros.

#pragma once

#include "kernels/cpu/vector_kernels.h"

namespace baton::cpu {
namespace {

inline constexpr float kMinusInfinity = -__builtin_inff();

inline int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

template <typename Isa>
struct AttentionScratch {
  using Word = typename Isa::Word;
  Word* q;       // [rows][head_dim / kWordElements]
  Word* k;       // [head_dim / kWordElements][64]
  Word* v;       // [64 / kWordElements][padded]
  Word* p;       // [rows][64 / kWordElements]
  float* s;      // [rows][64]
  float* o;      // [rows][padded], this segment
  float* total;  // [rows][padded]
  float* correction;                  // [rows]
  float *maximum, *sum;               // [rows], this segment
  float *total_maximum, *total_sum;   // [rows]

  /// Lays the arrays out behind `base` (may be null: only counts). Returns the bytes used.
  size_t place(void* base, int rows, int head_dim) {
    size_t at = 0;
    const auto take = [&](auto*& pointer, size_t count) {
      pointer = reinterpret_cast<__typeof__(&*pointer)>(static_cast<char*>(base) + at);
      at += (count * sizeof(*pointer) + 63) / 64 * 64;
    };
    const size_t n = static_cast<size_t>(rows), d = static_cast<size_t>(padded_dim(head_dim));
    const size_t e = Isa::kWordElements;
    take(q, n * d / e);
    take(k, d * kTileKeys / e);
    take(v, d * kTileKeys / e);
    take(p, n * kTileKeys / e);
    take(s, n * kTileKeys);
    take(o, n * d);
    take(total, n * d);
    take(correction, n);
    take(maximum, n);
    take(sum, n);
    take(total_maximum, n);
    take(total_sum, n);
    return at;
  }
};

template <typename Isa>
size_t attention_scratch_bytes(int rows, int head_dim) {
  // Counted from a dummy base, since arithmetic on a null pointer is undefined.
  alignas(64) static char dummy[64];
  AttentionScratch<Isa> scratch;
  return scratch.place(dummy, rows, head_dim);
}

/// 2^x of one number by the vector code, so that scalars and lanes agree.
template <typename V>
inline float exp2_scalar(float x) {
  alignas(64) float lanes[V::kWidth];
  V::store(lanes, exp2_of(V::set(x)));
  return lanes[0];
}

/// Merges a segment's state into a row's total; both may be empty (maximum -inf, sums zero).
template <typename V>
inline void merge_row(const float* o, float maximum, float sum, int padded, float* total, float* total_maximum,
                      float* total_sum) {
  const float joint = maximum > *total_maximum ? maximum : *total_maximum;
  if (joint == kMinusInfinity) return;
  const float keep = exp2_scalar<V>(*total_maximum - joint), add = exp2_scalar<V>(maximum - joint);
  for (int i = 0; i < padded; i += V::kWidth) {
    const V scaled = V::mul(V::load(total + i), V::set(keep));
    V::store(total + i, V::fma(V::load(o + i), V::set(add), scaled));
  }
  *total_sum = *total_sum * keep + sum * add;
  *total_maximum = joint;
}

/// out = total / sum. Adding +0 turns -0 into +0: the only bit that a masked key could have changed.
template <typename V>
inline void finish_row(const float* total, float sum, int head_dim, uint16_t* out) {
  const V inverse = V::set(sum > 0 ? 1.0f / sum : 0.0f);
  for (int i = 0; i < head_dim; i += V::kWidth) {
    const int64_t n = min64(V::kWidth, head_dim - i);
    V::store_bf16_part(out + i, V::add(V::mul(V::load(total + i), inverse), V::set(0.0f)), n);
  }
}

/// Scores of one row to weights; updates the row's maximum and sum and returns the correction of its old state.
/// Keys outside [visible_begin, visible_end) of the tile are masked.
template <typename Isa>
inline float soften_row(float* s, int visible_begin, int visible_end, float scale, float* maximum, float* sum,
                        typename Isa::Word* p) {
  using V = typename Isa::V;
  constexpr int kVectors = kTileKeys / V::kWidth;
  for (int i = 0; i < visible_begin; ++i) s[i] = kMinusInfinity;
  for (int i = visible_end; i < kTileKeys; ++i) s[i] = kMinusInfinity;
  V x[kVectors];
  for (int i = 0; i < kVectors; ++i) x[i] = V::mul(V::load(s + i * V::kWidth), V::set(scale));
  V highest = x[0];
  for (int i = 1; i < kVectors; ++i) highest = V::max(highest, x[i]);
  const float tile_maximum = V::reduce_max(highest);
  const float joint = tile_maximum > *maximum ? tile_maximum : *maximum;
  // A row that has seen no key yet keeps -inf; subtracting 0 instead makes every weight 2^-inf = 0.
  const float base = joint == kMinusInfinity ? 0.0f : joint;
  for (int i = 0; i < kVectors; ++i) x[i] = exp2_of(V::sub(x[i], V::set(base)));
  for (int i = 0; i < kVectors; i += 2) {
    Isa::store_weights(x[i], x[i + 1], p + i * V::kWidth / Isa::kWordElements);
  }
  V tile_sum = x[0];
  for (int i = 1; i < kVectors; ++i) tile_sum = V::add(tile_sum, x[i]);
  const float correction = exp2_scalar<V>(*maximum - base);
  *sum = *sum * correction + V::reduce_add(tile_sum);
  *maximum = joint;
  return correction;
}

inline const uint16_t* key_row(const AttentionTask& t, const uint16_t* pool, int64_t position) {
  const int64_t block = t.block_table[position / t.block_tokens];
  return pool + block * t.block_stride + t.kv_head * t.head_stride +
         (position % t.block_tokens) * t.head_dim;
}

/// Fills rows[0..63] with the tile's keys (or values) below `end`.
inline void gather_rows(const AttentionTask& t, const uint16_t* pool, int64_t tile_begin, int64_t end,
                        const uint16_t** rows) {
  int i = 0;
  while (i < kTileKeys && tile_begin + i < end) {
    const uint16_t* row = key_row(t, pool, tile_begin + i);
    const int64_t in_block = t.block_tokens - (tile_begin + i) % t.block_tokens;
    const int64_t stop = min64(min64(i + in_block, kTileKeys), end - tile_begin);
    for (; i < stop; ++i, row += t.head_dim) rows[i] = row;
  }
  for (; i < kTileKeys; ++i) rows[i] = nullptr;
}

/// Asks for the rows of the next tile while this one is computed: blocks are scattered, the hardware can't guess.
inline void prefetch_rows(const uint16_t* const* rows, int head_dim) {
  for (int i = 0; i < kTileKeys; ++i) {
    if (rows[i] == nullptr) return;
    const char* const row = reinterpret_cast<const char*>(rows[i]);
    for (int at = 0; at < head_dim * 2; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

template <typename Isa>
void attention_task(const AttentionTask& t) {
  using V = typename Isa::V;
  const int group = t.group, d = t.head_dim, padded = padded_dim(d);
  const int rows = static_cast<int>(t.token_end - t.token_begin) * group;
  const int words = d / Isa::kWordElements;
  AttentionScratch<Isa> w;
  w.place(t.scratch, rows, d);

  const int64_t row_stride = int64_t{t.heads} * d;
  const auto row_offset = [&](int r) {
    return (t.token_begin + r / group) * row_stride + (int64_t{t.kv_head} * group + r % group) * d;
  };
  for (int r = 0; r < rows; ++r) Isa::load_query(t.q + row_offset(r), d, w.q + int64_t{r} * words);

  const int64_t first_pos = t.start_pos + t.token_begin;
  const int64_t key_end = t.start_pos + t.token_end;  // of the last token: its own key is visible
  const int64_t key_begin = t.window > 0 ? max64(0, first_pos - t.window + 1) : 0;
  const float scale = t.scale * 1.4426950408889634f;  // the softmax is in powers of two

  for (int r = 0; r < rows; ++r) {
    w.total_maximum[r] = kMinusInfinity;
    w.total_sum[r] = 0;
  }
  for (int64_t i = 0; i < int64_t{rows} * padded; ++i) w.total[i] = 0;

  for (int64_t segment = t.segment_begin; segment < t.segment_end; ++segment) {
    const int64_t begin = max64(segment * kSegmentKeys, key_begin / kTileKeys * kTileKeys);
    const int64_t end = min64((segment + 1) * kSegmentKeys, key_end);
    for (int r = 0; r < rows; ++r) {
      w.maximum[r] = kMinusInfinity;
      w.sum[r] = 0;
    }
    for (int64_t i = 0; i < int64_t{rows} * padded; ++i) w.o[i] = 0;

    const uint16_t* k_rows[kTileKeys];
    const uint16_t* v_rows[kTileKeys];
    for (int64_t tile = begin; tile < end; tile += kTileKeys) {
      // Rows are ordered by token, so those that see nothing of this tile are a prefix (causality) and a suffix
      // (window).
      const int64_t first_token = max64(0, tile - first_pos);
      int64_t last_token = t.token_end - t.token_begin;
      if (t.window > 0) last_token = min64(last_token, tile + kTileKeys - 1 + t.window - first_pos);
      const int r0 = static_cast<int>(first_token) * group;
      const int r1 = static_cast<int>(last_token) * group;
      if (r0 >= r1) continue;

      gather_rows(t, t.k_pool, tile, key_end, k_rows);
      gather_rows(t, t.v_pool, tile, key_end, v_rows);
      Isa::pack_keys(k_rows, d, w.k);
      Isa::pack_values(v_rows, d, padded, w.v);
      if (tile + kTileKeys < end) {
        gather_rows(t, t.k_pool, tile + kTileKeys, key_end, k_rows);
        gather_rows(t, t.v_pool, tile + kTileKeys, key_end, v_rows);
        prefetch_rows(k_rows, d);
        prefetch_rows(v_rows, d);
      }
      Isa::scores(w.q + int64_t{r0} * words, words, r1 - r0, w.k, d, w.s + int64_t{r0} * kTileKeys);
      for (int r = r0; r < r1; ++r) {
        const int64_t pos = first_pos + r / group;
        const int64_t lowest = t.window > 0 ? pos - t.window + 1 : 0;
        const int visible_begin = static_cast<int>(min64(max64(lowest - tile, 0), kTileKeys));
        const int visible_end = static_cast<int>(min64(pos + 1 - tile, kTileKeys));
        w.correction[r] =
            soften_row<Isa>(w.s + int64_t{r} * kTileKeys, visible_begin, visible_end, scale, &w.maximum[r],
                            &w.sum[r], w.p + int64_t{r} * (kTileKeys / Isa::kWordElements));
      }
      Isa::weighted_sum(w.p + int64_t{r0} * (kTileKeys / Isa::kWordElements), r1 - r0, w.v, padded,
                        w.correction + r0, w.o + int64_t{r0} * padded);
    }
    if (t.partial != nullptr) {
      const int stride = partial_stride(d);
      for (int r = 0; r < rows; ++r) {
        float* const state = t.partial + ((segment - t.segment_begin) * rows + r) * stride;
        for (int i = 0; i < padded; ++i) state[i] = w.o[int64_t{r} * padded + i];
        state[padded] = w.maximum[r];
        state[padded + 1] = w.sum[r];
      }
      continue;
    }
    for (int r = 0; r < rows; ++r) {
      merge_row<V>(w.o + int64_t{r} * padded, w.maximum[r], w.sum[r], padded, w.total + int64_t{r} * padded,
                   &w.total_maximum[r], &w.total_sum[r]);
    }
  }
  if (t.partial != nullptr) return;
  for (int r = 0; r < rows; ++r) {
    finish_row<V>(w.total + int64_t{r} * padded, w.total_sum[r], d, t.out + row_offset(r));
  }
}

template <typename Isa>
void attention_merge_task(const AttentionTask& t) {
  using V = typename Isa::V;
  const int d = t.head_dim, padded = padded_dim(d), stride = partial_stride(d);
  const int rows = static_cast<int>(t.token_end - t.token_begin) * t.group;
  alignas(64) float total[kMaxHeadDim];
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < padded; ++i) total[i] = 0;
    float maximum = kMinusInfinity, sum = 0;
    for (int64_t segment = t.segment_begin; segment < t.segment_end; ++segment) {
      const float* const state = t.partial + ((segment - t.segment_begin) * rows + r) * stride;
      merge_row<V>(state, state[padded], state[padded + 1], padded, total, &maximum, &sum);
    }
    uint16_t* const out = t.out + (t.token_begin + r / t.group) * int64_t{t.heads} * d +
                          (int64_t{t.kv_head} * t.group + r % t.group) * d;
    finish_row<V>(total, sum, d, out);
  }
}

}  // namespace
}  // namespace baton::cpu
