#include "kernels/cuda/cuda_linear.h"

#include <limits>
#include <utility>

#include "base/check.h"
#include "kernels/cuda/gemv.h"
#include "kernels/cuda/library_product.h"

namespace baton::cuda {
namespace {

static_assert(CudaLinear::kFewRows == kGemvMaxRows);

GemvOutput gemv_output(LinearOutput output) {
  switch (output) {
    case LinearOutput::kBf16: return GemvOutput::kBf16;
    case LinearOutput::kFloat: return GemvOutput::kFloat;
    case LinearOutput::kAddFloat: return GemvOutput::kAddFloat;
  }
  return GemvOutput::kBf16;
}

void check_shape(const LinearShape& shape) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  BATON_CHECK(shape.rows > 0 && shape.rows <= kMost);
  BATON_CHECK(shape.out_features > 0 && shape.out_features <= kMost && shape.out_features % 8 == 0);
  BATON_CHECK(shape.in_features > 0 && shape.in_features <= kMost && shape.in_features % 8 == 0);
}

class Linear final : public CudaLinear {
 public:
  Linear(std::unique_ptr<Gemv> gemv, std::unique_ptr<LibraryProduct> library, bool batch_invariant)
      : gemv_(std::move(gemv)), library_(std::move(library)), gemv_rows_(batch_invariant ? 0 : kFewRows) {}

  Status prepare(const LinearShape& shape) override {
    check_shape(shape);
    return shape.rows <= gemv_rows_ ? Status() : library_->prepare(shape);
  }

  Status tune(CUstream stream, const LinearShape& shape, const bf16* x, const bf16* weight, void* y) override {
    check_shape(shape);
    return library_->tune(stream, shape, x, weight, y);
  }

  Status product(CUstream stream, const LinearShape& shape, const bf16* x, const bf16* weight, void* y) override {
    check_shape(shape);
    if (shape.rows > gemv_rows_) return library_->product(stream, shape, x, weight, y);
    return gemv_->launch(stream, arguments(shape, x, weight, y));
  }

  bool supports_fused(const LinearShape& shape) const override {
    return shape.rows <= gemv_rows_ && shape.in_features <= Gemv::kMaxNormedInputs;
  }

  Status normed_product(CUstream stream, const LinearShape& shape, const NormedInput& input, const bf16* weight,
                        void* y) override {
    return normed(stream, shape, input, weight, y, gemv_output(shape.output));
  }

  Status normed_silu_product(CUstream stream, const LinearShape& shape, const NormedInput& input, const bf16* weight,
                             bf16* y) override {
    BATON_CHECK(shape.out_features % 16 == 0 && shape.output == LinearOutput::kBf16);
    return normed(stream, shape, input, weight, y, GemvOutput::kSiluBf16);
  }

 private:
  static GemvArguments arguments(const LinearShape& shape, const void* x, const bf16* weight, void* y) {
    GemvArguments args{};
    args.x = x;
    args.weight = weight;
    args.y = y;
    args.rows = static_cast<int32_t>(shape.rows);
    args.out = static_cast<int32_t>(shape.out_features);
    args.in = static_cast<int32_t>(shape.in_features);
    args.output = gemv_output(shape.output);
    return args;
  }

  Status normed(CUstream stream, const LinearShape& shape, const NormedInput& input, const bf16* weight, void* y,
                GemvOutput output) {
    check_shape(shape);
    BATON_CHECK(supports_fused(shape));
    GemvArguments args = arguments(shape, input.x, weight, y);
    args.norm_weight = input.weight;
    args.norm_eps = input.eps;
    args.output = output;
    return gemv_->launch(stream, args);
  }

  const std::unique_ptr<Gemv> gemv_;
  const std::unique_ptr<LibraryProduct> library_;
  const int64_t gemv_rows_;
};

}  // namespace

Result<std::unique_ptr<CudaLinear>> CudaLinear::create(std::shared_ptr<const Gpu> gpu, const std::string& library,
                                                               bool batch_invariant) {
  if (!gpu->driver().can_compute) {
    return unavailable("the CUDA driver is too old to compute with (12.0 or newer is needed)");
  }
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Gemv> gemv, Gemv::create(gpu));
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<LibraryProduct> product, LibraryProduct::create(std::move(gpu), library, batch_invariant));
  return std::unique_ptr<CudaLinear>(std::make_unique<Linear>(std::move(gemv), std::move(product), batch_invariant));
}

}  // namespace baton::cuda
