// Qwen3, dense (Yang et al. 2025): no bias, but RMSNorm over each head of q and k before RoPE, and a head_dim of
// its own (128 in every release), so that heads * head_dim need not be hidden_size.
#include "model/architecture.h"

namespace baton {
namespace {

void read_config(ConfigReader& reader, ModelConfig* config) {
  read_kv_heads(reader, /*fallback=*/0, config);
  constexpr int64_t kDefaultHeadDim = 128;
  config->head_dim = static_cast<int32_t>(reader.optional_int("head_dim", kDefaultHeadDim, 1, kMaxHeadDim));
  read_qwen_sliding_window(reader, config);
  config->qkv_bias = config->o_bias = reader.optional_bool("attention_bias", false);
  config->qk_norm = true;
}

TensorNames tensor_names() {
  TensorNames names;
  names.q_norm = "model.layers.{}.self_attn.q_norm.weight";
  names.k_norm = "model.layers.{}.self_attn.k_norm.weight";
  return names;
}

}  // namespace

const Architecture kQwen3{"Qwen3ForCausalLM", "qwen3", read_config, tensor_names};

}  // namespace baton
