#include "kernels/cuda/gemv.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/cuda/embed.h"
#include "kernels/cuda/kernel_module.h"

namespace baton::cuda {
namespace {

#ifdef BATON_GEMV_FATBIN
BATON_EMBED(baton_gemv_fatbin, BATON_GEMV_FATBIN);
const void* kernel_image() { return baton_gemv_fatbin; }
#else
const void* kernel_image() { return nullptr; }
#endif

constexpr int64_t kSmallShareBytes = 128 << 10;
/// Of x, normalised by every block.
constexpr int kMaxNormedBytes = 40 << 10;

constexpr struct {
  int tiles, stages;
} kRings[] = {{1, 8}, {2, 4}, {4, 2}, {1, 4}, {2, 2}};
constexpr int kMaxRows[] = {1, 8, 16};

int x_bytes(const GemvArguments& args) { return args.rows * gemv_x_stride(args.in); }

}  // namespace

Result<std::unique_ptr<Gemv>> Gemv::create(std::shared_ptr<const Gpu> gpu) {
  if (kernel_image() == nullptr) {
    return unimplemented("this build has no CUDA kernels (nvcc was not found when it was built)");
  }
  std::unique_ptr<Gemv> made(new Gemv(std::move(gpu)));
  BATON_RETURN_IF_ERROR(made->load());
  return made;
}

Status Gemv::load() {
  const Driver& cu = gpu_->driver();
  CurrentDevice current(*gpu_);
  CUdevice device = 0;
  BATON_RETURN_IF_ERROR(compute_capability(*gpu_).status());
  BATON_RETURN_IF_ERROR(cu.check(cu.device_get(&device, gpu_->ordinal()), "cuDeviceGet"));
  BATON_RETURN_IF_ERROR(cu.check(cu.device_attribute(&max_shared_bytes_, kAttributeSharedBytesOptIn, device),
                                 "cuDeviceGetAttribute"));
  BATON_RETURN_IF_ERROR(cu.check(cu.module_load(&module_, kernel_image()),
                                 fmt::format("loading the kernels for few rows on {}", gpu_->name())));
  BATON_RETURN_IF_ERROR(cu.check(cu.module_function(&norm_rows_, module_, "baton_norm_rows"), "cuModuleGetFunction"));
  size_t at = 0;
  for (int rows : kMaxRows) {
    for (const auto& [tiles, stages] : kRings) {
      Variant& variant = variants_.at(at++);
      variant.max_rows = rows;
      variant.tiles = tiles;
      variant.ring_bytes = gemv_ring_bytes(stages, tiles);
      variant.shared_bytes = variant.ring_bytes + gemv_partials_bytes(rows, tiles);
      const std::string name = fmt::format("baton_gemv_r{}_t{}_s{}", rows, tiles, stages);
      BATON_RETURN_IF_ERROR(cu.check(cu.module_function(&variant.function, module_, name.c_str()), name));
      BATON_RETURN_IF_ERROR(cu.check(
          cu.function_set_attribute(variant.function, kFunctionMaxDynamicSharedBytes, max_shared_bytes_), name));
    }
  }
  return Status();
}

Gemv::~Gemv() {
  if (module_ == nullptr) return;
  CurrentDevice current(*gpu_);
  (void)gpu_->driver().module_unload(module_);
}

// Of the variants that fit, the one whose units leave the multiprocessors most evenly busy; of about equal ones the one with
// the most features per unit, which reads x the fewest times, and the longest ring.
const Gemv::Variant* Gemv::choose(const GemvArguments& args) const {
  const bool silu = args.output == GemvOutput::kSiluBf16;
  const int64_t multiprocessors = gpu_->multiprocessors();
  const int64_t all_tiles = args.out / kGemvTileFeatures;
  const int shared_for_x = args.norm_weight != nullptr ? x_bytes(args) : 0;
  const int max_rows = *std::lower_bound(std::begin(kMaxRows), std::end(kMaxRows), args.rows);
  // The weights of a small matrix are in a few rings: better to leave room for the next kernel's blocks to start theirs.
  const bool room_for_next = int64_t{args.out} * args.in * 2 <= kSmallShareBytes * multiprocessors;
  const Variant* best = nullptr;
  double best_score = 0.0;
  for (const Variant& variant : variants_) {
    if (variant.max_rows != max_rows || (silu && variant.tiles == 1)) continue;
    if (variant.shared_bytes + shared_for_x > max_shared_bytes_) continue;
    const int64_t units = (all_tiles + variant.tiles - 1) / variant.tiles;
    const int64_t rounds = (units + multiprocessors - 1) / multiprocessors;
    const double load = static_cast<double>(rounds * variant.tiles * multiprocessors) / static_cast<double>(all_tiles);
    const double ring = 1e-7 * (room_for_next ? variant.ring_bytes : -variant.ring_bytes);
    const double score = load - 0.01 * variant.tiles + ring;
    if (best == nullptr || score < best_score) {
      best = &variant;
      best_score = score;
    }
  }
  return best;
}

Status Gemv::launch_kernel(CUstream stream, CUfunction function, int blocks, int shared_bytes, void* args) const {
  void* parameters[] = {args};
  return cuda::launch_kernel(*gpu_, function, "a product of few rows",
                             {.blocks = static_cast<unsigned>(blocks), .threads = kGemvThreads, .shared_bytes = static_cast<unsigned>(shared_bytes)},
                             stream, static_cast<void**>(parameters));
}

Status Gemv::normalise(CUstream stream, GemvArguments& args) {
  BATON_CHECK(args.in <= kMaxNormedInputs);
  BATON_ASSIGN_OR_RETURN(CUdeviceptr normed, normed_.find(stream));
  NormRowsArguments norm{static_cast<const float*>(args.x), args.norm_weight, reinterpret_cast<void*>(normed), args.norm_eps,
                         args.in};
  args.x = norm.out;
  args.norm_weight = nullptr;
  return launch_kernel(stream, norm_rows_, args.rows, 0, &norm);
}

Status Gemv::launch(CUstream stream, GemvArguments args) {
  CurrentDevice current(*gpu_);
  const bool by_every_block = args.rows <= kGemvMaxNormedRows && x_bytes(args) <= kMaxNormedBytes;
  if (args.norm_weight != nullptr && !by_every_block) BATON_RETURN_IF_ERROR(normalise(stream, args));
  const Variant* variant = choose(args);
  if (variant == nullptr) {
    return unimplemented("{} has too little shared memory for a product of {} rows and {} inputs", gpu_->name(), args.rows,
                         args.in);
  }
  args.x_shared_stride = gemv_x_stride(args.in);
  const int shared_bytes = variant->shared_bytes + (args.norm_weight != nullptr ? x_bytes(args) : 0);
  const int units = (args.out / kGemvTileFeatures + variant->tiles - 1) / variant->tiles;
  return launch_kernel(stream, variant->function, std::min(units, gpu_->multiprocessors()), shared_bytes, &args);
}

}  // namespace baton::cuda
