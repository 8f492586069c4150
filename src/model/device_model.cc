#include "model/device_model.h"

#include <charconv>

#include "base/log.h"
#include "model/cuda/cuda_model.h"

namespace baton {
namespace {

constexpr std::string_view kCuda = "cuda";

/// "cuda" or "cuda:3" to 0 or 3; -1: neither.
int32_t parse_ordinal(std::string_view device) {
  if (device == kCuda) return 0;
  if (!device.starts_with("cuda:")) return -1;
  const std::string_view digits = device.substr(kCuda.size() + 1);
  int32_t ordinal = -1;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), ordinal);
  return error == std::errc() && end == digits.data() + digits.size() && ordinal >= 0 && ordinal < 1024 ? ordinal : -1;
}

Result<DeviceModel> load_on_gpu(const ModelOptions& options, const DeviceOptions& device, int32_t ordinal) {
  CudaOptions cuda;
  cuda.ordinal = ordinal;
  cuda.memory_utilization = device.gpu_memory_utilization;
  cuda.threads = device.threads;
  cuda.batch_invariant = device.batch_invariant;
  DeviceModel out;
  BATON_ASSIGN_OR_RETURN(out.model, load_cuda_model(options, cuda));
  out.name = out.model->device_name();
  return out;
}

}  // namespace

Status DeviceOptions::validate() const {
  if (device != "auto" && device != "cpu" && parse_ordinal(device) < 0) {
    return invalid_argument("device is '{}'; it must be auto, cpu, cuda or cuda:N", device);
  }
  if (!(gpu_memory_utilization > 0.0 && gpu_memory_utilization <= 1.0)) {
    return invalid_argument("the GPU memory utilization is {}; it must be above 0 and at most 1", gpu_memory_utilization);
  }
  return {};
}

Result<DeviceModel> load_on_device(const ModelOptions& options, const DeviceOptions& device) {
  BATON_RETURN_IF_ERROR(device.validate());
  if (device.device != "auto" && device.device != "cpu") return load_on_gpu(options, device, parse_ordinal(device.device));
  if (device.device == "auto") {
    Result<DeviceModel> loaded = load_on_gpu(options, device, 0);
    if (loaded.ok()) return loaded;
    const StatusCode code = loaded.status().code();
    if (code != StatusCode::kUnavailable && code != StatusCode::kUnimplemented) return loaded;
    log_info("computing on the CPU: {}", loaded.status().message());
  }
  DeviceModel out;
  BATON_ASSIGN_OR_RETURN(out.kernels, make_cpu_kernels(device.isa, device.threads));
  BATON_ASSIGN_OR_RETURN(out.model, Model::load(options, *out.kernels));
  out.name = out.kernels->name();
  return out;
}

}  // namespace baton
