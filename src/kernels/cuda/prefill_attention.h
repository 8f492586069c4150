#pragma once

#include <cstdint>
#include <memory>

#include "base/cuda/gpu.h"
#include "base/status.h"
#include "kernels/cuda/cuda_kernels.h"

namespace baton::cuda {

/// Causal attention of many query rows over a paged KV cache: flash attention, softmax in float32, weights rounded to bf16,
/// sums in float32. A query at position p sees the keys at 0..p (the last `sliding_window` of them), which lie in the cache
/// already. A row's bits depend on its query, its position and those keys; not on the tile or the chunk that it is
/// computed in, nor on other sequences.
class PrefillAttention {
 public:
  /// unimplemented: built without nvcc, or a GPU older than sm_80; unavailable: the driver refuses. `portable`: the
  /// kernels that every GPU has, where there are faster ones, too (tests, benchmarks).
  static Result<std::unique_ptr<PrefillAttention>> create(std::shared_ptr<const Gpu> gpu, bool portable = false);
  virtual ~PrefillAttention() = default;

  /// Puts attention of `count` tiles on `stream`. `tiles`: device memory; one that lies outside its sequence's rows, or whose
  /// sequence is negative, is skipped. Of `args`, q and out are [rows, heads, head_dim]; only rows of tiles are
  /// written. Allocates nothing, waits for nothing, may be captured. The shape must be one that validate() takes. One thread
  /// at a time.
  virtual Status launch(CUstream stream, const StepView& step, const PrefillTile* tiles, int32_t count,
                        const Attention& args, const DeviceKv& kv) = 0;

  /// Query tokens of a tile.
  virtual int32_t tile_tokens(int32_t heads, int32_t kv_heads, int32_t head_dim) const = 0;

  /// invalid_argument: what launch() cannot work with.
  virtual Status validate(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_tokens) const = 0;
};

}  // namespace baton::cuda
