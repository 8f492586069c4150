// Llama 2, 3, 3.1, 3.2, 3.3 (Touvron et al. 2023; Grattafiori et al. 2024): the plain form all others differ from.
// The RoPE scaling of 3.1 and later ("llama3") is in rope.cc.
#include "model/architecture.h"

namespace baton {
namespace {

void read_config(ConfigReader& reader, ModelConfig* config) {
  read_kv_heads(reader, /*fallback=*/config->heads, config);
  read_head_dim(reader, config);
  // One switch for q, k, v and o, as in transformers; few fine-tunes set it.
  config->qkv_bias = config->o_bias = reader.optional_bool("attention_bias", false);
  config->mlp_bias = reader.optional_bool("mlp_bias", false);
  reader.refuse("sliding_window", "a Llama has none; is this a Mistral?");
  reader.ignore({"pretraining_tp"});
}

}  // namespace

const Architecture kLlama{"LlamaForCausalLM", "llama", read_config, [] { return TensorNames{}; }};

}  // namespace baton
