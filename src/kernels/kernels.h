#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "base/status.h"
#include "tensor/buffer.h"
#include "tensor/dtype.h"
#include "tensor/thread_pool.h"

/// The operations of a transformer step, one function table per device (this file is the contract, the
/// implementations stand in kernels/cpu and, later, kernels/cuda).
///
/// **Batch invariance.** Every row of every result is bit for bit the same whatever else is in the batch, however
/// the prompt was cut into chunks, and however many threads ran: one accumulation order per element, fixed
/// by absolute positions. That is what makes disaggregated output equal to aggregated output, and a
/// recomputed sequence equal to the one that was preempted.
///
/// Activations: the residual stream is float32, inputs of matrix products are bf16, accumulation is float32.
/// All pointers are to device memory, row-major, without padding. Functions are synchronous on the CPU. One thread
/// (the owner of the device) calls them.
namespace baton {

/// A weight matrix [out_features, in_features], repacked once for the device's matrix kernels.
/// in_features must be even; both are padded inside as the kernel wishes.
class PackedMatrix {
 public:
  virtual ~PackedMatrix() = default;
  virtual int64_t out_features() const = 0;
  virtual int64_t in_features() const = 0;
  virtual size_t bytes() const = 0;
  /// The packed bytes in device memory: for measuring how fast they can be read at all, not for interpreting.
  virtual std::span<const std::byte> memory() const = 0;
};

/// Where the KV cache of one layer lies. Block b starts at pool + b * block_stride_bytes; inside it
/// K of this layer is [kv_heads][head_dim / 2][block_tokens][2] bf16 at k_offset_bytes and V
/// [kv_heads][block_tokens / 2][head_dim][2] at v_offset_bytes (the last token of an odd block is a plain [head_dim]): pairs
/// along what is summed over, so that products of bf16 pairs (vdpbf16ps) take the cache as it lies.
struct KvLayerView {
  std::byte* pool = nullptr;
  int64_t block_stride_bytes = 0;
  int64_t k_offset_bytes = 0;
  int64_t v_offset_bytes = 0;
  int32_t block_tokens = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
};

/// One sequence's part of a batch: `rows` query tokens at absolute positions [start_pos, start_pos + rows).
/// The K and V of positions below start_pos + rows are (after kv_write) in the blocks of block_table.
struct SequenceSlice {
  int32_t first_row = 0;
  int32_t rows = 0;
  int32_t start_pos = 0;
  const int32_t* block_table = nullptr;  // [ceil((start_pos + rows) / block_tokens)]
};

struct RopeTable {
  /// [max_positions, head_dim / 2] each, float32. Scaling (llama3, yarn with its mscale) is already inside.
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t max_positions = 0;
};

struct QkvArgs {
  const float* qkv = nullptr;             // [rows, (heads + 2 * kv_heads) * head_dim]
  int32_t rows = 0;
  int32_t heads = 0;
  const float* bias = nullptr;            // [(heads + 2 * kv_heads) * head_dim] or null
  const float* q_norm = nullptr;          // [head_dim] or null: RMSNorm per head before RoPE (Qwen3)
  const float* k_norm = nullptr;          // [head_dim] or null
  float norm_eps = 1e-6f;
  RopeTable rope;                          // half-split ("NeoX") rotation, as in all HF models
  std::span<const SequenceSlice> sequences;
  KvLayerView kv;
};

struct AttentionArgs {
  const bf16* q = nullptr;                // [rows, heads, head_dim], RoPE applied
  bf16* out = nullptr;                    // [rows, heads, head_dim]
  int32_t heads = 0;
  float scale = 0;                        // 1 / sqrt(head_dim), times yarn's factor where it belongs
  int32_t sliding_window = 0;             // 0: none; else a query sees the last `sliding_window` positions
  std::span<const SequenceSlice> sequences;
  KvLayerView kv;
};

class Kernels {
 public:
  virtual ~Kernels() = default;

  /// "cpu/avx512bf16", "cpu/avx2", "cpu/plain"
  virtual std::string_view name() const = 0;
  virtual ThreadPool& threads() = 0;

  /// Whether qkv_rope_kv_write and attention can work with this shape; what is not supported and what is.
  /// Call it once per model: the operations themselves CHECK.
  virtual Status validate_attention_shape(int64_t heads, int64_t kv_heads, int64_t head_dim) const = 0;

  /// Repacks rows of a [out_features, in_features] matrix of dtype bf16, f16 or f32 (converted to bf16, nearest
  /// even). `parts` are stacked in order along out_features (q, k, v; gate, up): one product for all.
  struct MatrixPart {
    const void* data;
    DType dtype;
    int64_t out_features;
  };
  virtual Result<std::unique_ptr<PackedMatrix>> pack(std::span<const MatrixPart> parts,
                                                     int64_t in_features) = 0;

  /// y[m, :] (+)= x[m, :] * W^T (+ bias). x [rows, in] bf16, y [rows, out] float32; bias [out] or null.
  /// `accumulate`: adds to y (the residual stream) instead of overwriting it.
  virtual void linear(const bf16* x, int64_t rows, const PackedMatrix& weight, const float* bias,
                      bool accumulate, float* y) = 0;

  /// x[m, :] = table[ids[m], :]. table [vocab, hidden] bf16 row-major; ids in range (checked by the caller).
  virtual void embed(const int32_t* ids, int64_t rows, const bf16* table, int64_t hidden, float* x) = 0;
  /// As embed, from a packed matrix (tied embeddings: the table is stored once, packed).
  virtual void embed_packed(const int32_t* ids, int64_t rows, const PackedMatrix& table, float* x) = 0;

  /// out[m, :] = bf16(x[m, :] / rms(x[m, :]) * weight), mean of squares in float32. Zhang & Sennrich 2019.
  virtual void rms_norm(const float* x, int64_t rows, int64_t hidden, const float* weight, float eps,
                        bf16* out) = 0;

  /// Adds bias, normalises q and k per head (Qwen3), applies RoPE, writes K and V to the cache and q to
  /// `q_out` [rows, heads, head_dim].
  virtual void qkv_rope_kv_write(const QkvArgs& args, bf16* q_out) = 0;

  /// Causal paged attention over the KV cache, GQA (heads a multiple of kv_heads), online softmax in float32
  /// over key tiles at fixed absolute positions.
  virtual void attention(const AttentionArgs& args) = 0;

  /// out[m, i] = bf16(silu(gate_up[m, i]) * gate_up[m, inter + i]). gate_up [rows, 2 * inter].
  virtual void silu_mul(const float* gate_up, int64_t rows, int64_t inter, bf16* out) = 0;
};

/// The best table for this machine. `isa`: "auto", "avx512bf16", "avx2" or "plain" (unimplemented when the
/// machine lacks it). `threads` as for ThreadPool.
Result<std::unique_ptr<Kernels>> make_cpu_kernels(std::string_view isa, int threads);

}  // namespace baton
