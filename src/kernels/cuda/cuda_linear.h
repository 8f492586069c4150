#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/cuda/gpu.h"
#include "base/status.h"
#include "tensor/dtype.h"

/// Matrix products on a GPU: cuBLASLt, found at run time, and kernels of our own where few rows make it a matter of reading
/// the weights.
namespace baton::cuda {

/// What a product writes.
enum class LinearOutput : uint8_t {
  kBf16,          ///< y bf16, overwritten
  kFloat,         ///< y float32, overwritten
  kAddFloat,      ///< y float32 += (the residual stream)
};

struct LinearShape {
  int64_t rows = 0;
  int64_t out_features = 0;
  int64_t in_features = 0;
  LinearOutput output = LinearOutput::kBf16;
};

/// RMSNorm of a product's input: x / rms(x) * weight, rounded to bf16.
struct NormedInput {
  const float* x;       // [rows, in]
  const float* weight;  // [in]
  float eps;
};

class CudaLinear {
 public:
  /// `library`: path of libcublasLt; empty: libcublasLt.so.13 or .12 as the loader finds them. `batch_invariant`: a row's
  /// bits never depend on the number of rows; few rows take twice as long or more. unavailable: there is no library, or it
  /// refuses. unimplemented: built without nvcc, or a GPU older than sm_80.
  static Result<std::unique_ptr<CudaLinear>> create(std::shared_ptr<const Gpu> gpu, const std::string& library,
                                                    bool batch_invariant = false);
  virtual ~CudaLinear() = default;

  /// Chooses how a shape is computed and keeps the choice; product() does it by itself when it was not done before. To be
  /// called before a stream is captured.
  virtual Status prepare(const LinearShape& shape) = 0;

  /// Times what cuBLASLt offers for a shape of many rows (512 or more) with these operands, keeps the fastest and overwrites
  /// y. Takes some 30 products; waits for the stream. All that it chooses among give the same bits. Worth 2 to 8 %.
  virtual Status tune(CUstream stream, const LinearShape& shape, const bf16* x, const bf16* weight, void* y) = 0;

  /// y[m, :] = x[m, :] W^T. x [rows, in] bf16, weight [out, in] bf16 row-major, y [rows, out]; device memory, 16-byte aligned,
  /// in_features and out_features multiples of 8. Sums are float32, in an order that depends on the shape only: the
  /// same shape gives the same bits. Up to kFewRows rows, and again above kMaxSplitRows, a row has the same bits whatever the
  /// other rows are and however many. Asynchronous on `stream`; may be captured when prepared. One thread at a time.
  ///
  /// Kernels for few rows read the weights before what was launched before them on the stream has ended: weights must not be
  /// written by a kernel that runs right before.
  virtual Status product(CUstream stream, const LinearShape& shape, const bf16* x, const bf16* weight, void* y) = 0;

  static constexpr int64_t kFewRows = 16;
  static constexpr int64_t kMaxSplitRows = 256;

  /// Whether normed_product and normed_silu_product work for a shape: up to kFewRows rows of up to 16384 inputs,
  /// and not batch_invariant.
  virtual bool supports_fused(const LinearShape& shape) const = 0;

  /// y = bf16(norm(x)) W^T.
  virtual Status normed_product(CUstream stream, const LinearShape& shape, const NormedInput& input, const bf16* weight,
                                void* y) = 0;

  /// y[m, i] = bf16(silu(g) * u) of [g; u] = bf16(norm(x) W^T), g the first half of out_features and u the other. y
  /// [rows, out_features / 2] bf16; shape.output is kBf16. out_features is a multiple of 16.
  virtual Status normed_silu_product(CUstream stream, const LinearShape& shape, const NormedInput& input, const bf16* weight,
                                     bf16* y) = 0;
};

}  // namespace baton::cuda
