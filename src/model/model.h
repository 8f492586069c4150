#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "kernels/kernels.h"
#include "kv/block_layout.h"
#include "model/model_config.h"

namespace baton {

struct ModelOptions {
  /// A folder in Hugging Face format; only config.json is needed with load_format "dummy".
  std::filesystem::path path;
  /// "auto" (safetensors) or "dummy": real shapes filled with seeded random weights.
  std::string load_format = "auto";
  uint64_t dummy_seed = 0;
  /// Bounds RoPE tables and requests; 0: config's max_position_embeddings.
  int32_t max_model_len = 0;
  /// Called from the loading thread with bytes done and in all; may be empty.
  std::function<void(int64_t done_bytes, int64_t total_bytes)> progress;
};

/// One forward pass over a mixed batch of prefill chunks and decode rows. Row r belongs to the
/// sequence slice that covers it; slices are in row order without gaps.
struct ForwardBatch {
  std::span<const int32_t> tokens;            // [rows], each in [0, vocab_size)
  std::span<const SequenceSlice> sequences;
  std::span<const int32_t> logit_rows;        // rows whose logits are wanted, ascending
  /// The KV pool: block b at pool + b * layout(block_tokens).block_bytes().
  std::byte* kv_pool = nullptr;
  int32_t block_tokens = 16;
  /// Runs as soon as a layer's KV of the whole batch is written and final, before that layer's attention, so
  /// that a push overlaps with the rest of the layer. On forward's thread; may be empty.
  std::function<void(int32_t layer)> layer_done;
};

/// A transformer with its weights on one device. One thread (the engine's) runs it.
class Model {
 public:
  /// Errors name file and tensor. `kernels` must outlive the model.
  static Result<std::unique_ptr<Model>> load(const ModelOptions& options, Kernels& kernels);
  virtual ~Model() = default;

  virtual const ModelConfig& config() const = 0;
  virtual BlockLayout layout(int32_t block_tokens) const = 0;
  /// Bytes of weights held in memory, packed.
  virtual int64_t weight_bytes() const = 0;
  /// Positions at or above this are refused: max_model_len of the options, else the config's.
  virtual int32_t max_model_len() const { return config().max_position_embeddings; }
  /// logits [logit_rows.size(), vocab_size] float32, caller's memory. Workspace grows with the largest batch.
  virtual Status forward(const ForwardBatch& batch, float* logits) = 0;
};

}  // namespace baton
