#pragma once

#include <string>
#include <string_view>

#include "model/config_reader.h"
#include "model/model_config.h"

namespace baton {

/// Bounds of what a config may ask for, well above any model that exists; they keep every size in int64.
inline constexpr int64_t kMaxPositions = int64_t{1} << 24;
inline constexpr int64_t kMaxHeads = 1024;
inline constexpr int64_t kMaxHeadDim = 1024;
inline constexpr int64_t kMaxLayers = 1024;

/// Names of a decoder's tensors in a checkpoint; "{}" stands for the layer. Empty: the architecture has none.
struct TensorNames {
  std::string embed = "model.embed_tokens.weight";
  std::string final_norm = "model.norm.weight";
  std::string lm_head = "lm_head.weight";
  std::string input_norm = "model.layers.{}.input_layernorm.weight";
  std::string post_attention_norm = "model.layers.{}.post_attention_layernorm.weight";
  /// Projections without ".weight" or ".bias".
  std::string q = "model.layers.{}.self_attn.q_proj";
  std::string k = "model.layers.{}.self_attn.k_proj";
  std::string v = "model.layers.{}.self_attn.v_proj";
  std::string o = "model.layers.{}.self_attn.o_proj";
  std::string gate = "model.layers.{}.mlp.gate_proj";
  std::string up = "model.layers.{}.mlp.up_proj";
  std::string down = "model.layers.{}.mlp.down_proj";
  std::string q_norm;
  std::string k_norm;
};

/// One dense, Llama-like decoder: RMSNorm, attention with RoPE and grouped heads, SwiGLU. What they share is in
/// transformer.h and in the common part of ModelConfig::parse; an architecture's file says how it differs.
struct Architecture {
  std::string_view name;        ///< as in config.json's "architectures"
  std::string_view model_type;  ///< as in its "model_type"
  /// Reads what is this architecture's own. The common sizes (layers, heads, hidden_size) are already set.
  void (*read_config)(ConfigReader& reader, ModelConfig* config);
  TensorNames (*tensor_names)();
};

extern const Architecture kLlama;
extern const Architecture kMistral;
extern const Architecture kQwen2;
extern const Architecture kQwen3;

// Pieces that several architectures read the same way.

/// num_key_value_heads; `fallback` when absent (0: it is required).
void read_kv_heads(ConfigReader& reader, int32_t fallback, ModelConfig* config);
/// head_dim, else hidden_size / heads.
void read_head_dim(ConfigReader& reader, ModelConfig* config);
/// use_sliding_window, sliding_window, max_window_layers as Qwen has them.
void read_qwen_sliding_window(ConfigReader& reader, ModelConfig* config);

}  // namespace baton
