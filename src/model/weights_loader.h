#pragma once

#include <bit>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "model/architecture.h"
#include "model/model_config.h"
#include "model/weight_source.h"

namespace baton {

/// A projection: y = x W^T + bias. Several of a checkpoint may be stacked in one (q, k, v; gate, up).
template <class Vector, class Matrix>
struct LinearWeights {
  Matrix weight{};
  Vector bias{};  // [out_features] or empty
};

template <class Vector, class Matrix>
struct DecoderLayerWeights {
  Vector input_norm{};                           // [hidden]
  LinearWeights<Vector, Matrix> qkv{};           // [(heads + 2 * kv_heads) * head_dim, hidden]
  Vector q_norm{}, k_norm{};                     // [head_dim] or empty
  LinearWeights<Vector, Matrix> o{};             // [hidden, heads * head_dim]
  Vector post_attention_norm{};                  // [hidden]
  LinearWeights<Vector, Matrix> gate_up{};       // [2 * intermediate, hidden]
  LinearWeights<Vector, Matrix> down{};          // [hidden, intermediate]
};

/// All weights of a decoder as one device keeps them.
template <class Vector, class Matrix, class Table>
struct DecoderWeights {
  Table embed{};                                 // [vocab, hidden] bf16; empty when tied to lm_head
  std::vector<DecoderLayerWeights<Vector, Matrix>> layers;
  Vector final_norm{};                           // [hidden]
  Matrix lm_head{};                              // [vocab, hidden]
  int64_t bytes = 0;
};

/// Fetches the weights of a decoder in one fixed order and gives them to a device's Store, each tensor released before the
/// next. Store has:
///   Vector, Matrix, Table                                              how it keeps them
///   Result<Vector> vector(std::span<const float> values)
///   Result<Matrix> matrix(std::span<const Kernels::MatrixPart> parts, int64_t in_features)   parts stacked
///   Result<Table> table(const WeightView& view, int64_t rows, int64_t width)                 row-major, looked up
///   int64_t held_bytes()                                               so far
template <class Store>
class WeightsLoader {
 public:
  using Vector = typename Store::Vector;
  using Matrix = typename Store::Matrix;
  using Weights = DecoderWeights<Vector, Matrix, typename Store::Table>;

  /// `progress` may be empty; all must outlive load().
  WeightsLoader(const ModelConfig& config, const TensorNames& names, WeightSource& source, Store& store,
                const std::function<void(int64_t done_bytes, int64_t total_bytes)>& progress)
      : config_(config), names_(names), source_(source), store_(store), progress_(progress) {
    total_bytes_ = config.parameters() * static_cast<int64_t>(sizeof(bf16));
  }

  Result<Weights> load() {
    Weights weights;
    weights.layers.resize(static_cast<size_t>(config_.layers));
    for (int32_t l = 0; l < config_.layers; l++) {
      BATON_RETURN_IF_ERROR(layer(l, &weights.layers[static_cast<size_t>(l)]));
    }
    BATON_RETURN_IF_ERROR(vector(names_.final_norm, config_.hidden_size, kOnes, &weights.final_norm));
    if (!config_.tie_word_embeddings) BATON_RETURN_IF_ERROR(embedding(&weights));
    const std::string& head = config_.tie_word_embeddings ? names_.embed : names_.lm_head;
    BATON_RETURN_IF_ERROR(matrix({{head, config_.vocab_size}}, config_.hidden_size, 1.0f, &weights.lm_head));
    BATON_RETURN_IF_ERROR(source_.finish());
    weights.bytes = store_.held_bytes();
    return weights;
  }

 private:
  struct Part {
    std::string name;
    int64_t out_features;
  };
  static constexpr WeightInit kOnes{1.0f, 0.0f};

  void done(int64_t parameters) {
    source_.release();
    done_bytes_ += parameters * static_cast<int64_t>(sizeof(bf16));
    if (progress_) progress_(done_bytes_, total_bytes_);
  }

  /// Appended to `values` as float32, exactly.
  Status fetch_vector(const std::string& name, int64_t size, WeightInit init, std::vector<float>* values) {
    const int64_t shape[] = {size};
    BATON_ASSIGN_OR_RETURN(WeightView view, source_.fetch(name, shape, init));
    const auto* halves = static_cast<const uint16_t*>(view.data);
    for (int64_t i = 0; i < size; i++) {
      switch (view.dtype) {
        case DType::kBF16:
          values->push_back(std::bit_cast<float>(static_cast<uint32_t>(halves[i]) << 16));
          break;
        case DType::kF16:
          values->push_back(f16_to_float(halves[i]));
          break;
        default:
          values->push_back(static_cast<const float*>(view.data)[i]);
      }
    }
    done(size);
    return {};
  }

  Status vector(const std::string& name, int64_t size, WeightInit init, Vector* out) {
    std::vector<float> values;
    BATON_RETURN_IF_ERROR(fetch_vector(name, size, init, &values));
    BATON_ASSIGN_OR_RETURN(*out, store_.vector(values));
    return {};
  }

  Status matrix(const std::vector<Part>& tensors, int64_t in_features, float gain, Matrix* out) {
    // Generated weights keep the variance of what passes through them.
    const WeightInit init{0.0f, gain / std::sqrt(static_cast<float>(in_features))};
    std::vector<Kernels::MatrixPart> parts;
    int64_t out_features = 0;
    for (const Part& tensor : tensors) {
      const int64_t shape[] = {tensor.out_features, in_features};
      BATON_ASSIGN_OR_RETURN(WeightView view, source_.fetch(tensor.name, shape, init));
      parts.push_back({view.data, view.dtype, tensor.out_features});
      out_features += tensor.out_features;
    }
    auto stored = store_.matrix(parts, in_features);
    if (!stored.ok()) return stored.status().with_context(tensors[0].name);
    *out = std::move(stored).value();
    done(out_features * in_features);
    return {};
  }

  /// Stacks `parts` ("….q_proj") along out_features.
  Status linear(const std::vector<Part>& parts, int64_t in_features, float gain, bool bias,
                LinearWeights<Vector, Matrix>* out) {
    std::vector<Part> weights = parts;
    for (Part& part : weights) part.name += ".weight";
    BATON_RETURN_IF_ERROR(matrix(weights, in_features, gain, &out->weight));
    if (!bias) return {};
    std::vector<float> values;
    for (const Part& part : parts) {
      BATON_RETURN_IF_ERROR(fetch_vector(part.name + ".bias", part.out_features, {0.0f, 0.02f}, &values));
    }
    BATON_ASSIGN_OR_RETURN(out->bias, store_.vector(values));
    return {};
  }

  Status layer(int32_t index, DecoderLayerWeights<Vector, Matrix>* out) {
    const int64_t hidden = config_.hidden_size, inter = config_.intermediate_size;
    const int64_t q = int64_t{config_.heads} * config_.head_dim, kv = int64_t{config_.kv_heads} * config_.head_dim;
    // What is added to the residual stream is made smaller the more layers add to it.
    const float residual_gain = 1.0f / std::sqrt(2.0f * static_cast<float>(config_.layers));
    const auto name = [&](const std::string& pattern) { return fmt::format(fmt::runtime(pattern), index); };

    BATON_RETURN_IF_ERROR(vector(name(names_.input_norm), hidden, kOnes, &out->input_norm));
    BATON_RETURN_IF_ERROR(linear({{name(names_.q), q}, {name(names_.k), kv}, {name(names_.v), kv}}, hidden, 1.0f,
                                 config_.qkv_bias, &out->qkv));
    if (config_.qk_norm) {
      BATON_RETURN_IF_ERROR(vector(name(names_.q_norm), config_.head_dim, kOnes, &out->q_norm));
      BATON_RETURN_IF_ERROR(vector(name(names_.k_norm), config_.head_dim, kOnes, &out->k_norm));
    }
    BATON_RETURN_IF_ERROR(linear({{name(names_.o), hidden}}, q, residual_gain, config_.o_bias, &out->o));
    BATON_RETURN_IF_ERROR(vector(name(names_.post_attention_norm), hidden, kOnes, &out->post_attention_norm));
    BATON_RETURN_IF_ERROR(linear({{name(names_.gate), inter}, {name(names_.up), inter}}, hidden, 1.0f,
                                 config_.mlp_bias, &out->gate_up));
    return linear({{name(names_.down), hidden}}, inter, residual_gain, config_.mlp_bias, &out->down);
  }

  /// The table of untied embeddings stays row-major: rows are looked up, never multiplied.
  Status embedding(Weights* weights) {
    const int64_t vocab = config_.vocab_size, hidden = config_.hidden_size;
    const int64_t shape[] = {vocab, hidden};
    BATON_ASSIGN_OR_RETURN(WeightView view, source_.fetch(names_.embed, shape, {0.0f, 1.0f}));
    BATON_ASSIGN_OR_RETURN(weights->embed, store_.table(view, vocab, hidden));
    done(vocab * hidden);
    return {};
  }

  const ModelConfig& config_;
  const TensorNames& names_;
  WeightSource& source_;
  Store& store_;
  const std::function<void(int64_t, int64_t)>& progress_;
  int64_t done_bytes_ = 0;
  int64_t total_bytes_ = 0;
};

}  // namespace baton
