#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "model/model.h"

namespace baton::testing {

/// A Model without arithmetic, for tests of what surrounds one: its "KV" is the token ids themselves. Every
/// token is written, with its position and layer, into its slot of the KV pool; logits are a hash of the
/// history *read back through the block table*, in every layer. A wrong block, a missing transfer, a slot
/// that was overwritten or reused: all give other tokens than the right ones. Equal histories give equal
/// logits in any batch. Cheap: rows * positions * layers loads and `vocab_size` hashes per row of logits.
class FakeModel : public Model {
 public:
  struct Options {
    int32_t vocab_size = 128;
    int32_t layers = 2;
    int32_t kv_heads = 2;
    int32_t max_model_len = 4096;
    std::vector<int32_t> eos_token_ids = {1};
    uint64_t seed = 1;                  ///< of the "weights"
    std::string model_id = "fake";
  };

  FakeModel() : FakeModel(Options()) {}
  explicit FakeModel(Options options) : options_(std::move(options)) {
    config_.architecture = "FakeForCausalLM";
    config_.model_type = "fake";
    config_.vocab_size = options_.vocab_size;
    config_.hidden_size = 8;
    config_.intermediate_size = 8;
    config_.layers = options_.layers;
    config_.heads = options_.kv_heads;
    config_.kv_heads = options_.kv_heads;
    config_.head_dim = kHeadDim;
    config_.max_position_embeddings = options_.max_model_len;
    config_.eos_token_ids = options_.eos_token_ids;
  }

  const ModelConfig& config() const override { return config_; }
  BlockLayout layout(int32_t block_tokens) const override {
    return {.model_id = options_.model_id, .layers = options_.layers, .kv_heads = options_.kv_heads,
            .head_dim = kHeadDim, .block_tokens = block_tokens, .dtype = "bf16", .element_bytes = 2};
  }
  int64_t weight_bytes() const override { return 0; }
  int32_t max_model_len() const override { return options_.max_model_len; }

  Result<double> measure_read_bytes_per_s() override { return unimplemented("a fake model reads nothing"); }
  Status forward(const ForwardBatch& batch, float* logits) override {
    ++forwards;
    rows += static_cast<int64_t>(batch.tokens.size());
    largest_batch = std::max(largest_batch, static_cast<int64_t>(batch.tokens.size()));
    if (!fail_next.ok()) return std::exchange(fail_next, Status());
    const BlockLayout layout = this->layout(batch.block_tokens);
    BATON_CHECK(batch.kv_pool != nullptr);
    check_shape(batch);
    for (int32_t layer = 0; layer < options_.layers; ++layer) {
      for (const SequenceSlice& slice : batch.sequences) {
        for (int32_t i = 0; i < slice.rows; ++i) {
          const int32_t token = batch.tokens[static_cast<size_t>(slice.first_row + i)];
          BATON_CHECK(token >= 0 && token < options_.vocab_size) << token;
          for (int32_t head = 0; head < options_.kv_heads; ++head) {
            Slot slot{token, slice.start_pos + i, mark(layer, head)};
            write(layout, batch, slice, layer, head, slice.start_pos + i, slot);
          }
        }
      }
      if (batch.layer_done) batch.layer_done(layer, nullptr);
    }
    if (before_logits) before_logits();
    size_t out = 0;
    for (int32_t row : batch.logit_rows) {
      fill_logits(history(layout, batch, slice_of(batch, row), row),
                  logits + static_cast<ptrdiff_t>(out++) * options_.vocab_size);
    }
    return {};
  }

  /// Logits after `tokens`, without a pool: the oracle.
  std::vector<float> logits_after(std::span<const int32_t> tokens) const {
    uint64_t hash = options_.seed;
    for (size_t position = 0; position < tokens.size(); ++position) {
      for (int32_t layer = 0; layer < options_.layers; ++layer) {
        for (int32_t head = 0; head < options_.kv_heads; ++head) {
          hash = extend(hash, Slot{tokens[position], static_cast<int32_t>(position), mark(layer, head)});
        }
      }
    }
    std::vector<float> logits(static_cast<size_t>(options_.vocab_size));
    fill_logits(hash, logits.data());
    return logits;
  }

  Status fail_next;         ///< returned, once, by the next forward()
  std::function<void()> before_logits;  ///< inside forward(), when every layer is done: what others do meanwhile
  int64_t forwards = 0;
  int64_t rows = 0;
  int64_t largest_batch = 0;

 private:
  static constexpr int32_t kHeadDim = 4;  // 8 bytes of bf16: K holds token and position, V the mark

  struct Slot {
    int32_t token;
    int32_t position;
    uint64_t mark;
  };

  uint64_t mark(int32_t layer, int32_t head) const {
    return mix_bits(options_.seed, static_cast<uint64_t>(layer) << 32 | static_cast<uint32_t>(head));
  }
  static uint64_t extend(uint64_t hash, const Slot& slot) {
    return mix_bits(hash ^ slot.mark, static_cast<uint64_t>(slot.token) << 32 | static_cast<uint32_t>(slot.position));
  }

  static void check_shape(const ForwardBatch& batch) {
    int32_t row = 0;
    for (const SequenceSlice& slice : batch.sequences) {
      BATON_CHECK(slice.first_row == row && slice.rows > 0 && slice.start_pos >= 0) << "slices in row order";
      row += slice.rows;
    }
    BATON_CHECK(static_cast<size_t>(row) == batch.tokens.size()) << row;
    for (size_t i = 0; i < batch.logit_rows.size(); ++i) {
      BATON_CHECK(batch.logit_rows[i] < row && (i == 0 || batch.logit_rows[i] > batch.logit_rows[i - 1]));
    }
  }
  static const SequenceSlice& slice_of(const ForwardBatch& batch, int32_t row) {
    for (const SequenceSlice& slice : batch.sequences) {
      if (row >= slice.first_row && row < slice.first_row + slice.rows) return slice;
    }
    BATON_CHECK(false) << "row " << row << " is in no slice";
    __builtin_unreachable();
  }

  /// Where K of a slot is; V is one plane further. 8 bytes each.
  static std::byte* address(const BlockLayout& layout, const ForwardBatch& batch, const SequenceSlice& slice,
                            int32_t layer, int32_t head, int32_t position) {
    const int64_t block = slice.block_table[position / layout.block_tokens];
    BATON_CHECK(block >= 0) << "block " << block;
    return batch.kv_pool + block * layout.block_bytes() + layout.layer_offset_bytes(layer) +
           (int64_t{head} * layout.block_tokens + position % layout.block_tokens) * kHeadDim * layout.element_bytes;
  }
  static void write(const BlockLayout& layout, const ForwardBatch& batch, const SequenceSlice& slice, int32_t layer,
                    int32_t head, int32_t position, const Slot& slot) {
    std::byte* k = address(layout, batch, slice, layer, head, position);
    std::memcpy(k, &slot, 8);
    std::memcpy(k + layout.plane_bytes(), &slot.mark, 8);
  }
  uint64_t history(const BlockLayout& layout, const ForwardBatch& batch, const SequenceSlice& slice,
                   int32_t row) const {
    uint64_t hash = options_.seed;
    const int32_t end = slice.start_pos + row - slice.first_row + 1;
    for (int32_t position = 0; position < end; ++position) {
      for (int32_t layer = 0; layer < options_.layers; ++layer) {
        for (int32_t head = 0; head < options_.kv_heads; ++head) {
          const std::byte* k = address(layout, batch, slice, layer, head, position);
          Slot slot;
          std::memcpy(&slot, k, 8);
          std::memcpy(&slot.mark, k + layout.plane_bytes(), 8);
          hash = extend(hash, slot);
        }
      }
    }
    return hash;
  }
  /// Peaked like a language model's: most logits from -8 to 0, a few up to 4.
  void fill_logits(uint64_t hash, float* logits) const {
    for (int32_t token = 0; token < options_.vocab_size; ++token) {
      const uint64_t bits = mix_bits(hash, static_cast<uint64_t>(token));
      const float unit = static_cast<float>(bits >> 40) * 0x1p-24f;
      logits[token] = (bits & 15) == 0 ? unit * 4.0f : unit * 8.0f - 8.0f;
    }
  }

  Options options_;
  ModelConfig config_;
};

}  // namespace baton::testing
