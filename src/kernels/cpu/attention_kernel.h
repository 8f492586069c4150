// Paged causal attention, written once over an instruction set description Isa; included by isa_*.cc only, hence
// the unnamed namespace (see isa.h).
//
// Online softmax (Milakov & Gimelshein 2018; the tiling of FlashAttention, Dao et al. 2022). For each tile of 64
// keys: S = Q K^T, row maximum m, P = 2^(S - m), l = l * c + sum(P), O = O * c + P V with c = 2^(m_old - m). After
// each segment of 512 keys (m, l, O) is merged into the row's total, so a long context can be cut over threads
// at segment borders with the same bits. A masked key has P = 0 exactly and a tile without any visible key
// leaves the state as it was, so a row doesn't notice which other rows shared its tile.
//
// Isa provides, with Word its element of a query (a bf16 pair or a float) and kWordElements 2 or 1:
//   V                                                        vector of float32, see vector_kernels.h
//   Products(tile, head_dim, Word* k, Word* v, ahead)        one tile, packed into k [head_dim / kWordElements][64] and
//                                                            v [64 / kWordElements][padded] unless it can be used as it lies
//     scores(q, q_stride, rows, float* s)                    s [rows][64]
//     weighted_sum(p, rows, corrections, float* o)           o[r] = o[r] * corrections[r] + p[r] V
//   load_query(src, head_dim, Word* dst)                     one row, head_dim / kWordElements words
//   store_weights(V a, V b, Word* dst)                       2 * kWidth weights, in order
// Keys from `count` of a tile on don't exist. Their scores may be anything: they are masked; their weights are 0, and
// weighted_sum never meets a value that was not written.

#include "kernels/cpu/vector_kernels.h"

namespace baton::cpu {
namespace {

inline constexpr float kMinusInfinity = -__builtin_inff();

inline int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

/// Where the 64 keys of a tile lie (KvLayerView has the order inside a block). Those from `count` on don't exist; their pointers
/// are valid but mean nothing. When a block holds whole groups of 16 tokens, only those of 0, 16, 32 and 48 are set.
struct Tile {
  const uint16_t* keys[kTileKeys];    // element i of a key: keys[key][i / 2 * pair_stride + i % 2]
  const uint16_t* values[kTileKeys];  // element i of a value: values[key][i * value_steps[key]]
  uint8_t value_steps[kTileKeys];
  int64_t pair_stride = 0;
  int count = 0;
  bool grouped = false;
};

/// Fetches a later tile's keys, then its values, four lines per step, while the present tile is computed: blocks are
/// scattered, so the hardware can't guess them. head_dim steps are a whole tile; then it does nothing.
/// Two tiles ahead and in the order of memory was best by measurement (docs/performance.md).
class TileAhead {
 public:
  TileAhead(const Tile& tile, int head_dim) : tile_(&tile), lines_(head_dim / 2) {
    left_ = tile.grouped ? (tile.count + 15) / 16 * 2 : 0;
    next_run();
  }

  inline __attribute__((always_inline)) void step() {
    if (left_ == 0) return;
    for (int i = 0; i < 4; ++i) __builtin_prefetch(line_ + i * stride_, 0, 2);
    line_ += 4 * stride_;
    at_ += 4;
    if (at_ >= lines_) {
      --left_;
      next_run();
    }
  }
  void all() {
    while (left_ > 0) step();
  }

 private:
  /// Sixteen keys (or values) are one run: a line per pair of dimensions (or 16 tokens one behind the other).
  void next_run() {
    if (left_ == 0) return;
    const int groups = (tile_->count + 15) / 16, run = 2 * groups - left_;
    const bool keys = run < groups;
    line_ = reinterpret_cast<const char*>(keys ? tile_->keys[16 * run] : tile_->values[16 * (run - groups)]);
    stride_ = keys ? tile_->pair_stride * 2 : 64;
    at_ = 0;
  }

  const Tile* tile_;
  const char* line_ = nullptr;
  int64_t stride_ = 0;  // bytes
  int lines_;           // of a run
  int at_ = 0;
  int left_;            // runs
};

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

/// One tile of one head. They are computed head by head, so that all heads of a block are read before the next block.
struct TileCursor {
  int64_t tile;  // first key
  int head;      // of the task

  void next(const AttentionTask& t) {
    if (++head < t.kv_heads) return;
    head = 0;
    tile += kTileKeys;
  }
};

/// Keys from `end` on don't exist.
inline void find_tile(const AttentionTask& t, const TileCursor& at, int64_t end, Tile* tile) {
  tile->count = static_cast<int>(min64(kTileKeys, end - at.tile));
  tile->grouped = t.block_tokens % 16 == 0;
  tile->pair_stride = 2 * int64_t{t.block_tokens};
  const uint16_t* const head = t.k_pool + (t.kv_head + at.head) * t.head_stride;
  const int step = tile->grouped ? 16 : 1;
  for (int i = 0; i < kTileKeys; i += step) {
    if (i >= tile->count) {
      tile->keys[i] = tile->keys[0];
      tile->values[i] = tile->values[0];
      continue;
    }
    const int64_t pos = at.tile + i, slot = pos % t.block_tokens;
    const uint16_t* const keys = head + t.block_table[pos / t.block_tokens] * t.block_stride;
    const bool alone = slot + 1 == t.block_tokens && slot % 2 == 0;
    tile->keys[i] = keys + 2 * slot;
    tile->values[i] = keys + t.v_offset + slot / 2 * 2 * t.head_dim + slot % 2;
    tile->value_steps[i] = alone ? 1 : 2;
  }
}

/// Where row `r` (of all heads) of a task lies in q and out, in elements.
inline int64_t row_offset(const AttentionTask& t, int r) {
  const int head_rows = static_cast<int>(t.token_end - t.token_begin) * t.group;
  const int head = r / head_rows, in_head = r % head_rows;
  return ((t.token_begin + in_head / t.group) * t.heads + (t.kv_head + head) * t.group + in_head % t.group) *
         int64_t{t.head_dim};
}

/// One tile of one head, into the running state of that head's rows.
template <typename Isa>
void attention_tile(const AttentionTask& t, const AttentionScratch<Isa>& w, const TileCursor& at, const Tile& now,
                    const Tile& later) {
  const int group = t.group, d = t.head_dim, padded = padded_dim(d);
  const int words = d / Isa::kWordElements, weights = kTileKeys / Isa::kWordElements;
  const int first = at.head * static_cast<int>(t.token_end - t.token_begin) * group;
  const int64_t tile = at.tile, first_pos = t.start_pos + t.token_begin;
  // Rows are ordered by token, so those that see nothing of this tile are a prefix (causality) and a suffix
  // (window).
  const int64_t first_token = max64(0, tile - first_pos);
  int64_t last_token = t.token_end - t.token_begin;
  if (t.window > 0) last_token = min64(last_token, tile + kTileKeys - 1 + t.window - first_pos);
  const int r0 = first + static_cast<int>(first_token) * group;
  const int r1 = first + static_cast<int>(last_token) * group;
  if (r0 >= r1) return;

  const float scale = t.scale * 1.4426950408889634f;  // the softmax is in powers of two
  TileAhead ahead(later, d);
  typename Isa::Products products(now, d, w.k, w.v, ahead);
  products.scores(w.q + int64_t{r0} * words, words, r1 - r0, w.s + int64_t{r0} * kTileKeys);
  for (int r = r0; r < r1; ++r) {
    const int64_t pos = first_pos + (r - first) / group;
    const int64_t lowest = t.window > 0 ? pos - t.window + 1 : 0;
    const int visible_begin = static_cast<int>(min64(max64(lowest - tile, 0), kTileKeys));
    const int visible_end = static_cast<int>(min64(pos + 1 - tile, kTileKeys));
    w.correction[r] = soften_row<Isa>(w.s + int64_t{r} * kTileKeys, visible_begin, visible_end, scale, &w.maximum[r],
                                      &w.sum[r], w.p + int64_t{r} * weights);
  }
  products.weighted_sum(w.p + int64_t{r0} * weights, r1 - r0, w.correction + r0, w.o + int64_t{r0} * padded);
}

template <typename Isa>
void attention_task(const AttentionTask& t) {
  using V = typename Isa::V;
  const int d = t.head_dim, padded = padded_dim(d);
  const int rows = static_cast<int>(t.token_end - t.token_begin) * t.group * t.kv_heads;
  const int words = d / Isa::kWordElements;
  AttentionScratch<Isa> w;
  w.place(t.scratch, rows, d);

  const int64_t key_end = t.start_pos + t.token_end;  // of the last token: its own key is visible
  const int64_t key_begin = t.window > 0 ? max64(0, t.start_pos + t.token_begin - t.window + 1) : 0;
  Tile tiles[3];  // this one, the next, the one that is being fetched
  TileCursor ahead = {max64(t.segment_begin * kSegmentKeys, key_begin / kTileKeys * kTileKeys), 0};
  const int64_t task_end = min64(t.segment_end * kSegmentKeys, key_end);
  for (int i = 0; i < 2; ++i, ahead.next(t)) {
    if (ahead.tile >= task_end) break;
    find_tile(t, ahead, key_end, &tiles[i]);
    if (i == 0) TileAhead(tiles[0], d).all();
  }

  for (int r = 0; r < rows; ++r) {
    Isa::load_query(t.q + row_offset(t, r), d, w.q + int64_t{r} * words);
    w.total_maximum[r] = kMinusInfinity;
    w.total_sum[r] = 0;
  }
  for (int64_t i = 0; i < int64_t{rows} * padded; ++i) w.total[i] = 0;

  int turn = 0;
  for (int64_t segment = t.segment_begin; segment < t.segment_end; ++segment) {
    const int64_t end = min64((segment + 1) * kSegmentKeys, key_end);
    for (int r = 0; r < rows; ++r) {
      w.maximum[r] = kMinusInfinity;
      w.sum[r] = 0;
    }
    for (int64_t i = 0; i < int64_t{rows} * padded; ++i) w.o[i] = 0;

    for (TileCursor now = {max64(segment * kSegmentKeys, key_begin / kTileKeys * kTileKeys), 0}; now.tile < end;
         now.next(t)) {
      Tile& later = tiles[(turn + 2) % 3];
      if (ahead.tile < task_end) {
        find_tile(t, ahead, key_end, &later);
        ahead.next(t);
      } else {
        later.count = 0;  // nothing to fetch
      }
      attention_tile<Isa>(t, w, now, tiles[turn], later);
      turn = (turn + 1) % 3;
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
    finish_row<V>(w.total + int64_t{r} * padded, w.total_sum[r], d, t.out + row_offset(t, r));
  }
}

template <typename Isa>
void attention_merge_task(const AttentionTask& t) {
  using V = typename Isa::V;
  const int d = t.head_dim, padded = padded_dim(d), stride = partial_stride(d);
  const int rows = static_cast<int>(t.token_end - t.token_begin) * t.group * t.kv_heads;
  alignas(64) float total[kMaxHeadDim];
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < padded; ++i) total[i] = 0;
    float maximum = kMinusInfinity, sum = 0;
    for (int64_t segment = t.segment_begin; segment < t.segment_end; ++segment) {
      const float* const state = t.partial + ((segment - t.segment_begin) * rows + r) * stride;
      merge_row<V>(state, state[padded], state[padded + 1], padded, total, &maximum, &sum);
    }
    finish_row<V>(total, sum, d, t.out + row_offset(t, r));
  }
}

}  // namespace
}  // namespace baton::cpu
