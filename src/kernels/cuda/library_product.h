#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <utility>

#include "base/cuda/gpu.h"
#include "kernels/cuda/cublaslt_library.h"
#include "kernels/cuda/cuda_linear.h"
#include "kernels/cuda/stream_workspaces.h"

namespace baton::cuda {

/// Products by cuBLASLt: one choice of algorithm per shape, kept; one workspace per stream. One thread at a time.
class LibraryProduct {
 public:
  /// `batch_invariant` as in CudaLinear::create().
  static Result<std::unique_ptr<LibraryProduct>> create(std::shared_ptr<const Gpu> gpu, const std::string& library,
                                                        bool batch_invariant);
  ~LibraryProduct();

  Status prepare(const LinearShape& shape);
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

    /// Layouts of x and y for another number of rows.
    Status set_rows(const LinearShape& shape);

    const std::shared_ptr<const CublasLt> lt;
    CublasLtMatmulDesc desc = nullptr;
    CublasLtMatrixLayout weight = nullptr, x = nullptr, y = nullptr;
    CublasLtAlgorithm algorithm{};
  };
  using Key = std::tuple<int64_t, int64_t, int64_t, LinearOutput>;

  LibraryProduct(std::shared_ptr<const Gpu> gpu, std::shared_ptr<const CublasLt> library, bool batch_invariant);
  Result<const Plan*> find_plan(const LinearShape& shape);
  Result<std::unique_ptr<Plan>> make_plan(const LinearShape& shape) const;

  const std::shared_ptr<const Gpu> gpu_;
  const std::shared_ptr<const CublasLt> library_;
  const bool batch_invariant_;
  CublasLtHandle handle_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
  StreamWorkspaces workspaces_;
};

}  // namespace baton::cuda
