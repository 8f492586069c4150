#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "tensor/dtype.h"

namespace baton {

/// RoPE parameters from `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5).
struct RopeConfig {
  enum class Type { kDefault, kLinear, kLlama3, kYarn };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double factor = 1.0;
  // llama3
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_positions = 0;
  // yarn (Peng et al. 2023)
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  double attention_factor = 0.0;  ///< 0: derived from factor (and mscale)
  double mscale = 0.0;
  double mscale_all_dim = 0.0;
  bool truncate = true;
};

/// config.json of a Hugging Face model, checked: every size positive and bounded, heads divisible.
struct ModelConfig {
  std::string architecture;        ///< "Qwen3ForCausalLM"
  std::string model_type;          ///< "qwen3"
  int32_t vocab_size = 0;
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;
  int32_t layers = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t max_position_embeddings = 0;
  float rms_norm_eps = 1e-6f;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;            ///< RMSNorm over each head of q and k before RoPE
  int32_t sliding_window = 0;      ///< 0: none
  /// Which layers use the sliding window; empty: all of them (when sliding_window is set).
  std::vector<bool> sliding_layers;
  DType dtype = DType::kBF16;
  RopeConfig rope;
  int32_t bos_token_id = -1;
  /// From generation_config.json, else config.json.
  std::vector<int32_t> eos_token_ids;
  /// generation_config.json's sampling defaults; unset where it says nothing.
  std::optional<float> default_temperature, default_top_p, default_min_p, default_repetition_penalty;
  std::optional<int32_t> default_top_k;

  /// Reads config.json and, when there, generation_config.json of a model folder.
  static Result<ModelConfig> load(const std::filesystem::path& model_dir);
  /// `generation_config_json` may be empty. Errors name the file's kind and the field.
  static Result<ModelConfig> parse(std::string_view config_json, std::string_view generation_config_json);
  /// Weights in all, tied embeddings counted once.
  int64_t parameters() const;
  /// The window of one layer; 0: full attention.
  int32_t window_of(int32_t layer) const;
  /// Everything that changes what the model computes, in one line: part of the model's identity.
  std::string canonical() const;
};

}  // namespace baton
