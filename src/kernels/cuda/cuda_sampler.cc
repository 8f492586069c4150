#include "kernels/cuda/cuda_sampler.h"

#include <bit>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "base/cuda/embed.h"
#include "kernels/cuda/kernel_module.h"

namespace baton::cuda {
namespace {

#ifdef BATON_SAMPLE_FATBIN
BATON_EMBED(baton_sample_fatbin, BATON_SAMPLE_FATBIN);
const void* kernel_image() { return baton_sample_fatbin; }
#else
const void* kernel_image() { return nullptr; }
#endif

class Impl final : public CudaSampler {
 public:
  explicit Impl(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}

  Status init() {
    BATON_ASSIGN_OR_RETURN(const ComputeCapability capability, compute_capability(*gpu_));
    if (kernel_image() == nullptr) return unimplemented("this build has no CUDA kernels: nvcc was not found when it was built");
    has_clusters_ = capability.has_clusters();
    BATON_ASSIGN_OR_RETURN(module_, KernelModule::load(gpu_, kernel_image(), "sampling"));
    BATON_ASSIGN_OR_RETURN(function_, module_.find("baton_sample"));
    CurrentDevice current(*gpu_);
    return gpu_->driver().check(
        gpu_->driver().function_set_attribute(function_, kFunctionMaxDynamicSharedBytes, kSampleSharedBytes), "cuFuncSetAttribute");
  }

  Status sample(CUstream stream, float* logits, int64_t rows, int64_t vocab, const SampleRow* how, const SampleEdit* edits,
                int32_t* tokens) override {
    BATON_CHECK(vocab > 0 && vocab <= (int64_t{1} << 30)) << "vocab " << vocab;
    BATON_CHECK(rows >= 0 && rows <= INT32_MAX / 8) << rows << " rows";
    if (rows == 0) return Status();
    SampleArguments a = {};
    a.logits = logits;
    a.rows = how;
    a.edits = edits;
    a.tokens = tokens;
    a.vocab = vocab;
    a.unit = std::ldexp(1.0f, 62 - std::bit_width(static_cast<uint64_t>(vocab)));
    const auto team = static_cast<unsigned>(row_team(has_clusters_, rows));
    return launch_kernel(*gpu_, function_, "sampling",
                         {.blocks = static_cast<unsigned>(rows) * team, .threads = kSampleThreads, .shared_bytes = kSampleSharedBytes,
                          .cluster = team}, stream, a);
  }

 private:
  const std::shared_ptr<const Gpu> gpu_;
  KernelModule module_;
  CUfunction function_ = nullptr;
  bool has_clusters_ = false;
};

}  // namespace

Result<std::unique_ptr<CudaSampler>> CudaSampler::create(std::shared_ptr<const Gpu> gpu) {
  auto sampler = std::make_unique<Impl>(std::move(gpu));
  BATON_RETURN_IF_ERROR(sampler->init());
  return std::unique_ptr<CudaSampler>(std::move(sampler));
}

}  // namespace baton::cuda
