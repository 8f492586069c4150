#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/cuda/driver.h"
#include "base/status.h"

/// The part of cuBLASLt that Baton uses, found at run time. The declarations are those of cublasLt.h (the ABI is the same in
/// CUDA 12 and 13).
namespace baton::cuda {

using CublasStatus = int;
using CublasLtHandle = struct cublasLtContext*;
using CublasLtMatmulDesc = struct CublasLtMatmulDescOpaque*;
using CublasLtMatrixLayout = struct CublasLtMatrixLayoutOpaque*;
using CublasLtPreference = struct CublasLtPreferenceOpaque*;
struct CublasLtAlgorithm {
  uint64_t data[8];
};
struct CublasLtHeuristic {
  CublasLtAlgorithm algorithm;
  size_t workspace_bytes;
  CublasStatus state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(CublasLtHeuristic) == 96);

inline constexpr int kCublasCompute32F = 68;
inline constexpr int kCublasTypeF32 = 0, kCublasTypeBf16 = 14;
inline constexpr int kCublasTranspose = 1;
inline constexpr int kMatmulDescTransposeA = 3;
inline constexpr int kPreferenceMaxWorkspaceBytes = 1, kPreferenceReductionSchemes = 3;
inline constexpr int kPreferenceAlignmentA = 5;  // B, C and D follow
inline constexpr uint32_t kReductionNone = 0, kReductionComputeType = 2;
inline constexpr int kAlgorithmId = 0, kAlgorithmSplits = 2;

// name of the member, exported symbol, parameters
#define BATON_CUBLASLT_FUNCTIONS(X)                                                                                  \
  X(create, cublasLtCreate, (CublasLtHandle * handle))                                                               \
  X(destroy, cublasLtDestroy, (CublasLtHandle handle))                                                               \
  X(desc_create, cublasLtMatmulDescCreate, (CublasLtMatmulDesc * desc, int compute_type, int scale_type))            \
  X(desc_destroy, cublasLtMatmulDescDestroy, (CublasLtMatmulDesc desc))                                              \
  X(desc_set, cublasLtMatmulDescSetAttribute,                                                                        \
    (CublasLtMatmulDesc desc, int attribute, const void* value, size_t bytes))                                       \
  X(layout_create, cublasLtMatrixLayoutCreate,                                                                       \
    (CublasLtMatrixLayout * layout, int type, uint64_t rows, uint64_t columns, int64_t leading))                     \
  X(layout_destroy, cublasLtMatrixLayoutDestroy, (CublasLtMatrixLayout layout))                                      \
  X(preference_create, cublasLtMatmulPreferenceCreate, (CublasLtPreference * preference))                            \
  X(preference_destroy, cublasLtMatmulPreferenceDestroy, (CublasLtPreference preference))                            \
  X(preference_set, cublasLtMatmulPreferenceSetAttribute,                                                            \
    (CublasLtPreference preference, int attribute, const void* value, size_t bytes))                                 \
  X(heuristics, cublasLtMatmulAlgoGetHeuristic,                                                                      \
    (CublasLtHandle handle, CublasLtMatmulDesc desc, CublasLtMatrixLayout a, CublasLtMatrixLayout b,                 \
     CublasLtMatrixLayout c, CublasLtMatrixLayout d, CublasLtPreference preference, int wanted,                      \
     CublasLtHeuristic* results, int* found))                                                                        \
  X(algorithm_config, cublasLtMatmulAlgoConfigGetAttribute,                                                          \
    (const CublasLtAlgorithm* algorithm, int attribute, void* value, size_t bytes, size_t* written))                 \
  X(matmul, cublasLtMatmul,                                                                                          \
    (CublasLtHandle handle, CublasLtMatmulDesc desc, const void* alpha, const void* a, CublasLtMatrixLayout a_layout, \
     const void* b, CublasLtMatrixLayout b_layout, const void* beta, const void* c, CublasLtMatrixLayout c_layout,   \
     void* d, CublasLtMatrixLayout d_layout, const CublasLtAlgorithm* algorithm, void* workspace,                    \
     size_t workspace_bytes, CUstream stream))

/// The functions of one libcublasLt. Immutable once loaded; safe from any thread. The library is never unloaded.
class CublasLt {
 public:
  /// `path` empty: libcublasLt.so.13, then .12, as the loader finds them. unavailable: there is none.
  static Result<std::shared_ptr<const CublasLt>> load(const std::string& path);

#define BATON_CUBLASLT_MEMBER(member, symbol, parameters) CublasStatus(*member) parameters = nullptr;
  BATON_CUBLASLT_FUNCTIONS(BATON_CUBLASLT_MEMBER)
#undef BATON_CUBLASLT_MEMBER
  size_t (*get_version)() = nullptr;                   ///< 130000: CUDA 13.0
  const char* (*status_name)(CublasStatus) = nullptr;

  /// ok, or "cublasLtMatmul: CUBLAS_STATUS_NOT_SUPPORTED".
  Status check(CublasStatus status, std::string_view call) const;
};

}  // namespace baton::cuda
