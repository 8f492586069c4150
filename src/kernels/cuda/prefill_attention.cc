#include "kernels/cuda/prefill_attention.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/cuda/embed.h"
#include "kernels/cuda/kernel_module.h"
#include "kernels/cuda/prefill_arguments.h"

namespace baton::cuda {
namespace {

#ifdef BATON_PREFILL_FATBIN
BATON_EMBED(baton_attention_prefill_fatbin, BATON_PREFILL_FATBIN);
BATON_EMBED(baton_attention_prefill_sm90_fatbin, BATON_PREFILL_SM90_FATBIN);
const void* portable_image() { return baton_attention_prefill_fatbin; }
const void* sm90_image() { return baton_attention_prefill_sm90_fatbin; }
#else
const void* portable_image() { return nullptr; }
const void* sm90_image() { return nullptr; }
#endif

constexpr float kLog2E = 1.4426950408889634f;
constexpr int64_t kMaxHeadDim = kPrefillWidths[std::size(kPrefillWidths) - 1];
constexpr int64_t kMaxHeads = 1024;
static_assert(kPrefillSm90Rows == prefill_rows(kPrefillSm90Widths[std::size(kPrefillSm90Widths) - 1]),
              "tile_tokens() is the same for both");
static_assert(sizeof(PrefillTile) == 2 * sizeof(int32_t) && offsetof(PrefillTile, sequence) == 0);

/// The first width that is no narrower; the number of widths when there is none.
template <size_t N>
size_t width_index(const int32_t (&widths)[N], int32_t head_dim) {
  return static_cast<size_t>(std::lower_bound(std::begin(widths), std::end(widths), head_dim) - std::begin(widths));
}

/// Kernels of one module, one for each width.
template <size_t N>
struct Kernels {
  CUmodule module = nullptr;
  CUfunction functions[N] = {};

  template <typename SharedBytes>
  Status load(const Gpu& gpu, const void* image, std::string_view prefix, const int32_t (&widths)[N], SharedBytes shared_bytes) {
    const Driver& cu = gpu.driver();
    BATON_RETURN_IF_ERROR(
        cu.check(cu.module_load(&module, image), fmt::format("loading {} on {}", prefix, gpu.name())));
    for (size_t i = 0; i < N; ++i) {
      const std::string name = fmt::format("{}_{}", prefix, widths[i]);
      BATON_RETURN_IF_ERROR(cu.check(cu.module_function(&functions[i], module, name.c_str()), name));
      BATON_RETURN_IF_ERROR(cu.check(
          cu.function_set_attribute(functions[i], kFunctionMaxDynamicSharedBytes, shared_bytes(widths[i])), name));
    }
    return {};
  }
};

class PagedPrefill final : public PrefillAttention {
 public:
  explicit PagedPrefill(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}

  ~PagedPrefill() override {
    CurrentDevice current(*gpu_);
    for (CUmodule module : {portable_.module, sm90_.module}) {
      if (module != nullptr) (void)gpu_->driver().module_unload(module);
    }
  }

  Status load(bool portable) {
    const Driver& cu = gpu_->driver();
    if (portable_image() == nullptr) {
      return unimplemented("this build has no CUDA kernels: nvcc was not found when it was built");
    }
    BATON_ASSIGN_OR_RETURN(const ComputeCapability capability, compute_capability(*gpu_));
    CurrentDevice current(*gpu_);
    BATON_RETURN_IF_ERROR(
        portable_.load(*gpu_, portable_image(), "baton_attention_prefill", kPrefillWidths, prefill_shared_bytes));
    if (capability.major != 9 || portable || cu.tensor_map_encode_tiled == nullptr) return {};
    return sm90_.load(*gpu_, sm90_image(), "baton_attention_prefill_sm90", kPrefillSm90Widths, prefill_sm90_shared_bytes);
  }

  Status launch(CUstream stream, const StepView& step, const PrefillTile* tiles, int32_t count, const Attention& args,
                const DeviceKv& kv) override {
    BATON_CHECK(validate(args.heads, kv.kv_heads, kv.head_dim, kv.block_tokens).ok());
    BATON_CHECK(args.scale > 0) << args.scale;
    if (count == 0) return {};
    BATON_CHECK(count > 0 && count <= std::numeric_limits<int32_t>::max() / 2 / args.heads) << count << " tiles";
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
    CurrentDevice current(*gpu_);
    if (sm90_.module != nullptr && kv.head_dim <= kPrefillSm90Widths[std::size(kPrefillSm90Widths) - 1]) {
      return launch_sm90(stream, arguments, count, step.rows);
    }
    const size_t index = width_index(kPrefillWidths, kv.head_dim);
    const int32_t width = kPrefillWidths[index];
    return launch_kernel(portable_.functions[index], count * args.heads, kPrefillThreads, prefill_shared_bytes(width),
                         stream, &arguments);
  }

  int32_t tile_tokens(int32_t, int32_t, int32_t head_dim) const override {
    const size_t index = width_index(kPrefillWidths, head_dim);
    BATON_CHECK(index < std::size(kPrefillWidths)) << "head_dim " << head_dim;
    return prefill_rows(kPrefillWidths[index]);
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
  Status launch_sm90(CUstream stream, const PrefillArguments& common, int32_t count, int32_t rows) {
    PrefillSm90Arguments arguments{};
    const DeviceKv& kv = common.kv;
    arguments.common = common;
    arguments.tile_count = count;
    arguments.box_tokens = std::gcd(kv.block_tokens, kPrefillSm90Keys);
    const auto row_bytes = static_cast<uint64_t>(kv.head_dim) * 2;
    // How many blocks the pool has is not known here; the tables name none that it has not.
    const uint64_t blocks[] = {static_cast<uint64_t>(kv.head_dim), static_cast<uint64_t>(kv.block_tokens),
                               static_cast<uint64_t>(kv.kv_heads), std::numeric_limits<int32_t>::max()};
    const uint64_t block_strides[] = {row_bytes, row_bytes * static_cast<uint64_t>(kv.block_tokens),
                                      static_cast<uint64_t>(kv.block_stride_bytes)};
    const uint32_t block_box[] = {kPrefillSm90PanelColumns, static_cast<uint32_t>(arguments.box_tokens), 1, 1};
    BATON_RETURN_IF_ERROR(encode(arguments.k, kv.pool + kv.k_offset_bytes, blocks, block_strides, block_box));
    BATON_RETURN_IF_ERROR(encode(arguments.v, kv.pool + kv.v_offset_bytes, blocks, block_strides, block_box));
    const uint64_t queries[] = {static_cast<uint64_t>(kv.head_dim), static_cast<uint64_t>(common.heads),
                                static_cast<uint64_t>(rows)};
    const uint64_t query_strides[] = {row_bytes, row_bytes * static_cast<uint64_t>(common.heads)};
    const uint32_t query_box[] = {kPrefillSm90PanelColumns, 1, kPrefillSm90Rows};
    BATON_RETURN_IF_ERROR(encode(arguments.q, common.q, queries, query_strides, query_box));
    const size_t index = width_index(kPrefillSm90Widths, kv.head_dim);
    return launch_kernel(sm90_.functions[index], std::min(count * common.heads, gpu_->multiprocessors()), kPrefillSm90Threads,
                         prefill_sm90_shared_bytes(kPrefillSm90Widths[index]), stream, &arguments);
  }

  template <size_t N>
  Status encode(TensorMap& map, const void* address, const uint64_t (&dimensions)[N], const uint64_t (&strides)[N - 1],
                const uint32_t (&box)[N]) {
    uint32_t element_strides[N];
    std::fill(std::begin(element_strides), std::end(element_strides), 1u);
    const Driver& cu = gpu_->driver();
    return cu.check(cu.tensor_map_encode_tiled(&map, kTensorMapBf16, N, const_cast<void*>(address), dimensions, strides, box,
                                               element_strides, 0, kTensorMapSwizzle128, kTensorMapPromotion256, 0),
                    "cuTensorMapEncodeTiled");
  }

  Status launch_kernel(CUfunction kernel, int32_t blocks, int32_t threads, int32_t shared_bytes, CUstream stream,
                       void* arguments) {
    void* parameters[] = {arguments};
    const Driver& cu = gpu_->driver();
    return cu.check(cu.launch(kernel, static_cast<unsigned>(blocks), 1, 1, static_cast<unsigned>(threads), 1, 1,
                              static_cast<unsigned>(shared_bytes), stream, parameters, nullptr),
                    "launching the prefill attention");
  }

  const std::shared_ptr<const Gpu> gpu_;
  Kernels<std::size(kPrefillWidths)> portable_;
  Kernels<std::size(kPrefillSm90Widths)> sm90_;  // empty: not this GPU
};

}  // namespace

Result<std::unique_ptr<PrefillAttention>> PrefillAttention::create(std::shared_ptr<const Gpu> gpu, bool portable) {
  auto attention = std::make_unique<PagedPrefill>(std::move(gpu));
  BATON_RETURN_IF_ERROR(attention->load(portable));
  return std::unique_ptr<PrefillAttention>(std::move(attention));
}

}  // namespace baton::cuda
