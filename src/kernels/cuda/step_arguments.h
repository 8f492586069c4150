#pragma once

#include <cstdint>

/// What the host and the CUDA kernels have to agree on. Read by nvcc, too: plain data, fixed layout. All pointers are to
/// device memory.
namespace baton::cuda {

/// One sequence's part of a batch, as SequenceSlice (kernels/kernels.h) but in device memory: `rows` query tokens at
/// absolute positions [start_pos, start_pos + rows), their rows from first_row on. `rows` 0: a place that is not used.
struct DeviceSequence {
  int32_t first_row;
  int32_t rows;
  int32_t start_pos;
  int32_t table_offset;  // of its block table in StepView::block_tables
};

/// Everything that changes from step to step: one upload, one address for the life of a CUDA graph.
struct StepView {
  const int32_t* tokens;           // [rows]
  const int32_t* positions;        // [rows]
  const int32_t* slots;            // [rows] block * block_tokens + place in the block; -1: a row that is not used
  const DeviceSequence* sequences; // [sequences]
  const int32_t* block_tables;     // all tables, one behind the other
  int32_t rows;
  int32_t sequences_count;
};

/// Where the KV cache of one layer lies on a GPU: block b at pool + b * block_stride_bytes; inside it K of this layer is
/// [kv_heads][block_tokens][head_dim] bf16 at k_offset_bytes, V likewise at v_offset_bytes. (The CPU keeps pairs:
/// kernels/kernels.h; BlockLayout's fingerprint tells the two orders apart.)
struct DeviceKv {
  unsigned char* pool;
  int64_t block_stride_bytes;
  int64_t k_offset_bytes;
  int64_t v_offset_bytes;
  int32_t block_tokens;  // a multiple of 8
  int32_t kv_heads;
  int32_t head_dim;      // a multiple of 8 up to 256
};

}  // namespace baton::cuda
