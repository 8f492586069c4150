#include "kernels/cuda/cuda_linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/random.h"

namespace baton::cuda {
namespace {

/// Needs a GPU. BATON_CUBLASLT names the library where the loader doesn't find it.
class CudaLinearTest : public ::testing::Test {
 protected:
  void SetUp() override {
    Result<std::shared_ptr<const Driver>> driver = Driver::load("");
    if (!driver.ok()) GTEST_SKIP() << driver.status().to_string();
    gpu_ = Gpu::open(driver.value(), 0).value();
    Result<std::unique_ptr<CudaLinear>> made = create(false);
    if (!made.ok()) GTEST_SKIP() << made.status().to_string();
    linear_ = std::move(made).value();
    CurrentDevice current(*gpu_);
    ASSERT_EQ(cu().stream_create(&stream_, kStreamNonBlocking, 0), kSuccess);
  }

  void TearDown() override {
    if (gpu_ == nullptr || stream_ == nullptr) return;
    CurrentDevice current(*gpu_);
    EXPECT_EQ(cu().stream_destroy(stream_), kSuccess);
  }

  const Driver& cu() const { return gpu_->driver(); }

  Result<std::unique_ptr<CudaLinear>> create(bool batch_invariant) const {
    const char* path = std::getenv("BATON_CUBLASLT");
    return CudaLinear::create(gpu_, path != nullptr ? path : "", batch_invariant);
  }

  /// y of rows [0, rows) of x.
  std::vector<float> product(CudaLinear& linear, int64_t rows, int64_t out, int64_t in, const DeviceMemory& x, const DeviceMemory& w) {
    const DeviceMemory y = upload(std::vector<float>(static_cast<size_t>(rows * out), NAN));
    const Status done = linear.product(stream_, {rows, out, in, LinearOutput::kFloat}, reinterpret_cast<const bf16*>(x.address()),
                                       reinterpret_cast<const bf16*>(w.address()), reinterpret_cast<void*>(y.address()));
    EXPECT_TRUE(done.ok()) << done.to_string();
    return download<float>(y);
  }

  template <typename T>
  DeviceMemory upload(const std::vector<T>& values) {
    DeviceMemory memory = DeviceMemory::allocate(gpu_, values.size() * sizeof(T)).value();
    CurrentDevice current(*gpu_);
    EXPECT_EQ(cu().copy_to_device(memory.address(), values.data(), memory.bytes()), kSuccess);
    return memory;
  }

  template <typename T>
  std::vector<T> download(const DeviceMemory& memory) {
    CurrentDevice current(*gpu_);
    EXPECT_EQ(cu().stream_synchronize(stream_), kSuccess);
    std::vector<T> values(memory.bytes() / sizeof(T));
    EXPECT_EQ(cu().copy_to_host(values.data(), memory.address(), memory.bytes()), kSuccess);
    return values;
  }

  std::shared_ptr<const Gpu> gpu_;
  std::unique_ptr<CudaLinear> linear_;
  CUstream stream_ = nullptr;
};

template <typename T>
T* pointer(const DeviceMemory& memory) {
  return reinterpret_cast<T*>(memory.address());
}

std::vector<float> random_floats(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random.uniform() * 2.0 - 1.0);
  return values;
}

std::vector<bf16> random_bf16(size_t count, uint64_t seed) {
  std::vector<bf16> values;
  values.reserve(count);
  for (float value : random_floats(count, seed)) values.emplace_back(value);
  return values;
}

double exact(const bf16* x, const bf16* w, int64_t in) {
  double sum = 0.0;
  for (int64_t k = 0; k < in; ++k) sum += static_cast<double>(static_cast<float>(x[k])) * static_cast<double>(static_cast<float>(w[k]));
  return sum;
}

/// Every output is written (the buffer holds NaN before), nothing behind the last one is, and all are right.
void expect_close(const std::vector<double>& expected, const std::vector<float>& got, double relative, int64_t in,
                  const std::string& what) {
  const double noise = 4e-7 * static_cast<double>(in);
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(got[i], expected[i], std::abs(expected[i]) * relative + noise) << what << ", output " << i;
  }
  for (size_t i = expected.size(); i < got.size(); ++i) ASSERT_TRUE(std::isnan(got[i])) << what << ", behind the end: " << i;
}

std::vector<float> to_floats(const std::vector<bf16>& values) {
  std::vector<float> floats;
  for (bf16 value : values) floats.push_back(static_cast<float>(value));
  return floats;
}

constexpr size_t kGuard = 64;
constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 64, 65, 100, 128, 130};
struct Features {
  int64_t out, in;
};
constexpr Features kFeatures[] = {{8, 8}, {24, 40}, {48, 16}, {64, 512}, {72, 520}, {104, 1000}, {256, 1024}, {1088, 2048}, {128, 4104}};

TEST_F(CudaLinearTest, EveryOutputOfEveryShapeIsRight) {
  for (const Features& features : kFeatures) {
    const int64_t out = features.out, in = features.in;
    const std::vector<bf16> w = random_bf16(static_cast<size_t>(out * in), 1);
    const std::vector<bf16> x = random_bf16(static_cast<size_t>(130 * in), 2);
    const std::vector<float> before = random_floats(static_cast<size_t>(130 * out), 3);
    const DeviceMemory device_w = upload(w);
    const DeviceMemory device_x = upload(x);
    std::vector<double> sums;
    for (int64_t m = 0; m < 130; ++m) {
      for (int64_t n = 0; n < out; ++n) sums.push_back(exact(&x[static_cast<size_t>(m * in)], &w[static_cast<size_t>(n * in)], in));
    }
    for (int64_t rows : kRows) {
      const auto outputs = static_cast<size_t>(rows * out);
      const std::string what = fmt::format("{} rows, {} -> {}", rows, in, out);
      const std::vector<double> expected(sums.begin(), sums.begin() + static_cast<std::ptrdiff_t>(outputs));
      {
        DeviceMemory y = upload(std::vector<bf16>(outputs + kGuard, bf16(NAN)));
        ASSERT_TRUE(linear_->product(stream_, {rows, out, in, LinearOutput::kBf16}, pointer<bf16>(device_x), pointer<bf16>(device_w),
                                     pointer<void>(y)).ok());
        expect_close(expected, to_floats(download<bf16>(y)), 0.005, in, what + ", bf16");
      }
      {
        DeviceMemory y = upload(std::vector<float>(outputs + kGuard, NAN));
        ASSERT_TRUE(linear_->product(stream_, {rows, out, in, LinearOutput::kFloat}, pointer<bf16>(device_x), pointer<bf16>(device_w),
                                     pointer<void>(y)).ok());
        expect_close(expected, download<float>(y), 1e-5, in, what + ", float32");
      }
      {
        std::vector<float> stream(before.begin(), before.begin() + static_cast<std::ptrdiff_t>(outputs));
        std::vector<double> total;
        for (size_t i = 0; i < outputs; ++i) total.push_back(expected[i] + static_cast<double>(stream[i]));
        stream.resize(outputs + kGuard, NAN);
        DeviceMemory y = upload(stream);
        ASSERT_TRUE(linear_->product(stream_, {rows, out, in, LinearOutput::kAddFloat}, pointer<bf16>(device_x), pointer<bf16>(device_w),
                                     pointer<void>(y)).ok());
        expect_close(total, download<float>(y), 1e-5, in, what + ", added");
      }
    }
  }
}

// What makes the output of a disaggregated run equal to that of an aggregated one.
TEST_F(CudaLinearTest, WithFewRowsARowsBitsDontDependOnTheOtherRows) {
  for (const Features& features : kFeatures) {
    const int64_t out = features.out, in = features.in;
    const DeviceMemory w = upload(random_bf16(static_cast<size_t>(out * in), 4));
    const DeviceMemory x = upload(random_bf16(static_cast<size_t>(CudaLinear::kFewRows * in), 5));
    std::vector<float> alone;
    for (int64_t m = 0; m < CudaLinear::kFewRows; ++m) {
      DeviceMemory y = upload(std::vector<float>(static_cast<size_t>(out), NAN));
      ASSERT_TRUE(linear_->product(stream_, {1, out, in, LinearOutput::kFloat}, pointer<bf16>(x) + m * in, pointer<bf16>(w),
                                   pointer<void>(y)).ok());
      for (float value : download<float>(y)) alone.push_back(value);
    }
    for (int64_t rows = 2; rows <= CudaLinear::kFewRows; ++rows) {
      const std::vector<float> together = product(*linear_, rows, out, in, x, w);
      ASSERT_EQ(std::memcmp(together.data(), alone.data(), together.size() * 4), 0) << rows << " rows, " << in << " -> " << out;
    }
  }
}

constexpr Features kLibraryFeatures[] = {{64, 512}, {256, 1024}, {1088, 2048}, {128, 4104}, {256, 14336}};

TEST_F(CudaLinearTest, WithManyRowsARowsBitsDontDependOnTheOtherRows) {
  constexpr int64_t kMost = 1100;
  for (const auto& [out, in] : kLibraryFeatures) {
    const DeviceMemory w = upload(random_bf16(static_cast<size_t>(out * in), 12));
    const DeviceMemory x = upload(random_bf16(static_cast<size_t>(kMost * in), 13));
    const std::vector<float> most = product(*linear_, kMost, out, in, x, w);
    for (int64_t rows : {257, 300, 511, 1024}) {
      const std::vector<float> some = product(*linear_, rows, out, in, x, w);
      ASSERT_EQ(std::memcmp(some.data(), most.data(), some.size() * 4), 0) << rows << " rows, " << in << " -> " << out;
    }
  }
}

TEST_F(CudaLinearTest, BatchInvariantARowsBitsDependOnNothingElse) {
  constexpr int64_t kMost = 600;
  const std::unique_ptr<CudaLinear> linear = create(true).value();
  for (const auto& [out, in] : kLibraryFeatures) {
    const DeviceMemory w = upload(random_bf16(static_cast<size_t>(out * in), 14));
    const DeviceMemory x = upload(random_bf16(static_cast<size_t>(kMost * in), 15));
    ASSERT_FALSE(linear->supports_fused({1, out, in, LinearOutput::kBf16}));
    const std::vector<float> most = product(*linear, kMost, out, in, x, w);
    for (int64_t rows : {1, 2, 7, 16, 17, 32, 33, 64, 100, 129, 255, 256, 257, 513}) {
      const std::vector<float> some = product(*linear, rows, out, in, x, w);
      ASSERT_EQ(std::memcmp(some.data(), most.data(), some.size() * 4), 0) << rows << " rows, " << in << " -> " << out;
    }
  }
}

TEST_F(CudaLinearTest, TuningChangesNoBit) {
  constexpr int64_t kRows = 1024, kOut = 1088, kIn = 2048;
  const DeviceMemory w = upload(random_bf16(static_cast<size_t>(kOut * kIn), 16));
  const DeviceMemory x = upload(random_bf16(static_cast<size_t>(kRows * kIn), 17));
  const std::vector<float> before = product(*linear_, kRows, kOut, kIn, x, w);
  const DeviceMemory y = upload(before);
  const LinearShape shape{kRows, kOut, kIn, LinearOutput::kFloat};
  const Status tuned = linear_->tune(stream_, shape, pointer<bf16>(x), pointer<bf16>(w), pointer<void>(y));
  ASSERT_TRUE(tuned.ok()) << tuned.to_string();
  const std::vector<float> after = product(*linear_, kRows, kOut, kIn, x, w);
  EXPECT_EQ(std::memcmp(before.data(), after.data(), before.size() * 4), 0);
  EXPECT_EQ(linear_->tune(stream_, {17, kOut, kIn, LinearOutput::kFloat}, pointer<bf16>(x), pointer<bf16>(w), pointer<void>(y)).code(),
            StatusCode::kInvalidArgument);
}

TEST_F(CudaLinearTest, TheNormAndSiluCanBeFused) {
  constexpr float kEps = 1e-5f;
  for (const Features& features : {Features{16, 8}, Features{48, 40}, Features{96, 1000}, Features{2080, 1024}, Features{64, 4096}, Features{32, 6000}}) {
    const int64_t out = features.out, in = features.in;
    const std::vector<bf16> w = random_bf16(static_cast<size_t>(out * in), 6);
    const std::vector<float> x = random_floats(static_cast<size_t>(16 * in), 7);
    const std::vector<float> norm = random_floats(static_cast<size_t>(in), 8);
    const DeviceMemory device_w = upload(w), device_x = upload(x), device_norm = upload(norm);
    std::vector<bf16> normed;
    for (int64_t m = 0; m < 16; ++m) {
      const float* row = &x[static_cast<size_t>(m * in)];
      double squares = 0.0;
      for (int64_t k = 0; k < in; ++k) squares += static_cast<double>(row[k]) * static_cast<double>(row[k]);
      const auto scale = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(in) + static_cast<double>(kEps)));
      for (int64_t k = 0; k < in; ++k) normed.emplace_back(row[k] * scale * norm[static_cast<size_t>(k)]);
    }
    const NormedInput input{pointer<float>(device_x), pointer<float>(device_norm), kEps};
    std::vector<bf16> silu_alone;
    for (int64_t rows : {1, 2, 3, 4, 5, 8, 9, 16}) {
      const LinearShape shape{rows, out, in, LinearOutput::kBf16};
      ASSERT_TRUE(linear_->supports_fused(shape));
      std::vector<double> sums, gated;
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t n = 0; n < out; ++n) sums.push_back(exact(&normed[static_cast<size_t>(m * in)], &w[static_cast<size_t>(n * in)], in));
        for (int64_t n = 0; n < out / 2; ++n) {
          const double gate = sums[static_cast<size_t>(m * out + n)], up = sums[static_cast<size_t>(m * out + out / 2 + n)];
          gated.push_back(gate / (1.0 + std::exp(-gate)) * up);
        }
      }
      const std::string what = fmt::format("{} rows, {} -> {}", rows, in, out);
      // A bf16 that is rounded the other way is off by a part in 256.
      const auto noise = static_cast<int64_t>(3e3 * std::sqrt(static_cast<double>(in)));
      DeviceMemory y = upload(std::vector<bf16>(sums.size() + kGuard, bf16(NAN)));
      ASSERT_TRUE(linear_->normed_product(stream_, shape, input, pointer<bf16>(device_w), pointer<void>(y)).ok());
      expect_close(sums, to_floats(download<bf16>(y)), 0.01, noise, what);
      DeviceMemory z = upload(std::vector<bf16>(gated.size() + kGuard, bf16(NAN)));
      ASSERT_TRUE(linear_->normed_silu_product(stream_, shape, input, pointer<bf16>(device_w), pointer<bf16>(z)).ok());
      const std::vector<bf16> silu = download<bf16>(z);
      expect_close(gated, to_floats(silu), 0.02, noise * 20, what + ", silu");
      if (rows == 1) silu_alone = silu;
      ASSERT_EQ(std::memcmp(silu.data(), silu_alone.data(), static_cast<size_t>(out)), 0) << what;
    }
  }
}

TEST_F(CudaLinearTest, AChainOfProductsCanBeCapturedAndReplayed) {
  constexpr int64_t kIn = 512;
  const std::vector<bf16> first = random_bf16(static_cast<size_t>(2 * kIn), 9);
  const DeviceMemory w = upload(random_bf16(static_cast<size_t>(kIn * kIn), 10));
  for (int64_t rows : {2, 40}) {
    const LinearShape shape{rows, kIn, kIn, LinearOutput::kBf16};
    ASSERT_TRUE(linear_->prepare(shape).ok());
    const std::vector<bf16> x = random_bf16(static_cast<size_t>(rows * kIn), 11);
    DeviceMemory a = upload(x), b = upload(x);
    auto chain = [&] {
      for (int i = 0; i < 3; ++i) {
        ASSERT_TRUE(linear_->product(stream_, shape, pointer<bf16>(a), pointer<bf16>(w), pointer<void>(b)).ok());
        ASSERT_TRUE(linear_->product(stream_, shape, pointer<bf16>(b), pointer<bf16>(w), pointer<void>(a)).ok());
      }
    };
    CurrentDevice current(*gpu_);
    ASSERT_EQ(cu().capture_begin(stream_, kCaptureModeThreadLocal), kSuccess);
    chain();
    CUgraph graph = nullptr;
    CUgraphExec exec = nullptr;
    ASSERT_EQ(cu().capture_end(stream_, &graph), kSuccess);
    ASSERT_EQ(cu().graph_instantiate(&exec, graph, 0), kSuccess);
    // The first products on this stream are captured ones: their workspace is allocated meanwhile.
    chain();
    const std::vector<bf16> direct = download<bf16>(a);
    for (int replay = 0; replay < 3; ++replay) {
      ASSERT_EQ(cu().copy_to_device(a.address(), x.data(), a.bytes()), kSuccess);
      ASSERT_EQ(cu().graph_launch(exec, stream_), kSuccess);
      const std::vector<bf16> replayed = download<bf16>(a);
      ASSERT_EQ(std::memcmp(replayed.data(), direct.data(), a.bytes()), 0) << rows << " rows";
    }
    EXPECT_EQ(cu().graph_exec_destroy(exec), kSuccess);
    EXPECT_EQ(cu().graph_destroy(graph), kSuccess);
  }
}

}  // namespace
}  // namespace baton::cuda
