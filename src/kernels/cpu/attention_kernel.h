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
//   V                                                                   vector of float32, see vector_kernels.h
//   load_query(src, head_dim, Word* dst)                                one row, head_dim / kWordElements words
//   pack_keys(const TileRows&, head_dim, Word* tile, ahead)             [head_dim / kWordElements][64]
//   pack_values(const TileRows&, head_dim, padded, Word* tile, ahead)   [64 / kWordElements][padded]
//   scores(q, q_stride, rows, tile, head_dim, float* s, ahead)          s [rows][64]
//   store_weights(V a, V b, Word* dst)                                  2 * kWidth weights, in order
//   weighted_sum(p, rows, count, tile, padded, corrections, float* o, ahead)   o[r] = o[r] * corrections[r] + p[r] V
// Keys from `count` of a tile on don't exist. Their scores may be anything: they are masked; their weights are 0, and
// weighted_sum never meets a value that was not packed.

#include "kernels/cpu/vector_kernels.h"

namespace baton::cpu {
namespace {

inline constexpr float kMinusInfinity = -__builtin_inff();

inline int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

/// Where the 64 keys of a tile lie. Those from `count` on don't exist; their pointers are valid but mean nothing.
struct TileRows {
  const uint16_t* k[kTileKeys];
  int64_t v_offset;  // elements from a key to its value
  int count;
};

/// Fetches a later tile's keys, then its values, four lines per step, while the present tile is computed: blocks are
/// scattered, so the hardware can't guess them. The two packing phases make head_dim / 2 steps each, which is one pass;
/// during the products of a few rows (decode) the values are asked for again, because a full queue drops prefetches.
/// Two tiles ahead and in the order of memory was best by measurement (docs/performance.md).
class TileAhead {
 public:
  TileAhead(const TileRows& tile, int head_dim) : tile_(tile), row_bytes_(head_dim * 2) {}

  inline __attribute__((always_inline)) void step() {
    const char* const line = reinterpret_cast<const char*>(tile_.k[row_] + offset_) + at_;
    for (int i = 0; i < 4; ++i) __builtin_prefetch(line + 64 * i, 0, 2);
    at_ += 256;
    if (at_ < row_bytes_) return;
    at_ = 0;
    if (++row_ == kTileKeys) {
      row_ = 0;
      offset_ = tile_.v_offset;
    }
  }

  /// Goes on where a copy of this stopped.
  void resume(const TileAhead& copy) {
    offset_ = copy.offset_;
    at_ = copy.at_;
    row_ = copy.row_;
  }

 private:
  const TileRows& tile_;
  int64_t offset_ = 0;  // elements: 0 in the keys, then v_offset
  int row_bytes_;
  int at_ = 0;
  int row_ = 0;
};

/// Fetches a task's first tile, which nothing has fetched ahead: all keys, then all values.
inline void fetch_tile(const TileRows& tile, int head_dim) {
  for (int part = 0; part < 2; ++part) {
    for (int key = 0; key < tile.count; ++key) {
      const char* const row = reinterpret_cast<const char*>(tile.k[key] + part * tile.v_offset);
      for (int at = 0; at < head_dim * 2; at += 64) __builtin_prefetch(row + at, 0, 2);
    }
  }
}

template <typename Isa>
struct AttentionScratch {
  using Word = typename Isa::Word;
  Word* q;                           // [rows][head_dim / kWordElements]
  Word* k;                           // [head_dim / kWordElements][64]
  Word* v;                           // [64 / kWordElements][padded]
  Word* p;                           // [rows][64 / kWordElements]
  float* s;                          // [rows][64]
  float* o;                          // [rows][padded], this segment
  float* total;                      // [rows][padded]
  float* correction;                 // [rows]
  float *maximum, *sum;              // [rows], this segment
  float *total_maximum, *total_sum;  // [rows]

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

/// Finds the rows of the tile that begins at `tile_begin`; keys from `end` on don't exist.
inline void gather_rows(const AttentionTask& t, int64_t tile_begin, int64_t end, TileRows* tile) {
  tile->count = static_cast<int>(min64(kTileKeys, end - tile_begin));
  tile->v_offset = t.v_offset;
  int64_t block = tile_begin / t.block_tokens, in_block = tile_begin % t.block_tokens;
  for (int i = 0; i < tile->count; ++block, in_block = 0) {
    const uint16_t* row =
        t.k_pool + t.block_table[block] * t.block_stride + t.kv_head * t.head_stride + in_block * t.head_dim;
    const int stop = static_cast<int>(min64(i + t.block_tokens - in_block, tile->count));
    for (; i < stop; ++i, row += t.head_dim) tile->k[i] = row;
  }
  for (int i = tile->count; i < kTileKeys; ++i) tile->k[i] = tile->k[0];
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
  TileRows tiles[3];  // this one, the next, the one that is being fetched

  for (int64_t segment = t.segment_begin; segment < t.segment_end; ++segment) {
    const int64_t begin = max64(segment * kSegmentKeys, key_begin / kTileKeys * kTileKeys);
    const int64_t end = min64((segment + 1) * kSegmentKeys, key_end);
    for (int r = 0; r < rows; ++r) {
      w.maximum[r] = kMinusInfinity;
      w.sum[r] = 0;
    }
    for (int64_t i = 0; i < int64_t{rows} * padded; ++i) w.o[i] = 0;

    if (begin < end) {
      gather_rows(t, begin, key_end, &tiles[0]);
      if (segment == t.segment_begin) fetch_tile(tiles[0], d);
      gather_rows(t, min64(begin + kTileKeys, key_end - 1), key_end, &tiles[1]);
    }
    int turn = 0;
    for (int64_t tile = begin; tile < end; tile += kTileKeys) {
      const TileRows& now = tiles[turn];
      TileRows& later = tiles[(turn + 2) % 3];
      if (tile + 2 * kTileKeys < key_end) {
        gather_rows(t, tile + 2 * kTileKeys, key_end, &later);
      } else {
        later = now;
      }
      turn = (turn + 1) % 3;
      // Rows are ordered by token, so those that see nothing of this tile are a prefix (causality) and a suffix
      // (window).
      const int64_t first_token = max64(0, tile - first_pos);
      int64_t last_token = t.token_end - t.token_begin;
      if (t.window > 0) last_token = min64(last_token, tile + kTileKeys - 1 + t.window - first_pos);
      const int r0 = static_cast<int>(first_token) * group;
      const int r1 = static_cast<int>(last_token) * group;
      if (r0 >= r1) continue;

      TileAhead ahead(later, d);
      Isa::pack_keys(now, d, w.k, ahead);
      Isa::pack_values(now, d, padded, w.v, ahead);
      Isa::scores(w.q + int64_t{r0} * words, words, r1 - r0, w.k, d, w.s + int64_t{r0} * kTileKeys, ahead);
      for (int r = r0; r < r1; ++r) {
        const int64_t pos = first_pos + r / group;
        const int64_t lowest = t.window > 0 ? pos - t.window + 1 : 0;
        const int visible_begin = static_cast<int>(min64(max64(lowest - tile, 0), kTileKeys));
        const int visible_end = static_cast<int>(min64(pos + 1 - tile, kTileKeys));
        w.correction[r] =
            soften_row<Isa>(w.s + int64_t{r} * kTileKeys, visible_begin, visible_end, scale, &w.maximum[r], &w.sum[r],
                            w.p + int64_t{r} * (kTileKeys / Isa::kWordElements));
      }
      Isa::weighted_sum(w.p + int64_t{r0} * (kTileKeys / Isa::kWordElements), r1 - r0, now.count, w.v, padded,
                        w.correction + r0, w.o + int64_t{r0} * padded, ahead);
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
