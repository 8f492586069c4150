#include <cuda_bf16.h>

#include <initializer_list>

#include "kernels/cuda/prefill_arguments.h"
#include "kernels/cuda/sm90.cuh"

/// Causal attention of query tiles over a paged cache on Hopper. What it computes, and that a row's bits depend on nothing but
/// its own sequence, is as in attention_prefill.cu.
///
/// A thread block stays for the whole launch and takes items (a tile and a head) in turn. Warpgroup 0 brings Q, K and V into
/// shared memory with the copy engine, a box per cache block and panel, two key tiles ahead. Warpgroups 1 and 2 have 64
/// query rows each: while one turns scores into weights, the other one's products keep the tensor cores busy (they hand
/// each other the turn), and inside a warpgroup the scores of the next key tile, be it of the next item, are computed beside
/// weights times V of this one.
///
///   full_*  counts the copied bytes         waited for by the consumers
///   empty_* counts the consumers' 8 warps   waited for by the producer
namespace {

using namespace baton::cuda;
using namespace baton::cuda::sm90;

constexpr int kRows = kPrefillSm90Rows;
constexpr int kKeys = kPrefillSm90Keys;
constexpr int kStages = kPrefillSm90Stages;
constexpr int kPanelBytes = kPrefillSm90PanelBytes;
constexpr int kConsumers = 256;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kRows == 128 && kKeys == 128, "a panel has 128 rows, a consumer 64 of them");

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

/// A place in a ring of stages, and the parity of its barrier's phase.
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// What an item asks for; `tiles` 0: nothing.
struct Item {
  int32_t head, first_row, tokens, first_pos, table_offset;
  int32_t first_key;  // a multiple of kKeys
  int32_t tiles;      // of keys
  __device__ __forceinline__ int32_t key_end() const { return first_pos + tokens; }
};

/// In shared memory. An item is announced with its Q and is read until its rows are stored; by then no more than three others
/// have been announced, since Q has two places.
struct Exchange {
  uint64_t full_q[kStages], empty_q[kStages];
  uint64_t full_k[kStages], empty_k[kStages];
  uint64_t full_v[kStages], empty_v[kStages];
  Item items[4];
};
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// The item of a round. Blocks take turns in going first: tiles come longest first, so the sums come out even.
__device__ __forceinline__ bool find_item(const PrefillSm90Arguments& a, int32_t round, Item& item) {
  const int32_t place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const int32_t index = round * gridDim.x + place;
  item.tiles = 0;
  if (round * gridDim.x >= a.tile_count * a.common.heads) return false;
  if (index >= a.tile_count * a.common.heads) return true;
  const int32_t tile = index / a.common.heads;
  item.head = index % a.common.heads;
  const int32_t sequence_index = a.common.tiles[2 * tile];
  const int32_t token_begin = a.common.tiles[2 * tile + 1];
  if (sequence_index < 0 || sequence_index >= a.common.sequences_count) return true;
  const DeviceSequence sequence = a.common.sequences[sequence_index];
  if (token_begin >= sequence.rows) return true;
  item.first_row = sequence.first_row + token_begin;
  item.tokens = min(kRows, sequence.rows - token_begin);
  item.first_pos = sequence.start_pos + token_begin;
  item.table_offset = sequence.table_offset;
  item.first_key = a.common.window > 0 ? max(0, item.first_pos - a.common.window + 1) / kKeys * kKeys : 0;
  item.tiles = (item.key_end() - item.first_key + kKeys - 1) / kKeys;
  return true;
}

template <int Width>
struct Shared {
  static constexpr int kPanels = prefill_sm90_panels(Width);
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kQ = 0, kK = kStages * kTileBytes, kV = kK + kStages * kTileBytes;
};

/// One warp's way through K or V, a key tile after the other. Only boxes that hold tokens of the sequence are copied; the
/// other rows stay as they are. Everything but the copy is the same in all lanes, so that it lives in uniform registers.
template <int Width>
class KeyLoader {
 public:
  using S = Shared<Width>;
  __device__ __forceinline__ KeyLoader(const PrefillSm90Arguments& a, const TensorMap& map, uint64_t* full, uint64_t* empty,
                                       uint32_t to)
      : a_(a), map_(map), full_(shared_address(full)), empty_(shared_address(empty)), to_(to) {}

  __device__ __forceinline__ void load(const Item& item) {
    const int32_t box_tokens = a_.box_tokens, block_tokens = a_.common.kv.block_tokens;
    const uint32_t box_bytes = box_tokens * kPrefillSm90PanelColumns * 2;
    const int32_t kv_head = item.head / (a_.common.heads / a_.common.kv.kv_heads);
    const int32_t* table = a_.common.block_tables + item.table_offset + item.first_key / block_tokens;
    int32_t token = item.first_key % block_tokens;
    int32_t left = (item.key_end() - item.first_key + box_tokens - 1) / box_tokens;
    while (left > 0) {
      const int32_t boxes = min(left, kKeys / box_tokens);
      left -= boxes;
      barrier_wait(empty_ + place_.stage * 8, place_.parity ^ 1);
      const uint32_t full = full_ + place_.stage * 8;
      if (threadIdx.x % 32 == 0) barrier_expect(full, boxes * S::kPanels * box_bytes);
      __syncwarp();
      uint32_t to = to_ + place_.stage * S::kTileBytes;
#pragma unroll 1
      for (int32_t box = 0; box < boxes; ++box, to += box_bytes) {
        const int32_t block = *table;
        if (threadIdx.x % 32 == 0) {
#pragma unroll
          for (int panel = 0; panel < S::kPanels; ++panel) {
            copy_box_4d(to + panel * kPanelBytes, &map_, full, panel * kPrefillSm90PanelColumns, token, kv_head, block);
          }
        }
        token += box_tokens;
        if (token == block_tokens) {
          token = 0;
          ++table;
        }
      }
      place_.advance();
    }
  }

 private:
  const PrefillSm90Arguments& a_;
  const TensorMap& map_;
  const uint32_t full_, empty_, to_;
  Place place_;
};

/// One lane: announces an item and brings its Q.
template <int Width>
__device__ __forceinline__ void load_q(const PrefillSm90Arguments& a, const Item& item, uint32_t full, uint32_t to) {
  using S = Shared<Width>;
  if (item.tiles == 0) {
    barrier_arrive(full);
    return;
  }
  barrier_expect(full, S::kTileBytes);
#pragma unroll
  for (int panel = 0; panel < S::kPanels; ++panel) {
    copy_box_3d(to + panel * kPanelBytes, &a.q, full, panel * kPrefillSm90PanelColumns, item.head, item.first_row);
  }
}

/// Warp 0 brings Q and K, warp 1 brings V.
template <int Width>
__device__ __forceinline__ void produce(const PrefillSm90Arguments& a, Exchange& exchange, uint32_t shared) {
  using S = Shared<Width>;
  const int warp = threadIdx.x / 32;
  if (warp > 1) return;
  KeyLoader<Width> loader(a, warp == 0 ? a.k : a.v, warp == 0 ? exchange.full_k : exchange.full_v,
                          warp == 0 ? exchange.empty_k : exchange.empty_v, shared + (warp == 0 ? S::kK : S::kV));
  Place q;
  int announced = 0;
  Item item;
  for (int32_t round = 0;; ++round) {
    const bool more = find_item(a, round, item);
    if (more && item.tiles == 0) continue;
    if (warp == 0) {
      barrier_wait(shared_address(&exchange.empty_q[q.stage]), q.parity ^ 1);
      if (threadIdx.x == 0) {
        exchange.items[announced % 4] = item;
        load_q<Width>(a, item, shared_address(&exchange.full_q[q.stage]), shared + S::kQ + q.stage * S::kTileBytes);
      }
      __syncwarp();
      ++announced;
      q.advance();
    }
    if (!more) return;
    loader.load(item);
  }
}

/// 64 query rows of a tile: a thread has two of them, 8 apart, and of these two columns of every eight.
template <int Width>
class Rows {
 public:
  using S = Shared<Width>;
  static constexpr int kScores = kKeys / 2, kOutputs = Width / 2;

  __device__ __forceinline__ Rows(const PrefillSm90Arguments& a, Exchange& exchange, uint32_t shared, int consumer)
      : a_(a.common), exchange_(exchange), shared_(shared), consumer_(consumer) {
    warp_ = threadIdx.x / 32 % 4;
    lane_ = threadIdx.x % 32;
  }

  __device__ __forceinline__ void run() {
    float s[kScores], o[kOutputs];
    uint32_t p[kKeys / 16 * 4];
    if (!begin_item()) return;
    barrier_wait(shared_address(&exchange_.full_k[k_.stage]), k_.parity);
    scores(s);
    multiply_wait<0>();
    pin(s);
    scores_done();
    mask(s);
    float correction[2];
    weigh(s, correction);
    to_bf16(s, p);
    bool empty = true;  // O

    for (;;) {
      const bool last = uniform(tiles_left_ == 0);
      if (last) {
        finish_v();
        ++item_;
        if (!begin_item()) break;
      }
      barrier_wait(shared_address(&exchange_.full_k[k_.stage]), k_.parity);
      named_sync(1 + consumer_, kConsumers);
      scores(s);
      barrier_wait(shared_address(&exchange_.full_v[v_.stage]), v_.parity);
      weighted_sum(p, o, !empty);
      named_arrive(2 - consumer_, kConsumers);
      multiply_wait<1>();
      pin(s);
      scores_done();
      const float finished[2] = {sum_[0], sum_[1]};
      if (last) begin_rows();
      mask(s);
      weigh(s, correction);
      computed_by_now(sum_[0] + sum_[1]);
      multiply_wait<0>();
      pin(o);
      // By 1 mostly: a maximum that stands for long is found early.
      if (__any_sync(0xffffffffu, !last && (correction[0] != 1.0f || correction[1] != 1.0f))) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) o[i] *= correction[i / 2 % 2];
      }
      pin(o);
      pin(p);
      release(exchange_.empty_v[v_.stage]);
      v_.advance();
      if (last) store(exchange_.items[(item_ - 1) % 4], o, finished);
      empty = last;
      to_bf16(s, p);
    }

    barrier_wait(shared_address(&exchange_.full_v[v_.stage]), v_.parity);
    weighted_sum(p, o, !empty);
    multiply_wait<0>();
    pin(o);
    store(exchange_.items[(item_ - 1) % 4], o, sum_);
  }

 private:
  /// Of the item after this one, once its Q is there; false: there is none.
  __device__ __forceinline__ bool begin_item() {
    barrier_wait(shared_address(&exchange_.full_q[q_.stage]), q_.parity);
    const Item& item = exchange_.items[item_ % 4];
    tiles_left_ = item.tiles;
    if (uniform(tiles_left_ == 0)) return false;
    first_key_ = item.first_key - kKeys;
    if (item_ == 0) begin_rows();
    return true;
  }

  __device__ __forceinline__ void begin_rows() {
    first_pos_ = exchange_.items[item_ % 4].first_pos + consumer_ * 64;
    maximum_[0] = maximum_[1] = -INFINITY;
    sum_[0] = sum_[1] = 0.0f;
  }

  /// The scores of a tile were computed: its K, and after the last tile Q, are not needed any more.
  __device__ __forceinline__ void scores_done() {
    release(exchange_.empty_k[k_.stage]);
    k_.advance();
    first_key_ += kKeys;
    if (uniform(--tiles_left_ == 0)) {
      release(exchange_.empty_q[q_.stage]);
      q_.advance();
    }
  }

  __device__ __forceinline__ void release(uint64_t& barrier) {
    if (lane_ == 0) barrier_arrive(shared_address(&barrier));
  }

  /// S = Q K^T, in the background.
  __device__ __forceinline__ void scores(float (&s)[kScores]) {
    const uint64_t q = k_major(shared_ + S::kQ + q_.stage * S::kTileBytes + consumer_ * (kPanelBytes / 2));
    const uint64_t k = k_major(shared_ + S::kK + k_.stage * S::kTileBytes);
    pin(s);
    multiply_begin();
#pragma unroll
    for (int step = 0; step < Width / 16; ++step) {
      const uint32_t offset = (step / 4 * kPanelBytes + step % 4 * 32) >> 4;
      multiply_shared<kKeys>(s, q + offset, k + offset, step > 0);
    }
    multiply_commit();
  }

  /// O (+)= P V, in the background.
  __device__ __forceinline__ void weighted_sum(uint32_t (&p)[kKeys / 16 * 4], float (&o)[kOutputs], bool add) {
    const uint64_t v = n_major(shared_ + S::kV + v_.stage * S::kTileBytes, kPanelBytes);
    pin(o);
    pin(p);
    multiply_begin();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      multiply_registers<Width>(o, p + step * 4, v + ((step * 2048) >> 4), step > 0 || add);
    }
    multiply_commit();
  }

  __device__ __forceinline__ void mask(float (&s)[kScores]) {
    const bool future = first_key_ + kKeys - 1 > first_pos_;
    const bool past = a_.window > 0 && first_key_ <= first_pos_ + 63 - a_.window;
    if (!uniform(future || past)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t last = first_pos_ + warp_ * 16 + lane_ / 4 + r * 8 - first_key_ - lane_ % 4 * 2;
      const int32_t before = a_.window > 0 ? last - a_.window : -1;
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i) {
        const int32_t column = i / 2 * 8 + i % 2;
        float& score = s[i / 2 * 4 + r * 2 + i % 2];
        if (column > last || column <= before) score = -INFINITY;
      }
    }
  }

  /// Scores become weights relative to the new maximum; `correction`: what weights so far have to be multiplied by.
  __device__ __forceinline__ void weigh(float (&s)[kScores], float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = maximum_[r];
#pragma unroll
      for (int i = 0; i < kScores / 4; ++i) largest = fmaxf(largest, fmaxf(s[i * 4 + r * 2], s[i * 4 + r * 2 + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      // Exactly 1 when the maximum stays: a product fused with this difference would not give 0.
      const float finite = largest == -INFINITY ? 0.0f : largest;
      correction[r] = exp2_fast((maximum_[r] - finite) * a_.scale_log2);
      maximum_[r] = largest;
      const float reference = finite * a_.scale_log2;
      float sum = sum_[r] * correction[r];
#pragma unroll
      for (int i = 0; i < kScores / 4; ++i) {
        float& x = s[i * 4 + r * 2];
        float& y = s[i * 4 + r * 2 + 1];
        x = exp2_fast(fmaf(x, a_.scale_log2, -reference));
        y = exp2_fast(fmaf(y, a_.scale_log2, -reference));
        sum += x + y;
      }
      sum_[r] = sum;
    }
  }

  __device__ __forceinline__ void to_bf16(const float (&s)[kScores], uint32_t (&p)[kKeys / 16 * 4]) {
#pragma unroll
    for (int i = 0; i < kKeys / 16 * 4; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
  }

  /// An item's last tile: rows of V behind the sequence's last token become zeros. Weights of 0 do not help against a NaN that
  /// lies there. Both consumers write the same.
  __device__ __forceinline__ void finish_v() {
    const Item& item = exchange_.items[item_ % 4];
    const int32_t keys = item.key_end() - first_key_;
    if (keys >= kKeys) return;
    barrier_wait(shared_address(&exchange_.full_v[v_.stage]), v_.parity);
    const uint32_t v = shared_ + S::kV + v_.stage * S::kTileBytes;
    const int words = (kKeys - keys) * 8;  // of 16 bytes, per panel
    for (int i = threadIdx.x % 128; i < words * S::kPanels; i += 128) {
      const uint32_t to = v + i / words * kPanelBytes + keys * 128 + i % words * 16;
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
    }
    fence_shared_proxy();
    named_sync(3 + consumer_, 128);
  }

  __device__ __forceinline__ void store(const Item& item, float (&o)[kOutputs], const float (&sums)[2]) {
    const int32_t tokens = item.tokens;
    const int quad = lane_ % 4;
    const int64_t row_stride = static_cast<int64_t>(a_.heads) * a_.kv.head_dim;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sums[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = reciprocal_fast(sum);
      const int32_t row = consumer_ * 64 + warp_ * 16 + lane_ / 4 + r * 8;
      uint16_t* out = a_.out + (static_cast<int64_t>(item.first_row) + row) * row_stride + item.head * a_.kv.head_dim;
#pragma unroll
      for (int group = 0; group < Width / 32; ++group) {
        // Four threads have two columns each of four times eight: a transposition gives each one of the eights.
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = (group * 4 + i) * 4 + r * 2;
          w[i] = pack(o[at] * inverse, o[at + 1] * inverse);
        }
        // No branches: with one that lanes may take differently ptxas gives up uniform registers in the loop around this.
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t got = __shfl_xor_sync(0xffffffffu, quad & 1 ? w[i] : w[i + 1], 1);
          w[i] = quad & 1 ? got : w[i];
          w[i + 1] = quad & 1 ? w[i + 1] : got;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t got = __shfl_xor_sync(0xffffffffu, quad & 2 ? w[i] : w[i + 2], 2);
          w[i] = quad & 2 ? got : w[i];
          w[i + 2] = quad & 2 ? w[i + 2] : got;
        }
        const int32_t column = (group * 4 + quad) * 8;
        store_if(row < tokens && column < a_.kv.head_dim, out + column, w);
      }
    }
  }

  const PrefillArguments& a_;
  Exchange& exchange_;
  const uint32_t shared_;
  const int consumer_;
  int warp_, lane_;
  Place q_, k_, v_;     // of Q and K for the next scores, of V for the next sum
  int item_ = 0;        // whose scores are computed
  int32_t tiles_left_;  // of it
  int32_t first_key_;   // of its tile before those
  int32_t first_pos_;
  float maximum_[2], sum_[2];
};

template <int Width>
__device__ __forceinline__ void attend(const PrefillSm90Arguments& a) {
  extern __shared__ unsigned char dynamic_shared[];
  __shared__ Exchange exchange;
  const uint32_t shared = (shared_address(dynamic_shared) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      for (uint64_t* full : {&exchange.full_q[i], &exchange.full_k[i], &exchange.full_v[i]}) {
        barrier_init(shared_address(full), 1);
      }
      for (uint64_t* empty : {&exchange.empty_q[i], &exchange.empty_k[i], &exchange.empty_v[i]}) {
        barrier_init(shared_address(empty), kConsumers / 32);
      }
    }
    barrier_init_done();
  } else if (threadIdx.x == 32) {
    for (const TensorMap* map : {&a.q, &a.k, &a.v}) prefetch_map(map);
  }
  __syncthreads();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    registers_down<kProducerRegisters>();
    produce<Width>(a, exchange, shared);
  } else {
    registers_up<kConsumerRegisters>();
    const int consumer = uniform(warpgroup == 2) ? 1 : 0;
    if (consumer == 1) named_arrive(1, kConsumers);
    Rows<Width>(a, exchange, shared, consumer).run();
  }
}

}  // namespace

#define BATON_PREFILL_SM90_KERNEL(width)                                                      \
  extern "C" __global__ void __launch_bounds__(kPrefillSm90Threads, 1)                        \
      baton_attention_prefill_sm90_##width(const __grid_constant__ PrefillSm90Arguments a) {  \
    attend<width>(a);                                                                         \
  }
BATON_PREFILL_SM90_KERNEL(64)
BATON_PREFILL_SM90_KERNEL(96)
BATON_PREFILL_SM90_KERNEL(128)
