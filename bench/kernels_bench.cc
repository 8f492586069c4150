// The CPU kernels beside the limits of the machine, measured in the same run: read bandwidth for what streams weights
// or KV, the peak of the dot-product instruction for what computes.
//
//   kernels_bench [--isa auto|avx512bf16|avx2|plain] [--threads N] [--only linear|attention|model|onednn]
//
// Shapes are those of Qwen3-0.6B. Every figure is the median of several passes; weights are rotated through enough
// copies that they come from memory, as they do in a model.

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/random.h"
#include "kernels/kernels.h"
#include "tensor/bandwidth.h"

#if defined(BATON_BENCH_ONEDNN)
#include "onednn_baseline.h"
#endif

namespace baton {
namespace {

constexpr int64_t kHidden = 1024, kInter = 3072, kVocab = 151936;
constexpr int kLayers = 28, kHeads = 16, kKvHeads = 8, kHeadDim = 128, kBlockTokens = 16;
constexpr int64_t kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;

double seconds(const std::function<void()>& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Median time of `passes` calls after one to warm up.
double median_seconds(int passes, const std::function<void()>& body) {
  body();
  std::vector<double> times(static_cast<size_t>(passes));
  for (double& time : times) time = seconds(body);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

#if defined(__x86_64__)
/// GFLOP/s of vdpbf16ps (64 operations each) with 24 independent sums on every thread; 0 where it doesn't exist.
double measure_dot_gflops(ThreadPool& threads) {
  if (!__builtin_cpu_supports("avx512bf16")) return 0;
  constexpr int kLoops = 4'000'000;
  const auto spin = [](int, int) {
    for (int i = 0; i < kLoops; ++i) {
      asm volatile(
          ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n"
          "vdpbf16ps %%zmm31, %%zmm31, %%zmm\\r\n"
          ".endr\n" ::
              : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                "xmm12", "xmm13", "xmm14", "xmm15");
    }
    asm volatile("vzeroupper");
  };
  double best = 1e9;
  for (int i = 0; i < 5; ++i) best = std::min(best, seconds([&] { threads.run(std::cref(spin)); }));
  return 24.0 * 64 * kLoops * threads.threads() / best / 1e9;
}
#else
double measure_dot_gflops(ThreadPool&) { return 0; }
#endif

struct Limits {
  double read_gbps = 0;
  double dot_gflops = 0;
};

std::vector<bf16> random_bf16(size_t count, uint64_t seed, double scale) {
  Random random(seed);
  std::vector<bf16> values(count);
  for (bf16& value : values) value = bf16(static_cast<float>((random.uniform() * 2 - 1) * scale));
  return values;
}

std::unique_ptr<PackedMatrix> random_matrix(Kernels& kernels, int64_t out, int64_t in,
                                            const std::vector<bf16>& pool) {
  // Weights are cut from one pool of random numbers: only their number matters here.
  std::vector<bf16> data(static_cast<size_t>(out * in));
  for (size_t at = 0; at < data.size(); at += pool.size()) {
    std::memcpy(&data[at], pool.data(), std::min(pool.size(), data.size() - at) * sizeof(bf16));
  }
  const Kernels::MatrixPart part = {data.data(), DType::kBF16, out};
  auto packed = kernels.pack({&part, 1}, in);
  BATON_CHECK(packed.ok()) << packed.status().to_string();
  return std::move(packed).value();
}

struct Shape {
  const char* name;
  int64_t out, in;
};
constexpr Shape kShapes[] = {{"qkv", kQkv, kHidden},
                             {"o", kHidden, int64_t{kHeads} * kHeadDim},
                             {"gate_up", 2 * kInter, kHidden},
                             {"down", kHidden, kInter},
                             {"lm_head", kVocab, kHidden}};

void bench_linear(Kernels& kernels, const Limits& limits, const std::vector<bf16>& pool) {
  fmt::print("\nlinear: y[rows, out] = x[rows, in] W^T\n");
  fmt::print("{:<8} {:>7} {:>6} {:>5} {:>10} {:>8} {:>6} {:>9} {:>6}\n", "", "out", "in", "rows", "ms", "GB/s",
             "of max", "GFLOP/s", "of max");
  for (const Shape& shape : kShapes) {
    const int64_t bytes = shape.out * shape.in * 2;
    const size_t copies = static_cast<size_t>(std::max<int64_t>(1, (int64_t{256} << 20) / bytes));
    std::vector<std::unique_ptr<PackedMatrix>> weights;
    for (size_t i = 0; i < copies; ++i) weights.push_back(random_matrix(kernels, shape.out, shape.in, pool));
    for (const int64_t rows : {1, 4, 16, 64, 512}) {
      if (shape.out == kVocab && rows > 64) continue;  // a model needs the last row alone
      const std::vector<bf16> x = random_bf16(static_cast<size_t>(rows * shape.in), 1, 1);
      std::vector<float> y(static_cast<size_t>(rows * shape.out));
      const size_t used = rows >= 64 ? std::min<size_t>(copies, 6) : copies;
      const double time = median_seconds(7,
                                         [&] {
                                           for (size_t i = 0; i < used; ++i) {
                                             kernels.linear(x.data(), rows, *weights[i], nullptr, false, y.data());
                                           }
                                         }) /
                          static_cast<double>(used);
      const double gbps = static_cast<double>(bytes) / time / 1e9;
      const double gflops = 2.0 * static_cast<double>(rows * shape.out * shape.in) / time / 1e9;
      fmt::print("{:<8} {:>7} {:>6} {:>5} {:>10.3f} {:>8.1f} {:>6.2f} {:>9.1f} {:>6.2f}\n", shape.name, shape.out,
                 shape.in, rows, time * 1e3, gbps, gbps / limits.read_gbps, gflops,
                 limits.dot_gflops > 0 ? gflops / limits.dot_gflops : 0.0);
    }
  }
}

/// A KV pool for all layers with a table of scattered blocks per sequence.
struct KvPool {
  KvPool(int64_t tokens, int sequences) : blocks_per_sequence((tokens + kBlockTokens - 1) / kBlockTokens) {
    const int64_t blocks = blocks_per_sequence * sequences;
    half_bytes = int64_t{kKvHeads} * kBlockTokens * kHeadDim * 2;
    stride_bytes = half_bytes * 2 * kLayers;
    auto allocated = Buffer::allocate(static_cast<size_t>(stride_bytes * blocks));
    BATON_CHECK(allocated.ok()) << allocated.status().to_string();
    buffer = std::move(allocated).value();
    const std::vector<bf16> values = random_bf16(size_t{1} << 20, 3, 1);
    for (size_t at = 0; at < buffer.bytes(); at += values.size() * 2) {
      std::memcpy(buffer.data() + at, values.data(), std::min(values.size() * 2, buffer.bytes() - at));
    }
    tables.resize(static_cast<size_t>(sequences));
    Random random(4);
    std::vector<int32_t> ids(static_cast<size_t>(blocks));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
    std::shuffle(ids.begin(), ids.end(), random);
    for (size_t i = 0; i < ids.size(); ++i) tables[i % tables.size()].push_back(ids[i]);
  }
  KvLayerView layer(int index) const {
    return {.pool = buffer.data(),
            .block_stride_bytes = stride_bytes,
            .k_offset_bytes = half_bytes * 2 * index,
            .v_offset_bytes = half_bytes * (2 * index + 1),
            .block_tokens = kBlockTokens,
            .kv_heads = kKvHeads,
            .head_dim = kHeadDim};
  }
  int64_t blocks_per_sequence, half_bytes, stride_bytes;
  Buffer buffer;
  std::vector<std::vector<int32_t>> tables;
};

void attend(Kernels& kernels, const KvPool& pool, int layer, const std::vector<SequenceSlice>& slices, const bf16* q,
            bf16* out) {
  kernels.attention({.q = q,
                     .out = out,
                     .heads = kHeads,
                     .scale = 1.0f / std::sqrt(float{kHeadDim}),
                     .sliding_window = 0,
                     .sequences = slices,
                     .kv = pool.layer(layer)});
}

void bench_attention(Kernels& kernels, const Limits& limits) {
  fmt::print("\nattention, one layer, {} heads over {}, head_dim {}\n", kHeads, kKvHeads, kHeadDim);
  fmt::print("{:<28} {:>10} {:>8} {:>6} {:>9} {:>6}\n", "", "ms", "GB/s", "of max", "GFLOP/s", "of max");
  const auto report = [&](const std::string& name, double time, double bytes, double flops) {
    fmt::print("{:<28} {:>10.3f} {:>8.1f} {:>6.2f} {:>9.1f} {:>6.2f}\n", name, time * 1e3, bytes / time / 1e9,
               bytes / time / 1e9 / limits.read_gbps, flops / time / 1e9,
               limits.dot_gflops > 0 ? flops / time / 1e9 / limits.dot_gflops : 0.0);
  };
  for (const int tokens : {512, 2048}) {
    const KvPool pool(tokens, 1);
    const size_t row = size_t{kHeads} * kHeadDim;
    const std::vector<bf16> q = random_bf16(static_cast<size_t>(tokens) * row, 5, 1);
    std::vector<bf16> out(q.size());
    const std::vector<SequenceSlice> slices = {{0, tokens, 0, pool.tables[0].data()}};
    const double time = median_seconds(5, [&] { attend(kernels, pool, 0, slices, q.data(), out.data()); });
    report(fmt::format("prefill {} tokens", tokens), time, 4.0 * tokens * kKvHeads * kHeadDim,
           4.0 * kHeads * kHeadDim * tokens * (tokens + 1) / 2);
  }
  for (const auto& [context, sequences] : {std::pair{512, 1}, {2048, 1}, {8192, 1}, {2048, 8}, {512, 32}}) {
    const KvPool pool(context, sequences);
    const std::vector<bf16> q = random_bf16(static_cast<size_t>(sequences * kHeads * kHeadDim), 6, 1);
    std::vector<bf16> out(q.size());
    std::vector<SequenceSlice> slices;
    for (int i = 0; i < sequences; ++i) {
      slices.push_back({i, 1, context - 1, pool.tables[static_cast<size_t>(i)].data()});
    }
    // All layers in turn, so that the cache comes from memory.
    const double time = median_seconds(7,
                                       [&] {
                                         for (int layer = 0; layer < kLayers; ++layer) {
                                           attend(kernels, pool, layer, slices, q.data(), out.data());
                                         }
                                       }) /
                        kLayers;
    report(fmt::format("decode {} x context {}", sequences, context), time,
           4.0 * kKvHeads * kHeadDim * context * sequences, 4.0 * kHeads * kHeadDim * context * sequences);
  }
}

/// The kernels of one whole step of the model, in the order of the model, without the model.
class ModelStep {
 public:
  ModelStep(Kernels& kernels, const std::vector<bf16>& pool) : kernels_(kernels) {
    for (int i = 0; i < kLayers; ++i) {
      for (int s = 0; s < 4; ++s) layers_.push_back(random_matrix(kernels, kShapes[s].out, kShapes[s].in, pool));
    }
    head_ = random_matrix(kernels, kVocab, kHidden, pool);
    norm_.assign(kInter, 1.0f);
    cos_.assign(size_t{kMaxPositions} * kHeadDim / 2, 0.6f);
    sin_.assign(cos_.size(), 0.8f);
  }
  static constexpr int kMaxPositions = 8192;

  int64_t weight_bytes() const {
    size_t bytes = head_->bytes();
    for (const auto& matrix : layers_) bytes += matrix->bytes();
    return static_cast<int64_t>(bytes);
  }

  /// How fast these very weights can be read.
  double read_gbps() {
    std::vector<std::span<const std::byte>> regions = {head_->memory()};
    for (const auto& matrix : layers_) regions.push_back(matrix->memory());
    return measure_read_gbps(kernels_.threads(), regions, 1);
  }

  /// `logit_rows`: rows that go through the head.
  void run(const KvPool& pool, const std::vector<SequenceSlice>& slices, int rows, int logit_rows) {
    const size_t n = static_cast<size_t>(rows);
    x_.resize(n * kHidden, 0.5f);
    wide_.resize(std::max(n * 2 * kInter, static_cast<size_t>(logit_rows) * kVocab));
    normed_.resize(n * kHidden);
    q_.resize(n * kHeads * kHeadDim);
    attended_.resize(q_.size());
    gated_.resize(n * kInter);
    for (int layer = 0; layer < kLayers; ++layer) {
      const auto weight = [&](int which) -> const PackedMatrix& {
        return *layers_[static_cast<size_t>(layer * 4 + which)];
      };
      kernels_.rms_norm(x_.data(), rows, kHidden, norm_.data(), 1e-6f, normed_.data());
      kernels_.linear(normed_.data(), rows, weight(0), nullptr, false, wide_.data());
      kernels_.qkv_rope_kv_write({.qkv = wide_.data(),
                                  .rows = rows,
                                  .heads = kHeads,
                                  .bias = nullptr,
                                  .q_norm = norm_.data(),
                                  .k_norm = norm_.data(),
                                  .norm_eps = 1e-6f,
                                  .rope = {cos_.data(), sin_.data(), kMaxPositions},
                                  .sequences = slices,
                                  .kv = pool.layer(layer)},
                                 q_.data());
      attend(kernels_, pool, layer, slices, q_.data(), attended_.data());
      kernels_.linear(attended_.data(), rows, weight(1), nullptr, true, x_.data());
      kernels_.rms_norm(x_.data(), rows, kHidden, norm_.data(), 1e-6f, normed_.data());
      kernels_.linear(normed_.data(), rows, weight(2), nullptr, false, wide_.data());
      kernels_.silu_mul(wide_.data(), rows, kInter, gated_.data());
      kernels_.linear(gated_.data(), rows, weight(3), nullptr, true, x_.data());
    }
    kernels_.rms_norm(x_.data(), logit_rows, kHidden, norm_.data(), 1e-6f, normed_.data());
    kernels_.linear(normed_.data(), logit_rows, *head_, nullptr, false, wide_.data());
  }

 private:
  Kernels& kernels_;
  std::vector<std::unique_ptr<PackedMatrix>> layers_;
  std::unique_ptr<PackedMatrix> head_;
  std::vector<float> norm_, cos_, sin_, x_, wide_;
  std::vector<bf16> normed_, q_, attended_, gated_;
};

void bench_model(Kernels& kernels, const std::vector<bf16>& pool) {
  ModelStep step(kernels, pool);
  fmt::print("\nkernels of a whole step, Qwen3-0.6B ({:.0f} MB of weights)\n",
             static_cast<double>(step.weight_bytes()) / 1e6);
  fmt::print("{:<28} {:>10} {:>8} {:>8} {:>8} {:>6}\n", "", "ms", "tok/s", "GB/s", "read max", "ratio");
  for (const int tokens : {512, 2048}) {
    const KvPool kv(tokens, 1);
    const double time = median_seconds(5, [&] {
      for (int begin = 0; begin < tokens; begin += 512) {
        step.run(kv, {{0, std::min(512, tokens - begin), begin, kv.tables[0].data()}}, std::min(512, tokens - begin),
                 1);
      }
    });
    fmt::print("{:<28} {:>10.1f} {:>8.1f}\n", fmt::format("prefill {} tokens", tokens), time * 1e3, tokens / time);
  }
  for (const auto& [context, sequences] : {std::pair{128, 1}, {2048, 1}, {512, 4}, {512, 16}}) {
    const KvPool kv(context, sequences);
    std::vector<SequenceSlice> slices;
    for (int i = 0; i < sequences; ++i)
      slices.push_back({i, 1, context - 1, kv.tables[static_cast<size_t>(i)].data()});
    const double bytes =
        static_cast<double>(step.weight_bytes()) + 4.0 * kLayers * kKvHeads * kHeadDim * context * sequences;
    // The limit right before each measurement: neighbours come and go.
    std::vector<double> times, ratios, limits;
    for (int pass = 0; pass < 9; ++pass) {
      const double limit = step.read_gbps();
      const double time = seconds([&] { step.run(kv, slices, sequences, sequences); });
      limits.push_back(limit);
      times.push_back(time);
      ratios.push_back(bytes / time / 1e9 / limit);
    }
    for (auto* values : {&times, &ratios, &limits}) std::sort(values->begin(), values->end());
    const double time = times[times.size() / 2];
    fmt::print("{:<28} {:>10.2f} {:>8.1f} {:>8.1f} {:>8.1f} {:>6.2f}\n",
               fmt::format("decode {} x context {}", sequences, context), time * 1e3, sequences / time,
               bytes / time / 1e9, limits[limits.size() / 2], ratios[ratios.size() / 2]);
  }
}

int run(int argc, char** argv) {
  std::string isa = "auto", only;
  int threads = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (i + 1 >= argc || (flag != "--isa" && flag != "--threads" && flag != "--only")) {
      fmt::print(stderr, "usage: {} [--isa NAME] [--threads N] [--only linear|attention|model|onednn]\n", argv[0]);
      return 2;
    }
    const char* const value = argv[++i];
    if (flag == "--isa") isa = value;
    if (flag == "--threads") threads = std::atoi(value);
    if (flag == "--only") only = value;
  }
  auto made = make_cpu_kernels(isa, threads);
  if (!made.ok()) {
    fmt::print(stderr, "{}\n", made.status().to_string());
    return 1;
  }
  Kernels& kernels = **made;
  auto read = measure_read_gbps(kernels.threads(), size_t{1} << 30, 7);
  if (!read.ok()) {
    fmt::print(stderr, "{}\n", read.status().to_string());
    return 1;
  }
  const Limits limits = {.read_gbps = *read, .dot_gflops = measure_dot_gflops(kernels.threads())};
  fmt::print("{}, {} threads: read {:.1f} GB/s, bf16 dot product {:.0f} GFLOP/s\n", kernels.name(),
             kernels.threads().threads(), limits.read_gbps, limits.dot_gflops);
  const std::vector<bf16> pool = random_bf16(size_t{1} << 20, 2, 0.05);
  if (only.empty() || only == "linear") bench_linear(kernels, limits, pool);
  if (only.empty() || only == "attention") bench_attention(kernels, limits);
  if (only.empty() || only == "model") bench_model(kernels, pool);
#if defined(BATON_BENCH_ONEDNN)
  if (only.empty() || only == "onednn") bench_onednn();
#endif
  return 0;
}

}  // namespace
}  // namespace baton

int main(int argc, char** argv) { return baton::run(argc, argv); }
