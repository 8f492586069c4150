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
/// Algorithms of one family that don't split a sum over thread blocks give a row the same bits, whatever their tiles and
/// however many rows there are (measured on an H200 for 1 to 8,192 rows, and what cuda_linear_test holds). Above
/// CudaLinear::kMaxSplitRows rows, or with `batch_invariant` always, no others are used.
class LibraryProduct {
 public:
  static Result<std::unique_ptr<LibraryProduct>> create(std::shared_ptr<const Gpu> gpu, const std::string& library,
                                                        bool batch_invariant = false);
  ~LibraryProduct();

  Status prepare(const LinearShape& shape);
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
    bool tuned = false;
  };
  using Key = std::tuple<int64_t, int64_t, int64_t, LinearOutput>;

  LibraryProduct(std::shared_ptr<const Gpu> gpu, std::shared_ptr<const CublasLt> library, bool batch_invariant);
  bool may_split(const LinearShape& shape) const;
  Result<Plan*> find_plan(const LinearShape& shape);
  Result<std::unique_ptr<Plan>> make_plan(const LinearShape& shape);
  Status describe(const LinearShape& shape, Plan& plan) const;
  Result<std::vector<CublasLtHeuristic>> candidates(const LinearShape& shape, const Plan& plan, int wanted) const;
  /// Those of one family that split no sum; where there are none, and not batch_invariant, what there is.
  Result<std::vector<CublasLtHeuristic>> unsplit_candidates(const LinearShape& shape, const Plan& plan);
  Result<int> find_family(const LinearShape& shape);
  Status run(CUstream stream, const LinearShape& shape, const Plan& plan, const CublasLtAlgorithm& algorithm, const bf16* x,
             const bf16* weight, void* y);

  const std::shared_ptr<const Gpu> gpu_;
  const std::shared_ptr<const CublasLt> library_;
  const bool batch_invariant_;
  CublasLtHandle handle_ = nullptr;
  std::map<std::tuple<int64_t, int64_t, LinearOutput>, int> families_;
  std::map<Key, std::unique_ptr<Plan>> plans_;
  StreamWorkspaces workspaces_;
};

}  // namespace baton::cuda
