#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BATON_ON_BOTH __host__ __device__
#else
#define BATON_ON_BOTH
#endif

/// What the host and the kernels of gemv.cu have to agree on.
namespace baton::cuda {

inline constexpr int kGemvWarps = 8;
inline constexpr int kGemvThreads = kGemvWarps * 32;
/// Features of a tile: the n of mma.m16n8k16, whose m holds the rows of x.
inline constexpr int kGemvTileFeatures = 8;
inline constexpr int kGemvMaxRows = 16;
/// Rows that a block normalises by itself: beyond that, all blocks doing so cost more than a kernel that does it once.
inline constexpr int kGemvMaxNormedRows = 4;

enum class GemvOutput : int32_t {
  kBf16,
  kFloat,
  kAddFloat,
  kSiluBf16,  ///< the weight is [gate; up]: y [rows, out / 2]
};

struct GemvArguments {
  const void* x;             // bf16 [rows, in]; float32 when it is to be normalised
  const float* norm_weight;  // [in], or null
  const void* weight;        // bf16 [out, in]
  void* y;
  float norm_eps;
  int32_t rows;
  int32_t out;
  int32_t in;
  GemvOutput output;
  int32_t x_shared_stride;   // bytes of a row of x in shared memory, where it is put when it is normalised
};

struct NormRowsArguments {
  const float* x;       // [rows, in]
  const float* weight;  // [in]
  void* out;            // bf16 [rows, in]
  float eps;
  int32_t in;
};

/// Inputs that a warp loads in a step, of `tiles` * 8 features: two lines of 128 bytes of each row.
inline constexpr int kGemvStepInputs = 128;

/// Shared memory of a block, in this order: the rings of weights, the partial sums, x.
BATON_ON_BOTH constexpr int gemv_ring_bytes(int stages, int tiles) {
  return kGemvWarps * stages * tiles * kGemvTileFeatures * kGemvStepInputs * 2;
}
BATON_ON_BOTH constexpr int gemv_partials_bytes(int max_rows, int tiles) {
  return 2 * kGemvWarps * tiles * max_rows * kGemvTileFeatures * 4;
}
/// Rows lie 64 bytes past a multiple of 128 apart, so that eight lanes that read two rows find eight different banks.
BATON_ON_BOTH constexpr int gemv_x_stride(int in) { return (in * 2 + 127) / 128 * 128 + 64; }

}  // namespace baton::cuda
