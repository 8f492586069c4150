#include "kernels/cuda/cublaslt_library.h"

#include <dlfcn.h>

namespace baton::cuda {
namespace {

constexpr int kFlags = RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE;

template <typename Function>
Status find(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, symbol));
  if (function == nullptr) return unavailable("the cuBLASLt library has no {}: it is too old (12.0 or newer is needed)", symbol);
  return Status();
}

Result<void*> open(const std::string& path) {
  if (!path.empty()) {
    void* library = ::dlopen(path.c_str(), kFlags);
    if (library == nullptr) return unavailable("cuBLASLt: {}", ::dlerror());
    return library;
  }
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    if (void* library = ::dlopen(name, kFlags); library != nullptr) return library;
  }
  return unavailable("there is no libcublasLt.so.13 or .12 where the loader looks (LD_LIBRARY_PATH, ldconfig)");
}

}  // namespace

Result<std::shared_ptr<const CublasLt>> CublasLt::load(const std::string& path) {
  BATON_ASSIGN_OR_RETURN(void* library, open(path));
  auto loaded = std::make_shared<CublasLt>();
#define BATON_CUBLASLT_LOAD(member, symbol, parameters) BATON_RETURN_IF_ERROR(find(library, #symbol, loaded->member));
  BATON_CUBLASLT_FUNCTIONS(BATON_CUBLASLT_LOAD)
#undef BATON_CUBLASLT_LOAD
  BATON_RETURN_IF_ERROR(find(library, "cublasLtGetVersion", loaded->get_version));
  BATON_RETURN_IF_ERROR(find(library, "cublasLtGetStatusName", loaded->status_name));
  return std::shared_ptr<const CublasLt>(std::move(loaded));
}

Status CublasLt::check(CublasStatus status, std::string_view call) const {
  if (status == 0) return Status();
  const char* name = status_name(status);
  const std::string message = fmt::format("{}: {}", call, name != nullptr ? name : fmt::format("cuBLAS status {}", status));
  // Unavailable means that the GPU is lost; these do not.
  constexpr CublasStatus kAllocFailed = 3, kInvalidValue = 7, kNotSupported = 15;
  if (status == kAllocFailed) return resource_exhausted("{}", message);
  if (status == kInvalidValue || status == kNotSupported) return unimplemented("{}", message);
  return unavailable("{}", message);
}

}  // namespace baton::cuda
