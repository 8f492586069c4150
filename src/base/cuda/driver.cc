#include "base/cuda/driver.h"

#include <dlfcn.h>

namespace baton::cuda {

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
  driver->can_compute = true;
#define BATON_CUDA_FIND(member, symbol, parameters)                                                                \
  driver->member = reinterpret_cast<decltype(driver->member)>(::dlsym(library, #symbol));                          \
  driver->can_compute &= driver->member != nullptr;
  BATON_CUDA_COMPUTE_FUNCTIONS(BATON_CUDA_FIND)
#undef BATON_CUDA_FIND
#define BATON_CUDA_FIND(member, symbol, parameters) \
  driver->member = reinterpret_cast<decltype(driver->member)>(::dlsym(library, #symbol));
  BATON_CUDA_TENSOR_MAP_FUNCTIONS(BATON_CUDA_FIND)
#undef BATON_CUDA_FIND
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
  std::string message = fmt::format("{}: {} ({})", call, error_name != nullptr ? error_name : fmt::format("CUDA error {}", result).c_str(),
                                    text != nullptr ? text : "no text");
  constexpr CUresult kOutOfMemory = 2;
  return result == kOutOfMemory ? resource_exhausted("{}", message) : unavailable("{}", message);
}

}  // namespace baton::cuda
