// On the stand-in for CUDA's driver: no GPU is needed.
#include "model/cuda/step_buffer.h"

#include <gtest/gtest.h>

#include <cmath>

namespace baton {
namespace {

constexpr int32_t kBlockTokens = 16;
constexpr int32_t kTile = 64;

class StepBufferTest : public testing::Test {
 protected:
  void SetUp() override {
    auto driver = cuda::Driver::load(BATON_FAKE_CUDA);
    ASSERT_TRUE(driver.ok()) << driver.status().to_string();
    gpu_ = cuda::Gpu::open(*driver, 0).value();
    current_ = std::make_unique<cuda::CurrentDevice>(*gpu_);
    ASSERT_EQ(gpu_->driver().stream_create(&stream_, cuda::kStreamNonBlocking, 0), cuda::kSuccess);
  }
  void TearDown() override {
    if (stream_ != nullptr) (void)gpu_->driver().stream_destroy(stream_);
  }

  /// A sequence of `rows` tokens from position `start`, in blocks that nobody else has.
  void add(int32_t rows, int32_t start) {
    const int32_t blocks = (start + rows + kBlockTokens - 1) / kBlockTokens;
    std::vector<int32_t>& table = tables_.emplace_back(static_cast<size_t>(blocks));
    for (int32_t& block : table) block = next_block_ += 3;
    slices_.push_back({static_cast<int32_t>(tokens_.size()), rows, start, nullptr});
    for (int32_t r = 0; r < rows; ++r) tokens_.push_back(100 * static_cast<int32_t>(slices_.size()) + r);
  }
  void want(std::vector<int32_t> rows) { logit_rows_ = std::move(rows); }

  ForwardBatch batch() {
    for (size_t i = 0; i < slices_.size(); ++i) slices_[i].block_table = tables_[i].data();
    ForwardBatch batch;
    batch.tokens = tokens_;
    batch.sequences = slices_;
    batch.logit_rows = logit_rows_;
    batch.block_tokens = kBlockTokens;
    batch.choices = choices_;
    batch.edits = edits_;
    return batch;
  }

  StepPlan build(int32_t padded_rows, bool only_tiles = false) {
    const ForwardBatch built = batch();
    StepCapacity capacity = StepBuffer::measure(built, kTile);
    capacity.rows = padded_rows;
    capacity.sequences += padded_rows - std::ssize(tokens_);
    capacity.logit_rows = padded_rows;
    buffer_ = StepBuffer::create(gpu_, capacity).value();
    const StepPlan plan = buffer_.build(built, padded_rows, kTile, only_tiles);
    EXPECT_TRUE(buffer_.send(stream_).ok());
    EXPECT_EQ(gpu_->driver().stream_synchronize(stream_), cuda::kSuccess);
    return plan;
  }

  template <typename T>
  std::vector<T> fetch(const T* device, int32_t count) {
    std::vector<T> out(static_cast<size_t>(count));
    EXPECT_EQ(gpu_->driver().copy_to_host(out.data(), reinterpret_cast<cuda::CUdeviceptr>(device), out.size() * sizeof(T)),
              cuda::kSuccess);
    return out;
  }

  /// Every row of `view` is where its sequence says.
  void check_rows(const cuda::StepView& view) {
    const auto sequences = fetch(view.sequences, view.sequences_count);
    const auto tokens = fetch(view.tokens, view.rows), positions = fetch(view.positions, view.rows), slots = fetch(view.slots, view.rows);
    for (size_t s = 0; s < slices_.size(); ++s) {
      EXPECT_EQ(sequences[s].first_row, slices_[s].first_row);
      EXPECT_EQ(sequences[s].rows, slices_[s].rows);
      EXPECT_EQ(sequences[s].start_pos, slices_[s].start_pos);
      const auto table = fetch(view.block_tables + sequences[s].table_offset, static_cast<int32_t>(tables_[s].size()));
      EXPECT_EQ(table, tables_[s]);
      for (int32_t r = 0; r < slices_[s].rows; ++r) {
        const auto row = static_cast<size_t>(slices_[s].first_row + r);
        const int32_t position = slices_[s].start_pos + r;
        EXPECT_EQ(tokens[row], tokens_[row]);
        EXPECT_EQ(positions[row], position);
        EXPECT_EQ(slots[row], tables_[s][static_cast<size_t>(position / kBlockTokens)] * kBlockTokens + position % kBlockTokens);
      }
    }
  }

  std::shared_ptr<const cuda::Gpu> gpu_;
  std::unique_ptr<cuda::CurrentDevice> current_;
  cuda::CUstream stream_ = nullptr;
  StepBuffer buffer_;
  std::vector<std::vector<int32_t>> tables_;
  std::vector<SequenceSlice> slices_;
  std::vector<int32_t> tokens_, logit_rows_;
  std::vector<TokenChoice> choices_;
  std::vector<LogitEdit> edits_;
  int32_t next_block_ = 0;
};

TEST_F(StepBufferTest, MixedStep) {
  add(1, 40);
  add(130, 0);
  add(7, 25);
  add(1, 0);
  want({0, 130, 137, 138});
  const StepPlan plan = build(static_cast<int32_t>(tokens_.size()));
  check_rows(plan.step);
  EXPECT_TRUE(plan.decodes);
  EXPECT_FALSE(plan.keeps_all);
  // Tiles: three of the long prompt, one of the chunk; those that see most keys first.
  ASSERT_EQ(plan.tile_count, 4);
  const auto tiles = fetch(plan.tiles, 4);
  const std::vector<std::pair<int32_t, int32_t>> expected = {{1, 128}, {1, 64}, {2, 0}, {1, 0}};
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(std::pair(tiles[i].sequence, tiles[i].token_begin), expected[i]) << i;
  }
  // The rows with logits: sequences of one row, with the tables of those they came from.
  ASSERT_EQ(plan.kept.rows, 4);
  EXPECT_EQ(fetch(plan.kept_rows, 4), logit_rows_);
  const auto kept = fetch(plan.kept.sequences, 4);
  const auto sequences = fetch(plan.step.sequences, 4);
  const std::vector<int32_t> positions = {40, 129, 31, 0};
  for (int32_t i = 0; i < 4; ++i) {
    const auto at = static_cast<size_t>(i);
    EXPECT_EQ(kept[at].first_row, i);
    EXPECT_EQ(kept[at].rows, 1);
    EXPECT_EQ(kept[at].start_pos, positions[at]);
    EXPECT_EQ(kept[at].table_offset, sequences[at].table_offset);
    EXPECT_EQ(fetch(plan.kept_tiles, 4)[at].sequence, i);
  }
}

TEST_F(StepBufferTest, PaddedDecode) {
  for (int32_t i = 0; i < 5; ++i) add(1, 17 * i);
  want({0, 1, 2, 3, 4});
  const StepPlan plan = build(8);
  check_rows(plan.step);
  EXPECT_TRUE(plan.decodes);
  EXPECT_TRUE(plan.keeps_all);
  EXPECT_EQ(plan.tile_count, 0);
  EXPECT_EQ(plan.step.rows, 8);
  EXPECT_EQ(plan.step.sequences_count, 8);
  const auto slots = fetch(plan.step.slots, 8), tokens = fetch(plan.step.tokens, 8);
  const auto sequences = fetch(plan.step.sequences, 8);
  for (size_t i = 5; i < 8; ++i) {
    EXPECT_EQ(slots[i], -1);
    EXPECT_EQ(tokens[i], 0);
    EXPECT_EQ(sequences[i].rows, 0);
    EXPECT_EQ(sequences[i].first_row, static_cast<int32_t>(i));
  }
}

TEST_F(StepBufferTest, WaysToChoose) {
  for (int32_t i = 0; i < 3; ++i) add(1, i);
  want({0, 1, 2});
  edits_ = {{.token = 7, .bias = 2.5f}, {.token = 9, .repetition = 1.5f, .frequency = 0.25f, .presence = 1}};
  choices_ = {{}, {.greedy = false, .uniform = 0.625, .temperature = 0.5f, .top_p = 0.9f, .min_p = 0.125f, .top_k = 20, .edit_begin = 0, .edit_count = 2},
              {.greedy = false, .temperature = 2}};
  const StepPlan plan = build(4);
  const auto rows = fetch(plan.choices, 4);
  EXPECT_EQ(rows[0].greedy, 1);
  EXPECT_EQ(rows[1].greedy, 0);
  EXPECT_EQ(rows[1].uniform, 0.625);
  EXPECT_EQ(rows[1].scale, 2.0f);
  EXPECT_EQ(rows[1].top_p, 0.9f);
  EXPECT_EQ(rows[1].top_k, 20);
  EXPECT_FLOAT_EQ(rows[1].min_p_offset, 0.5f * std::log(0.125f));
  EXPECT_EQ(rows[1].edit_count, 2);
  EXPECT_EQ(rows[2].scale, 0.5f);
  EXPECT_TRUE(std::isinf(rows[2].min_p_offset));
  EXPECT_EQ(rows[3].greedy, 1) << "a row that fills the batch up";
  EXPECT_EQ(rows[3].edit_count, 0);
  const auto edits = fetch(plan.edits, 2);
  EXPECT_EQ(edits[0].token, 7);
  EXPECT_EQ(edits[0].bias, 2.5f);
  EXPECT_EQ(edits[1].repetition, 1.5f);
  EXPECT_EQ(edits[1].frequency, 0.25f);
  EXPECT_EQ(edits[1].presence, 1.0f);
}

TEST_F(StepBufferTest, EverySequenceInTilesWhereNoneMayDecode) {
  add(1, 40);
  add(3, 0);
  want({});
  const StepPlan plan = build(4, /*only_tiles=*/true);
  EXPECT_FALSE(plan.decodes);
  EXPECT_EQ(plan.tile_count, 2);
  EXPECT_EQ(plan.kept.rows, 0);
}

}  // namespace
}  // namespace baton
