#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "kernels/cuda/cuda_kernels.h"

/// Operations of CudaKernels with their inputs on the GPU: one table for the parity test, which holds the result beside
/// that of the CPU's kernels (kernels/kernels.h), and for `baton bench kernels`, which takes the time.
namespace baton::cuda {

class OperationCase {
 public:
  virtual ~OperationCase() = default;
  const std::string& operation() const { return operation_; }
  const std::string& shape() const { return shape_; }
  /// What has to be moved at the least, and computed.
  int64_t bytes() const { return bytes_; }
  int64_t flops() const { return flops_; }

  /// Puts the operation on the stream. Cases with `copies` take the next copy of their large inputs each time.
  virtual Status launch(CUstream stream) = 0;
  /// Runs it on poisoned outputs and on the CPU: the largest deviation in units of what is allowed; 1 is the limit, infinity is
  /// an element that was not written, or written and should not have been.
  virtual Result<double> error(CUstream stream) = 0;
  /// The result of one run, as bytes, for comparing runs.
  virtual Result<std::vector<std::byte>> result(CUstream stream) = 0;

 protected:
  std::string operation_, shape_;
  int64_t bytes_ = 0, flops_ = 0;
};

struct CaseSequence {
  int32_t start_pos = 0;
  int32_t rows = 1;  ///< 0: a place that is not used
};

struct AttentionShape {
  int32_t heads = 32;
  int32_t kv_heads = 8;
  int32_t head_dim = 128;
  int32_t block_tokens = 16;
  int32_t sliding_window = 0;
  std::vector<CaseSequence> sequences = {};
  uint64_t seed = 1;      ///< of all values
  int32_t first = 0;      ///< decode: only sequences [first, first + launched) are computed
  int32_t launched = -1;  ///< -1: all
  int32_t copies = 1;     ///< layers in the pool, read in turn: so that a benchmark does not read a cache
};

struct QkvShape {
  int32_t rows = 1;
  int32_t heads = 32;
  int32_t kv_heads = 8;
  int32_t head_dim = 128;
  int32_t block_tokens = 16;
  bool bias = false;
  bool norm = false;
  int32_t unused_every = 0;  ///< every n-th row has slot -1
};

using CaseResult = Result<std::unique_ptr<OperationCase>>;
CaseResult embed_case(CudaKernels& kernels, int64_t rows, int64_t hidden, int64_t vocab);
CaseResult rms_norm_case(CudaKernels& kernels, int64_t rows, int64_t hidden);
CaseResult qkv_rope_kv_write_case(CudaKernels& kernels, const QkvShape& shape);
CaseResult attention_decode_case(CudaKernels& kernels, const AttentionShape& shape);
CaseResult attention_prefill_case(CudaKernels& kernels, const AttentionShape& shape);
CaseResult silu_mul_case(CudaKernels& kernels, int64_t rows, int64_t inter, bool bias);
CaseResult add_bias_case(CudaKernels& kernels, int64_t rows, int64_t width);
CaseResult gather_rows_case(CudaKernels& kernels, int64_t rows, int64_t row_bytes);
/// With ties, NaN and infinities in some rows.
CaseResult argmax_case(CudaKernels& kernels, int64_t rows, int64_t vocab);

}  // namespace baton::cuda
