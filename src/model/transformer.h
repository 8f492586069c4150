#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/architecture.h"
#include "model/model.h"
#include "model/rope.h"
#include "model/weight_source.h"
#include "model/weights_loader.h"
#include "tensor/buffer.h"

namespace baton {

using DecoderLayer = DecoderLayerWeights<std::vector<float>, std::unique_ptr<PackedMatrix>>;
using TransformerWeights = DecoderWeights<std::vector<float>, std::unique_ptr<PackedMatrix>, Buffer>;

/// Fetches and packs everything; each tensor is released before the next. Peak memory: the packed weights and one
/// matrix.
Result<TransformerWeights> load_transformer_weights(
    const ModelConfig& config, const TensorNames& names, WeightSource& source, Kernels& kernels,
    const std::function<void(int64_t done_bytes, int64_t total_bytes)>& progress);

/// invalid_argument: `batch` is not one that a model of this shape can compute. `chosen_rows`: how many tokens the step launched
/// before chooses, for chosen_before().
Status check_batch(const ModelConfig& config, int32_t max_model_len, const ForwardBatch& batch, const float* logits,
                   int32_t chosen_rows = 0);

/// The decoder that all our architectures are variants of. Pre-norm residual blocks:
///   x += o(attention(rope(norm(qkv(norm(x))))));  x += down(silu(gate(norm(x))) * up(norm(x)))
class Transformer final : public Model {
 public:
  /// `model_id` goes into layout(). `max_model_len` is at most what `rope` was made for.
  Transformer(ModelConfig config, TransformerWeights weights, RopeTables rope, Kernels& kernels,
              std::string model_id, int32_t max_model_len);

  const ModelConfig& config() const override { return config_; }
  BlockLayout layout(int32_t block_tokens) const override;
  int64_t weight_bytes() const override { return weights_.bytes; }
  int32_t max_model_len() const override { return max_model_len_; }
  Status forward(const ForwardBatch& batch, float* logits) override;
  Result<double> measure_read_bytes_per_s() override;
  double measure_piecewise_read_bytes_per_s(std::span<const std::span<const std::byte>> pieces) override;

 private:
  struct Workspace {
    Buffer x;        // [rows, hidden] float32: the residual stream
    Buffer normed;   // [rows, hidden] bf16
    Buffer qkv;      // [rows, (heads + 2 * kv_heads) * head_dim] float32
    Buffer q;        // [rows, heads * head_dim] bf16
    Buffer attended; // [rows, heads * head_dim] bf16
    Buffer gate_up;  // [mlp rows, 2 * intermediate] float32
    Buffer act;      // [mlp rows, intermediate] bf16
  };

  Status reserve(int64_t rows);
  void embed(const ForwardBatch& batch);
  void write_kv(const DecoderLayer& layer, const ForwardBatch& batch, const KvLayerView& kv);
  void attend(const DecoderLayer& layer, int32_t window, std::span<const SequenceSlice> sequences, int64_t rows,
              const KvLayerView& kv);
  void mlp(const DecoderLayer& layer, int64_t rows);
  void keep_logit_rows(const ForwardBatch& batch);

  ModelConfig config_;
  TransformerWeights weights_;
  RopeTables rope_;
  Kernels& kernels_;
  std::string model_id_;
  int32_t max_model_len_;
  Workspace work_;
  std::vector<SequenceSlice> kept_sequences_;
};

}  // namespace baton
