#include <bit>
#include <cmath>
#include <cstring>

#include "model/transformer.h"

namespace baton {
namespace {

/// "model.layers.{}.mlp" and 3 -> "model.layers.3.mlp"
std::string layer_name(const std::string& pattern, int32_t layer) {
  return fmt::format(fmt::runtime(pattern), layer);
}

/// Converts to float32, exactly.
std::vector<float> to_float(const WeightView& view, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  const auto* halves = static_cast<const uint16_t*>(view.data);
  for (size_t i = 0; i < values.size(); i++) {
    switch (view.dtype) {
      case DType::kBF16:
        values[i] = std::bit_cast<float>(static_cast<uint32_t>(halves[i]) << 16);
        break;
      case DType::kF16:
        values[i] = f16_to_float(halves[i]);
        break;
      default:
        values[i] = static_cast<const float*>(view.data)[i];
    }
  }
  return values;
}

class Loader {
 public:
  Loader(const ModelConfig& config, const TensorNames& names, WeightSource& source, Kernels& kernels,
         const std::function<void(int64_t, int64_t)>& progress)
      : config_(config), names_(names), source_(source), kernels_(kernels), progress_(progress) {
    total_bytes_ = config.parameters() * static_cast<int64_t>(sizeof(bf16));
  }

  Result<TransformerWeights> load();

 private:
  struct Part {
    std::string name;
    int64_t out_features;
  };

  Status vector(const std::string& name, int64_t size, WeightInit init, std::vector<float>* out);
  /// Stacks `parts` ("….q_proj") along out_features.
  Status linear(const std::vector<Part>& parts, int64_t in_features, float gain, bool bias, Linear* out);
  Status matrix(const std::vector<Part>& tensors, int64_t in_features, float gain, std::unique_ptr<PackedMatrix>* out);
  Status layer(int32_t index, DecoderLayer* out);
  Status embedding(TransformerWeights* weights);
  void done(int64_t parameters);

  const ModelConfig& config_;
  const TensorNames& names_;
  WeightSource& source_;
  Kernels& kernels_;
  const std::function<void(int64_t, int64_t)>& progress_;
  int64_t held_bytes_ = 0;
  int64_t done_bytes_ = 0;
  int64_t total_bytes_ = 0;
};

void Loader::done(int64_t parameters) {
  source_.release();
  done_bytes_ += parameters * static_cast<int64_t>(sizeof(bf16));
  if (progress_) progress_(done_bytes_, total_bytes_);
}

Status Loader::vector(const std::string& name, int64_t size, WeightInit init, std::vector<float>* out) {
  const int64_t shape[] = {size};
  BATON_ASSIGN_OR_RETURN(WeightView view, source_.fetch(name, shape, init));
  *out = to_float(view, size);
  held_bytes_ += size * static_cast<int64_t>(sizeof(float));
  done(size);
  return {};
}

Status Loader::matrix(const std::vector<Part>& tensors, int64_t in_features, float gain,
                      std::unique_ptr<PackedMatrix>* out) {
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
  auto packed = kernels_.pack(parts, in_features);
  if (!packed.ok()) return packed.status().with_context(tensors[0].name);
  *out = std::move(packed).value();
  held_bytes_ += static_cast<int64_t>((*out)->bytes());
  done(out_features * in_features);
  return {};
}

Status Loader::linear(const std::vector<Part>& parts, int64_t in_features, float gain, bool bias, Linear* out) {
  std::vector<Part> weights = parts;
  for (Part& part : weights) part.name += ".weight";
  BATON_RETURN_IF_ERROR(matrix(weights, in_features, gain, &out->weight));
  if (!bias) return {};
  for (const Part& part : parts) {
    std::vector<float> values;
    BATON_RETURN_IF_ERROR(vector(part.name + ".bias", part.out_features, {0.0f, 0.02f}, &values));
    out->bias.insert(out->bias.end(), values.begin(), values.end());
  }
  return {};
}

Status Loader::layer(int32_t index, DecoderLayer* out) {
  const int64_t hidden = config_.hidden_size, inter = config_.intermediate_size;
  const int64_t q = int64_t{config_.heads} * config_.head_dim, kv = int64_t{config_.kv_heads} * config_.head_dim;
  // What is added to the residual stream is made smaller the more layers add to it.
  const float residual_gain = 1.0f / std::sqrt(2.0f * static_cast<float>(config_.layers));
  auto name = [&](const std::string& pattern) { return layer_name(pattern, index); };
  constexpr WeightInit kOnes{1.0f, 0.0f};

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
Status Loader::embedding(TransformerWeights* weights) {
  const int64_t vocab = config_.vocab_size, hidden = config_.hidden_size;
  const int64_t shape[] = {vocab, hidden};
  BATON_ASSIGN_OR_RETURN(WeightView view, source_.fetch(names_.embed, shape, {0.0f, 1.0f}));
  BATON_ASSIGN_OR_RETURN(weights->embed, Buffer::allocate(static_cast<size_t>(vocab * hidden) * sizeof(bf16)));
  auto* table = weights->embed.as<bf16>();
  kernels_.threads().parallel_for(vocab, 256, [&](int64_t begin, int64_t end, int) {
    const size_t first = static_cast<size_t>(begin * hidden), last = static_cast<size_t>(end * hidden);
    if (view.dtype == DType::kBF16) {
      std::memcpy(table + first, static_cast<const bf16*>(view.data) + first, (last - first) * sizeof(bf16));
    } else if (view.dtype == DType::kF16) {
      const auto* halves = static_cast<const uint16_t*>(view.data);
      for (size_t i = first; i < last; i++) table[i] = bf16(f16_to_float(halves[i]));
    } else {
      const auto* floats = static_cast<const float*>(view.data);
      for (size_t i = first; i < last; i++) table[i] = bf16(floats[i]);
    }
  });
  held_bytes_ += static_cast<int64_t>(weights->embed.bytes());
  done(vocab * hidden);
  return {};
}

Result<TransformerWeights> Loader::load() {
  TransformerWeights weights;
  weights.layers.resize(static_cast<size_t>(config_.layers));
  for (int32_t l = 0; l < config_.layers; l++) {
    BATON_RETURN_IF_ERROR(layer(l, &weights.layers[static_cast<size_t>(l)]));
  }
  BATON_RETURN_IF_ERROR(vector(names_.final_norm, config_.hidden_size, {1.0f, 0.0f}, &weights.final_norm));
  if (!config_.tie_word_embeddings) BATON_RETURN_IF_ERROR(embedding(&weights));
  const std::string& head = config_.tie_word_embeddings ? names_.embed : names_.lm_head;
  BATON_RETURN_IF_ERROR(matrix({{head, config_.vocab_size}}, config_.hidden_size, 1.0f, &weights.lm_head));
  BATON_RETURN_IF_ERROR(source_.finish());
  weights.bytes = held_bytes_;
  return weights;
}

}  // namespace

Result<TransformerWeights> load_transformer_weights(
    const ModelConfig& config, const TensorNames& names, WeightSource& source, Kernels& kernels,
    const std::function<void(int64_t done_bytes, int64_t total_bytes)>& progress) {
  return Loader(config, names, source, kernels, progress).load();
}

}  // namespace baton
