// Every operation on a GPU beside its namesake on the CPU (operation_cases.h), at the shapes that go wrong first. Skipped
// where there is no GPU.

#include "kernels/cuda/cuda_kernels.h"

#include <gtest/gtest.h>

#include <cstring>

#include "kernels/cuda/operation_cases.h"

namespace baton::cuda {
namespace {

class CudaKernelsTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto driver = Driver::load("");
    if (!driver.ok()) {
      why_not_ = driver.status().to_string();
      return;
    }
    auto gpu = Gpu::open(*driver, 0);
    auto kernels = gpu.ok() ? CudaKernels::create(*gpu) : Result<std::unique_ptr<CudaKernels>>(gpu.status());
    if (!kernels.ok()) {
      why_not_ = kernels.status().to_string();
      return;
    }
    kernels_ = std::move(kernels).value();
    CurrentDevice current(*kernels_->gpu());
    ASSERT_EQ((*gpu)->driver().stream_create(&stream_, kStreamNonBlocking, 0), kSuccess);
  }
  static void TearDownTestSuite() {
    if (kernels_ == nullptr) return;
    {
      CurrentDevice current(*kernels_->gpu());
      EXPECT_EQ(kernels_->gpu()->driver().stream_destroy(stream_), kSuccess);
    }
    kernels_.reset();
  }
  void SetUp() override {
    if (kernels_ == nullptr) GTEST_SKIP() << "no GPU to compute on: " << why_not_;
  }

  static std::unique_ptr<OperationCase> take(CaseResult made) {
    BATON_CHECK(made.ok()) << made.status().to_string();
    return std::move(made).value();
  }
  static void expect_parity(CaseResult made) {
    const auto operation = take(std::move(made));
    SCOPED_TRACE(operation->operation() + " " + operation->shape());
    const Result<double> error = operation->error(stream_);
    ASSERT_TRUE(error.ok()) << error.status().to_string();
    EXPECT_LE(*error, 1.0);
  }
  static std::vector<std::byte> bits(const AttentionShape& shape) {
    const auto operation = take(attention_decode_case(*kernels_, shape));
    auto result = operation->result(stream_);
    BATON_CHECK(result.ok()) << result.status().to_string();
    return std::move(result).value();
  }

  static inline std::unique_ptr<CudaKernels> kernels_;
  static inline CUstream stream_ = nullptr;
  static inline std::string why_not_;
};

TEST_F(CudaKernelsTest, Embed) {
  expect_parity(embed_case(*kernels_, 1, 8, 3));
  expect_parity(embed_case(*kernels_, 7, 1032, 50));
  expect_parity(embed_case(*kernels_, 33, 4096, 300));
}

TEST_F(CudaKernelsTest, RmsNorm) {
  for (const int64_t hidden : {8, 72, 1024, 4096, 16384, 20480}) {
    for (const int64_t rows : {1, 3}) expect_parity(rms_norm_case(*kernels_, rows, hidden));
  }
}

TEST_F(CudaKernelsTest, QkvRopeKvWrite) {
  for (const int32_t head_dim : {8, 16, 24, 32, 64, 80, 96, 128, 256}) {
    for (const int32_t rows : {1, 5, 131}) {
      expect_parity(qkv_rope_kv_write_case(*kernels_, {.rows = rows, .heads = 6, .kv_heads = 2, .head_dim = head_dim,
                                                       .block_tokens = 8, .bias = rows != 1, .norm = rows != 5,
                                                       .unused_every = rows > 1 ? 4 : 0}));
    }
  }
}

TEST_F(CudaKernelsTest, DecodeOfEveryHeadDimension) {
  for (const int32_t head_dim : {8, 16, 24, 32, 64, 80, 96, 112, 128, 192, 256}) {
    for (const int32_t group : {1, 3, 4, 7, 16, 20}) {
      expect_parity(attention_decode_case(*kernels_, {.heads = 2 * group, .kv_heads = 2, .head_dim = head_dim, .block_tokens = 8,
                                                      .sequences = {{0}, {300}, {17}}}));
    }
  }
}

TEST_F(CudaKernelsTest, DecodeOfEveryLength) {
  AttentionShape shape = {.heads = 8, .kv_heads = 2, .head_dim = 64, .block_tokens = 24};
  for (int32_t length = 0; length < 70; ++length) shape.sequences.push_back({length});
  for (const int32_t length : {126, 127, 128, 129, 1023, 1024, 4094, 4095, 4096, 4097, 5000}) shape.sequences.push_back({length});
  expect_parity(attention_decode_case(*kernels_, shape));
}

TEST_F(CudaKernelsTest, DecodeWithASlidingWindow) {
  for (const int32_t window : {1, 7, 16, 100, 1000}) {
    expect_parity(attention_decode_case(*kernels_, {.heads = 8, .kv_heads = 2, .head_dim = 128, .sliding_window = window,
                                                    .sequences = {{0}, {5}, {99}, {100}, {1500}}}));
  }
}

TEST_F(CudaKernelsTest, DecodeLeavesOtherSequencesAlone) {
  expect_parity(attention_decode_case(*kernels_, {.heads = 4, .kv_heads = 1, .head_dim = 32,
                                                  .sequences = {{0, 0}, {0, 0}, {40}, {0, 0}, {400}, {9}, {0, 0}}}));
  expect_parity(attention_decode_case(*kernels_, {.sequences = {{0, 0}}}));
}

TEST_F(CudaKernelsTest, DecodeOfLongContexts) {
  expect_parity(attention_decode_case(*kernels_, {.heads = 4, .kv_heads = 1, .head_dim = 128, .block_tokens = 64,
                                                  .sequences = {{40000}, {3}, {9000}}}));
}

TEST_F(CudaKernelsTest, DecodeOfMoreSequencesThanOneLaunchTakes) {
  AttentionShape shape = {.heads = 2, .kv_heads = 1, .head_dim = 16};
  for (int32_t i = 0; i < 600; ++i) shape.sequences.push_back({i % 37, i % 5 == 0 ? 0 : 1});
  expect_parity(attention_decode_case(*kernels_, shape));
}

// A thread block's share of the work ends wherever the batch makes it end, and the bits are the same.
TEST_F(CudaKernelsTest, DecodeOfASequenceDoesNotDependOnTheOthers) {
  for (const int32_t heads : {32, 40, 128}) {
    AttentionShape shape = {.heads = heads, .kv_heads = 8, .head_dim = 128};
    for (int32_t i = 0; i < 40; ++i) shape.sequences.push_back({(i * 611) % 3000, i % 9 == 4 ? 0 : 1});
    shape.sequences.push_back({6000});
    const std::vector<std::byte> together = bits(shape);
    const size_t row_bytes = static_cast<size_t>(heads) * 128 * 2;
    size_t row = 0;
    for (size_t i = 0; i < shape.sequences.size(); ++i) {
      if (shape.sequences[i].rows == 0) continue;
      if (i % 4 == 0) {
        AttentionShape alone = shape;
        alone.first = static_cast<int32_t>(i);
        alone.launched = 1;
        EXPECT_EQ(std::memcmp(bits(alone).data() + row * row_bytes, together.data() + row * row_bytes, row_bytes), 0)
            << "sequence " << i << ", " << heads << " heads";
      }
      ++row;
    }
  }
}

TEST_F(CudaKernelsTest, Prefill) {
  for (const int32_t head_dim : {16, 32, 80, 128}) {
    expect_parity(attention_prefill_case(*kernels_, {.heads = 4, .kv_heads = 2, .head_dim = head_dim,
                                                     .sequences = {{0, 5}, {33, 40}, {0, 0}, {200, 1}}}));
  }
}

TEST_F(CudaKernelsTest, SiluMul) {
  expect_parity(silu_mul_case(*kernels_, 1, 8, false));
  expect_parity(silu_mul_case(*kernels_, 3, 104, true));
  expect_parity(silu_mul_case(*kernels_, 5, 14336, false));
}

TEST_F(CudaKernelsTest, AddBias) {
  expect_parity(add_bias_case(*kernels_, 1, 4));
  expect_parity(add_bias_case(*kernels_, 5, 1028));
}

TEST_F(CudaKernelsTest, GatherRows) {
  expect_parity(gather_rows_case(*kernels_, 1, 16));
  expect_parity(gather_rows_case(*kernels_, 9, 8208));
}

TEST_F(CudaKernelsTest, Argmax) {
  for (const int64_t vocab : {1, 2, 5, 31, 33, 1000, 4099, 151936, 128257}) {
    for (const int64_t rows : {1, 17}) expect_parity(argmax_case(*kernels_, rows, vocab));
  }
}

TEST_F(CudaKernelsTest, RefusesShapesThatItDoesNotHave) {
  EXPECT_EQ(kernels_->validate_attention_shape(32, 8, 100, 16).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(kernels_->validate_attention_shape(32, 8, 264, 16).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(kernels_->validate_attention_shape(30, 8, 128, 16).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(kernels_->validate_attention_shape(32, 8, 128, 12).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(kernels_->validate_attention_shape(32, 8, 128, 16).ok());
}

}  // namespace
}  // namespace baton::cuda
