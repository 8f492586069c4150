#include "kernels/cuda/prefill_attention.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <limits>
#include <utility>

#include "base/check.h"
#include "kernels/cuda/prefill_arguments.h"

namespace baton::cuda {
namespace {

#ifdef BATON_PREFILL_FATBIN
asm(".pushsection .rodata, \"a\", @progbits\n"
    ".balign 64\n"
    ".hidden baton_attention_prefill_fatbin\n"
    ".global baton_attention_prefill_fatbin\n"
    "baton_attention_prefill_fatbin:\n"
    ".incbin \"" BATON_PREFILL_FATBIN "\"\n"
    ".balign 64\n"
    ".popsection\n");
extern "C" const char baton_attention_prefill_fatbin[];
const void* kernel_image() { return baton_attention_prefill_fatbin; }
#else
const void* kernel_image() { return nullptr; }
#endif

constexpr float kLog2E = 1.4426950408889634f;
constexpr int64_t kMaxHeadDim = kPrefillWidths[std::size(kPrefillWidths) - 1];
constexpr int64_t kMaxHeads = 1024;
static_assert(sizeof(PrefillTile) == 2 * sizeof(int32_t) && offsetof(PrefillTile, sequence) == 0);

size_t width_index(int32_t head_dim) {
  const int32_t* width = std::lower_bound(std::begin(kPrefillWidths), std::end(kPrefillWidths), head_dim);
  BATON_CHECK(head_dim > 0 && width != std::end(kPrefillWidths)) << "head_dim " << head_dim;
  return static_cast<size_t>(width - std::begin(kPrefillWidths));
}

class PagedPrefill final : public PrefillAttention {
 public:
  explicit PagedPrefill(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}

  ~PagedPrefill() override {
    if (module_ == nullptr) return;
    CurrentDevice current(*gpu_);
    (void)gpu_->driver().module_unload(module_);
  }

  Status load() {
    const Driver& cu = gpu_->driver();
    if (kernel_image() == nullptr) {
      return unimplemented("this build has no CUDA kernels: nvcc was not found when it was built");
    }
    if (!cu.can_compute) return unavailable("the CUDA driver lacks functions that computing needs; a newer one has them");
    CurrentDevice current(*gpu_);
    int major = 0;
    CUdevice device = 0;
    BATON_RETURN_IF_ERROR(cu.check(cu.device_get(&device, gpu_->ordinal()), "cuDeviceGet"));
    BATON_RETURN_IF_ERROR(cu.check(cu.device_attribute(&major, kAttributeComputeMajor, device), "cuDeviceGetAttribute"));
    if (major < 8) return unimplemented("{} is older than sm_80, the first with bf16 tensor cores", gpu_->name());
    BATON_RETURN_IF_ERROR(cu.check(cu.module_load(&module_, kernel_image()),
                                   fmt::format("loading the prefill attention on {}", gpu_->name())));
    for (size_t i = 0; i < std::size(kPrefillWidths); ++i) {
      const std::string name = fmt::format("baton_attention_prefill_{}", kPrefillWidths[i]);
      BATON_RETURN_IF_ERROR(cu.check(cu.module_function(&kernels_[i], module_, name.c_str()), name));
      BATON_RETURN_IF_ERROR(cu.check(cu.function_set_attribute(kernels_[i], kFunctionMaxDynamicSharedBytes,
                                                               prefill_shared_bytes(kPrefillWidths[i])), name));
    }
    return {};
  }

  Status launch(CUstream stream, const StepView& step, const PrefillTile* tiles, int32_t count, const Attention& args,
                const DeviceKv& kv) override {
    BATON_CHECK(validate(args.heads, kv.kv_heads, kv.head_dim, kv.block_tokens).ok());
    if (count == 0) return {};
    BATON_CHECK(count > 0 && count <= std::numeric_limits<int32_t>::max() / args.heads) << count << " tiles";
    PrefillArguments arguments{
        .sequences = step.sequences,
        .block_tables = step.block_tables,
        .tiles = reinterpret_cast<const int32_t*>(tiles),
        .q = reinterpret_cast<const uint16_t*>(args.q),
        .out = reinterpret_cast<uint16_t*>(args.out),
        .kv = kv,
        .heads = args.heads,
        .sequences_count = step.sequences_count,
        .scale_log2 = args.scale * kLog2E,
        .window = std::max(args.sliding_window, 0),
    };
    const size_t index = width_index(kv.head_dim);
    const int32_t width = kPrefillWidths[index];
    void* parameters[] = {&arguments};
    const Driver& cu = gpu_->driver();
    CurrentDevice current(*gpu_);
    return cu.check(cu.launch(kernels_[index], static_cast<unsigned>(count * args.heads), 1, 1,
                              static_cast<unsigned>(prefill_threads(width)), 1, 1,
                              static_cast<unsigned>(prefill_shared_bytes(width)), stream, parameters, nullptr),
                    "launching the prefill attention");
  }

  int32_t tile_tokens(int32_t, int32_t, int32_t head_dim) const override {
    return prefill_rows(kPrefillWidths[width_index(head_dim)]);
  }

  Status validate(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_tokens) const override {
    if (kv_heads <= 0 || heads <= 0 || heads > kMaxHeads || heads % kv_heads != 0) {
      return invalid_argument("attention on the GPU takes up to {} heads, a multiple of the KV heads; these are {} and {}",
                              kMaxHeads, heads, kv_heads);
    }
    if (head_dim <= 0 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
      return invalid_argument("attention on the GPU takes a head_dim that is a multiple of 8 up to {}, not {}", kMaxHeadDim,
                              head_dim);
    }
    if (block_tokens <= 0 || block_tokens % 8 != 0) {
      return invalid_argument("attention on the GPU takes blocks of a multiple of 8 tokens, not {}", block_tokens);
    }
    return {};
  }

 private:
  const std::shared_ptr<const Gpu> gpu_;
  CUmodule module_ = nullptr;
  CUfunction kernels_[std::size(kPrefillWidths)] = {};
};

}  // namespace

Result<std::unique_ptr<PrefillAttention>> PrefillAttention::create(std::shared_ptr<const Gpu> gpu) {
  auto attention = std::make_unique<PagedPrefill>(std::move(gpu));
  BATON_RETURN_IF_ERROR(attention->load());
  return std::unique_ptr<PrefillAttention>(std::move(attention));
}

}  // namespace baton::cuda
