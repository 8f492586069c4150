#include "kernels/cuda/prefill_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/random.h"

/// Prefill attention against a reference in double precision, on a GPU; skipped where there is none.
namespace baton::cuda {
namespace {

struct Sequence {
  int32_t rows;
  int32_t start_pos;
};

struct Shape {
  int32_t heads = 4;
  int32_t kv_heads = 2;
  int32_t head_dim = 128;
  int32_t block_tokens = 16;
  int32_t window = 0;
  std::vector<Sequence> sequences;
};

constexpr uint16_t kPoison = 0xffff;  // a NaN
constexpr int kLayers = 2;            // the second one is used

/// A pool on the GPU that holds NaN wherever no token of a sequence lies, and queries for every position.
class PrefillCase {
 public:
  PrefillCase(std::shared_ptr<const Gpu> gpu, PrefillAttention& attention, const Shape& shape, uint64_t seed)
      : gpu_(std::move(gpu)), attention_(attention), shape_(shape), random_(seed) {
    const Shape& s = shape_;
    scale_ = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
    const int64_t plane = int64_t{s.kv_heads} * s.block_tokens * s.head_dim;
    stride_ = kLayers * 2 * plane;
    int32_t blocks = 3;
    for (const Sequence& sequence : s.sequences) {
      tables_.emplace_back((sequence.start_pos + sequence.rows + s.block_tokens - 1) / s.block_tokens);
      blocks += static_cast<int32_t>(tables_.back().size());
    }
    std::vector<int32_t> free(static_cast<size_t>(blocks));
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), random_);
    pool_.assign(static_cast<size_t>(blocks) * static_cast<size_t>(stride_), kPoison);
    for (size_t i = 0; i < tables_.size(); ++i) {
      for (int32_t& block : tables_[i]) {
        block = free.back();
        free.pop_back();
      }
      const int32_t length = s.sequences[i].start_pos + s.sequences[i].rows;
      for (int32_t pos = 0; pos < length; ++pos) {
        const double peak = random_.chance(0.02) ? 6.0 : 1.0;
        for (int32_t head = 0; head < s.kv_heads; ++head) {
          for (int32_t d = 0; d < s.head_dim; ++d) {
            pool_[k_index(i, pos, head, d)] = bf16(static_cast<float>(gauss() * peak)).bits;
            pool_[k_index(i, pos, head, d) + static_cast<size_t>(plane)] = bf16(static_cast<float>(gauss())).bits;
          }
        }
      }
      queries_.emplace_back(static_cast<size_t>(length) * row_elements());
      for (uint16_t& q : queries_.back()) q = bf16(static_cast<float>(gauss())).bits;
    }
    device_pool_ = upload(pool_);
  }

  size_t row_elements() const { return static_cast<size_t>(shape_.heads) * static_cast<size_t>(shape_.head_dim); }

  /// The outputs of `pieces`, each a stretch of a sequence; each [rows, heads, head_dim]. Between the pieces the buffers have
  /// rows that belong to nobody and must stay untouched.
  struct Piece {
    size_t sequence;
    int32_t start_pos;
    int32_t rows;
  };
  std::vector<std::vector<uint16_t>> run(const std::vector<Piece>& pieces) {
    constexpr int32_t kGap = 3;
    std::vector<DeviceSequence> sequences;
    std::vector<int32_t> tables;
    std::vector<PrefillTile> tiles;
    std::vector<uint16_t> q;
    const int32_t tile_tokens = attention_.tile_tokens(shape_.heads, shape_.kv_heads, shape_.head_dim);
    for (const Piece& piece : pieces) {
      q.resize(q.size() + kGap * row_elements(), kPoison);
      const auto index = static_cast<int32_t>(sequences.size());
      sequences.push_back({static_cast<int32_t>(q.size() / row_elements()), piece.rows, piece.start_pos,
                           static_cast<int32_t>(tables.size())});
      tables.insert(tables.end(), tables_[piece.sequence].begin(), tables_[piece.sequence].end());
      const uint16_t* from = queries_[piece.sequence].data() + static_cast<size_t>(piece.start_pos) * row_elements();
      q.insert(q.end(), from, from + static_cast<size_t>(piece.rows) * row_elements());
      for (int32_t token = 0; token < piece.rows; token += tile_tokens) tiles.push_back({index, token});
    }
    // Tiles that are none.
    tiles.push_back({0, sequences[0].rows});
    tiles.push_back({-1, 0});
    std::shuffle(tiles.begin(), tiles.end(), random_);

    const auto device_sequences = upload(sequences);
    const auto device_tables = upload(tables);
    const auto device_tiles = upload(tiles);
    const auto device_q = upload(q);
    const auto out = upload(std::vector<uint16_t>(q.size(), kPoison));
    const StepView step{.tokens = nullptr,
                        .positions = nullptr,
                        .slots = nullptr,
                        .sequences = reinterpret_cast<const DeviceSequence*>(device_sequences.address()),
                        .block_tables = reinterpret_cast<const int32_t*>(device_tables.address()),
                        .rows = static_cast<int32_t>(q.size() / row_elements()),
                        .sequences_count = static_cast<int32_t>(sequences.size())};
    const Attention args{.q = reinterpret_cast<const bf16*>(device_q.address()),
                         .out = reinterpret_cast<bf16*>(out.address()),
                         .heads = shape_.heads,
                         .scale = scale_,
                         .sliding_window = shape_.window};
    const int64_t plane = int64_t{shape_.kv_heads} * shape_.block_tokens * shape_.head_dim;
    const DeviceKv kv{.pool = reinterpret_cast<unsigned char*>(device_pool_.address()),
                      .block_stride_bytes = stride_ * 2,
                      .k_offset_bytes = plane * 2 * 2,
                      .v_offset_bytes = plane * 2 * 3,
                      .block_tokens = shape_.block_tokens,
                      .kv_heads = shape_.kv_heads,
                      .head_dim = shape_.head_dim};
    const Status launched =
        attention_.launch(nullptr, step, reinterpret_cast<const PrefillTile*>(device_tiles.address()),
                          static_cast<int32_t>(tiles.size()), args, kv);
    EXPECT_TRUE(launched.ok()) << launched.to_string();
    CurrentDevice current(*gpu_);
    const Status finished = gpu_->driver().check(gpu_->driver().stream_synchronize(nullptr), "prefill attention");
    EXPECT_TRUE(finished.ok()) << finished.to_string();
    std::vector<uint16_t> all(q.size());
    EXPECT_EQ(gpu_->driver().copy_to_host(all.data(), out.address(), all.size() * 2), kSuccess);

    std::vector<std::vector<uint16_t>> results;
    std::vector<bool> used(static_cast<size_t>(step.rows));
    for (const DeviceSequence& sequence : sequences) {
      const auto from = all.begin() + static_cast<ptrdiff_t>(static_cast<size_t>(sequence.first_row) * row_elements());
      results.emplace_back(from, from + static_cast<ptrdiff_t>(static_cast<size_t>(sequence.rows) * row_elements()));
      std::fill_n(used.begin() + sequence.first_row, sequence.rows, true);
    }
    size_t touched = 0;
    for (size_t i = 0; i < all.size(); ++i) touched += !used[i / row_elements()] && all[i] != kPoison;
    EXPECT_EQ(touched, 0u) << "elements of rows that belong to nobody were written";
    return results;
  }

  /// Whole sequences, as the shape lists them.
  std::vector<Piece> whole() const {
    std::vector<Piece> pieces;
    for (size_t i = 0; i < shape_.sequences.size(); ++i) {
      pieces.push_back({i, shape_.sequences[i].start_pos, shape_.sequences[i].rows});
    }
    return pieces;
  }

  /// The largest ||out - reference|| / ||reference|| of a row and head. `stride`: every how many rows are looked at.
  double worst_error(const Piece& piece, const std::vector<uint16_t>& out, int32_t stride = 1) const {
    const Shape& s = shape_;
    const size_t plane = static_cast<size_t>(s.kv_heads) * static_cast<size_t>(s.block_tokens) * static_cast<size_t>(s.head_dim);
    double worst = 0;
    std::vector<double> weights, expected(static_cast<size_t>(s.head_dim));
    for (int32_t row = 0; row < piece.rows; row += row + stride < piece.rows ? stride : std::max(1, piece.rows - 1 - row)) {
      const int32_t pos = piece.start_pos + row;
      const int32_t lowest = s.window > 0 ? std::max(0, pos - s.window + 1) : 0;
      for (int32_t head = 0; head < s.heads; ++head) {
        const int32_t kv_head = head / (s.heads / s.kv_heads);
        const uint16_t* q = queries_[piece.sequence].data() + (int64_t{pos} * s.heads + head) * s.head_dim;
        weights.assign(static_cast<size_t>(pos - lowest + 1), 0.0);
        double largest = -INFINITY, sum = 0;
        for (int32_t key = lowest; key <= pos; ++key) {
          double dot = 0;
          const uint16_t* k = &pool_[k_index(piece.sequence, key, kv_head, 0)];
          for (int32_t d = 0; d < s.head_dim; ++d) dot += value(q[d]) * value(k[d]);
          weights[static_cast<size_t>(key - lowest)] = dot * static_cast<double>(scale_);
          largest = std::max(largest, dot * static_cast<double>(scale_));
        }
        std::fill(expected.begin(), expected.end(), 0.0);
        for (int32_t key = lowest; key <= pos; ++key) {
          const double weight = std::exp(weights[static_cast<size_t>(key - lowest)] - largest);
          sum += weight;
          const uint16_t* v = &pool_[k_index(piece.sequence, key, kv_head, 0) + plane];
          for (int32_t d = 0; d < s.head_dim; ++d) expected[static_cast<size_t>(d)] += weight * value(v[d]);
        }
        double difference = 0, norm = 0;
        const size_t at = static_cast<size_t>(row) * row_elements() + static_cast<size_t>(head) * static_cast<size_t>(s.head_dim);
        for (size_t d = 0; d < expected.size(); ++d) {
          const double e = expected[d] / sum;
          difference += (value(out[at + d]) - e) * (value(out[at + d]) - e);
          norm += e * e;
        }
        const double error = std::sqrt(difference / norm);
        if (!(error <= worst)) worst = error;  // NaN too
        if (std::isnan(error)) return error;
      }
    }
    return worst;
  }

 private:
  static double value(uint16_t bits) {
    bf16 v;
    v.bits = bits;
    return static_cast<double>(static_cast<float>(v));
  }
  double gauss() { return random_.uniform() + random_.uniform() + random_.uniform() + random_.uniform() - 2.0; }
  size_t k_index(size_t sequence, int32_t pos, int32_t head, int32_t d) const {
    const Shape& s = shape_;
    const int64_t plane = int64_t{s.kv_heads} * s.block_tokens * s.head_dim;
    return static_cast<size_t>(tables_[sequence][static_cast<size_t>(pos / s.block_tokens)] * stride_ + 2 * plane +
                               (int64_t{head} * s.block_tokens + pos % s.block_tokens) * s.head_dim + d);
  }
  template <typename T>
  DeviceMemory upload(const std::vector<T>& values) {
    auto memory = DeviceMemory::allocate(gpu_, values.size() * sizeof(T));
    BATON_CHECK(memory.ok()) << memory.status().to_string();
    CurrentDevice current(*gpu_);
    EXPECT_EQ(gpu_->driver().copy_to_device(memory->address(), values.data(), values.size() * sizeof(T)), kSuccess);
    return std::move(*memory);
  }

  const std::shared_ptr<const Gpu> gpu_;
  PrefillAttention& attention_;
  const Shape shape_;
  Random random_;
  float scale_ = 0;
  int64_t stride_ = 0;  // elements of a block
  std::vector<std::vector<int32_t>> tables_;
  std::vector<uint16_t> pool_;
  std::vector<std::vector<uint16_t>> queries_;  // [positions, heads, head_dim] of a sequence
  DeviceMemory device_pool_;
};

/// The parameter: kernels that every GPU has, or the fastest that this one has.
class PrefillAttentionTest : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    auto driver = Driver::load("");
    if (!driver.ok()) GTEST_SKIP() << driver.status().to_string();
    auto gpu = Gpu::open(*driver, 0);
    if (!gpu.ok()) GTEST_SKIP() << gpu.status().to_string();
    gpu_ = *gpu;
    auto attention = PrefillAttention::create(gpu_, GetParam());
    if (!attention.ok() && attention.status().code() == StatusCode::kUnimplemented) {
      GTEST_SKIP() << attention.status().to_string();
    }
    ASSERT_TRUE(attention.ok()) << attention.status().to_string();
    attention_ = std::move(*attention);
  }

  void expect_right(const Shape& shape, int32_t stride = 1) {
    SCOPED_TRACE(fmt::format("{} heads, {} KV heads, head_dim {}, blocks of {}, window {}", shape.heads, shape.kv_heads,
                             shape.head_dim, shape.block_tokens, shape.window));
    ASSERT_TRUE(attention_->validate(shape.heads, shape.kv_heads, shape.head_dim, shape.block_tokens).ok());
    PrefillCase test(gpu_, *attention_, shape, 7 + static_cast<uint64_t>(shape.head_dim + shape.window));
    const auto pieces = test.whole();
    const auto results = test.run(pieces);
    for (size_t i = 0; i < pieces.size(); ++i) {
      EXPECT_LT(test.worst_error(pieces[i], results[i], stride), 1e-2)
          << "sequence " << i << ", " << pieces[i].rows << " rows at " << pieces[i].start_pos;
    }
  }

  std::shared_ptr<const Gpu> gpu_;
  std::unique_ptr<PrefillAttention> attention_;
};

TEST_P(PrefillAttentionTest, SmallCase) {
  expect_right({.heads = 2, .kv_heads = 1, .sequences = {{150, 37}, {1, 0}}});
}

TEST_P(PrefillAttentionTest, EveryWidth) {
  for (int32_t head_dim : {8, 16, 24, 32, 40, 64, 72, 80, 96, 112, 120, 128, 160, 192, 248, 256}) {
    expect_right({.head_dim = head_dim, .sequences = {{131, 0}, {65, 200}}});
  }
}

TEST_P(PrefillAttentionTest, OddLengthsAndPrefixes) {
  for (int32_t head_dim : {64, 128}) {
    expect_right({.head_dim = head_dim,
                  .sequences = {{1, 0}, {2, 127}, {127, 1}, {128, 128}, {129, 127}, {1, 300}, {64, 64}, {255, 513}, {33, 31}}});
  }
}

TEST_P(PrefillAttentionTest, Windows) {
  for (int32_t window : {1, 2, 16, 63, 64, 65, 128, 129, 200, 1000}) {
    expect_right({.head_dim = 128, .window = window, .sequences = {{300, 0}, {140, 333}}});
    expect_right({.head_dim = 64, .window = window, .sequences = {{290, 65}}});
  }
}

TEST_P(PrefillAttentionTest, GroupsAndBlockSizes) {
  for (int32_t block_tokens : {8, 16, 24, 32, 48, 64, 128, 256}) {
    expect_right({.heads = 3, .kv_heads = 3, .block_tokens = block_tokens, .sequences = {{200, 77}, {70, 0}}});
  }
  for (int32_t heads : {1, 2, 5, 8, 14}) {
    expect_right({.heads = heads, .kv_heads = 1, .sequences = {{140, 60}}});
  }
}

TEST_P(PrefillAttentionTest, MoreItemsThanThreadBlocks) {
  Random random(11);
  for (int32_t window : {0, 150}) {
    for (int32_t head_dim : {64, 96, 128}) {
      Shape shape{.heads = 32, .kv_heads = 8, .head_dim = head_dim, .window = window, .sequences = {}};
      for (int i = 0; i < 24; ++i) {
        const auto rows = 1 + static_cast<int32_t>(random.below(400));
        shape.sequences.push_back({rows, random.chance(0.5) ? 0 : static_cast<int32_t>(random.below(300))});
      }
      expect_right(shape, 61);
    }
  }
}

TEST_P(PrefillAttentionTest, LongContext) {
  expect_right({.heads = 2, .kv_heads = 1, .sequences = {{1100, 3000}, {2100, 0}}}, 97);
  expect_right({.heads = 2, .kv_heads = 1, .window = 700, .sequences = {{1100, 3000}}}, 97);
}

TEST_P(PrefillAttentionTest, ARowsBitsDoNotDependOnTheChunkOrTheBatch) {
  for (int32_t head_dim : {64, 80, 128, 256}) {
    for (int32_t window : {0, 100}) {
      const Shape shape{
          .heads = 32, .kv_heads = 4, .head_dim = head_dim, .window = window, .sequences = {{700, 0}, {300, 123}}};
      PrefillCase test(gpu_, *attention_, shape, 3);
      const auto together = test.run(test.whole());
      for (const std::vector<int32_t>& chunks :
           {std::vector<int32_t>{700}, {128, 572}, {100, 1, 64, 300, 235}, {16, 684}, {699, 1}}) {
        std::vector<PrefillCase::Piece> pieces;
        int32_t pos = 0;
        for (int32_t rows : chunks) {
          pieces.push_back({0, pos, rows});
          pos += rows;
        }
        std::vector<uint16_t> joined;
        for (const auto& part : test.run(pieces)) joined.insert(joined.end(), part.begin(), part.end());
        EXPECT_TRUE(joined == together[0]) << "head_dim " << head_dim << ", window " << window << ", " << chunks.size() << " chunks";
      }
    }
  }
}

TEST_P(PrefillAttentionTest, ShapesItCannotDoAreRefused) {
  EXPECT_EQ(attention_->validate(32, 8, 260, 16).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(attention_->validate(32, 8, 100, 16).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(attention_->validate(32, 5, 128, 16).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(attention_->validate(32, 8, 128, 12).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(attention_->validate(32, 8, 128, 16).ok());
}

INSTANTIATE_TEST_SUITE_P(Kernels, PrefillAttentionTest, ::testing::Bool(),
                         [](const auto& kind) { return kind.param ? "portable" : "fastest"; });

}  // namespace
}  // namespace baton::cuda
