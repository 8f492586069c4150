#include "kernels/cuda/library_product.h"

#include <algorithm>
#include <utility>

namespace baton::cuda {
namespace {

/// What NVIDIA advises for Hopper.
constexpr size_t kWorkspaceBytes = 32u << 20;
/// A chunked prefill has a new shape whenever its last chunk has a new length. A plan is some 400 bytes.
constexpr size_t kMaxPlans = 8192;
constexpr int kCandidates = 12;
/// Rows at which the library's first choice says which family of algorithms a product of more or fewer rows uses.
constexpr int64_t kFamilyRows = 2048;
constexpr int64_t kMinTunedRows = 512;
constexpr int kTuneRounds = 3;

std::string text(const LinearShape& shape) {
  return fmt::format("product of {} rows, {} -> {} features", shape.rows, shape.in_features, shape.out_features);
}

/// Events that go with their scope.
class EventPair {
 public:
  explicit EventPair(const Driver& driver) : driver_(driver) {}
  EventPair(const EventPair&) = delete;
  EventPair& operator=(const EventPair&) = delete;
  ~EventPair() {
    for (CUevent event : {begin, end}) {
      if (event != nullptr) (void)driver_.event_destroy(event);
    }
  }
  Status create() {
    BATON_RETURN_IF_ERROR(driver_.check(driver_.event_create(&begin, kEventDefault), "cuEventCreate"));
    return driver_.check(driver_.event_create(&end, kEventDefault), "cuEventCreate");
  }

  CUevent begin = nullptr, end = nullptr;

 private:
  const Driver& driver_;
};

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

bool LibraryProduct::may_split(const LinearShape& shape) const {
  return !batch_invariant_ && shape.rows <= CudaLinear::kMaxSplitRows;
}

// y = x W^T row-major is, column-major, y' [out, rows] = W'^T x' with W' [in, out] and x' [in, rows].
Status LibraryProduct::describe(const LinearShape& shape, Plan& plan) const {
  const CublasLt& lt = *library_;
  const auto rows = static_cast<uint64_t>(shape.rows);
  const auto out = static_cast<uint64_t>(shape.out_features);
  const auto in = static_cast<uint64_t>(shape.in_features);
  const int out_type = shape.output == LinearOutput::kBf16 ? kCublasTypeBf16 : kCublasTypeF32;
  BATON_RETURN_IF_ERROR(lt.check(lt.desc_create(&plan.desc, kCublasCompute32F, kCublasTypeF32), "cublasLtMatmulDescCreate"));
  const int32_t transpose = kCublasTranspose;
  BATON_RETURN_IF_ERROR(lt.check(lt.desc_set(plan.desc, kMatmulDescTransposeA, &transpose, sizeof(transpose)),
                                 "cublasLtMatmulDescSetAttribute"));
  BATON_RETURN_IF_ERROR(lt.check(lt.layout_create(&plan.weight, kCublasTypeBf16, in, out, shape.in_features),
                                 "cublasLtMatrixLayoutCreate"));
  BATON_RETURN_IF_ERROR(lt.check(lt.layout_create(&plan.x, kCublasTypeBf16, in, rows, shape.in_features),
                                 "cublasLtMatrixLayoutCreate"));
  return lt.check(lt.layout_create(&plan.y, out_type, out, rows, shape.out_features), "cublasLtMatrixLayoutCreate");
}

Result<std::vector<CublasLtHeuristic>> LibraryProduct::candidates(const LinearShape& shape, const Plan& plan, int wanted) const {
  const CublasLt& lt = *library_;
  CublasLtPreference preference = nullptr;
  BATON_RETURN_IF_ERROR(lt.check(lt.preference_create(&preference), "cublasLtMatmulPreferenceCreate"));
  const std::unique_ptr<std::remove_pointer_t<CublasLtPreference>, decltype(lt.preference_destroy)> owner(
      preference, lt.preference_destroy);
  auto set = [&](int attribute, const auto& value) {
    return lt.check(lt.preference_set(preference, attribute, &value, sizeof(value)), "cublasLtMatmulPreferenceSetAttribute");
  };
  BATON_RETURN_IF_ERROR(set(kPreferenceMaxWorkspaceBytes, uint64_t{kWorkspaceBytes}));
  // Parts of a sum that are split over thread blocks are added up in order, in float32; or the sum is not split.
  BATON_RETURN_IF_ERROR(set(kPreferenceReductionSchemes, may_split(shape) ? kReductionComputeType : kReductionNone));
  for (int operand = 0; operand < 4; ++operand) {
    BATON_RETURN_IF_ERROR(set(kPreferenceAlignmentA + operand, uint32_t{16}));
  }
  std::vector<CublasLtHeuristic> found(static_cast<size_t>(wanted));
  int count = 0;
  const Status asked = lt.check(lt.heuristics(handle_, plan.desc, plan.weight, plan.x, plan.y, plan.y, preference, wanted,
                                              found.data(), &count),
                                "cublasLtMatmulAlgoGetHeuristic");
  BATON_RETURN_IF_ERROR(asked.with_context(text(shape)));
  found.resize(static_cast<size_t>(count));
  std::erase_if(found, [](const CublasLtHeuristic& candidate) { return candidate.state != 0; });
  if (found.empty()) return unavailable("cuBLASLt has no algorithm for a {}", text(shape));
  return found;
}

Result<int> LibraryProduct::find_family(const LinearShape& shape) {
  const std::tuple<int64_t, int64_t, LinearOutput> key{shape.out_features, shape.in_features, shape.output};
  if (auto at = families_.find(key); at != families_.end()) return at->second;
  LinearShape many = shape;
  many.rows = kFamilyRows;
  Plan plan(library_);
  BATON_RETURN_IF_ERROR(describe(many, plan));
  BATON_ASSIGN_OR_RETURN(const std::vector<CublasLtHeuristic> found, candidates(many, plan, 1));
  int family = 0;
  size_t written = 0;
  BATON_RETURN_IF_ERROR(
      library_->check(library_->algorithm_config(&found[0].algorithm, kAlgorithmId, &family, sizeof(family), &written),
                      "cublasLtMatmulAlgoConfigGetAttribute"));
  return families_.emplace(key, family).first->second;
}

Result<std::vector<CublasLtHeuristic>> LibraryProduct::unsplit_candidates(const LinearShape& shape, const Plan& plan) {
  BATON_ASSIGN_OR_RETURN(const int wanted, find_family(shape));
  BATON_ASSIGN_OR_RETURN(std::vector<CublasLtHeuristic> found, candidates(shape, plan, kCandidates));
  std::erase_if(found, [&](const CublasLtHeuristic& candidate) {
    int family = 0, splits = 0;
    size_t written = 0;
    return library_->algorithm_config(&candidate.algorithm, kAlgorithmId, &family, sizeof(family), &written) != 0 ||
           library_->algorithm_config(&candidate.algorithm, kAlgorithmSplits, &splits, sizeof(splits), &written) != 0 ||
           family != wanted || splits > 1;
  });
  if (!found.empty()) return found;
  if (batch_invariant_) {
    return unavailable("cuBLASLt has no algorithm whose bits don't depend on the number of rows for a {}: run without "
                       "--batch-invariant", text(shape));
  }
  return candidates(shape, plan, 1);
}

Result<std::unique_ptr<LibraryProduct::Plan>> LibraryProduct::make_plan(const LinearShape& shape) {
  auto plan = std::make_unique<Plan>(library_);
  BATON_RETURN_IF_ERROR(describe(shape, *plan));
  if (may_split(shape)) {
    BATON_ASSIGN_OR_RETURN(const std::vector<CublasLtHeuristic> found, candidates(shape, *plan, 1));
    plan->algorithm = found[0].algorithm;
  } else {
    BATON_ASSIGN_OR_RETURN(const std::vector<CublasLtHeuristic> found, unsplit_candidates(shape, *plan));
    plan->algorithm = found[0].algorithm;
  }
  return plan;
}

Result<LibraryProduct::Plan*> LibraryProduct::find_plan(const LinearShape& shape) {
  const Key key{shape.rows, shape.out_features, shape.in_features, shape.output};
  if (auto at = plans_.find(key); at != plans_.end()) return at->second.get();
  if (plans_.size() >= kMaxPlans) std::erase_if(plans_, [](const auto& entry) { return !entry.second->tuned; });
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Plan> plan, make_plan(shape));
  return plans_.emplace(key, std::move(plan)).first->second.get();
}

Status LibraryProduct::prepare(const LinearShape& shape) {
  CurrentDevice current(*gpu_);
  return find_plan(shape).status();
}

Status LibraryProduct::run(CUstream stream, const LinearShape& shape, const Plan& plan, const CublasLtAlgorithm& algorithm,
                           const bf16* x, const bf16* weight, void* y) {
  BATON_ASSIGN_OR_RETURN(CUdeviceptr workspace, workspaces_.find(stream));
  const float alpha = 1.0f;
  const float beta = shape.output == LinearOutput::kAddFloat ? 1.0f : 0.0f;
  return library_->check(library_->matmul(handle_, plan.desc, &alpha, weight, plan.weight, x, plan.x, &beta, y, plan.y, y, plan.y,
                                          &algorithm, reinterpret_cast<void*>(workspace), kWorkspaceBytes, stream),
                         "cublasLtMatmul");
}

Status LibraryProduct::product(CUstream stream, const LinearShape& shape, const bf16* x, const bf16* weight, void* y) {
  CurrentDevice current(*gpu_);
  BATON_ASSIGN_OR_RETURN(const Plan* plan, find_plan(shape));
  return run(stream, shape, *plan, plan->algorithm, x, weight, y);
}

Status LibraryProduct::tune(CUstream stream, const LinearShape& shape, const bf16* x, const bf16* weight, void* y) {
  if (shape.rows < kMinTunedRows) {
    return invalid_argument("a {} is not tuned: that is for {} rows or more", text(shape), kMinTunedRows);
  }
  CurrentDevice current(*gpu_);
  const Driver& cu = gpu_->driver();
  BATON_ASSIGN_OR_RETURN(Plan* plan, find_plan(shape));
  BATON_ASSIGN_OR_RETURN(const std::vector<CublasLtHeuristic> found, unsplit_candidates(shape, *plan));
  EventPair events(cu);
  BATON_RETURN_IF_ERROR(events.create());
  CublasLtAlgorithm best = plan->algorithm;
  float best_ms = 0.0f;
  for (const CublasLtHeuristic& candidate : found) {
    for (int round = 0; round < kTuneRounds; ++round) {
      float ms = 0.0f;
      BATON_RETURN_IF_ERROR(cu.check(cu.event_record(events.begin, stream), "cuEventRecord"));
      BATON_RETURN_IF_ERROR(run(stream, shape, *plan, candidate.algorithm, x, weight, y));
      BATON_RETURN_IF_ERROR(cu.check(cu.event_record(events.end, stream), "cuEventRecord"));
      BATON_RETURN_IF_ERROR(cu.check(cu.stream_synchronize(stream), "cuStreamSynchronize"));
      BATON_RETURN_IF_ERROR(cu.check(cu.event_elapsed_ms(&ms, events.begin, events.end), "cuEventElapsedTime"));
      // The first call of an algorithm loads its kernel.
      if (round > 0 && (best_ms == 0.0f || ms < best_ms)) {
        best_ms = ms;
        best = candidate.algorithm;
      }
    }
  }
  plan->algorithm = best;
  plan->tuned = true;
  return {};
}

}  // namespace baton::cuda
