#pragma once

#include <cstdint>

#include "kernels/cuda/step_arguments.h"

/// What prefill_attention.cc hands to the kernels of attention_prefill.cu and attention_prefill_sm90.cu.
namespace baton::cuda {

struct PrefillArguments {
  const DeviceSequence* sequences;
  const int32_t* block_tables;
  const int32_t* tiles;  // [tiles, 2]: PrefillTile
  const uint16_t* q;     // [rows, heads, head_dim] bf16
  uint16_t* out;         // the same
  DeviceKv kv;
  int32_t heads;
  int32_t sequences_count;
  float scale_log2;      // scale * log2(e): weights are powers of two
  int32_t window;        // 0: none
};

/// The widths that a kernel is compiled for; a head is computed by the narrowest that it fits into.
inline constexpr int32_t kPrefillWidths[] = {32, 64, 96, 128, 192, 256};

/// Query tokens, threads, keys of a tile and dynamic shared memory of the kernel for a width. A warp has 16 or 32 rows.
constexpr int32_t prefill_rows(int32_t width) { return width <= 128 ? 128 : 64; }
inline constexpr int32_t kPrefillThreads = 128;
constexpr int32_t prefill_keys(int32_t width) { return width <= 128 ? 64 : 32; }
/// Of a row in shared memory, in elements: an odd number of 16-byte words, so that eight rows' words lie in different banks.
constexpr int32_t prefill_stride(int32_t width) { return width + 8; }
constexpr int32_t prefill_shared_bytes(int32_t width) {
  return (prefill_rows(width) + 2 * prefill_keys(width)) * prefill_stride(width) * 2;
}

/// A CUtensorMap: how the copy engine finds boxes of a tensor.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

/// For attention_prefill_sm90.cu. Boxes are 64 columns wide, of tensors [blocks, kv_heads, block_tokens, head_dim] and
/// [rows, heads, head_dim]; columns beyond head_dim read as zeros.
struct PrefillSm90Arguments {
  TensorMap k;         // boxes of box_tokens tokens
  TensorMap v;
  TensorMap q;         // boxes of kPrefillSm90Rows rows of one head
  PrefillArguments common;
  int32_t tile_count;
  int32_t box_tokens;  // the largest divisor that block_tokens and kPrefillSm90Keys have in common
};

inline constexpr int32_t kPrefillSm90Widths[] = {64, 96, 128};
inline constexpr int32_t kPrefillSm90Rows = 128;
inline constexpr int32_t kPrefillSm90Keys = 128;
inline constexpr int32_t kPrefillSm90Stages = 2;
inline constexpr int32_t kPrefillSm90Threads = 384;
/// Columns and bytes of a panel: what a box fills, or several boxes below each other.
inline constexpr int32_t kPrefillSm90PanelColumns = 64;
inline constexpr int32_t kPrefillSm90PanelBytes = 128 * kPrefillSm90PanelColumns * 2;
constexpr int32_t prefill_sm90_panels(int32_t width) {
  return (width + kPrefillSm90PanelColumns - 1) / kPrefillSm90PanelColumns;
}
/// The stages of Q, K and V, and what aligning them takes.
constexpr int32_t prefill_sm90_shared_bytes(int32_t width) {
  return 3 * kPrefillSm90Stages * prefill_sm90_panels(width) * kPrefillSm90PanelBytes + 1024;
}

}  // namespace baton::cuda
