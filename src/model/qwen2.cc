// Qwen2 and Qwen2.5 (Yang et al. 2024): a Llama with bias on q, k and v only. Layers from max_window_layers on
// can have a sliding window; released models have it switched off.
#include "model/architecture.h"

namespace baton {
namespace {

void read_config(ConfigReader& reader, ModelConfig* config) {
  read_kv_heads(reader, /*fallback=*/0, config);
  read_head_dim(reader, config);
  read_qwen_sliding_window(reader, config);
  config->qkv_bias = true;
}

}  // namespace

const Architecture kQwen2{"Qwen2ForCausalLM", "qwen2", read_config, [] { return TensorNames{}; }};

}  // namespace baton
