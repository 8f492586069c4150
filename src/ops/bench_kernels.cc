#include "ops/bench_kernels.h"

#include <algorithm>
#include <charconv>
#include <functional>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/random.h"
#include "kernels/cuda/cuda_linear.h"
#include "kernels/cuda/operation_cases.h"

namespace baton::ops {
namespace {

using cuda::AttentionShape;
using cuda::CaseResult;
using cuda::CudaKernels;
using cuda::OperationCase;

struct ModelShape {
  const char* name;
  int32_t hidden, intermediate, heads, kv_heads, head_dim, vocab;
  bool qk_norm;
};
constexpr ModelShape kShapes[] = {
    {"llama-8b", 4096, 14336, 32, 8, 128, 128256, false},
    {"qwen3-0.6b", 1024, 3072, 16, 8, 128, 151936, true},
};

const ModelShape* find_shape(const std::string& name) {
  const auto found = std::ranges::find_if(kShapes, [&](const ModelShape& shape) { return name == shape.name; });
  return found == std::end(kShapes) ? nullptr : found;
}

std::optional<int> parse_device(const std::string& device) {
  if (device == "cuda") return 0;
  if (!device.starts_with("cuda:")) return std::nullopt;
  int ordinal = -1;
  const char* const end = device.data() + device.size();
  const auto [at, error] = std::from_chars(device.data() + 5, end, ordinal);
  return error == std::errc() && at == end && ordinal >= 0 ? std::optional(ordinal) : std::nullopt;
}

/// Times what is put on a stream: many launches in one CUDA graph, so that the host's part does not count.
class GpuTimer {
 public:
  static Result<std::unique_ptr<GpuTimer>> create(std::shared_ptr<const cuda::Gpu> gpu) {
    std::unique_ptr<GpuTimer> timer(new GpuTimer(std::move(gpu)));
    cuda::CurrentDevice current(*timer->gpu_);
    BATON_RETURN_IF_ERROR(timer->check(timer->cu().stream_create(&timer->stream_, cuda::kStreamNonBlocking, 0), "cuStreamCreate"));
    for (cuda::CUevent& event : timer->events_) {
      BATON_RETURN_IF_ERROR(timer->check(timer->cu().event_create(&event, cuda::kEventDefault), "cuEventCreate"));
    }
    return timer;
  }
  ~GpuTimer() {
    cuda::CurrentDevice current(*gpu_);
    for (cuda::CUevent event : events_) {
      if (event != nullptr) (void)cu().event_destroy(event);
    }
    if (stream_ != nullptr) (void)cu().stream_destroy(stream_);
  }

  cuda::CUstream stream() const { return stream_; }

  /// Seconds of one launch, one value per run.
  Result<std::vector<double>> time(int32_t runs, const std::function<Status(cuda::CUstream)>& launch) {
    constexpr double kRunMs = 4;
    cuda::CurrentDevice current(*gpu_);
    for (int i = 0; i < 3; ++i) BATON_RETURN_IF_ERROR(launch(stream_));
    BATON_ASSIGN_OR_RETURN(const double once_ms, elapsed_ms([&] { return launch(stream_); }));
    const int count = static_cast<int>(std::clamp(kRunMs / once_ms, 1.0, 256.0));

    cuda::CUgraph graph = nullptr;
    BATON_RETURN_IF_ERROR(check(cu().capture_begin(stream_, cuda::kCaptureModeRelaxed), "cuStreamBeginCapture"));
    Status launched;
    for (int i = 0; i < count && launched.ok(); ++i) launched = launch(stream_);
    BATON_RETURN_IF_ERROR(check(cu().capture_end(stream_, &graph), "cuStreamEndCapture"));
    cuda::CUgraphExec exec = nullptr;
    if (launched.ok()) launched = check(cu().graph_instantiate(&exec, graph, 0), "cuGraphInstantiate");
    (void)cu().graph_destroy(graph);
    std::vector<double> seconds;
    for (int32_t run = -1; run < runs && launched.ok(); ++run) {  // the first one warms up
      Result<double> ms = elapsed_ms([&] { return check(cu().graph_launch(exec, stream_), "cuGraphLaunch"); });
      launched = ms.status();
      if (ms.ok() && run >= 0) seconds.push_back(*ms * 1e-3 / count);
    }
    if (exec != nullptr) (void)cu().graph_exec_destroy(exec);
    BATON_RETURN_IF_ERROR(launched);
    return seconds;
  }

  /// The same without a graph: for what takes much longer than its launch.
  Result<std::vector<double>> time_launched(int32_t runs, const std::function<Status(cuda::CUstream)>& launch) {
    cuda::CurrentDevice current(*gpu_);
    std::vector<double> seconds;
    for (int32_t run = -1; run < runs; ++run) {
      BATON_ASSIGN_OR_RETURN(const double ms, elapsed_ms([&] { return launch(stream_); }));
      if (run >= 0) seconds.push_back(ms * 1e-3);
    }
    return seconds;
  }

 private:
  explicit GpuTimer(std::shared_ptr<const cuda::Gpu> gpu) : gpu_(std::move(gpu)) {}
  const cuda::Driver& cu() const { return gpu_->driver(); }
  Status check(cuda::CUresult result, std::string_view call) const { return cu().check(result, call); }

  template <typename Launch>
  Result<double> elapsed_ms(Launch&& launch) {
    BATON_RETURN_IF_ERROR(check(cu().event_record(events_[0], stream_), "cuEventRecord"));
    BATON_RETURN_IF_ERROR(launch());
    BATON_RETURN_IF_ERROR(check(cu().event_record(events_[1], stream_), "cuEventRecord"));
    BATON_RETURN_IF_ERROR(check(cu().stream_synchronize(stream_), "waiting for the GPU"));
    float ms = 0;
    BATON_RETURN_IF_ERROR(check(cu().event_elapsed_ms(&ms, events_[0], events_[1]), "cuEventElapsedTime"));
    return std::max(static_cast<double>(ms), 1e-4);
  }

  const std::shared_ptr<const cuda::Gpu> gpu_;
  cuda::CUstream stream_ = nullptr;
  cuda::CUevent events_[2] = {};
};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

Result<double> measure_copy(GpuTimer& timer, const std::shared_ptr<const cuda::Gpu>& gpu, int32_t runs) {
  constexpr size_t kBytes = size_t{1} << 30;
  BATON_ASSIGN_OR_RETURN(cuda::DeviceMemory memory, cuda::DeviceMemory::allocate(gpu, 2 * kBytes));
  const cuda::Driver& cu = gpu->driver();
  constexpr int kCopies = 4;  // in a graph they would be left to a copy engine, which is slower
  BATON_ASSIGN_OR_RETURN(std::vector<double> seconds, timer.time_launched(runs, [&](cuda::CUstream stream) {
    Status status;
    for (int i = 0; i < kCopies && status.ok(); ++i) {
      status = cu.check(cu.copy_async(memory.address(), memory.address() + kBytes, kBytes, stream), "cuMemcpyAsync");
    }
    return status;
  }));
  return 2.0 * kBytes * kCopies / median(seconds);
}

Result<double> measure_product(GpuTimer& timer, const std::shared_ptr<const cuda::Gpu>& gpu, int32_t runs) {
  constexpr int64_t kSize = 8192;
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<cuda::CudaLinear> linear, cuda::CudaLinear::create(gpu, ""));
  std::vector<bf16> values(static_cast<size_t>(kSize * kSize));
  Random random(5);  // zeros are multiplied faster
  for (bf16& value : values) value = bf16(static_cast<float>(random.uniform() * 2 - 1));
  const size_t bytes = values.size() * sizeof(bf16);
  BATON_ASSIGN_OR_RETURN(cuda::DeviceMemory x, cuda::DeviceMemory::allocate(gpu, bytes));
  BATON_ASSIGN_OR_RETURN(cuda::DeviceMemory w, cuda::DeviceMemory::allocate(gpu, bytes));
  BATON_ASSIGN_OR_RETURN(cuda::DeviceMemory y, cuda::DeviceMemory::allocate(gpu, bytes));
  const cuda::LinearShape shape = {kSize, kSize, kSize, cuda::LinearOutput::kBf16};
  {
    cuda::CurrentDevice current(*gpu);
    const cuda::Driver& cu = gpu->driver();
    BATON_RETURN_IF_ERROR(cu.check(cu.copy_to_device(x.address(), values.data(), bytes), "cuMemcpyHtoD"));
    BATON_RETURN_IF_ERROR(cu.check(cu.copy_to_device(w.address(), values.data(), bytes), "cuMemcpyHtoD"));
    BATON_RETURN_IF_ERROR(linear->prepare(shape));
  }
  BATON_ASSIGN_OR_RETURN(std::vector<double> seconds, timer.time(runs, [&](cuda::CUstream stream) {
    return linear->product(stream, shape, reinterpret_cast<const bf16*>(x.address()), reinterpret_cast<const bf16*>(w.address()),
                           reinterpret_cast<void*>(y.address()));
  }));
  return 2.0 * kSize * kSize * kSize / median(seconds);
}

using CaseMaker = std::function<CaseResult(CudaKernels&)>;

/// Made one after the other, since large ones fill gigabytes.
std::vector<std::pair<std::string, CaseMaker>> case_makers(const ModelShape& m) {
  std::vector<std::pair<std::string, CaseMaker>> makers;
  const auto decode = [&](int32_t batch, int32_t context) {
    makers.emplace_back("attention_decode", [=](CudaKernels& kernels) {
      AttentionShape shape = {.heads = m.heads, .kv_heads = m.kv_heads, .head_dim = m.head_dim};
      shape.sequences.assign(static_cast<size_t>(batch), {context - 1});
      const int64_t layer = int64_t{batch} * context * m.kv_heads * m.head_dim * 4;
      shape.copies = static_cast<int32_t>(std::clamp<int64_t>((int64_t{512} << 20) / layer, 2, 64));
      return cuda::attention_decode_case(kernels, shape);
    });
  };
  for (const int32_t batch : {1, 2, 4, 8, 10, 16, 32, 64, 128}) decode(batch, 2048);
  for (const int32_t batch : {1, 8}) decode(batch, 128);
  for (const int32_t batch : {1, 8, 32}) decode(batch, 8192);
  for (const int32_t batch : {1, 8}) decode(batch, 65536);
  makers.emplace_back("attention_decode", [=](CudaKernels& kernels) {
    AttentionShape shape = {.heads = m.heads, .kv_heads = m.kv_heads, .head_dim = m.head_dim, .copies = 4};
    for (int32_t i = 0; i < 32; ++i) shape.sequences.push_back({(i * 997) % 4096});
    return cuda::attention_decode_case(kernels, shape);
  });
  for (const auto& [start, rows] : {std::pair(0, 512), {0, 2048}, {0, 8192}, {8192, 2048}}) {
    makers.emplace_back("attention_prefill", [=, start = start, rows = rows](CudaKernels& kernels) {
      return cuda::attention_prefill_case(
          kernels, {.heads = m.heads, .kv_heads = m.kv_heads, .head_dim = m.head_dim, .sequences = {{start, rows}}});
    });
  }
  for (const int32_t rows : {1, 32, 128, 8192}) {
    makers.emplace_back("embed", [=](CudaKernels& k) { return cuda::embed_case(k, rows, m.hidden, 32000); });
    makers.emplace_back("rms_norm", [=](CudaKernels& k) { return cuda::rms_norm_case(k, rows, m.hidden); });
    makers.emplace_back("qkv_rope_kv_write", [=](CudaKernels& k) {
      return cuda::qkv_rope_kv_write_case(
          k, {.rows = rows, .heads = m.heads, .kv_heads = m.kv_heads, .head_dim = m.head_dim, .norm = m.qk_norm});
    });
    makers.emplace_back("silu_mul", [=](CudaKernels& k) { return cuda::silu_mul_case(k, rows, m.intermediate, false); });
    makers.emplace_back("gather_rows", [=](CudaKernels& k) { return cuda::gather_rows_case(k, rows, int64_t{m.hidden} * 4); });
  }
  for (const int32_t rows : {1, 32, 128}) {
    makers.emplace_back("argmax", [=](CudaKernels& k) { return cuda::argmax_case(k, rows, m.vocab); });
  }
  return makers;
}

}  // namespace

Status BenchKernelsOptions::validate() const {
  if (!parse_device(device)) return invalid_argument("--device is '{}'; kernels are measured on cuda or cuda:N", device);
  if (find_shape(shape) == nullptr) return invalid_argument("--shape is '{}'; there are llama-8b and qwen3-0.6b", shape);
  if (runs < 1) return invalid_argument("--runs is {}; it must be positive", runs);
  return {};
}

Result<BenchKernelsResult> run_bench_kernels(const BenchKernelsOptions& options) {
  BATON_RETURN_IF_ERROR(options.validate());
  BATON_ASSIGN_OR_RETURN(std::shared_ptr<const cuda::Driver> driver, cuda::Driver::load(""));
  const int ordinal = *parse_device(options.device);
  if (ordinal >= driver->devices) return invalid_argument("there is no GPU {}; the driver sees {}", ordinal, driver->devices);
  BATON_ASSIGN_OR_RETURN(std::shared_ptr<const cuda::Gpu> gpu, cuda::Gpu::open(driver, ordinal));
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<CudaKernels> kernels, CudaKernels::create(gpu));
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<GpuTimer> timer, GpuTimer::create(gpu));

  BenchKernelsResult result;
  result.options = options;
  result.device = std::string(kernels->name());
  BATON_ASSIGN_OR_RETURN(result.copy_bytes_per_s, measure_copy(*timer, gpu, options.runs));
  Result<double> product = measure_product(*timer, gpu, options.runs);
  if (product.ok()) {
    result.product_flops_per_s = *product;
  } else {
    result.product_note = product.status().message();
  }
  for (const auto& [operation, make] : case_makers(*find_shape(options.shape))) {
    if (operation.find(options.only) == std::string::npos) continue;
    BATON_ASSIGN_OR_RETURN(std::unique_ptr<OperationCase> measured, make(*kernels));
    BenchKernelsRow row;
    row.operation = measured->operation();
    row.shape = measured->shape();
    row.bytes = measured->bytes();
    row.flops = measured->flops();
    const auto context = [&](const Status& status) { return status.with_context(fmt::format("{} {}", row.operation, row.shape)); };
    if (options.verify) {
      Result<double> error = measured->error(timer->stream());
      if (!error.ok()) return context(error.status());
      row.error = *error;
    }
    Result<std::vector<double>> seconds =
        timer->time(options.runs, [&](cuda::CUstream stream) { return measured->launch(stream); });
    if (!seconds.ok()) return context(seconds.status());
    const double middle = median(*seconds);
    row.us = middle * 1e6;
    row.min_us = std::ranges::min(*seconds) * 1e6;
    row.max_us = std::ranges::max(*seconds) * 1e6;
    row.bytes_per_s = static_cast<double>(row.bytes) / middle;
    row.flops_per_s = static_cast<double>(row.flops) / middle;
    result.rows.push_back(std::move(row));
  }
  return result;
}

std::string bench_kernels_table(const BenchKernelsResult& result) {
  std::string out = fmt::format("{}  shapes of {}\ncopy inside the GPU: {:.0f} GB/s, read and written\n", result.device,
                                result.options.shape, result.copy_bytes_per_s * 1e-9);
  out += result.product_flops_per_s > 0
             ? fmt::format("matrix product 8192 x 8192 x 8192, bf16: {:.0f} TFLOP/s\n", result.product_flops_per_s * 1e-12)
             : fmt::format("no matrix product to compare with: {}\n", result.product_note);
  out += fmt::format("\n{:<19}{:<32}{:>10}{:>10}{:>9}{:>10}{:>9}{}\n", "", "", "us", "GB/s", "of copy", "TFLOP/s", "of peak",
                     result.options.verify ? "    error" : "");
  for (const BenchKernelsRow& row : result.rows) {
    out += fmt::format("{:<19}{:<32}{:>10.2f}{:>10.0f}{:>8.0f}%", row.operation, row.shape, row.us, row.bytes_per_s * 1e-9,
                       100 * row.bytes_per_s / result.copy_bytes_per_s);
    if (row.flops > 0) out += fmt::format("{:>10.1f}", row.flops_per_s * 1e-12);
    if (row.flops > 0 && result.product_flops_per_s > 0) out += fmt::format("{:>8.0f}%", 100 * row.flops_per_s / result.product_flops_per_s);
    if (row.error >= 0) out += fmt::format("  {:.2f} of what is allowed", row.error);
    out += '\n';
  }
  return out + fmt::format("of one launch in a CUDA graph; medians of {} runs. Few rows are read from the GPU's cache, as in a step.\n",
                           result.options.runs);
}

std::string bench_kernels_json(const BenchKernelsResult& result) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const BenchKernelsRow& row : result.rows) {
    rows.push_back({{"operation", row.operation}, {"shape", row.shape}, {"us", row.us}, {"min_us", row.min_us}, {"max_us", row.max_us},
                    {"bytes", row.bytes}, {"flops", row.flops}, {"bytes_per_s", row.bytes_per_s}, {"flops_per_s", row.flops_per_s},
                    {"share_of_copy", row.bytes_per_s / result.copy_bytes_per_s}});
    if (row.error >= 0) rows.back()["error"] = row.error;
  }
  const nlohmann::ordered_json out = {{"device", result.device}, {"shape", result.options.shape}, {"runs", result.options.runs},
                                      {"copy_bytes_per_s", result.copy_bytes_per_s},
                                      {"product_flops_per_s", result.product_flops_per_s}, {"rows", rows}};
  return out.dump(2) + "\n";
}

}  // namespace baton::ops
