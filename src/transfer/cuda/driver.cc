#include "transfer/cuda/driver.h"

#include <dlfcn.h>

#include "transfer/cuda/copy_arguments.h"

namespace baton::transfer::cuda {

Result<std::shared_ptr<const Driver>> Driver::load(const std::string& path) {
  const std::string name = path.empty() ? "libcuda.so.1" : path;
  void* library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (library == nullptr) return unavailable("there is no CUDA driver: {}", ::dlerror());
  auto driver = std::make_shared<Driver>();
#define BATON_CUDA_LOAD(member, symbol, parameters)                                                                \
  driver->member = reinterpret_cast<decltype(driver->member)>(::dlsym(library, #symbol));                          \
  if (driver->member == nullptr) {                                                                                 \
    return unavailable("{} has no {}: the CUDA driver is too old (11.4 or newer is needed)", name, #symbol);       \
  }
  BATON_CUDA_FUNCTIONS(BATON_CUDA_LOAD)
#undef BATON_CUDA_LOAD
  BATON_RETURN_IF_ERROR(driver->check(driver->init(0), "cuInit"));
  BATON_RETURN_IF_ERROR(driver->check(driver->driver_version(&driver->version), "cuDriverGetVersion"));
  BATON_RETURN_IF_ERROR(driver->check(driver->device_count(&driver->devices), "cuDeviceGetCount"));
  if (driver->devices == 0) return unavailable("the CUDA driver sees no device (CUDA_VISIBLE_DEVICES?)");
  return std::shared_ptr<const Driver>(std::move(driver));
}

Status Driver::check(CUresult result, std::string_view call) const {
  if (result == kSuccess) return Status();
  const char* error_name = nullptr;
  const char* text = nullptr;
  (void)get_error_name(result, &error_name);
  (void)get_error_string(result, &text);
  return unavailable("{}: {} ({})", call, error_name != nullptr ? error_name : fmt::format("CUDA error {}", result).c_str(),
                     text != nullptr ? text : "no text");
}

#ifdef BATON_CUDA_FATBIN
asm(".pushsection .rodata, \"a\", @progbits\n"
    ".balign 64\n"
    ".hidden baton_transfer_cuda_fatbin\n"
    ".global baton_transfer_cuda_fatbin\n"
    "baton_transfer_cuda_fatbin:\n"
    ".incbin \"" BATON_CUDA_FATBIN "\"\n"
    ".balign 64\n"
    ".popsection\n");
extern "C" const char baton_transfer_cuda_fatbin[];
const void* kernel_image() { return baton_transfer_cuda_fatbin; }
bool has_kernels() { return true; }
#else
const void* kernel_image() {
  alignas(64) static const char kNone[64] = "built without nvcc";
  return kNone;
}
bool has_kernels() { return false; }
#endif

}  // namespace baton::transfer::cuda
