// How fast prefill attention is on a GPU, in TFLOP/s of the products that causality and the window leave (4 * head_dim per
// visible pair of query and key and head). bench/attention_baseline.py measures what PyTorch has for the same shapes.
//
//   cuda_prefill_bench [--device 0] [--rounds 20] [--peak-tflops 989] [--filter text] [--portable 1]
//                      [--cuda-library libcuda.so.1]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "kernels/cuda/prefill_attention.h"

namespace {

using namespace baton;
using namespace baton::cuda;

struct Case {
  const char* name;
  int32_t heads, kv_heads, head_dim, window;
  int32_t sequences, rows, start_pos;
};

constexpr Case kCases[] = {
    {"Llama-3.1-8B, 8,192 tokens", 32, 8, 128, 0, 1, 8192, 0},
    {"  2,048 behind 6,144", 32, 8, 128, 0, 1, 2048, 6144},
    {"  512 behind 7,680", 32, 8, 128, 0, 1, 512, 7680},
    {"  2,048 tokens", 32, 8, 128, 0, 1, 2048, 0},
    {"  512 tokens", 32, 8, 128, 0, 1, 512, 0},
    {"  8 prompts of 1,024", 32, 8, 128, 0, 8, 1024, 0},
    {"  32,768 tokens", 32, 8, 128, 0, 1, 32768, 0},
    {"  8,192 tokens, window 4,096", 32, 8, 128, 4096, 1, 8192, 0},
    {"  8,192 tokens, window 1,024", 32, 8, 128, 1024, 1, 8192, 0},
    {"Qwen3-0.6B, 8,192 tokens", 16, 8, 128, 0, 1, 8192, 0},
    {"32 heads of 64, 8,192 tokens", 32, 8, 64, 0, 1, 8192, 0},
    {"32 heads of 96, 8,192 tokens", 32, 8, 96, 0, 1, 8192, 0},
};
constexpr int32_t kBlockTokens = 16;
constexpr int kLayersInBlock = 4;  // strides as in a model's pool, not all of its memory

void check(const Status& status) { BATON_CHECK(status.ok()) << status.to_string(); }

template <typename T>
DeviceMemory upload(const std::shared_ptr<const Gpu>& gpu, const std::vector<T>& values) {
  auto memory = DeviceMemory::allocate(gpu, values.size() * sizeof(T));
  check(memory.status());
  CurrentDevice current(*gpu);
  check(gpu->driver().check(gpu->driver().copy_to_device(memory->address(), values.data(), values.size() * sizeof(T)), "copy"));
  return std::move(*memory);
}

/// Four uniform variables added: near enough to a normal one.
std::vector<uint16_t> random_values(size_t count, uint64_t seed) {
  std::vector<uint16_t> values(count);
  Random random(seed);
  for (uint16_t& v : values) {
    const uint64_t bits = random();
    const int sum = static_cast<int>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
    v = bf16(static_cast<float>(sum - 131070) * (1.7320508f / 65536.0f)).bits;
  }
  return values;
}

struct Timing {
  double median_ms, best_ms;
};

Timing measure(const std::shared_ptr<const Gpu>& gpu, PrefillAttention& attention, const Case& c, int rounds) {
  const int64_t plane = int64_t{c.kv_heads} * kBlockTokens * c.head_dim;
  const int64_t stride = kLayersInBlock * 2 * plane;
  const int32_t length = c.start_pos + c.rows;
  const int32_t blocks_each = (length + kBlockTokens - 1) / kBlockTokens;
  std::vector<int32_t> tables(static_cast<size_t>(blocks_each * c.sequences));
  std::iota(tables.begin(), tables.end(), 0);
  Random random(1);
  std::shuffle(tables.begin(), tables.end(), random);
  std::vector<DeviceSequence> sequences;
  std::vector<PrefillTile> tiles;
  const int32_t tile_tokens = attention.tile_tokens(c.heads, c.kv_heads, c.head_dim);
  for (int32_t i = 0; i < c.sequences; ++i) {
    sequences.push_back({i * c.rows, c.rows, c.start_pos, i * blocks_each});
    for (int32_t token = 0; token < c.rows; token += tile_tokens) tiles.push_back({i, token});
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](auto& a, auto& b) { return a.token_begin > b.token_begin; });
  const auto pool = upload(gpu, random_values(tables.size() * static_cast<size_t>(stride), 2));
  const auto q_elements = static_cast<size_t>(int64_t{c.sequences} * c.rows * c.heads * c.head_dim);
  const auto q = upload(gpu, random_values(q_elements, 3));
  const auto out = upload(gpu, std::vector<uint16_t>(q_elements));
  const auto device_tables = upload(gpu, tables);
  const auto device_sequences = upload(gpu, sequences);
  const auto device_tiles = upload(gpu, tiles);

  StepView step{};
  step.sequences = reinterpret_cast<const DeviceSequence*>(device_sequences.address());
  step.block_tables = reinterpret_cast<const int32_t*>(device_tables.address());
  step.rows = c.sequences * c.rows;
  step.sequences_count = c.sequences;
  const Attention args{.q = reinterpret_cast<const bf16*>(q.address()),
                       .out = reinterpret_cast<bf16*>(out.address()),
                       .heads = c.heads,
                       .scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim)),
                       .sliding_window = c.window};
  const DeviceKv kv{.pool = reinterpret_cast<unsigned char*>(pool.address()),
                    .block_stride_bytes = stride * 2,
                    .k_offset_bytes = plane * 4,
                    .v_offset_bytes = plane * 6,
                    .block_tokens = kBlockTokens,
                    .kv_heads = c.kv_heads,
                    .head_dim = c.head_dim};

  const Driver& cu = gpu->driver();
  CurrentDevice current(*gpu);
  CUstream stream = nullptr;
  CUevent from = nullptr, to = nullptr;
  check(cu.check(cu.stream_create(&stream, kStreamNonBlocking, 0), "cuStreamCreate"));
  check(cu.check(cu.event_create(&from, kEventDefault), "cuEventCreate"));
  check(cu.check(cu.event_create(&to, kEventDefault), "cuEventCreate"));
  const auto launch = [&] {
    check(attention.launch(stream, step, reinterpret_cast<const PrefillTile*>(device_tiles.address()),
                           static_cast<int32_t>(tiles.size()), args, kv));
  };
  for (int i = 0; i < 3; ++i) launch();
  constexpr int kLaunches = 5;  // between two events: the gap before the first one counts little
  std::vector<double> times;
  for (int i = 0; i < rounds; ++i) {
    check(cu.check(cu.event_record(from, stream), "cuEventRecord"));
    for (int j = 0; j < kLaunches; ++j) launch();
    check(cu.check(cu.event_record(to, stream), "cuEventRecord"));
    check(cu.check(cu.event_synchronize(to), "cuEventSynchronize"));
    float ms = 0;
    check(cu.check(cu.event_elapsed_ms(&ms, from, to), "cuEventElapsedTime"));
    times.push_back(static_cast<double>(ms) / kLaunches);
  }
  (void)cu.event_destroy(from);
  (void)cu.event_destroy(to);
  (void)cu.stream_destroy(stream);
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front()};
}

double pairs(const Case& c) {
  double sum = 0;
  for (int32_t row = 0; row < c.rows; ++row) {
    const int32_t visible = c.start_pos + row + 1;
    sum += c.window > 0 ? std::min(visible, c.window) : visible;
  }
  return sum * c.sequences;
}

}  // namespace

int main(int argc, char** argv) {
  int device = 0, rounds = 20;
  double peak = 989;
  bool portable = false;
  std::string library, filter;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--device") == 0) device = std::atoi(argv[i + 1]);
    if (std::strcmp(argv[i], "--rounds") == 0) rounds = std::max(1, std::atoi(argv[i + 1]));
    if (std::strcmp(argv[i], "--peak-tflops") == 0) peak = std::atof(argv[i + 1]);
    if (std::strcmp(argv[i], "--filter") == 0) filter = argv[i + 1];
    if (std::strcmp(argv[i], "--portable") == 0) portable = std::atoi(argv[i + 1]) != 0;
    if (std::strcmp(argv[i], "--cuda-library") == 0) library = argv[i + 1];
  }
  auto driver = Driver::load(library);
  check(driver.status());
  auto gpu = Gpu::open(*driver, device);
  check(gpu.status());
  auto attention = PrefillAttention::create(*gpu, portable);
  check(attention.status());
  std::printf("%s; median of %d, blocks of %d tokens, peak %.0f TFLOP/s\n", (*gpu)->name().c_str(), rounds, kBlockTokens, peak);
  std::printf("%-32s %10s %10s %9s %9s\n", "", "median ms", "best ms", "TFLOP/s", "of peak");
  for (const Case& c : kCases) {
    if (std::string_view(c.name).find(filter) == std::string_view::npos) continue;
    const Timing t = measure(*gpu, **attention, c, rounds);
    const double tflops = 4.0 * c.head_dim * c.heads * pairs(c) / (t.median_ms * 1e9);
    std::printf("%-32s %10.4f %10.4f %9.1f %8.1f%%\n", c.name, t.median_ms, t.best_ms, tflops, tflops / peak * 100);
  }
  return 0;
}
