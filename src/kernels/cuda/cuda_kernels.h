#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "base/cuda/gpu.h"
#include "base/status.h"
#include "kernels/cuda/step_arguments.h"
#include "tensor/dtype.h"

/// The operations of a transformer step on a GPU. What each computes is what its namesake in kernels/kernels.h does;
/// the parity test holds one beside the other. Differences: activations between products are bf16, the residual stream is
/// float32, and whatever changes from step to step lies in device memory (StepView), so that a step can be replayed as
/// a CUDA graph.
///
/// Every function puts its work on `stream` and returns; none allocates, none waits, so all may be captured. Errors
/// are of the launch (a bad shape is a CHECK). All pointers are device memory, 16-byte aligned, row-major, without padding. One
/// thread at a time.
namespace baton::cuda {

struct QkvRope {
  const bf16* qkv;         // [rows, (heads + 2 * kv_heads) * head_dim]
  int32_t heads;
  const float* bias;       // [(heads + 2 * kv_heads) * head_dim] or null
  const float* q_norm;     // [head_dim] or null
  const float* k_norm;     // [head_dim] or null
  float norm_eps;
  const float* rope_cos;   // [max_positions, head_dim / 2]
  const float* rope_sin;
};

struct Attention {
  const bf16* q;           // [rows, heads, head_dim]
  bf16* out;               // [rows, heads, head_dim]
  int32_t heads;
  float scale;             // 1 / sqrt(head_dim), ...
  int32_t sliding_window;  // 0: none
};

/// A tile of a prefill: query tokens [token_begin, token_begin + kPrefillTileTokens) of a sequence. Made by the host
/// (plan_prefill), longest first.
struct PrefillTile {
  int32_t sequence;
  int32_t token_begin;
};

class CudaKernels {
 public:
  /// Loads the kernels. unimplemented: built without nvcc, or a GPU older than sm_80; unavailable: the driver refuses.
  static Result<std::unique_ptr<CudaKernels>> create(std::shared_ptr<const Gpu> gpu);
  virtual ~CudaKernels() = default;

  virtual const std::shared_ptr<const Gpu>& gpu() const = 0;
  /// "cuda/sm_90 (NVIDIA H200)"
  virtual std::string_view name() const = 0;
  /// What attention and qkv_rope_kv_write can work with.
  virtual Status validate_attention_shape(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_tokens) const = 0;

  /// x[m, :] = table[tokens[m], :]; x float32. A negative token t stands for chosen[-1 - t], what an earlier step on this stream
  /// chose; zeros where that is negative, too, or `chosen` is null.
  virtual Status embed(CUstream stream, const StepView& step, const int32_t* chosen, const bf16* table, int64_t hidden, float* x) = 0;

  /// out[m, :] = bf16(x[m, :] / rms(x[m, :]) * weight), x float32.
  virtual Status rms_norm(CUstream stream, const float* x, int64_t rows, int64_t hidden, const float* weight, float eps,
                          bf16* out) = 0;

  /// Bias, per-head norms, RoPE; K and V of every row into the cache at its slot, q to `q_out` [rows, heads, head_dim].
  virtual Status qkv_rope_kv_write(CUstream stream, const StepView& step, const QkvRope& args, const DeviceKv& kv,
                                   bf16* q_out) = 0;

  /// Attention of one query row for each of the sequences [first, first + count) of the step; those with other than one row
  /// are left alone. The grid depends on `count` and the constants only; how far each context is cut over thread blocks is
  /// decided on the GPU. `workspace`: decode_workspace_bytes(count, heads, head_dim). The bits of a row depend on its query and
  /// its context alone. Calls of one CudaKernels must not run at the same time. Sequences and block tables are read before what was
  /// launched before has ended: a copy may write them, a kernel may not.
  virtual Status attention_decode(CUstream stream, const StepView& step, int32_t first, int32_t count,
                                  const Attention& args, const DeviceKv& kv, CUdeviceptr workspace) = 0;
  virtual size_t decode_workspace_bytes(int32_t count, int32_t heads, int32_t head_dim) const = 0;

  /// Causal attention of the rows of `tiles`, over the cached prefix and the chunk itself (already in the cache).
  /// `tiles` is device memory.
  virtual Status attention_prefill(CUstream stream, const StepView& step, const PrefillTile* tiles, int32_t tile_count,
                                   const Attention& args, const DeviceKv& kv) = 0;
  virtual int32_t prefill_tile_tokens(int32_t heads, int32_t kv_heads, int32_t head_dim) const = 0;

  /// out[m, i] = bf16(silu(g) * u), gate_up [rows, 2 * inter] bf16; bias [2 * inter] float32 or null.
  virtual Status silu_mul(CUstream stream, const bf16* gate_up, const float* bias, int64_t rows, int64_t inter,
                          bf16* out) = 0;

  /// x[m, :] += bias, x float32.
  virtual Status add_bias(CUstream stream, float* x, int64_t rows, int64_t width, const float* bias) = 0;

  /// to[m] = from[index[m]], rows of row_bytes (a multiple of 16).
  virtual Status gather_rows(CUstream stream, const void* from, int64_t row_bytes, const int32_t* index, int64_t rows,
                             void* to) = 0;

  /// tokens[m] = the first index of the row's maximum; -1 when the row has a NaN or +infinity. logits float32.
  virtual Status argmax(CUstream stream, const float* logits, int64_t rows, int64_t vocab, int32_t* tokens) = 0;
};

}  // namespace baton::cuda
