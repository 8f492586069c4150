#include "kernels/cuda/cuda_kernels.h"

#include <algorithm>
#include <bit>
#include <numbers>
#include <utility>

#include "base/check.h"
#include "base/cuda/embed.h"
#include "kernels/cuda/kernel_arguments.h"
#include "kernels/cuda/kernel_module.h"
#include "kernels/cuda/prefill_attention.h"
#include "kernels/cuda/sample_arguments.h"

namespace baton::cuda {
namespace {

#ifdef BATON_STEP_KERNELS_FATBIN
BATON_EMBED(baton_step_kernels_fatbin, BATON_STEP_KERNELS_FATBIN);
BATON_EMBED(baton_attention_decode_fatbin, BATON_ATTENTION_DECODE_FATBIN);
constexpr bool kHasKernels = true;
const void* step_image() { return baton_step_kernels_fatbin; }
const void* decode_image() { return baton_attention_decode_fatbin; }
#else
constexpr bool kHasKernels = false;
const void* step_image() { return nullptr; }
const void* decode_image() { return nullptr; }
#endif

const uint16_t* raw(const bf16* p) { return reinterpret_cast<const uint16_t*>(p); }
uint16_t* raw(bf16* p) { return reinterpret_cast<uint16_t*>(p); }

unsigned blocks_for(int64_t units, int64_t each) {
  const int64_t blocks = (units + each - 1) / each;
  BATON_CHECK(blocks <= INT32_MAX) << blocks << " thread blocks";
  return static_cast<unsigned>(blocks);
}

constexpr int32_t kDecodeHeadDims[] = {32, 64, 96, 128, 256};
constexpr int32_t kDecodeRows[] = {4, 8, 16};

class CudaKernelsImpl final : public CudaKernels {
 public:
  explicit CudaKernelsImpl(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}

  Status init() {
    BATON_ASSIGN_OR_RETURN(const ComputeCapability capability, compute_capability(*gpu_));
    if (!kHasKernels) {
      return unimplemented("this build has no CUDA kernels (nvcc was not found when it was built)");
    }
    name_ = fmt::format("cuda/sm_{}{} ({})", capability.major, capability.minor, gpu_->name());
    has_clusters_ = capability.has_clusters();
    BATON_ASSIGN_OR_RETURN(step_, KernelModule::load(gpu_, step_image(), "step"));
    BATON_ASSIGN_OR_RETURN(decode_module_, KernelModule::load(gpu_, decode_image(), "attention"));
    const Driver& cu = gpu_->driver();
    CUdevice device = 0;
    int shared_bytes = 0;
    BATON_RETURN_IF_ERROR(cu.check(cu.device_get(&device, gpu_->ordinal()), "cuDeviceGet"));
    BATON_RETURN_IF_ERROR(cu.check(cu.device_attribute(&shared_bytes, kAttributeSharedBytesOptIn, device), "cuDeviceGetAttribute"));
    CurrentDevice current(*gpu_);
    for (const auto& [name, function] :
         {std::pair("baton_embed", &embed_), {"baton_rms_norm", &rms_norm_}, {"baton_qkv_rope_kv_write", &qkv_},
          {"baton_silu_mul", &silu_mul_}, {"baton_add_bias", &add_bias_}, {"baton_gather_rows", &gather_rows_},
          {"baton_argmax", &argmax_}}) {
      BATON_ASSIGN_OR_RETURN(*function, step_.find(name));
    }
    for (size_t d = 0; d < std::size(kDecodeHeadDims); ++d) {
      for (size_t r = 0; r < std::size(kDecodeRows); ++r) {
        CUfunction& function = decode_[d][r];
        BATON_ASSIGN_OR_RETURN(
            function, decode_module_.find(fmt::format("baton_attention_decode_{}_{}", kDecodeHeadDims[d], kDecodeRows[r])));
        const size_t bytes = decode_shared_bytes(kDecodeHeadDims[d], kDecodeRows[r], kDecodeMaxSequences);
        if (bytes + 1024 > static_cast<size_t>(shared_bytes)) {  // validate_attention_shape tells
          function = nullptr;
          continue;
        }
        BATON_RETURN_IF_ERROR(cu.check(cu.function_set_attribute(function, kFunctionMaxDynamicSharedBytes, static_cast<int>(bytes)),
                                       "cuFuncSetAttribute"));
      }
    }
    // On sm_80 and its kin, which have less shared memory, the second block of a multiprocessor waits its turn.
    decode_blocks_ = 2 * gpu_->multiprocessors();
    const size_t arrival_bytes = static_cast<size_t>(decode_blocks_) * sizeof(uint32_t);
    BATON_ASSIGN_OR_RETURN(arrivals_, DeviceMemory::allocate(gpu_, arrival_bytes));
    BATON_RETURN_IF_ERROR(cu.check(cu.memory_set(arrivals_.address(), 0, arrival_bytes), "cuMemsetD8"));
    BATON_ASSIGN_OR_RETURN(prefill_, PrefillAttention::create(gpu_));
    return Status();
  }

  const std::shared_ptr<const Gpu>& gpu() const override { return gpu_; }
  std::string_view name() const override { return name_; }

  Status validate_attention_shape(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_tokens) const override {
    if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0 || heads > INT16_MAX) {
      return invalid_argument("{} heads over {} KV heads: the first must be a multiple of the second", heads, kv_heads);
    }
    if (head_dim < 8 || head_dim > 256 || head_dim % 8 != 0) {
      return invalid_argument("head_dim is {}; CUDA attention takes multiples of 8 up to 256", head_dim);
    }
    if (block_tokens < 8 || block_tokens % 8 != 0 || block_tokens > INT16_MAX) {
      return invalid_argument("blocks of {} tokens; CUDA attention takes multiples of 8", block_tokens);
    }
    if (decode_function(static_cast<int32_t>(heads / kv_heads), static_cast<int32_t>(head_dim)) == nullptr) {
      return invalid_argument("head_dim is {}; {} has too little shared memory for it", head_dim, gpu_->name());
    }
    return prefill_->validate(heads, kv_heads, head_dim, block_tokens);
  }

  Status embed(CUstream stream, const StepView& step, const int32_t* chosen, const bf16* table, int64_t hidden,
               float* x) override {
    BATON_CHECK(hidden > 0 && hidden % 8 == 0) << "hidden " << hidden;
    if (step.rows == 0) return Status();
    return launch(embed_, "embed", static_cast<unsigned>(step.rows), row_threads(hidden / 8, 256), 0, stream, step,
                  chosen, raw(table), hidden, x);
  }

  Status rms_norm(CUstream stream, const float* x, int64_t rows, int64_t hidden, const float* weight, float eps,
                  bf16* out) override {
    BATON_CHECK(hidden > 0 && hidden % 8 == 0) << "hidden " << hidden;
    if (rows == 0) return Status();
    return launch(rms_norm_, "rms_norm", blocks_for(rows, 1), row_threads(hidden / 16, 1024), 0, stream, x, hidden, weight,
                  eps, raw(out));
  }

  Status qkv_rope_kv_write(CUstream stream, const StepView& step, const QkvRope& args, const DeviceKv& kv,
                           bf16* q_out) override {
    BATON_CHECK(kv.head_dim > 0 && kv.head_dim % 8 == 0 && kv.head_dim <= 256) << "head_dim " << kv.head_dim;
    if (step.rows == 0) return Status();
    QkvRopeArguments a = {};
    a.step = step;
    a.kv = kv;
    a.qkv = raw(args.qkv);
    a.bias = args.bias;
    a.q_norm = args.q_norm;
    a.k_norm = args.k_norm;
    a.rope_cos = args.rope_cos;
    a.rope_sin = args.rope_sin;
    a.q_out = raw(q_out);
    a.norm_eps = args.norm_eps;
    a.heads = args.heads;
    a.threads_per_head = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(kv.head_dim / 8)));
    // A block works on one row; when there are few, on fewer of its heads, so that more multiprocessors have some.
    const auto threads_per_head = static_cast<unsigned>(a.threads_per_head);
    const unsigned heads = static_cast<unsigned>(args.heads) + 2 * static_cast<unsigned>(kv.kv_heads);
    const unsigned threads = step.rows <= 16 ? 64 : 256;
    const unsigned heads_per_block = threads / threads_per_head;
    return launch_kernel(*gpu_, qkv_, "qkv_rope_kv_write",
                         {.blocks = static_cast<unsigned>(step.rows), .threads = threads,
                          .blocks_y = (heads + heads_per_block - 1) / heads_per_block}, stream, a);
  }

  Status attention_decode(CUstream stream, const StepView& step, int32_t first, int32_t count, const Attention& args,
                          const DeviceKv& kv, CUdeviceptr workspace) override {
    BATON_CHECK(kv.head_dim > 0 && kv.head_dim % 8 == 0 && kv.head_dim <= 256) << "head_dim " << kv.head_dim;
    BATON_CHECK(args.heads % kv.kv_heads == 0) << args.heads << " heads, " << kv.kv_heads << " KV heads";
    BATON_CHECK(kv.block_tokens % 8 == 0) << "block_tokens " << kv.block_tokens;
    DecodeArguments a = {};
    a.block_tables = step.block_tables;
    a.kv = kv;
    a.q = raw(args.q);
    a.out = raw(args.out);
    a.partials = reinterpret_cast<float*>(workspace);
    a.arrivals = reinterpret_cast<uint32_t*>(arrivals_.address());
    a.heads = args.heads;
    a.group = args.heads / kv.kv_heads;
    const int32_t rows = decode_rows(a.group), padded = decode_padded_head_dim(kv.head_dim);
    a.head_blocks = (a.group + rows - 1) / rows;
    a.scale_log2 = args.scale * std::numbers::log2e_v<float>;
    a.sliding_window = args.sliding_window;
    const auto block_tokens = static_cast<uint32_t>(kv.block_tokens);
    a.block_shift = std::has_single_bit(block_tokens) ? std::countr_zero(block_tokens) : -1;
    const CUfunction function = decode_function(a.group, kv.head_dim);
    BATON_CHECK(function != nullptr) << "head_dim " << kv.head_dim << " was not validated";
    for (; count > 0; first += kDecodeMaxSequences, count -= kDecodeMaxSequences) {
      a.sequences = step.sequences + first;
      a.count = std::min(count, kDecodeMaxSequences);
      const int64_t most = static_cast<int64_t>(a.count) * kv.kv_heads * a.head_blocks * kDecodeMaxSplits;
      const auto blocks = static_cast<unsigned>(std::min<int64_t>(most, decode_blocks_));
      BATON_RETURN_IF_ERROR(launch(function, "attention_decode", blocks, kDecodeThreads,
                                   static_cast<unsigned>(decode_shared_bytes(padded, rows, a.count)), stream, a));
    }
    return Status();
  }

  size_t decode_workspace_bytes(int32_t count, int32_t heads, int32_t head_dim) const override {
    // A thread block leaves partials of one pair at most that begins in its share.
    const auto blocks = std::min<int64_t>(decode_blocks_, static_cast<int64_t>(count) * heads * kDecodeMaxSplits);
    return static_cast<size_t>(blocks) * kDecodeMaxSplits *
           decode_partial_floats(decode_padded_head_dim(head_dim), decode_rows(heads)) * sizeof(float);
  }

  Status attention_prefill(CUstream stream, const StepView& step, const PrefillTile* tiles, int32_t tile_count,
                           const Attention& args, const DeviceKv& kv) override {
    if (tile_count == 0) return Status();
    return prefill_->launch(stream, step, tiles, tile_count, args, kv);
  }

  int32_t prefill_tile_tokens(int32_t heads, int32_t kv_heads,
                              int32_t head_dim) const override {
    return prefill_->tile_tokens(heads, kv_heads, head_dim);
  }

  Status silu_mul(CUstream stream, const bf16* gate_up, const float* bias, int64_t rows, int64_t inter, bf16* out) override {
    BATON_CHECK(inter > 0 && inter % 8 == 0) << "inter " << inter;
    if (rows == 0) return Status();
    const int64_t units = rows * (inter / 8);
    const unsigned threads = units <= 16384 ? 64 : 256;
    return launch(silu_mul_, "silu_mul", blocks_for(units, threads), threads, 0, stream, raw(gate_up), bias, rows, inter, raw(out));
  }

  Status add_bias(CUstream stream, float* x, int64_t rows, int64_t width, const float* bias) override {
    BATON_CHECK(width > 0 && width % 4 == 0) << "width " << width;
    if (rows == 0) return Status();
    return launch(add_bias_, "add_bias", blocks_for(rows * (width / 4), 256), 256, 0, stream, x, rows, width, bias);
  }

  Status gather_rows(CUstream stream, const void* from, int64_t row_bytes, const int32_t* index, int64_t rows,
                     void* to) override {
    BATON_CHECK(row_bytes > 0 && row_bytes % 16 == 0) << "rows of " << row_bytes << " bytes";
    if (rows == 0) return Status();
    const int64_t vectors = row_bytes / 16;
    return launch(gather_rows_, "gather_rows", blocks_for(rows, 1), row_threads(vectors, 256), 0, stream, from, vectors, index, to);
  }

  Status argmax(CUstream stream, const float* logits, int64_t rows, int64_t vocab, int32_t* tokens) override {
    BATON_CHECK(vocab > 0 && vocab <= INT32_MAX) << "vocab " << vocab;
    if (rows == 0) return Status();
    const auto team = static_cast<unsigned>(row_team(has_clusters_, rows));
    return launch_kernel(*gpu_, argmax_, "argmax", {.blocks = blocks_for(rows * team, 1), .threads = kSampleThreads, .cluster = team},
                         stream, logits, vocab, tokens);
  }

 private:
  /// Whole warps, as many as have something to do.
  static unsigned row_threads(int64_t vectors, int64_t most) {
    return static_cast<unsigned>(std::clamp<int64_t>((vectors + 31) / 32 * 32, 32, most));
  }

  CUfunction decode_function(int32_t group, int32_t head_dim) const {
    const auto d = std::ranges::find(kDecodeHeadDims, decode_padded_head_dim(head_dim)) - std::begin(kDecodeHeadDims);
    const auto r = std::ranges::find(kDecodeRows, decode_rows(group)) - std::begin(kDecodeRows);
    return decode_[d][r];
  }

  template <typename... Arguments>
  Status launch(CUfunction function, const char* what, unsigned blocks, unsigned threads, unsigned shared_bytes, CUstream stream,
                Arguments... arguments) {
    return launch_kernel(*gpu_, function, what, {.blocks = blocks, .threads = threads, .shared_bytes = shared_bytes}, stream, arguments...);
  }

  const std::shared_ptr<const Gpu> gpu_;
  std::string name_;
  KernelModule step_, decode_module_;
  CUfunction embed_ = nullptr, rms_norm_ = nullptr, qkv_ = nullptr, silu_mul_ = nullptr, add_bias_ = nullptr,
             gather_rows_ = nullptr, argmax_ = nullptr;
  CUfunction decode_[std::size(kDecodeHeadDims)][std::size(kDecodeRows)] = {};
  int32_t decode_blocks_ = 0;
  bool has_clusters_ = false;
  DeviceMemory arrivals_;
  std::unique_ptr<PrefillAttention> prefill_;
};

}  // namespace

Result<std::unique_ptr<CudaKernels>> CudaKernels::create(std::shared_ptr<const Gpu> gpu) {
  auto kernels = std::make_unique<CudaKernelsImpl>(std::move(gpu));
  BATON_RETURN_IF_ERROR(kernels->init());
  return std::unique_ptr<CudaKernels>(std::move(kernels));
}

}  // namespace baton::cuda
