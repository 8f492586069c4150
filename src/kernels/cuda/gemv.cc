#include "kernels/cuda/gemv.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/check.h"

namespace baton::cuda {
namespace {

#ifdef BATON_GEMV_FATBIN
asm(".pushsection .rodata, \"a\", @progbits\n"
    ".balign 64\n"
    ".hidden baton_gemv_fatbin\n"
    ".global baton_gemv_fatbin\n"
    "baton_gemv_fatbin:\n"
    ".incbin \"" BATON_GEMV_FATBIN "\"\n"
    ".balign 64\n"
    ".popsection\n");
extern "C" const char baton_gemv_fatbin[];
const void* kernel_image() { return baton_gemv_fatbin; }
#else
const void* kernel_image() { return nullptr; }
#endif

constexpr int kAttributeMaxSharedPerBlock = 97;
constexpr int kStagesTimesTiles = 8;
/// x goes to shared memory when it is this small; two blocks, of this kernel and of the next one, then fit one multiprocessor.
constexpr int kSmallXBytes = 40 << 10;

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
  int major = 0;
  BATON_RETURN_IF_ERROR(cu.check(cu.device_get(&device, gpu_->ordinal()), "cuDeviceGet"));
  BATON_RETURN_IF_ERROR(cu.check(cu.device_attribute(&major, kAttributeComputeMajor, device), "cuDeviceGetAttribute"));
  if (major < 8) return unimplemented("{} is older than sm_80", gpu_->name());
  BATON_RETURN_IF_ERROR(cu.check(cu.device_attribute(&max_shared_bytes_, kAttributeMaxSharedPerBlock, device),
                                 "cuDeviceGetAttribute"));
  BATON_RETURN_IF_ERROR(cu.check(cu.module_load(&module_, kernel_image()),
                                 fmt::format("loading the kernels for few rows on {}", gpu_->name())));
  size_t at = 0;
  for (int rows : {1, 4, 8, 16}) {
    for (int tiles : {1, 2, 4}) {
      Variant& variant = variants_[at++];
      variant.max_rows = rows;
      variant.tiles = tiles;
      variant.shared_base_bytes = gemv_ring_bytes(kStagesTimesTiles / tiles, tiles) + gemv_partials_bytes(rows, tiles);
      const std::string name = fmt::format("baton_gemv_r{}_t{}", rows, tiles);
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

bool Gemv::normed_fits(int64_t rows, int64_t in) const {
  if (rows < 1 || rows > kGemvMaxRows || in > (1 << 20)) return false;
  const int most = gemv_ring_bytes(kStagesTimesTiles, 1) + gemv_partials_bytes(kGemvMaxRows, 4);
  return most + rows * gemv_x_stride(static_cast<int>(in)) <= max_shared_bytes_;
}

// As many features per unit as leave the multiprocessors evenly busy: the fewer units, the fewer times x is read.
const Gemv::Variant& Gemv::choose(const GemvArguments& args) const {
  const bool silu = args.output == GemvOutput::kSiluBf16;
  const int64_t multiprocessors = gpu_->multiprocessors();
  const int64_t all_tiles = (args.out + kGemvTileFeatures - 1) / kGemvTileFeatures;
  const Variant* best = nullptr;
  double best_load = 0.0;
  for (const Variant& variant : variants_) {
    const bool smallest = variant.max_rows >= args.rows && (variant.max_rows == 1 || variant.max_rows / 2 < args.rows);
    if (!smallest && !(variant.max_rows == 4 && args.rows == 2)) continue;
    if (silu && variant.tiles == 1) continue;
    const int64_t units = (all_tiles + variant.tiles - 1) / variant.tiles;
    const int64_t rounds = (units + multiprocessors - 1) / multiprocessors;
    const double load = static_cast<double>(rounds * variant.tiles * multiprocessors) / static_cast<double>(all_tiles);
    if (best == nullptr || load <= best_load * 1.02) {
      best = &variant;
      best_load = load;
    }
  }
  BATON_CHECK(best != nullptr);
  return *best;
}

Status Gemv::launch(CUstream stream, GemvArguments args) const {
  const Variant& variant = choose(args);
  const int64_t x_bytes = int64_t{args.rows} * gemv_x_stride(args.in);
  const bool in_shared = args.norm_weight != nullptr || x_bytes <= kSmallXBytes;
  args.x_shared_stride = in_shared ? gemv_x_stride(args.in) : 0;
  const int unit_tiles = variant.tiles;
  const int units = (args.out / kGemvTileFeatures + unit_tiles - 1) / unit_tiles;

  CUlaunchAttribute attribute{};
  attribute.id = kLaunchProgrammaticSerialization;
  attribute.value.number = 1;
  CUlaunchConfig config{};
  config.grid_x = static_cast<unsigned>(std::min(units, gpu_->multiprocessors()));
  config.grid_y = config.grid_z = config.block_y = config.block_z = 1;
  config.block_x = kGemvThreads;
  config.shared_bytes = static_cast<unsigned>(variant.shared_base_bytes + (in_shared ? x_bytes : 0));
  config.stream = stream;
  config.attributes = &attribute;
  config.attribute_count = 1;
  void* parameters[] = {&args};
  CurrentDevice current(*gpu_);
  const Driver& cu = gpu_->driver();
  return cu.check(cu.launch_ex(&config, variant.function, parameters, nullptr), "launching the product for few rows");
}

}  // namespace baton::cuda
