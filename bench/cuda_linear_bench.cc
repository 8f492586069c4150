// The matrix products of a model on a GPU, all layers with weights of their own in one CUDA graph: ours beside cuBLASLt
// beside the rate at which the memory can be read.
//
//   cuda_linear_bench [--cublaslt PATH] [--model llama-8b|qwen-0.6b] [--rows N,N,...] [--gpu N]
//
// "ours" computes what "cuBLASLt" computes; from 512 rows on it is what tune() has chosen. "fused" also does the RMSNorms before qkv, gate_up and the head, and SiLU.
// Every figure is the median of several replays. Errors are against double precision, on a sample of the outputs.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "kernels/cuda/cuda_linear.h"
#include "kernels/cuda/library_product.h"

asm(".pushsection .rodata, \"a\", @progbits\n"
    ".balign 64\n"
    ".hidden baton_read_memory_fatbin\n"
    ".global baton_read_memory_fatbin\n"
    "baton_read_memory_fatbin:\n"
    ".incbin \"" BATON_READ_MEMORY_FATBIN "\"\n"
    ".balign 64\n"
    ".popsection\n");
extern "C" const char baton_read_memory_fatbin[];

namespace baton::cuda {
namespace {

struct ModelShape {
  std::string_view name;
  int layers;
  int64_t hidden, inter, attention, kv, vocab;
};
constexpr ModelShape kModels[] = {{"llama-8b", 32, 4096, 14336, 4096, 1024, 128256},
                                  {"qwen-0.6b", 28, 1024, 3072, 2048, 1024, 151936}};
constexpr float kEps = 1e-5f;

void must(const Status& status) { BATON_CHECK(status.ok()) << status.to_string(); }

struct Options {
  std::string cublaslt;
  std::string model;
  std::vector<int64_t> rows = {1, 2, 4, 8, 10, 16, 32, 64, 128, 1024, 4096, 8192};
  int gpu = 0;
};

enum class Way { kOurs, kLibrary, kFused };

class Bench {
 public:
  Bench(std::shared_ptr<const Gpu> gpu, CudaLinear& ours, LibraryProduct& library, const ModelShape& model, int64_t max_rows)
      : gpu_(std::move(gpu)), ours_(ours), library_(library), model_(model), max_rows_(max_rows) {
    CurrentDevice current(*gpu_);
    check(cu().stream_create(&stream_, kStreamNonBlocking, 0), "cuStreamCreate");
    check(cu().event_create(&begin_, kEventDefault), "cuEventCreate");
    check(cu().event_create(&end_, kEventDefault), "cuEventCreate");
    check(cu().module_load(&module_, baton_read_memory_fatbin), "cuModuleLoadData");
    check(cu().module_function(&read_, module_, "baton_read_memory"), "cuModuleGetFunction");
    Random random(7);
    std::vector<bf16> noise((8 << 20) + 12345 * 8);
    for (bf16& value : noise) value = bf16(static_cast<float>(random.uniform() - 0.5) * 0.1f);
    weights_ = filled(weight_bytes(), noise);
    std::reverse(noise.begin(), noise.end());
    x_ = filled(static_cast<size_t>(max_rows * std::max(model.inter, model.attention)) * 2, noise);
    normed_ = filled(static_cast<size_t>(max_rows * model.hidden) * 2, noise);
    const int64_t widest = max_rows * std::max(model.inter * 2 * 2, (model.attention + 2 * model.kv) * 4);
    y_ = DeviceMemory::allocate(gpu_, static_cast<size_t>(std::max(widest, std::min<int64_t>(max_rows, 128) * model.vocab * 4))).value();
    std::vector<float> floats(static_cast<size_t>(max_rows * model.hidden));
    for (float& value : floats) value = static_cast<float>(random.uniform() - 0.5);
    residual_ = DeviceMemory::allocate(gpu_, floats.size() * 4).value();
    check(cu().copy_to_device(residual_.address(), floats.data(), floats.size() * 4), "cuMemcpyHtoD");
    norm_weight_ = DeviceMemory::allocate(gpu_, static_cast<size_t>(model.hidden) * 4).value();
    check(cu().copy_to_device(norm_weight_.address(), floats.data(), norm_weight_.bytes()), "cuMemcpyHtoD");
  }
  ~Bench() {
    CurrentDevice current(*gpu_);
    (void)cu().event_destroy(begin_);
    (void)cu().event_destroy(end_);
    (void)cu().module_unload(module_);
    (void)cu().stream_destroy(stream_);
  }

  size_t weight_bytes() const {
    const int64_t layer = model_.hidden * (model_.attention + 2 * model_.kv) + model_.attention * model_.hidden +
                          3 * model_.inter * model_.hidden;
    return static_cast<size_t>(layer * model_.layers + model_.vocab * model_.hidden) * 2;
  }
  double flops(int64_t rows) const {
    const auto head = static_cast<double>(model_.vocab * model_.hidden);
    return 2.0 * (static_cast<double>(rows) * (static_cast<double>(weight_bytes()) / 2 - head) +
                  static_cast<double>(head_rows(rows)) * head);
  }
  /// A prefill computes the logits of its last row only.
  static int64_t head_rows(int64_t rows) { return rows > 128 ? 1 : rows; }

  double read_ms() {
    return time_ms([&] {
      size_t count = weight_bytes() / 16;
      CUdeviceptr from = weights_.address(), to = y_.address();
      void* parameters[] = {&from, &count, &to};
      check(cu().launch(read_, static_cast<unsigned>(gpu_->multiprocessors() * 8), 1, 1, 512, 1, 1, 0, stream_, parameters, nullptr),
            "cuLaunchKernel");
    });
  }

  double model_ms(Way way, int64_t rows) {
    prepare(way, rows);
    return time_ms([&] { all_layers(way, rows); });
  }

  /// The largest error of a sample of outputs, over the root mean square of the outputs.
  double error(Way way, int64_t rows) {
    const int64_t in = model_.hidden, out = model_.attention + 2 * model_.kv;
    const LinearShape shape{rows, out, in, LinearOutput::kFloat};
    CurrentDevice current(*gpu_);
    must(way == Way::kLibrary ? library_.product(stream_, shape, x(), weight(0), y())
                              : ours_.product(stream_, shape, x(), weight(0), y()));
    check(cu().stream_synchronize(stream_), "cuStreamSynchronize");
    const std::vector<bf16> w = download<bf16>(weights_, 0, out * in);
    const std::vector<bf16> inputs = download<bf16>(x_, 0, rows * in);
    const std::vector<float> outputs = download<float>(y_, 0, rows * out);
    Random random(3);
    double worst = 0.0, squares = 0.0;
    constexpr int kSample = 2000;
    for (int i = 0; i < kSample; ++i) {
      const auto m = static_cast<int64_t>(random.below(static_cast<uint64_t>(rows)));
      const auto n = static_cast<int64_t>(random.below(static_cast<uint64_t>(out)));
      double sum = 0.0;
      for (int64_t k = 0; k < in; ++k) {
        sum += static_cast<double>(static_cast<float>(inputs[static_cast<size_t>(m * in + k)])) *
               static_cast<double>(static_cast<float>(w[static_cast<size_t>(n * in + k)]));
      }
      squares += sum * sum;
      worst = std::max(worst, std::abs(static_cast<double>(outputs[static_cast<size_t>(m * out + n)]) - sum));
    }
    return worst / std::sqrt(squares / kSample);
  }

 private:
  const Driver& cu() const { return gpu_->driver(); }
  void check(CUresult result, std::string_view call) const { must(cu().check(result, call)); }
  const bf16* weight(size_t at) const { return reinterpret_cast<const bf16*>(weights_.address()) + at; }
  const bf16* x() const { return reinterpret_cast<const bf16*>(x_.address()); }
  const bf16* normed() const { return reinterpret_cast<const bf16*>(normed_.address()); }
  void* y() const { return reinterpret_cast<void*>(y_.address()); }
  NormedInput input() const {
    return {reinterpret_cast<const float*>(residual_.address()), reinterpret_cast<const float*>(norm_weight_.address()), kEps};
  }

  DeviceMemory filled(size_t bytes, const std::vector<bf16>& noise) {
    DeviceMemory memory = DeviceMemory::allocate(gpu_, bytes).value();
    const size_t piece = noise.size() * 2;
    check(cu().copy_to_device(memory.address(), noise.data(), std::min(piece, bytes)), "cuMemcpyHtoD");
    for (size_t at = piece; at < bytes; at += piece) {
      check(cu().copy_async(memory.address() + at, memory.address(), std::min(piece, bytes - at), stream_), "cuMemcpyAsync");
    }
    check(cu().stream_synchronize(stream_), "cuStreamSynchronize");
    return memory;
  }

  template <typename T>
  std::vector<T> download(const DeviceMemory& memory, size_t at, int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    check(cu().copy_to_host(values.data(), memory.address() + at, values.size() * sizeof(T)), "cuMemcpyDtoH");
    return values;
  }

  struct Product {
    LinearShape shape;
    bool normed;
    bool silu;
  };
  std::vector<Product> layer(int64_t rows) const {
    return {{{rows, model_.attention + 2 * model_.kv, model_.hidden, LinearOutput::kBf16}, true, false},
            {{rows, model_.hidden, model_.attention, LinearOutput::kAddFloat}, false, false},
            {{rows, 2 * model_.inter, model_.hidden, LinearOutput::kBf16}, true, true},
            {{rows, model_.hidden, model_.inter, LinearOutput::kAddFloat}, false, false}};
  }
  Product head(int64_t rows) const {
    return {{head_rows(rows), model_.vocab, model_.hidden, LinearOutput::kFloat}, true, false};
  }

  void prepare(Way way, int64_t rows) {
    std::vector<Product> products = layer(rows);
    products.push_back(head(rows));
    for (const Product& product : products) {
      must(way == Way::kLibrary ? library_.prepare(product.shape) : ours_.prepare(product.shape));
      if (way == Way::kOurs && product.shape.rows >= 512) {
        void* to = product.shape.output == LinearOutput::kAddFloat ? reinterpret_cast<void*>(residual_.address()) : y();
        must(ours_.tune(stream_, product.shape, product.normed ? normed() : x(), weight(0), to));
      }
    }
  }

  void one(Way way, const Product& product, size_t at) {
    void* to = product.shape.output == LinearOutput::kAddFloat ? reinterpret_cast<void*>(residual_.address()) : y();
    const bf16* from = product.normed ? normed() : x();
    if (way == Way::kLibrary) {
      must(library_.product(stream_, product.shape, from, weight(at), to));
    } else if (way == Way::kOurs || !product.normed || !ours_.supports_fused(product.shape)) {
      must(ours_.product(stream_, product.shape, from, weight(at), to));
    } else if (product.silu) {
      must(ours_.normed_silu_product(stream_, product.shape, input(), weight(at), static_cast<bf16*>(to)));
    } else {
      must(ours_.normed_product(stream_, product.shape, input(), weight(at), to));
    }
  }

  void all_layers(Way way, int64_t rows) {
    size_t at = 0;
    for (int i = 0; i < model_.layers; ++i) {
      for (const Product& product : layer(rows)) {
        one(way, product, at);
        at += static_cast<size_t>(product.shape.out_features * product.shape.in_features);
      }
    }
    one(way, head(rows), at);
  }

  double time_ms(const std::function<void()>& body) {
    CurrentDevice current(*gpu_);
    CUgraph graph = nullptr;
    CUgraphExec exec = nullptr;
    check(cu().capture_begin(stream_, kCaptureModeThreadLocal), "cuStreamBeginCapture");
    body();
    check(cu().capture_end(stream_, &graph), "cuStreamEndCapture");
    check(cu().graph_instantiate(&exec, graph, 0), "cuGraphInstantiate");
    std::vector<float> times;
    float total = 0.0f;
    for (int replay = 0; replay < 22 && (replay < 5 || total < 400.0f); ++replay) {
      float ms = 0.0f;
      check(cu().event_record(begin_, stream_), "cuEventRecord");
      check(cu().graph_launch(exec, stream_), "cuGraphLaunch");
      check(cu().event_record(end_, stream_), "cuEventRecord");
      check(cu().stream_synchronize(stream_), "cuStreamSynchronize");
      check(cu().event_elapsed_ms(&ms, begin_, end_), "cuEventElapsedTime");
      total += ms;
      if (replay > 0) times.push_back(ms);
    }
    check(cu().graph_exec_destroy(exec), "cuGraphExecDestroy");
    check(cu().graph_destroy(graph), "cuGraphDestroy");
    std::sort(times.begin(), times.end());
    return static_cast<double>(times[times.size() / 2]);
  }

  const std::shared_ptr<const Gpu> gpu_;
  CudaLinear& ours_;
  LibraryProduct& library_;
  const ModelShape& model_;
  const int64_t max_rows_;
  CUstream stream_ = nullptr;
  CUevent begin_ = nullptr, end_ = nullptr;
  CUmodule module_ = nullptr;
  CUfunction read_ = nullptr;
  DeviceMemory weights_, x_, normed_, y_, residual_, norm_weight_;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view name = argv[i];
    const char* value = argv[i + 1];
    if (name == "--cublaslt") {
      options.cublaslt = value;
    } else if (name == "--model") {
      options.model = value;
    } else if (name == "--gpu") {
      options.gpu = std::atoi(value);
    } else if (name == "--rows") {
      options.rows.clear();
      for (const char* at = value; *at != '\0';) {
        char* end = nullptr;
        options.rows.push_back(std::strtoll(at, &end, 10));
        BATON_CHECK(end != at && options.rows.back() > 0) << "--rows " << value;
        at = *end == ',' ? end + 1 : end;
      }
    } else {
      fmt::print(stderr, "unknown option {}\n", name);
      std::exit(2);
    }
  }
  return options;
}

void run(const Options& options) {
  std::shared_ptr<const Driver> driver = Driver::load("").value();
  std::shared_ptr<const Gpu> gpu = Gpu::open(driver, options.gpu).value();
  std::unique_ptr<CudaLinear> ours = CudaLinear::create(gpu, options.cublaslt).value();
  std::unique_ptr<LibraryProduct> library = LibraryProduct::create(gpu, options.cublaslt).value();
  fmt::print("{}\n", gpu->name());
  for (const ModelShape& model : kModels) {
    if (!options.model.empty() && options.model != model.name) continue;
    Bench bench(gpu, *ours, *library, model, *std::max_element(options.rows.begin(), options.rows.end()));
    const double bytes = static_cast<double>(bench.weight_bytes());
    const double read_ms = bench.read_ms();
    fmt::print("\n{}: {:.2f} GB of weights; reading them takes {:.3f} ms ({:.0f} GB/s)\n", model.name, bytes / 1e9, read_ms,
               bytes / read_ms / 1e6);
    fmt::print("{:>6}{:>10}{:>8}{:>9}{:>8}{:>11}{:>10}{:>9}{:>11}{:>11}\n", "rows", "ours ms", "GB/s", "TFLOP/s", "of read",
               "cuBLASLt", "TFLOP/s", "fused", "error", "cuBLASLt");
    for (int64_t rows : options.rows) {
      const double ms = bench.model_ms(Way::kOurs, rows);
      const double library_ms = bench.model_ms(Way::kLibrary, rows);
      const std::string fused = rows <= CudaLinear::kFewRows ? fmt::format("{:.3f}", bench.model_ms(Way::kFused, rows)) : "-";
      fmt::print("{:>6}{:>10.3f}{:>8.0f}{:>9.1f}{:>7.0f}%{:>11.3f}{:>10.1f}{:>9}{:>11.1e}{:>11.1e}\n", rows, ms, bytes / ms / 1e6,
                 bench.flops(rows) / ms / 1e9, 100 * read_ms / ms, library_ms, bench.flops(rows) / library_ms / 1e9, fused,
                 bench.error(Way::kOurs, rows), bench.error(Way::kLibrary, rows));
      std::fflush(stdout);
    }
  }
}

}  // namespace
}  // namespace baton::cuda

int main(int argc, char** argv) {
  baton::cuda::run(baton::cuda::parse(argc, argv));
  return 0;
}
