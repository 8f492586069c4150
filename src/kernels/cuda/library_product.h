#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "base/cuda/gpu.h"
#include "kernels/cuda/cublaslt_library.h"
#include "kernels/cuda/cuda_linear.h"
#include "kernels/cuda/stream_workspaces.h"

namespace baton::cuda {

/// Products by cuBLASLt: one choice of algorithm per shape, kept; one workspace per stream. One thread at a time.
///
/// With `batch_invariant` one algorithm, which splits no sum over thread blocks, serves a product at any number of rows. Without,
/// above CudaLinear::kMaxSplitRows rows, any of the same family does that splits no sum: they give a row the same bits, whatever
/// their tiles and however many rows there are (seen on an H200 for 1 to 8,192 rows, and held by cuda_linear_test).
class LibraryProduct {
 public:
  static Result<std::unique_ptr<LibraryProduct>> create(std::shared_ptr<const Gpu> gpu, const std::string& library,
                                                        bool batch_invariant = false);
  ~LibraryProduct();

  Status prepare(const LinearShape& shape);
  Status reserve(CUstream stream);
  /// As CudaLinear::tune.
  Status tune(CUstream stream, const LinearShape& shape, const bf16* x, const bf16* weight, void* y);
  Status product(CUstream stream, const LinearShape& shape, const bf16* x, const bf16* weight, void* y);

 private:
  struct Plan {
    explicit Plan(std::shared_ptr<const CublasLt> library) : lt(std::move(library)) {}
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;
    ~Plan() {
      if (desc != nullptr) (void)lt->desc_destroy(desc);
      for (CublasLtMatrixLayout layout : {weight, x, y}) {
        if (layout != nullptr) (void)lt->layout_destroy(layout);
      }
    }

    const std::shared_ptr<const CublasLt> lt;
    CublasLtMatmulDesc desc = nullptr;
    CublasLtMatrixLayout weight = nullptr, x = nullptr, y = nullptr;
    CublasLtAlgorithm algorithm{};
  };
  using Key = std::tuple<int64_t, int64_t, int64_t, LinearOutput>;

  LibraryProduct(std::shared_ptr<const Gpu> gpu, std::shared_ptr<const CublasLt> library, bool batch_invariant);
  bool may_split(const LinearShape& shape) const;
  Result<const Plan*> find_plan(const LinearShape& shape);
  Status describe(const LinearShape& shape, Plan& plan) const;
  Result<CublasLtAlgorithm> choose(const LinearShape& shape, const Plan& plan);
  const CublasLtAlgorithm* find_tuned(const LinearShape& shape) const;
  /// The library's best first.
  Result<std::vector<CublasLtHeuristic>> candidates(const LinearShape& shape, const Plan& plan, int wanted) const;
  /// Those of one family that split no sum; where there are none, what there is.
  Result<std::vector<CublasLtHeuristic>> family_candidates(const LinearShape& shape, const Plan& plan);
  Result<CublasLtAlgorithm> find_common(const LinearShape& shape);
  Status run(CUstream stream, const LinearShape& shape, const Plan& plan, const CublasLtAlgorithm& algorithm, const bf16* x,
             const bf16* weight, void* y);

  const std::shared_ptr<const Gpu> gpu_;
  const std::shared_ptr<const CublasLt> library_;
  const bool batch_invariant_;
  CublasLtHandle handle_ = nullptr;
  /// By shape without rows: the algorithm chosen for a common number of rows, and what tune() found for which rows.
  using Features = std::tuple<int64_t, int64_t, LinearOutput>;
  std::map<Features, CublasLtAlgorithm> common_;
  std::map<Features, std::map<int64_t, CublasLtAlgorithm>> tuned_;
  std::map<Key, std::unique_ptr<Plan>> plans_;
  StreamWorkspaces workspaces_;
};

}  // namespace baton::cuda
