#pragma once

#include <cstddef>
#include <cstdint>

/// The border between the CPU kernels' driver (cpu_kernels.cc: threads, scratch, order of work) and the files
/// that are compiled once per instruction set (isa_*.cc).
///
/// Those files are built with flags such as -mavx512f. An inline function of a shared header that is emitted in
/// one of them could be the copy that the linker keeps for the whole program, and crash older CPUs. So they
/// include nothing but this file, kernel templates in unnamed namespaces, and compiler headers: no fmt, no
/// std:: algorithms, no base/. bf16 travels as uint16_t for the same reason. A test looks at their symbols.
namespace baton::cpu {

/// Packed weights: panels of 32 output features. Panel p, pair kk, lane n is the 32-bit word
/// [(p * k_pairs + kk) * 32 + n] = { W[32p + n][2kk] low half, W[32p + n][2kk + 1] high half }: what vdpbf16ps
/// wants, 128 contiguous bytes per step, and a panel is one contiguous stream.
inline constexpr int64_t kPanelLanes = 32;

/// Attention works on tiles of 64 keys that begin at multiples of 64, and merges its running state into the
/// total after every segment of 512 keys. Both are positions in the sequence, never in the chunk.
inline constexpr int kTileKeys = 64;
inline constexpr int kSegmentKeys = 512;
inline constexpr int kMaxHeadDim = 256;

/// y[rows, panels] = a * W^T. Rows come in blocks of at most IsaOps::max_block_rows, see row_block().
struct LinearTask {
  const void* a = nullptr;  // blocks as written by pack_block, one behind the other
  int64_t rows = 0;
  int64_t k_pairs = 0;
  const uint32_t* weights = nullptr;  // first panel of the matrix
  int64_t panel_begin = 0;
  int64_t panel_end = 0;
  int64_t out_features = 0;
  const float* bias = nullptr;
  bool accumulate = false;
  float* y = nullptr;        // [rows, out_features]
  float* scratch = nullptr;  // [rows, kPanelLanes]: sums between blocks of k
};

/// One row of a step: bias, per-head norm, RoPE, then q to q_out and k, v to their slots in the cache.
struct QkvRow {
  const float* qkv = nullptr;
  const float* bias = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  const float* cos = nullptr;  // [head_dim / 2] of this row's position
  const float* sin = nullptr;
  float norm_eps = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  uint16_t* q_out = nullptr;  // [heads, head_dim]
  uint16_t* k_out = nullptr;  // head 0's slot; head h's lies h * kv_head_stride elements further
  uint16_t* v_out = nullptr;
  int64_t kv_head_stride = 0;
  int64_t k_pair_stride = 0;  // elements from one pair of dimensions to the next
  int v_step = 0;             // elements from one dimension to the next
};

/// Query tokens [token_begin, token_end) of one sequence against KV heads [kv_head, kv_head + kv_heads), over segments
/// [segment_begin, segment_end). Row r of KV head h is token r / group, head h * group + r % group. Several heads make
/// longer runs of memory: they lie one behind the other in a block.
struct AttentionTask {
  const uint16_t* q = nullptr;  // first row of the sequence, [rows, heads, head_dim]
  uint16_t* out = nullptr;
  int heads = 0;
  int group = 0;  // query heads per KV head
  int head_dim = 0;
  int kv_head = 0;
  int kv_heads = 1;
  float scale = 0;
  int64_t window = 0;  // 0: none
  int64_t start_pos = 0;
  int64_t token_begin = 0;
  int64_t token_end = 0;
  const uint16_t* k_pool = nullptr;  // layer's K of block 0, kv_head 0
  int64_t v_offset = 0;              // elements from a head's K to its V
  int64_t block_stride = 0;          // elements
  int64_t head_stride = 0;           // elements: block_tokens * head_dim
  int block_tokens = 0;
  const int32_t* block_table = nullptr;
  int64_t segment_begin = 0;
  int64_t segment_end = 0;
  /// Null: the result is final and goes to `out`. Else the unmerged state of every segment is written:
  /// [segment - segment_begin][head][row][head_dim_padded + 2] floats (sums, maximum, normaliser).
  float* partial = nullptr;
  void* scratch = nullptr;  // attention_scratch_bytes(), 64-byte aligned, of the running thread
};

struct IsaOps {
  const char* name = nullptr;
  int max_block_rows = 0;         // rows of a register block
  int activation_pair_bytes = 0;  // of one packed (even, odd) pair of one row

  /// Packs `rows` <= max_block_rows rows of x (row length 2 * k_pairs) for the register kernel.
  void (*pack_block)(const uint16_t* x, int64_t rows, int64_t k_pairs, void* out) = nullptr;
  void (*linear)(const LinearTask& task) = nullptr;
  /// One row.
  void (*rms_norm)(const float* x, int64_t hidden, const float* weight, float eps, uint16_t* out) = nullptr;
  void (*silu_mul)(const float* gate, const float* up, int64_t count, uint16_t* out) = nullptr;
  void (*qkv_row)(const QkvRow& row) = nullptr;

  /// `rows`: of all heads of the task.
  size_t (*attention_scratch_bytes)(int rows, int head_dim) = nullptr;
  void (*attention)(const AttentionTask& task) = nullptr;
  /// Merges `segments` states of a task (in order) and writes its rows to task.out.
  void (*attention_merge)(const AttentionTask& task) = nullptr;
};

/// Rows [begin, end) of block `index` when `rows` are cut into the fewest blocks of at most `max_rows`, as even
/// as can be.
struct RowBlocks {
  int64_t rows;
  int64_t count;
  constexpr RowBlocks(int64_t rows_in, int64_t max_rows)
      : rows(rows_in), count((rows_in + max_rows - 1) / max_rows) {}
  constexpr int64_t begin(int64_t index) const { return rows * index / count; }
};

/// Floats per row of a partial attention state.
inline constexpr int partial_stride(int head_dim) { return (head_dim + 15) / 16 * 16 + 2; }

extern const IsaOps kPlainOps;
#if defined(BATON_CPU_X86)
extern const IsaOps kAvx2Ops;
extern const IsaOps kAvx512Bf16Ops;
#endif

}  // namespace baton::cpu
