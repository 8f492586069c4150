#include "kernels/cuda/library_product.h"

#include <utility>

namespace baton::cuda {
namespace {

/// What NVIDIA advises for Hopper.
constexpr size_t kWorkspaceBytes = 32u << 20;
/// A chunked prefill has a new shape whenever its last chunk has a new length. A plan is some 400 bytes.
constexpr size_t kMaxPlans = 8192;
/// The number of rows that the algorithm is chosen for where one has to serve all.
constexpr int64_t kInvariantRows = 512;

}  // namespace

Result<std::unique_ptr<LibraryProduct>> LibraryProduct::create(std::shared_ptr<const Gpu> gpu, const std::string& library,
                                                               bool batch_invariant) {
  BATON_ASSIGN_OR_RETURN(std::shared_ptr<const CublasLt> lt, CublasLt::load(library));
  std::unique_ptr<LibraryProduct> made(new LibraryProduct(std::move(gpu), std::move(lt), batch_invariant));
  CurrentDevice current(*made->gpu_);
  BATON_RETURN_IF_ERROR(made->library_->check(made->library_->create(&made->handle_),
                                              fmt::format("cublasLtCreate on {}", made->gpu_->name())));
  return made;
}

LibraryProduct::LibraryProduct(std::shared_ptr<const Gpu> gpu, std::shared_ptr<const CublasLt> library, bool batch_invariant)
    : gpu_(std::move(gpu)), library_(std::move(library)), batch_invariant_(batch_invariant), workspaces_(gpu_, kWorkspaceBytes) {}

LibraryProduct::~LibraryProduct() {
  plans_.clear();
  if (handle_ == nullptr) return;
  CurrentDevice current(*gpu_);
  (void)library_->destroy(handle_);
}

Status LibraryProduct::Plan::set_rows(const LinearShape& shape) {
  for (CublasLtMatrixLayout* layout : {&x, &y}) {
    if (*layout != nullptr) (void)lt->layout_destroy(*layout);
    *layout = nullptr;
  }
  const auto rows = static_cast<uint64_t>(shape.rows);
  const int out_type = shape.output == LinearOutput::kBf16 ? kCublasTypeBf16 : kCublasTypeF32;
  BATON_RETURN_IF_ERROR(lt->check(lt->layout_create(&x, kCublasTypeBf16, static_cast<uint64_t>(shape.in_features), rows, shape.in_features),
                                  "cublasLtMatrixLayoutCreate"));
  return lt->check(lt->layout_create(&y, out_type, static_cast<uint64_t>(shape.out_features), rows, shape.out_features),
                   "cublasLtMatrixLayoutCreate");
}

// y = x W^T row-major is, column-major, y' [out, rows] = W'^T x' with W' [in, out] and x' [in, rows].
Result<std::unique_ptr<LibraryProduct::Plan>> LibraryProduct::make_plan(const LinearShape& shape) const {
  const CublasLt& lt = *library_;
  if (batch_invariant_ && shape.rows != kInvariantRows) {
    BATON_ASSIGN_OR_RETURN(std::unique_ptr<Plan> common, make_plan({kInvariantRows, shape.out_features, shape.in_features, shape.output}));
    BATON_RETURN_IF_ERROR(common->set_rows(shape));
    return common;
  }
  auto plan = std::make_unique<Plan>(library_);
  const auto out = static_cast<uint64_t>(shape.out_features);
  const auto in = static_cast<uint64_t>(shape.in_features);
  BATON_RETURN_IF_ERROR(lt.check(lt.desc_create(&plan->desc, kCublasCompute32F, kCublasTypeF32), "cublasLtMatmulDescCreate"));
  const int32_t transpose = kCublasTranspose;
  BATON_RETURN_IF_ERROR(lt.check(lt.desc_set(plan->desc, kMatmulDescTransposeA, &transpose, sizeof(transpose)),
                                 "cublasLtMatmulDescSetAttribute"));
  BATON_RETURN_IF_ERROR(lt.check(lt.layout_create(&plan->weight, kCublasTypeBf16, in, out, shape.in_features),
                                 "cublasLtMatrixLayoutCreate"));
  BATON_RETURN_IF_ERROR(plan->set_rows(shape));

  CublasLtPreference preference = nullptr;
  BATON_RETURN_IF_ERROR(lt.check(lt.preference_create(&preference), "cublasLtMatmulPreferenceCreate"));
  std::unique_ptr<std::remove_pointer_t<CublasLtPreference>, decltype(lt.preference_destroy)> owner(
      preference, lt.preference_destroy);
  const uint64_t workspace_bytes = kWorkspaceBytes;
  // Parts of a sum that are split over thread blocks are added up in order, in float32; or the sum is not split.
  const uint32_t reductions = batch_invariant_ ? 0 : kReductionComputeType;
  const uint32_t alignment = 16;
  Status set = lt.check(lt.preference_set(preference, kPreferenceMaxWorkspaceBytes, &workspace_bytes, sizeof(workspace_bytes)),
                        "cublasLtMatmulPreferenceSetAttribute");
  BATON_RETURN_IF_ERROR(set);
  BATON_RETURN_IF_ERROR(lt.check(lt.preference_set(preference, kPreferenceReductionSchemes, &reductions, sizeof(reductions)),
                                 "cublasLtMatmulPreferenceSetAttribute"));
  for (int operand = 0; operand < 4; ++operand) {
    BATON_RETURN_IF_ERROR(
        lt.check(lt.preference_set(preference, kPreferenceAlignmentA + operand, &alignment, sizeof(alignment)),
                 "cublasLtMatmulPreferenceSetAttribute"));
  }
  CublasLtHeuristic best{};
  int found = 0;
  const Status asked = lt.check(lt.heuristics(handle_, plan->desc, plan->weight, plan->x, plan->y, plan->y, preference, 1, &best,
                                              &found),
                                "cublasLtMatmulAlgoGetHeuristic");
  BATON_RETURN_IF_ERROR(asked.with_context(
      fmt::format("product of {} rows, {} -> {} features", shape.rows, shape.in_features, shape.out_features)));
  if (found == 0 || best.state != 0) {
    return unavailable("cuBLASLt has no algorithm for {} rows, {} -> {} features", shape.rows, shape.in_features,
                       shape.out_features);
  }
  plan->algorithm = best.algorithm;
  return plan;
}

Result<const LibraryProduct::Plan*> LibraryProduct::find_plan(const LinearShape& shape) {
  const Key key{shape.rows, shape.out_features, shape.in_features, shape.output};
  if (auto at = plans_.find(key); at != plans_.end()) return at->second.get();
  if (plans_.size() >= kMaxPlans) plans_.clear();
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Plan> plan, make_plan(shape));
  return plans_.emplace(key, std::move(plan)).first->second.get();
}

Status LibraryProduct::prepare(const LinearShape& shape) {
  CurrentDevice current(*gpu_);
  return find_plan(shape).status();
}

Status LibraryProduct::product(CUstream stream, const LinearShape& shape, const bf16* x, const bf16* weight, void* y) {
  CurrentDevice current(*gpu_);
  BATON_ASSIGN_OR_RETURN(const Plan* plan, find_plan(shape));
  BATON_ASSIGN_OR_RETURN(CUdeviceptr workspace, workspaces_.find(stream));
  const float alpha = 1.0f;
  const float beta = shape.output == LinearOutput::kAddFloat ? 1.0f : 0.0f;
  return library_->check(
      library_->matmul(handle_, plan->desc, &alpha, weight, plan->weight, x, plan->x, &beta, y, plan->y, y, plan->y,
                       &plan->algorithm, reinterpret_cast<void*>(workspace), kWorkspaceBytes, stream),
      "cublasLtMatmul");
}

}  // namespace baton::cuda
