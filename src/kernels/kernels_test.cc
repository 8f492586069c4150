// Every operation on every instruction set that this machine has: against a reference in double precision, and
// bit for bit against itself under other batch sizes, chunkings and thread counts.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "base/random.h"
#include "kernels/kernels.h"

namespace baton {
namespace {

std::vector<std::string> machine_isas() {
  std::vector<std::string> isas;
  for (const char* isa : {"plain", "avx2", "avx512bf16"}) {
    if (make_cpu_kernels(isa, 1).ok()) isas.push_back(isa);
  }
  return isas;
}

std::unique_ptr<Kernels> make(const std::string& isa, int threads) {
  auto kernels = make_cpu_kernels(isa, threads);
  BATON_CHECK(kernels.ok()) << kernels.status().to_string();
  return std::move(kernels).value();
}

std::vector<float> random_floats(size_t count, uint64_t seed, double scale = 1.0) {
  Random random(seed);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>((random.uniform() * 2 - 1) * scale);
  return values;
}

std::vector<bf16> to_bf16(const std::vector<float>& values) {
  std::vector<bf16> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) result[i] = bf16(values[i]);
  return result;
}

double as_double(bf16 value) { return static_cast<double>(static_cast<float>(value)); }

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// What outputs hold before an operation: a lane that is not written, or read by mistake, shows as NaN.
constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();
const bf16 kPoison16(kPoison);

class KernelsTest : public testing::TestWithParam<std::string> {
 protected:
  const std::string& isa() const { return GetParam(); }
};

INSTANTIATE_TEST_SUITE_P(Cpu, KernelsTest, testing::ValuesIn(machine_isas()),
                         [](const auto& info) { return info.param; });

// ---------------------------------------------------------------------------------------------- linear

struct LinearShape {
  int64_t out_features;
  int64_t in_features;
};
constexpr LinearShape kLinearShapes[] = {{1, 2},    {16, 32},  {31, 6},    {32, 64}, {33, 66},
                                         {300, 64}, {96, 130}, {40, 1200}, {64, 256}};

struct LinearCase {
  std::vector<bf16> x;  // [rows, in]
  std::vector<bf16> w;  // [out, in]
  std::vector<float> bias;
  std::vector<float> residual;  // [rows, out]
};

LinearCase make_linear_case(LinearShape shape, int64_t rows) {
  return {.x = to_bf16(random_floats(static_cast<size_t>(rows * shape.in_features), 1)),
          .w = to_bf16(random_floats(static_cast<size_t>(shape.out_features * shape.in_features), 2)),
          .bias = random_floats(static_cast<size_t>(shape.out_features), 3),
          .residual = random_floats(static_cast<size_t>(rows * shape.out_features), 4)};
}

std::unique_ptr<PackedMatrix> pack_one(Kernels& kernels, const std::vector<bf16>& w, LinearShape shape) {
  const Kernels::MatrixPart part = {w.data(), DType::kBF16, shape.out_features};
  auto packed = kernels.pack({&part, 1}, shape.in_features);
  BATON_CHECK(packed.ok()) << packed.status().to_string();
  return std::move(packed).value();
}

TEST_P(KernelsTest, LinearMatchesReference) {
  auto kernels = make(isa(), 2);
  for (const LinearShape shape : kLinearShapes) {
    for (const int64_t rows : {1, 2, 3, 5, 7, 12, 13, 33}) {
      const LinearCase c = make_linear_case(shape, rows);
      auto packed = pack_one(*kernels, c.w, shape);
      for (int variant = 0; variant < 4; ++variant) {
        const bool with_bias = (variant & 1) != 0, accumulate = (variant & 2) != 0;
        std::vector<float> y =
            accumulate ? c.residual : std::vector<float>(static_cast<size_t>(rows * shape.out_features), kPoison);
        kernels->linear(c.x.data(), rows, *packed, with_bias ? c.bias.data() : nullptr, accumulate, y.data());
        for (int64_t m = 0; m < rows; ++m) {
          for (int64_t n = 0; n < shape.out_features; ++n) {
            double sum = 0, magnitude = 1;
            for (int64_t k = 0; k < shape.in_features; ++k) {
              const double product = as_double(c.x[static_cast<size_t>(m * shape.in_features + k)]) *
                                     as_double(c.w[static_cast<size_t>(n * shape.in_features + k)]);
              sum += product;
              magnitude += std::abs(product);
            }
            const size_t at = static_cast<size_t>(m * shape.out_features + n);
            if (with_bias) sum += static_cast<double>(c.bias[static_cast<size_t>(n)]);
            if (accumulate) sum += static_cast<double>(c.residual[at]);
            ASSERT_NEAR(static_cast<double>(y[at]), sum, magnitude * 4e-6)
                << shape.out_features << "x" << shape.in_features << " rows " << rows << " variant " << variant
                << " at " << m << "," << n;
          }
        }
      }
    }
  }
}

TEST_P(KernelsTest, LinearIsBatchAndThreadInvariant) {
  // The second is deeper than one block of k, the third has more rows than one packing of activations.
  struct Case {
    LinearShape shape;
    int64_t rows;
  };
  for (const auto& [shape, total] : {Case{{300, 64}, 150}, Case{{97, 2100}, 150}, Case{{70, 66}, 600}}) {
    const LinearCase c = make_linear_case(shape, total);
    const auto compute = [&](Kernels& kernels, const PackedMatrix& packed, int64_t step) {
      std::vector<float> y = c.residual;
      for (int64_t begin = 0; begin < total; begin += step) {
        kernels.linear(c.x.data() + begin * shape.in_features, std::min(step, total - begin), packed, c.bias.data(),
                       true, y.data() + begin * shape.out_features);
      }
      return y;
    };
    std::vector<float> expected;
    for (const int threads : {1, 2, 3}) {
      auto kernels = make(isa(), threads);
      auto packed = pack_one(*kernels, c.w, shape);
      if (expected.empty()) expected = compute(*kernels, *packed, 1);
      for (const int64_t rows : {2, 7, 33, 150, 600}) {
        ASSERT_TRUE(same_bits(compute(*kernels, *packed, rows), expected))
            << shape.out_features << "x" << shape.in_features << ", " << rows << " rows, " << threads << " threads";
      }
    }
  }
}

TEST_P(KernelsTest, PackStacksPartsOfEveryDtype) {
  auto kernels = make(isa(), 2);
  constexpr int64_t kIn = 70;
  const std::vector<float> f32 = random_floats(20 * kIn, 5);
  const std::vector<bf16> half_as_bf16 = to_bf16(random_floats(37 * kIn, 6));
  std::vector<uint16_t> f16(3 * kIn);
  Random random(7);
  for (uint16_t& bits : f16) bits = static_cast<uint16_t>(random.below(0x7c00) | (random.below(2) << 15));
  const Kernels::MatrixPart parts[] = {
      {f32.data(), DType::kF32, 20}, {half_as_bf16.data(), DType::kBF16, 37}, {f16.data(), DType::kF16, 3}};
  auto packed = kernels->pack(parts, kIn);
  ASSERT_TRUE(packed.ok()) << packed.status().to_string();
  EXPECT_EQ((*packed)->out_features(), 60);
  EXPECT_EQ((*packed)->in_features(), kIn);
  EXPECT_GE((*packed)->bytes(), 60u * kIn * 2);

  std::vector<int32_t> ids(60);
  for (int32_t i = 0; i < 60; ++i) ids[static_cast<size_t>(i)] = 59 - i;
  std::vector<float> rows(60 * kIn, kPoison);
  kernels->embed_packed(ids.data(), 60, **packed, rows.data());
  for (int64_t i = 0; i < 60; ++i) {
    const int64_t row = 59 - i;
    for (int64_t k = 0; k < kIn; ++k) {
      const float expected =
          row < 20   ? static_cast<float>(bf16(f32[static_cast<size_t>(row * kIn + k)]))
          : row < 57 ? static_cast<float>(half_as_bf16[static_cast<size_t>((row - 20) * kIn + k)])
                     : static_cast<float>(bf16(f16_to_float(f16[static_cast<size_t>((row - 57) * kIn + k)])));
      ASSERT_EQ(rows[static_cast<size_t>(i * kIn + k)], expected) << row << "," << k;
    }
  }
}

TEST_P(KernelsTest, PackRefusesWhatItCannotTake) {
  auto kernels = make(isa(), 1);
  const std::vector<bf16> data(64);
  const auto code = [&](const void* pointer, DType dtype, int64_t out, int64_t in) {
    const Kernels::MatrixPart part = {pointer, dtype, out};
    return kernels->pack({&part, 1}, in).status().code();
  };
  EXPECT_EQ(code(data.data(), DType::kBF16, 8, 8), StatusCode::kOk);
  EXPECT_EQ(code(data.data(), DType::kBF16, 8, 7), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(data.data(), DType::kBF16, 8, 0), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(data.data(), DType::kBF16, 0, 8), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(data.data(), DType::kBF16, -1, 8), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(data.data(), DType::kI32, 8, 8), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(nullptr, DType::kBF16, 8, 8), StatusCode::kInvalidArgument);
  EXPECT_EQ(kernels->pack({}, 8).status().code(), StatusCode::kInvalidArgument);
  // 2^24 x 2^24 bf16 is 512 TiB: refused by the system, said with the size.
  EXPECT_EQ(code(data.data(), DType::kBF16, int64_t{1} << 24, int64_t{1} << 24), StatusCode::kResourceExhausted);
}

// ----------------------------------------------------------------------------------------- element-wise

TEST_P(KernelsTest, EmbedWidensRows) {
  auto kernels = make(isa(), 2);
  const std::vector<bf16> table = to_bf16(random_floats(10 * 24, 8));
  const std::vector<int32_t> ids = {9, 0, 3, 3};
  std::vector<float> x(4 * 24, kPoison);
  kernels->embed(ids.data(), 4, table.data(), 24, x.data());
  for (size_t i = 0; i < 4; ++i) {
    for (size_t k = 0; k < 24; ++k) {
      ASSERT_EQ(x[i * 24 + k], static_cast<float>(table[static_cast<size_t>(ids[i]) * 24 + k]));
    }
  }
}

TEST_P(KernelsTest, RmsNormMatchesReference) {
  auto kernels = make(isa(), 2);
  for (const int64_t hidden : {2, 6, 64, 70, 1024, 1030}) {
    for (const int64_t rows : {1, 3, 40}) {
      const size_t count = static_cast<size_t>(rows * hidden);
      std::vector<float> x = random_floats(count, 9, 3.0);
      for (int64_t k = 0; k < hidden; ++k) x[static_cast<size_t>(k)] = 0;  // a row of zeros stays finite
      const std::vector<float> weight = random_floats(static_cast<size_t>(hidden), 10);
      std::vector<bf16> out(count, kPoison16);
      kernels->rms_norm(x.data(), rows, hidden, weight.data(), 1e-6f, out.data());
      for (int64_t m = 0; m < rows; ++m) {
        double squares = 0;
        for (int64_t k = 0; k < hidden; ++k) {
          const double value = static_cast<double>(x[static_cast<size_t>(m * hidden + k)]);
          squares += value * value;
        }
        const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(hidden) + 1e-6);
        for (int64_t k = 0; k < hidden; ++k) {
          const size_t at = static_cast<size_t>(m * hidden + k);
          const double expected =
              static_cast<double>(x[at]) * inverse * static_cast<double>(weight[static_cast<size_t>(k)]);
          ASSERT_NEAR(as_double(out[at]), expected, std::abs(expected) * 0.004 + 1e-6)
              << hidden << " " << m << "," << k;
        }
      }
    }
  }
}

TEST_P(KernelsTest, SiluMulMatchesReference) {
  auto kernels = make(isa(), 2);
  for (const int64_t inter : {2, 18, 96, 1000}) {
    for (const int64_t rows : {1, 5, 33}) {
      std::vector<float> gate_up = random_floats(static_cast<size_t>(rows * 2 * inter), 11, 12.0);
      gate_up[0] = -200;  // e^200 overflows float: the result is 0, not NaN
      gate_up[1] = 200;
      std::vector<bf16> out(static_cast<size_t>(rows * inter), kPoison16);
      kernels->silu_mul(gate_up.data(), rows, inter, out.data());
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t i = 0; i < inter; ++i) {
          const double gate = static_cast<double>(gate_up[static_cast<size_t>(m * 2 * inter + i)]);
          const double up = static_cast<double>(gate_up[static_cast<size_t>(m * 2 * inter + inter + i)]);
          const double expected = gate / (1 + std::exp(-gate)) * up;
          ASSERT_NEAR(as_double(out[static_cast<size_t>(m * inter + i)]), expected,
                      std::abs(expected) * 0.004 + 1e-6);
        }
      }
    }
  }
}

// -------------------------------------------------------------------------------------------- attention

/// A cache of one layer for several sequences, with scattered blocks and poison in everything not written.
struct Cache {
  Cache(int32_t kv_heads, int32_t head_dim, int32_t block_tokens, int32_t blocks) {
    // Two layers per block: ours is the second, so that offsets and strides matter.
    const int64_t half = int64_t{kv_heads} * block_tokens * head_dim;
    memory.assign(static_cast<size_t>(half * 4 * blocks), kPoison16);
    view = {.pool = reinterpret_cast<std::byte*>(memory.data()),
            .block_stride_bytes = half * 4 * 2,
            .k_offset_bytes = half * 2 * 2,
            .v_offset_bytes = half * 3 * 2,
            .block_tokens = block_tokens,
            .kv_heads = kv_heads,
            .head_dim = head_dim};
  }
  bf16& at(const std::vector<int32_t>& table, int64_t pos, int32_t head, bool value, int32_t i) {
    std::byte* const block =
        view.pool + table[static_cast<size_t>(pos / view.block_tokens)] * view.block_stride_bytes;
    auto* const base = reinterpret_cast<bf16*>(block + (value ? view.v_offset_bytes : view.k_offset_bytes)) +
                       int64_t{head} * view.block_tokens * view.head_dim;
    const int64_t slot = pos % view.block_tokens, d = view.head_dim;
    if (!value) return base[(i / 2 * view.block_tokens + slot) * 2 + i % 2];
    if (slot % 2 == 0 && slot + 1 == view.block_tokens) return base[slot * d + i];
    return base[(slot / 2 * d + i) * 2 + slot % 2];
  }
  std::vector<bf16> head(const std::vector<int32_t>& table, int64_t pos, int32_t head, bool value) {
    std::vector<bf16> result;
    for (int32_t i = 0; i < view.head_dim; ++i) result.push_back(at(table, pos, head, value, i));
    return result;
  }
  std::vector<bf16> memory;
  KvLayerView view;
};

/// Block ids that are neither contiguous nor ascending.
std::vector<int32_t> scattered_table(int32_t count, int32_t first, int32_t step) {
  std::vector<int32_t> table(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) table[static_cast<size_t>(i)] = first + (count - 1 - i) * step;
  return table;
}

TEST_P(KernelsTest, QkvMatchesReferenceAndWritesOnlyItsSlots) {
  auto kernels = make(isa(), 2);
  struct Case {
    int32_t heads, kv_heads, head_dim, block_tokens;
    bool bias, norm;
  };
  for (const Case c : {Case{4, 2, 16, 4, false, true}, Case{4, 4, 8, 3, true, false},
                       Case{8, 2, 128, 16, false, true}, Case{3, 1, 40, 5, true, true}}) {
    constexpr int32_t kRowsA = 5, kStartA = 2, kRowsB = 1, kStartB = 9;
    constexpr int32_t kRows = kRowsA + 1 + kRowsB;  // row 5 belongs to nobody
    const int32_t d = c.head_dim, width = (c.heads + 2 * c.kv_heads) * d;
    const std::vector<float> qkv = random_floats(static_cast<size_t>(kRows * width), 12);
    const std::vector<float> bias = random_floats(static_cast<size_t>(width), 13);
    const std::vector<float> q_norm = random_floats(static_cast<size_t>(d), 14);
    const std::vector<float> k_norm = random_floats(static_cast<size_t>(d), 15);
    const std::vector<float> angles = random_floats(static_cast<size_t>(16 * d / 2), 16, 3.0);
    std::vector<float> cos(angles.size()), sin(angles.size());
    for (size_t i = 0; i < angles.size(); ++i) cos[i] = std::cos(angles[i]), sin[i] = std::sin(angles[i]);

    Cache cache(c.kv_heads, d, c.block_tokens, 16);
    const std::vector<int32_t> table_a = scattered_table(4, 1, 2), table_b = scattered_table(4, 0, 4);
    const SequenceSlice sequences[] = {
        {.first_row = 0, .rows = kRowsA, .start_pos = kStartA, .block_table = table_a.data()},
        {.first_row = 6, .rows = kRowsB, .start_pos = kStartB, .block_table = table_b.data()}};
    const QkvArgs args = {.qkv = qkv.data(),
                          .rows = kRows,
                          .heads = c.heads,
                          .bias = c.bias ? bias.data() : nullptr,
                          .q_norm = c.norm ? q_norm.data() : nullptr,
                          .k_norm = c.norm ? k_norm.data() : nullptr,
                          .norm_eps = 1e-6f,
                          .rope = {.cos = cos.data(), .sin = sin.data(), .max_positions = 16},
                          .sequences = sequences,
                          .kv = cache.view};
    std::vector<bf16> q(static_cast<size_t>(kRows * c.heads * d), kPoison16);
    kernels->qkv_rope_kv_write(args, q.data());

    const auto reference = [&](int32_t row, int32_t head, int64_t pos) {
      std::vector<double> x(static_cast<size_t>(d));
      double squares = 0;
      for (int32_t i = 0; i < d; ++i) {
        const size_t at = static_cast<size_t>(head * d + i);
        x[static_cast<size_t>(i)] = static_cast<double>(qkv[static_cast<size_t>(row * width) + at]) +
                                    (c.bias ? static_cast<double>(bias[at]) : 0.0);
        squares += x[static_cast<size_t>(i)] * x[static_cast<size_t>(i)];
      }
      if (head >= c.heads + c.kv_heads) return x;  // V
      if (c.norm) {
        const std::vector<float>& weight = head < c.heads ? q_norm : k_norm;
        for (int32_t i = 0; i < d; ++i) {
          x[static_cast<size_t>(i)] *=
              static_cast<double>(weight[static_cast<size_t>(i)]) / std::sqrt(squares / d + 1e-6);
        }
      }
      std::vector<double> y(x.size());
      for (int32_t i = 0; i < d / 2; ++i) {
        const double angle = static_cast<double>(angles[static_cast<size_t>(pos * (d / 2) + i)]);
        const double a = x[static_cast<size_t>(i)], b = x[static_cast<size_t>(i + d / 2)];
        y[static_cast<size_t>(i)] = a * std::cos(angle) - b * std::sin(angle);
        y[static_cast<size_t>(i + d / 2)] = b * std::cos(angle) + a * std::sin(angle);
      }
      return y;
    };
    size_t written = 0;
    const auto expect_head = [&](const bf16* actual, const std::vector<double>& expected) {
      for (int32_t i = 0; i < d; ++i) {
        ASSERT_NEAR(as_double(actual[i]), expected[static_cast<size_t>(i)],
                    0.004 * std::abs(expected[static_cast<size_t>(i)]) + 1e-5);
      }
    };
    for (const SequenceSlice& sequence : sequences) {
      const std::vector<int32_t>& table = sequence.first_row == 0 ? table_a : table_b;
      for (int32_t i = 0; i < sequence.rows; ++i) {
        const int32_t row = sequence.first_row + i, pos = sequence.start_pos + i;
        for (int32_t h = 0; h < c.heads; ++h)
          expect_head(&q[static_cast<size_t>((row * c.heads + h) * d)], reference(row, h, pos));
        for (int32_t h = 0; h < c.kv_heads; ++h) {
          expect_head(cache.head(table, pos, h, false).data(), reference(row, c.heads + h, pos));
          expect_head(cache.head(table, pos, h, true).data(), reference(row, c.heads + c.kv_heads + h, pos));
          written += static_cast<size_t>(2 * d);
        }
      }
    }
    size_t not_poison = 0;
    for (bf16 value : cache.memory) not_poison += std::isnan(static_cast<float>(value)) ? 0 : 1;
    EXPECT_EQ(not_poison, written);
    EXPECT_TRUE(std::isnan(static_cast<float>(q[static_cast<size_t>(5 * c.heads * d)])));
  }
}

struct AttentionCase {
  int32_t heads, kv_heads, head_dim, block_tokens, context, window;
  float spread;  // of q: large values make sharp softmaxes
};
constexpr AttentionCase kAttentionCases[] = {
    {4, 2, 16, 4, 40, 0, 1},  {4, 4, 8, 3, 7, 0, 1},     {2, 1, 24, 16, 130, 0, 4},  {16, 8, 128, 16, 200, 0, 2},
    {4, 2, 64, 32, 70, 8, 1}, {6, 2, 40, 5, 150, 65, 2}, {2, 1, 256, 16, 600, 0, 1}, {4, 1, 32, 64, 1100, 600, 3},
    {2, 2, 120, 1, 65, 1, 1}, {8, 1, 96, 16, 300, 0, 8},
};

struct AttentionData {
  explicit AttentionData(const AttentionCase& c)
      : cache(c.kv_heads, c.head_dim, c.block_tokens, 2 * ((c.context + c.block_tokens - 1) / c.block_tokens) + 1) {
    table = scattered_table((c.context + c.block_tokens - 1) / c.block_tokens, 1, 2);
    q = to_bf16(
        random_floats(static_cast<size_t>(c.context * c.heads * c.head_dim), 20, static_cast<double>(c.spread)));
    const auto k = to_bf16(random_floats(static_cast<size_t>(c.context * c.kv_heads * c.head_dim), 21));
    const auto v = to_bf16(random_floats(static_cast<size_t>(c.context * c.kv_heads * c.head_dim), 22));
    for (int32_t pos = 0; pos < c.context; ++pos) {
      for (int32_t h = 0; h < c.kv_heads; ++h) {
        const size_t at = static_cast<size_t>((pos * c.kv_heads + h) * c.head_dim);
        for (int32_t i = 0; i < c.head_dim; ++i) {
          cache.at(table, pos, h, false, i) = k[at + static_cast<size_t>(i)];
          cache.at(table, pos, h, true, i) = v[at + static_cast<size_t>(i)];
        }
      }
    }
  }
  Cache cache;
  std::vector<int32_t> table;
  std::vector<bf16> q;  // [context, heads, head_dim]
};

/// Attention of positions [first, context), computed in slices of `chunk` tokens (0: all at once).
std::vector<bf16> attend(Kernels& kernels, const AttentionCase& c, AttentionData& data, int32_t first,
                         int32_t chunk) {
  const size_t row = static_cast<size_t>(c.heads * c.head_dim);
  std::vector<bf16> out(static_cast<size_t>(c.context - first) * row, kPoison16);
  const int32_t step = chunk == 0 ? c.context - first : chunk;
  for (int32_t pos = first; pos < c.context; pos += step) {
    const int32_t rows = std::min(step, c.context - pos);
    const SequenceSlice slice = {.first_row = 0, .rows = rows, .start_pos = pos, .block_table = data.table.data()};
    kernels.attention({.q = data.q.data() + static_cast<size_t>(pos) * row,
                       .out = out.data() + static_cast<size_t>(pos - first) * row,
                       .heads = c.heads,
                       .scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim)),
                       .sliding_window = c.window,
                       .sequences = {&slice, 1},
                       .kv = data.cache.view});
  }
  return out;
}

TEST_P(KernelsTest, AttentionMatchesReference) {
  auto kernels = make(isa(), 2);
  for (const AttentionCase& c : kAttentionCases) {
    AttentionData data(c);
    const int32_t d = c.head_dim, group = c.heads / c.kv_heads;
    const std::vector<bf16> out = attend(*kernels, c, data, 0, 0);
    const int32_t stride = c.context > 100 ? 37 : 1;  // the reference is slow: a sample of long contexts
    for (int32_t pos = 0; pos < c.context;
         pos += (pos + stride < c.context || pos == c.context - 1) ? stride : c.context - 1 - pos) {
      for (int32_t h = 0; h < c.heads; ++h) {
        const bf16* const query = &data.q[static_cast<size_t>((pos * c.heads + h) * d)];
        const int32_t lowest = c.window > 0 ? std::max(0, pos - c.window + 1) : 0;
        std::vector<double> weights;
        double maximum = -1e300;
        for (int32_t key = lowest; key <= pos; ++key) {
          const std::vector<bf16> k = data.cache.head(data.table, key, h / group, false);
          double dot = 0;
          for (int32_t i = 0; i < d; ++i) dot += as_double(query[i]) * as_double(k[i]);
          weights.push_back(dot / std::sqrt(static_cast<double>(d)));
          maximum = std::max(maximum, weights.back());
        }
        double sum = 0;
        for (double& weight : weights) sum += weight = std::exp(weight - maximum);
        for (int32_t i = 0; i < d; ++i) {
          double expected = 0;
          for (int32_t key = lowest; key <= pos; ++key) {
            expected += weights[static_cast<size_t>(key - lowest)] / sum *
                        as_double(data.cache.at(data.table, key, h / group, true, i));
          }
          // Values are in [-1, 1]; weights and result are rounded to bf16.
          ASSERT_NEAR(as_double(out[static_cast<size_t>((pos * c.heads + h) * d + i)]), expected, 0.006)
              << "heads " << c.heads << "/" << c.kv_heads << " dim " << d << " pos " << pos << " head " << h;
        }
      }
    }
  }
}

TEST_P(KernelsTest, AttentionIsChunkAndThreadInvariant) {
  for (const AttentionCase& c : kAttentionCases) {
    AttentionData data(c);
    const size_t row = static_cast<size_t>(c.heads * c.head_dim);
    auto single = make(isa(), 1);
    const std::vector<bf16> expected = attend(*single, c, data, 0, 0);
    for (const int threads : {1, 2, 3}) {
      auto kernels = make(isa(), threads);
      // Long contexts one by one only at their end, where all segments are in play.
      const int32_t end_part = std::max(0, c.context - 150);
      struct Run {
        int32_t first, chunk;
      };
      for (const Run run : {Run{0, 100}, Run{end_part, 64}, Run{end_part, 16}, Run{end_part, 7},
                            Run{c.context / 3, 0}, Run{std::max(0, c.context - 20), 1}}) {
        const std::vector<bf16> out = attend(*kernels, c, data, run.first, run.chunk);
        ASSERT_EQ(std::memcmp(out.data(), expected.data() + static_cast<size_t>(run.first) * row,
                              out.size() * sizeof(bf16)),
                  0)
            << "dim " << c.head_dim << " context " << c.context << " from " << run.first << " by " << run.chunk
            << " with " << threads << " threads";
      }
    }
  }
}

TEST_P(KernelsTest, AttentionOfABatchEqualsItsSequences) {
  const AttentionCase c = {4, 2, 32, 16, 700, 0, 2};
  AttentionData data(c);
  auto kernels = make(isa(), 2);
  const std::vector<bf16> expected = attend(*kernels, c, data, 0, 0);
  const size_t row = static_cast<size_t>(c.heads * c.head_dim);
  // Decode rows and prefill chunks of "different" sequences over the same cache, in an odd order.
  const SequenceSlice slices[] = {{3, 1, 699, data.table.data()},
                                  {4, 20, 100, data.table.data()},
                                  {0, 1, 0, data.table.data()},
                                  {1, 2, 511, data.table.data()},
                                  {24, 130, 570, data.table.data()}};
  std::vector<bf16> q(154 * row), out(154 * row, kPoison16);
  for (const SequenceSlice& slice : slices) {
    std::memcpy(&q[static_cast<size_t>(slice.first_row) * row], &data.q[static_cast<size_t>(slice.start_pos) * row],
                static_cast<size_t>(slice.rows) * row * 2);
  }
  kernels->attention({.q = q.data(),
                      .out = out.data(),
                      .heads = c.heads,
                      .scale = 1.0f / std::sqrt(32.0f),
                      .sliding_window = 0,
                      .sequences = slices,
                      .kv = data.cache.view});
  for (const SequenceSlice& slice : slices) {
    EXPECT_EQ(
        std::memcmp(&out[static_cast<size_t>(slice.first_row) * row],
                    &expected[static_cast<size_t>(slice.start_pos) * row], static_cast<size_t>(slice.rows) * row * 2),
        0)
        << "slice at " << slice.start_pos;
  }
}

TEST_P(KernelsTest, ElementWiseRowsAreBatchInvariant) {
  constexpr int64_t kRows = 150, kHidden = 200;
  const std::vector<float> x = random_floats(kRows * kHidden * 2, 30);
  const std::vector<float> weight = random_floats(kHidden, 31);
  std::vector<bf16> norm_all(kRows * kHidden), silu_all(kRows * kHidden);
  auto all = make(isa(), 3);
  all->rms_norm(x.data(), kRows, kHidden, weight.data(), 1e-5f, norm_all.data());
  all->silu_mul(x.data(), kRows, kHidden, silu_all.data());
  auto one = make(isa(), 1);
  std::vector<bf16> norm_one(kRows * kHidden), silu_one(kRows * kHidden);
  for (int64_t m = 0; m < kRows; ++m) {
    one->rms_norm(x.data() + m * kHidden, 1, kHidden, weight.data(), 1e-5f, norm_one.data() + m * kHidden);
    one->silu_mul(x.data() + m * 2 * kHidden, 1, kHidden, silu_one.data() + m * kHidden);
  }
  EXPECT_TRUE(same_bits(norm_all, norm_one));
  EXPECT_TRUE(same_bits(silu_all, silu_one));
}

// ----------------------------------------------------------------------------------------------- border

TEST_P(KernelsTest, AttentionShapesAreValidated) {
  auto kernels = make(isa(), 1);
  EXPECT_TRUE(kernels->validate_attention_shape(16, 8, 128).ok());
  EXPECT_TRUE(kernels->validate_attention_shape(4, 4, 8).ok());
  EXPECT_FALSE(kernels->validate_attention_shape(4, 3, 64).ok());
  EXPECT_FALSE(kernels->validate_attention_shape(4, 0, 64).ok());
  EXPECT_FALSE(kernels->validate_attention_shape(4, 2, 12).ok());
  EXPECT_FALSE(kernels->validate_attention_shape(4, 2, 264).ok());
}

TEST(CpuKernels, NamesTheInstructionSet) {
  EXPECT_EQ(make("plain", 1)->name(), "cpu/plain");
  EXPECT_EQ(make("auto", 1)->name(), "cpu/" + machine_isas().back());
  EXPECT_EQ(make_cpu_kernels("sse9", 1).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(make_cpu_kernels("plain", -1).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(make("plain", 3)->threads().threads(), 3);
}

}  // namespace
}  // namespace baton
