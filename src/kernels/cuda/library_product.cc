#include "kernels/cuda/library_product.h"

#include <cstdlib>
#include <utility>

namespace baton::cuda {
namespace {

/// What NVIDIA advises for Hopper.
constexpr size_t kWorkspaceBytes = 32u << 20;
/// A chunked prefill has a new shape whenever its last chunk has a new length. A plan is some 400 bytes.
constexpr size_t kMaxPlans = 8192;
constexpr int kCandidates = 12;
/// Rows for which the algorithm is chosen where one, or one family, has to serve all numbers of rows.
constexpr int64_t kCommonRows = 512;
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
  if (found.empty()) return unimplemented("cuBLASLt has no algorithm for a {}", text(shape));
  return found;
}

Result<CublasLtAlgorithm> LibraryProduct::find_common(const LinearShape& shape) {
  const Features key{shape.out_features, shape.in_features, shape.output};
  if (auto at = common_.find(key); at != common_.end()) return at->second;
  LinearShape common = shape;
  common.rows = kCommonRows;
  Plan plan(library_);
  BATON_RETURN_IF_ERROR(describe(common, plan));
  BATON_ASSIGN_OR_RETURN(const std::vector<CublasLtHeuristic> found, candidates(common, plan, 1));
  return common_.emplace(key, found[0].algorithm).first->second;
}

Result<std::vector<CublasLtHeuristic>> LibraryProduct::family_candidates(const LinearShape& shape, const Plan& plan) {
  const auto read = [&](const CublasLtAlgorithm& algorithm, int attribute) {
    int value = -1;
    size_t written = 0;
    return library_->algorithm_config(&algorithm, attribute, &value, sizeof(value), &written) == 0 ? value : -1;
  };
  BATON_ASSIGN_OR_RETURN(const CublasLtAlgorithm common, find_common(shape));
  BATON_ASSIGN_OR_RETURN(std::vector<CublasLtHeuristic> found, candidates(shape, plan, kCandidates));
  const CublasLtHeuristic first = found[0];
  std::erase_if(found, [&](const CublasLtHeuristic& candidate) {
    return read(candidate.algorithm, kAlgorithmId) != read(common, kAlgorithmId) || read(candidate.algorithm, kAlgorithmSplits) > 1;
  });
  if (found.empty()) found.push_back(first);
  return found;
}

const CublasLtAlgorithm* LibraryProduct::find_tuned(const LinearShape& shape) const {
  const auto tuned = tuned_.find({shape.out_features, shape.in_features, shape.output});
  if (tuned == tuned_.end()) return nullptr;
  const CublasLtAlgorithm* nearest = nullptr;
  int64_t distance = shape.rows / 3 + 1;  // an algorithm for 8,192 rows is good for 6,200, too
  for (const auto& [rows, algorithm] : tuned->second) {
    if (std::abs(rows - shape.rows) >= distance) continue;
    distance = std::abs(rows - shape.rows);
    nearest = &algorithm;
  }
  return nearest;
}

Result<CublasLtAlgorithm> LibraryProduct::choose(const LinearShape& shape, const Plan& plan) {
  if (batch_invariant_) return find_common(shape);
  if (const CublasLtAlgorithm* tuned = may_split(shape) ? nullptr : find_tuned(shape); tuned != nullptr) return *tuned;
  BATON_ASSIGN_OR_RETURN(const std::vector<CublasLtHeuristic> found,
                         may_split(shape) ? candidates(shape, plan, 1) : family_candidates(shape, plan));
  return found[0].algorithm;
}

Result<const LibraryProduct::Plan*> LibraryProduct::find_plan(const LinearShape& shape) {
  const Key key{shape.rows, shape.out_features, shape.in_features, shape.output};
  if (auto at = plans_.find(key); at != plans_.end()) return at->second.get();
  if (plans_.size() >= kMaxPlans) plans_.clear();
  auto plan = std::make_unique<Plan>(library_);
  BATON_RETURN_IF_ERROR(describe(shape, *plan));
  BATON_ASSIGN_OR_RETURN(plan->algorithm, choose(shape, *plan));
  return plans_.emplace(key, std::move(plan)).first->second.get();
}

Status LibraryProduct::prepare(const LinearShape& shape) {
  CurrentDevice current(*gpu_);
  return find_plan(shape).status();
}

Status LibraryProduct::reserve(CUstream stream) { return workspaces_.find(stream).status(); }

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
  if (batch_invariant_ || shape.rows < kMinTunedRows) return {};
  CurrentDevice current(*gpu_);
  const Driver& cu = gpu_->driver();
  Plan plan(library_);
  BATON_RETURN_IF_ERROR(describe(shape, plan));
  BATON_ASSIGN_OR_RETURN(const std::vector<CublasLtHeuristic> found, family_candidates(shape, plan));
  EventPair events(cu);
  BATON_RETURN_IF_ERROR(events.create());
  CublasLtAlgorithm best = found[0].algorithm;
  float best_ms = 0.0f;
  for (const CublasLtHeuristic& candidate : found) {
    for (int round = 0; round < kTuneRounds; ++round) {
      float ms = 0.0f;
      BATON_RETURN_IF_ERROR(cu.check(cu.event_record(events.begin, stream), "cuEventRecord"));
      BATON_RETURN_IF_ERROR(run(stream, shape, plan, candidate.algorithm, x, weight, y));
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
  tuned_[{shape.out_features, shape.in_features, shape.output}][shape.rows] = best;
  plans_.clear();
  return {};
}

}  // namespace baton::cuda
