#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/step_arguments.h"

/// What the kernels of step_kernels.cu and attention_decode.cu take by value. Read by nvcc, too.
namespace baton::cuda {

struct QkvRopeArguments {
  StepView step;
  DeviceKv kv;
  const uint16_t* qkv;  // bf16, as all uint16_t here
  const float* bias;
  const float* q_norm;
  const float* k_norm;
  const float* rope_cos;
  const float* rope_sin;
  uint16_t* q_out;
  float norm_eps;
  int32_t heads;
  int32_t threads_per_head;  // a power of two, at least head_dim / 8
};

/// Decode attention: the context of a sequence is cut into splits, a function of its length alone; a thread block takes
/// a range of consecutive splits of (sequence, KV head, head block) triples.
struct DecodeArguments {
  const DeviceSequence* sequences;  // [count]
  const int32_t* block_tables;
  DeviceKv kv;
  const uint16_t* q;
  uint16_t* out;
  float* partials;      // [grid][kDecodeMaxSplits][rows * (padded head_dim + 2)]
  uint32_t* arrivals;   // [grid], zero between launches
  int32_t count;
  int32_t heads;
  int32_t group;        // query heads of a KV head
  int32_t head_blocks;  // ceil(group / rows)
  float scale_log2;
  int32_t sliding_window;
  int32_t block_shift;  // log2 of kv.block_tokens; -1: not a power of two
};

inline constexpr int32_t kDecodeThreads = 128;
inline constexpr int32_t kDecodeTileTokens = 16;    // of a warp
inline constexpr int32_t kDecodeSplitTokens = 128;  // the shortest split
inline constexpr int32_t kDecodeMaxSplits = 32;
inline constexpr int32_t kDecodeMaxSequences = 256;  // of one launch

/// Head dimensions that the kernel is compiled for; others are padded with zeros on their way into shared memory.
constexpr int32_t decode_padded_head_dim(int32_t head_dim) {
  return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : 256;
}
/// Query heads that a thread block works on: 4, 8 or 16.
constexpr int32_t decode_rows(int32_t group) { return group <= 4 ? 4 : group <= 8 ? 8 : 16; }
constexpr size_t decode_partial_floats(int32_t padded_head_dim, int32_t rows) {
  return static_cast<size_t>(rows) * static_cast<size_t>(padded_head_dim + 2);
}
/// Tiles of a warp in shared memory. Two blocks fit on a multiprocessor of an H100, one on an A100's.
constexpr int32_t decode_stages(int32_t padded_head_dim) { return padded_head_dim > 128 ? 2 : 3; }
constexpr size_t decode_shared_bytes(int32_t padded_head_dim, int32_t rows, int32_t max_sequences) {
  const size_t warps = kDecodeThreads / 32;
  const size_t stage = size_t{2} * kDecodeTileTokens * static_cast<size_t>(padded_head_dim + 8) * 2;
  const size_t merge = warps * (4 * static_cast<size_t>(padded_head_dim) + 8 * static_cast<size_t>(rows)) * 4;
  const size_t sums = warps * 16 * 2 * 4;
  return warps * static_cast<size_t>(decode_stages(padded_head_dim)) * stage + merge + sums +
         (static_cast<size_t>(max_sequences) + 1) * 4;
}

}  // namespace baton::cuda
