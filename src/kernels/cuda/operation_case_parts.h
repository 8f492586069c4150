#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "kernels/cuda/operation_cases.h"
#include "kernels/kernels.h"

/// What the cases are made of: arrays on the GPU, bounds, a case with one output. Only operation_cases*.cc include this.
namespace baton::cuda {

inline constexpr double kUnwritten = std::numeric_limits<double>::infinity();
inline constexpr unsigned char kPoison = 0xff;  // a NaN in bf16 and float32, -1 as a number
inline constexpr size_t kPatternBytes = size_t{16} << 20;

inline float as_float(float value) { return value; }
inline float as_float(int32_t value) { return static_cast<float>(value); }
inline float as_float(bf16 value) { return static_cast<float>(value); }

template <typename T>
std::vector<T> random_values(Random& random, size_t count, double scale = 1.0) {
  std::vector<T> values(count);
  for (T& value : values) value = T(static_cast<float>((random.uniform() * 2 - 1) * scale));
  return values;
}

/// An array on the GPU.
template <typename T>
class Array {
 public:
  static Result<Array> allocate(const std::shared_ptr<const Gpu>& gpu, size_t count) {
    Array array;
    array.gpu_ = gpu;
    array.count_ = count;
    BATON_ASSIGN_OR_RETURN(array.memory_, DeviceMemory::allocate(gpu, std::max<size_t>(count * sizeof(T), 16)));
    return array;
  }
  static Result<Array> upload(const std::shared_ptr<const Gpu>& gpu, std::span<const T> values) {
    BATON_ASSIGN_OR_RETURN(Array array, allocate(gpu, values.size()));
    CurrentDevice current(*gpu);
    BATON_RETURN_IF_ERROR(gpu->driver().check(
        gpu->driver().copy_to_device(array.memory_.address(), values.data(), values.size_bytes()), "cuMemcpyHtoD"));
    return array;
  }
  /// `count` values of a random pattern that repeats itself: large arrays are for benchmarks.
  static Result<Array> random(const std::shared_ptr<const Gpu>& gpu, Random& random, size_t count, double scale = 1.0) {
    const size_t pattern = std::min(count, kPatternBytes / sizeof(T));
    const std::vector<T> values = random_values<T>(random, pattern, scale);
    BATON_ASSIGN_OR_RETURN(Array array, allocate(gpu, count));
    CurrentDevice current(*gpu);
    for (size_t at = 0; at < count; at += pattern) {
      BATON_RETURN_IF_ERROR(gpu->driver().check(
          gpu->driver().copy_to_device(array.memory_.address() + at * sizeof(T), values.data(),
                                       std::min(pattern, count - at) * sizeof(T)), "cuMemcpyHtoD"));
    }
    return array;
  }
  Status poison() {
    CurrentDevice current(*gpu_);
    return gpu_->driver().check(gpu_->driver().memory_set(memory_.address(), kPoison, memory_.bytes()), "cuMemsetD8");
  }
  Result<std::vector<T>> download() const {
    std::vector<T> values(count_);
    CurrentDevice current(*gpu_);
    BATON_RETURN_IF_ERROR(gpu_->driver().check(
        gpu_->driver().copy_to_host(values.data(), memory_.address(), count_ * sizeof(T)), "cuMemcpyDtoH"));
    return values;
  }
  T* data() const { return reinterpret_cast<T*>(memory_.address()); }
  CUdeviceptr address() const { return memory_.address(); }
  size_t size() const { return count_; }

 private:
  std::shared_ptr<const Gpu> gpu_;
  DeviceMemory memory_;
  size_t count_ = 0;
};

struct Bound {
  double absolute;
  double relative;
};
inline constexpr Bound kExact = {0, 0};
inline constexpr Bound kOneRounding = {1e-6, 1.0 / 128};  // bf16 values that were next to each other

template <typename T>
double deviation(std::span<const T> got, std::span<const T> expected, Bound bound) {
  BATON_CHECK(got.size() == expected.size()) << got.size() << " and " << expected.size() << " values";
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const auto a = static_cast<double>(as_float(got[i])), b = static_cast<double>(as_float(expected[i]));
    if (std::memcmp(&got[i], &expected[i], sizeof(T)) == 0) continue;
    const double allowed = bound.absolute + bound.relative * std::abs(b);
    const double share = std::isfinite(a) && std::isfinite(b) && allowed > 0 ? std::abs(a - b) / allowed : kUnwritten;
    worst = std::max(worst, share);
  }
  return worst;
}

inline std::unique_ptr<Kernels> cpu_kernels() {
  auto kernels = make_cpu_kernels("auto", 0);
  BATON_CHECK(kernels.ok()) << kernels.status().to_string();
  return std::move(kernels).value();
}

/// A case with one output array.
template <typename T>
class SimpleCase : public OperationCase {
 public:
  Result<double> error(CUstream stream) override {
    BATON_ASSIGN_OR_RETURN(const std::vector<T> got, run(stream));
    const std::vector<T> expected = reference();
    return deviation<T>(got, expected, bound_);
  }
  Result<std::vector<std::byte>> result(CUstream stream) override {
    BATON_ASSIGN_OR_RETURN(const std::vector<T> got, run(stream));
    const auto bytes = std::as_bytes(std::span(got));
    return std::vector<std::byte>(bytes.begin(), bytes.end());
  }

 protected:
  SimpleCase(CudaKernels& kernels, std::string operation, std::string shape) : kernels_(kernels) {
    operation_ = std::move(operation);
    shape_ = std::move(shape);
  }
  const std::shared_ptr<const Gpu>& gpu() const { return kernels_.gpu(); }
  /// What the output holds before a run; poison unless there is something that must stay.
  virtual Status reset() { return out_.poison(); }
  virtual std::vector<T> reference() = 0;

  Result<std::vector<T>> run(CUstream stream) {
    BATON_RETURN_IF_ERROR(reset());
    {
      CurrentDevice current(*gpu());
      const Driver& cu = gpu()->driver();
      BATON_RETURN_IF_ERROR(cu.check(cu.stream_synchronize(nullptr), "cuStreamSynchronize"));  // of what poisoned
      BATON_RETURN_IF_ERROR(launch(stream));
      BATON_RETURN_IF_ERROR(cu.check(cu.stream_synchronize(stream), operation_));
    }
    return out_.download();
  }

  CudaKernels& kernels_;
  Array<T> out_;
  Bound bound_ = kExact;
};

template <typename Case, typename... Arguments>
CaseResult make_case(CudaKernels& kernels, Arguments&&... arguments) {
  auto made = std::make_unique<Case>(kernels, std::forward<Arguments>(arguments)...);
  BATON_RETURN_IF_ERROR(made->init());
  return std::unique_ptr<OperationCase>(std::move(made));
}

}  // namespace baton::cuda
