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
#include "model/token_choice.h"
#include "tensor/memory.h"

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
  std::span<const int32_t> tokens;            // [rows], each in [0, vocab_size), or chosen_before() in Model::launch()
  std::span<const SequenceSlice> sequences;
  std::span<const int32_t> logit_rows;        // rows whose logits are wanted, ascending
  /// The KV pool: block b at pool + b * layout(block_tokens).block_bytes().
  std::byte* kv_pool = nullptr;
  int32_t block_tokens = 16;
  /// Runs as soon as a layer's KV of the whole batch is written, or will be, before that layer's attention, so that a push
  /// overlaps with the rest of the layer. `ready` empty: it is written and final. Else its get() is a CUevent that is
  /// reached when it is; whoever waits for it keeps it. On forward's thread; may be empty.
  std::function<void(int32_t layer, const std::shared_ptr<void>& ready)> layer_done;
  /// [logit_rows] or empty. Not empty: instead of logits the model writes the token that it chose for every row as `choices`
  /// [logit_rows] say, or kChosenNotFinite or kChosenNone. Only when it can_choose() with so many edits.
  std::span<int32_t> chosen;
  std::span<const TokenChoice> choices;
  std::span<const LogitEdit> edits;
};

/// As a token of a batch: the one that the step launched before chooses for its logit row `logit_row`.
constexpr int32_t chosen_before(int32_t logit_row) { return -1 - logit_row; }

/// The largest batch that will come, for models that plan their memory once.
struct BatchLimits {
  int64_t rows = 0;
  int64_t sequences = 0;
  int64_t sequence_tokens = 0;  ///< of one sequence, prompt and output
  int32_t block_tokens = 16;
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
  /// logits [logit_rows.size(), vocab_size] float32, the caller's host memory (best of allocate_logits()). Workspace grows with
  /// the largest batch.
  virtual Status forward(const ForwardBatch& batch, float* logits) = 0;
  virtual bool can_choose(size_t /*edits*/) const { return false; }

  /// forward() in two parts: a step is launched, and finish() waits for the oldest one that has not been. A failed launch() leaves
  /// nothing under way of that step. What results go into (logits, chosen) must stay until finish(); the rest of the batch is read
  /// by launch() alone. A model that runs ahead takes a second step while the first one is under way: they are computed one after
  /// the other, and where the first one chooses its tokens the second one may have chosen_before() among its own, also one that
  /// turns out to be kChosenNone or kChosenNotFinite (what is computed from it means nothing).
  virtual bool runs_ahead() const { return false; }
  virtual Status launch(const ForwardBatch& batch, float* logits) { return forward(batch, logits); }
  virtual Status finish() { return {}; }
  /// False while more than an eighth of the newest step is still to come. A step of decoding does not say: true.
  virtual bool mostly_done() const { return true; }
  /// For people: "cuda/sm_90 (NVIDIA H200)"; empty on the CPU, whose kernels have a name of their own.
  virtual std::string device_name() const { return {}; }
  /// How fast its device reads memory, measured now (under a second): what bounds decoding.
  virtual Result<double> measure_read_bytes_per_s() = 0;
  /// The same of pieces of its memory that lie apart; 0: it is the same.
  virtual double measure_piecewise_read_bytes_per_s(std::span<const std::span<const std::byte>>) { return 0; }
  /// Rows a step should have at most, where nothing else is said.
  virtual int32_t usual_batched_tokens() const { return 512; }

  /// Takes what batches up to `limits` need, so that no later one fails for want of memory. Optional.
  virtual Status prepare(const BatchLimits&) { return {}; }
  /// What is left for the KV pool after prepare(); 0: the model doesn't say.
  virtual int64_t spare_kv_bytes() const { return 0; }
  /// Memory for ForwardBatch::kv_pool, where the model computes.
  virtual Result<std::unique_ptr<Memory>> allocate_kv(size_t bytes) { return allocate_host_memory("baton-kv", bytes); }
  virtual Result<std::unique_ptr<Memory>> allocate_logits(size_t bytes) { return allocate_host_memory("baton-logits", bytes); }
};

}  // namespace baton
