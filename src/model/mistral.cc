// Mistral 7B (Jiang et al. 2023), v0.1 to v0.3, Nemo and their kin: a Llama whose layers may all attend to a
// sliding window, and whose head_dim need not be hidden_size / heads.
#include "model/architecture.h"

namespace baton {
namespace {

void read_config(ConfigReader& reader, ModelConfig* config) {
  read_kv_heads(reader, /*fallback=*/0, config);
  read_head_dim(reader, config);
  // v0.1 has 4096, later ones null: no window. Absent means v0.1's, as in transformers.
  const int64_t fallback = reader.has_key("sliding_window") ? 0 : 4096;
  config->sliding_window = static_cast<int32_t>(
      reader.optional_int("sliding_window", fallback, 1, kMaxPositions));
  reader.refuse("attention_bias", "Mistral's projections have no bias");
}

}  // namespace

const Architecture kMistral{"MistralForCausalLM", "mistral", read_config, [] { return TensorNames{}; }};

}  // namespace baton
