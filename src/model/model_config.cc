#include "model/model_config.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/log.h"
#include "model/config_reader.h"
#include "model/registry.h"

namespace baton {

using nlohmann::json;

namespace {

constexpr int64_t kMaxVocab = int64_t{1} << 22;
constexpr int64_t kMaxHidden = int64_t{1} << 16;
constexpr int64_t kMaxIntermediate = int64_t{1} << 20;
constexpr size_t kMaxConfigBytes = size_t{4} << 20;
constexpr size_t kMaxEosTokens = 64;

/// What a config may hold that changes the model in a way we do not have.
struct RefusedField {
  const char* key;
  const char* why;
};
constexpr RefusedField kRefused[] = {
    {"quantization_config", "quantized checkpoints are not supported; use a bf16, f16 or f32 one"},
    {"compression_config", "compressed checkpoints are not supported; use a bf16, f16 or f32 one"},
    {"num_experts", "mixture-of-experts models are not supported"},
    {"num_local_experts", "mixture-of-experts models are not supported"},
    {"n_routed_experts", "mixture-of-experts models are not supported"},
    {"text_config", "multimodal models are not supported"},
    {"vision_config", "multimodal models are not supported"},
    {"is_encoder_decoder", "only decoders are supported"},
    {"add_cross_attention", "only decoders are supported"},
    {"attn_logit_softcapping", "logit soft-capping is not supported"},
    {"final_logit_softcapping", "logit soft-capping is not supported"},
    {"alibi", "ALiBi is not supported"},
    {"use_mrope", "multimodal RoPE is not supported"},
    {"attention_sink_size", "attention sinks are not supported"},
    {"clip_qkv", "clipping of q, k and v is not supported"},
    // Set by the architectures that have them; reading them there comes first.
    {"attention_bias", "this architecture has no such bias here"},
    {"mlp_bias", "this architecture has no such bias here"},
    {"sliding_window", "this architecture has no sliding window here"},
    {"use_sliding_window", "this architecture has no sliding window here"},
};

RopeConfig::Type parse_rope_type(const std::string& name, ConfigReader& reader) {
  if (name == "default") return RopeConfig::Type::kDefault;
  if (name == "linear") return RopeConfig::Type::kLinear;
  if (name == "llama3") return RopeConfig::Type::kLlama3;
  if (name == "yarn") return RopeConfig::Type::kYarn;
  reader.fail(unimplemented("rope_type \"{}\" is not supported; there are default, linear, llama3, yarn",
                            name.substr(0, 40)));
  return RopeConfig::Type::kDefault;
}

/// transformers 5 writes `rope_parameters` with rope_theta inside; 4 wrote `rope_theta` and `rope_scaling`.
Status read_rope(ConfigReader& config_reader, ModelConfig* config) {
  constexpr double kMaxTheta = 1e15;
  RopeConfig& rope = config->rope;
  rope.theta = config_reader.optional_number("rope_theta", 10000.0, 1.0, kMaxTheta);
  if (config_reader.optional_number("partial_rotary_factor", 1.0, 0.0, 1.0) != 1.0) {
    config_reader.fail(unimplemented("partial_rotary_factor: RoPE over a part of the head is not supported"));
  }
  const json* scaling = config_reader.optional_object("rope_scaling");
  const json* parameters = config_reader.optional_object("rope_parameters");
  if (parameters == nullptr) parameters = scaling;
  if (parameters == nullptr || !config_reader.status().ok()) return config_reader.status();

  ConfigReader reader(*parameters, config_reader.context() + (parameters == scaling ? ": rope_scaling"
                                                                                     : ": rope_parameters"));
  for (const char* layer_type : {"full_attention", "sliding_attention"}) {
    if (reader.has(layer_type)) reader.fail(unimplemented("RoPE that differs by layer type is not supported"));
  }
  rope.theta = reader.optional_number("rope_theta", rope.theta, 1.0, kMaxTheta);
  // "type" is the name of before 2024; where both stand they agree or "rope_type" is meant.
  std::string old_name = reader.optional_string("type", "default");
  rope.type = parse_rope_type(reader.optional_string("rope_type", old_name), reader);
  if (reader.optional_number("partial_rotary_factor", 1.0, 0.0, 1.0) != 1.0) {
    reader.fail(unimplemented("partial_rotary_factor: RoPE over a part of the head is not supported"));
  }
  if (rope.type != RopeConfig::Type::kDefault) {
    if (!reader.has("factor")) reader.fail(invalid_argument("factor is missing"));
    rope.factor = reader.optional_number("factor", 1.0, 1.0, 65536.0);
    rope.original_max_positions = reader.optional_int("original_max_position_embeddings",
                                                      config->max_position_embeddings, 1, kMaxPositions);
  }
  if (rope.type == RopeConfig::Type::kLlama3) {
    rope.low_freq_factor = reader.optional_number("low_freq_factor", 1.0, 1e-3, 1e6);
    rope.high_freq_factor = reader.optional_number("high_freq_factor", 4.0, 1e-3, 1e6);
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      reader.fail(invalid_argument("high_freq_factor ({}) must be above low_freq_factor ({})",
                                   rope.high_freq_factor, rope.low_freq_factor));
    }
  }
  if (rope.type == RopeConfig::Type::kYarn) {
    rope.beta_fast = reader.optional_number("beta_fast", 32.0, 1e-3, 1e6);
    rope.beta_slow = reader.optional_number("beta_slow", 1.0, 1e-3, 1e6);
    rope.attention_factor = reader.optional_number("attention_factor", 0.0, 0.0, 1e3);
    rope.mscale = reader.optional_number("mscale", 0.0, 0.0, 1e3);
    rope.mscale_all_dim = reader.optional_number("mscale_all_dim", 0.0, 0.0, 1e3);
    rope.truncate = reader.optional_bool("truncate", true);
    if (rope.theta <= 1.0) reader.fail(invalid_argument("rope_theta must be above 1 for yarn"));
    // Configs that switch yarn on often leave max_position_embeddings as it was in training.
    double extended = static_cast<double>(rope.original_max_positions) * rope.factor;
    config->max_position_embeddings =
        std::max(config->max_position_embeddings,
                 static_cast<int32_t>(std::min(extended, static_cast<double>(kMaxPositions))));
  }
  // Fields of other types that do nothing here are left by tools; anything else would change the angles.
  reader.ignore({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
                 "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
                 "finetuned"});
  for (const std::string& key : reader.unread_keys()) {
    reader.fail(unimplemented("{} is not supported", key.substr(0, 60)));
  }
  return reader.status();
}

/// layer_types (transformers 4.53 and later) says for each layer what sliding_window implies elsewhere.
void read_layer_types(ConfigReader& reader, ModelConfig* config) {
  std::vector<std::string> types = reader.optional_strings("layer_types", kMaxLayers);
  if (types.empty()) return;
  if (types.size() != static_cast<size_t>(config->layers)) {
    reader.fail(invalid_argument("layer_types has {} items for {} layers", types.size(), config->layers));
    return;
  }
  std::vector<bool> sliding;
  for (const std::string& type : types) {
    if (type != "full_attention" && type != "sliding_attention") {
      reader.fail(unimplemented("layer type \"{}\" is not supported; there are full_attention, sliding_attention",
                                type.substr(0, 40)));
      return;
    }
    sliding.push_back(type == "sliding_attention");
  }
  bool any = std::find(sliding.begin(), sliding.end(), true) != sliding.end();
  if (any && config->sliding_window == 0) {
    reader.fail(invalid_argument("layer_types has sliding_attention, but no sliding_window is in use"));
  }
  if (!any) config->sliding_window = 0;
  config->sliding_layers = any ? std::move(sliding) : std::vector<bool>();
}

Status read_config(const json& object, ModelConfig* config) {
  ConfigReader reader(object, "config.json");
  std::vector<std::string> names = reader.optional_strings("architectures", 16);
  if (names.empty()) reader.fail(invalid_argument("architectures is missing or empty"));
  BATON_RETURN_IF_ERROR(reader.status());
  auto found = find_architecture(names[0]);
  if (!found.ok()) return found.status().with_context("config.json");
  const Architecture& architecture = **found;
  config->architecture = architecture.name;
  config->model_type = reader.optional_string("model_type", architecture.model_type);
  if (config->model_type != architecture.model_type) {
    reader.fail(invalid_argument("model_type is \"{}\", but {} is \"{}\"", config->model_type.substr(0, 40),
                                 architecture.name, architecture.model_type));
  }

  auto required = [&](const char* key, int64_t max) {
    return static_cast<int32_t>(reader.required_int(key, 1, max));
  };
  config->vocab_size = required("vocab_size", kMaxVocab);
  config->hidden_size = required("hidden_size", kMaxHidden);
  config->intermediate_size = required("intermediate_size", kMaxIntermediate);
  config->layers = required("num_hidden_layers", kMaxLayers);
  config->heads = required("num_attention_heads", kMaxHeads);
  config->max_position_embeddings = required("max_position_embeddings", kMaxPositions);
  config->rms_norm_eps = static_cast<float>(reader.optional_number("rms_norm_eps", 1e-6, 0.0, 0.1));
  config->tie_word_embeddings = reader.optional_bool("tie_word_embeddings", false);
  std::string activation = reader.optional_string("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    reader.fail(unimplemented("hidden_act \"{}\" is not supported; there is silu", activation.substr(0, 40)));
  }
  std::string dtype = reader.optional_string("dtype", reader.optional_string("torch_dtype", "bfloat16"));
  auto parsed_dtype = parse_dtype(dtype);
  if (!parsed_dtype || *parsed_dtype == DType::kI32) {
    reader.fail(unimplemented("dtype \"{}\" is not supported; there are bfloat16, float16, float32",
                              dtype.substr(0, 40)));
  } else {
    config->dtype = *parsed_dtype;
  }
  BATON_RETURN_IF_ERROR(reader.status());
  BATON_RETURN_IF_ERROR(read_rope(reader, config));
  architecture.read_config(reader, config);
  BATON_RETURN_IF_ERROR(reader.status());
  read_layer_types(reader, config);

  config->bos_token_id = static_cast<int32_t>(reader.optional_int("bos_token_id", -1, 0, config->vocab_size - 1));
  for (int64_t id : reader.int_or_list("eos_token_id", 0, config->vocab_size - 1, kMaxEosTokens)) {
    config->eos_token_ids.push_back(static_cast<int32_t>(id));
  }
  for (const RefusedField& field : kRefused) {
    auto unread = reader.unread_keys();
    if (std::find(unread.begin(), unread.end(), field.key) != unread.end()) reader.refuse(field.key, field.why);
  }
  BATON_RETURN_IF_ERROR(reader.status());

  auto even = [&](const char* what, int64_t value) {
    if (value % 2 != 0) reader.fail(unimplemented("{} is {}; it must be even", what, value));
  };
  even("hidden_size", config->hidden_size);
  even("intermediate_size", config->intermediate_size);
  even("head_dim", config->head_dim);
  if (config->heads % config->kv_heads != 0) {
    reader.fail(invalid_argument("num_attention_heads ({}) must be a multiple of num_key_value_heads ({})",
                                 config->heads, config->kv_heads));
  }
  reader.ignore({"transformers_version", "use_cache", "initializer_range", "attention_dropout", "pad_token_id",
                 "_name_or_path", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
                 "id2label", "label2id", "problem_type", "torchscript", "use_bfloat16", "unsloth_version",
                 "hidden_dropout", "embd_pdrop", "resid_pdrop", "unsloth_fixed", "max_window_layers", "_attn_implementation"});
  for (const std::string& key : reader.unread_keys()) {
    log_warning("config.json: {} is not known and has no effect", key.substr(0, 60));
  }
  return reader.status();
}

Status read_generation_config(const json& object, ModelConfig* config) {
  ConfigReader reader(object, "generation_config.json");
  std::vector<int64_t> eos = reader.int_or_list("eos_token_id", 0, config->vocab_size - 1, kMaxEosTokens);
  if (!eos.empty()) config->eos_token_ids.assign(eos.begin(), eos.end());
  if (config->bos_token_id < 0) {
    config->bos_token_id =
        static_cast<int32_t>(reader.optional_int("bos_token_id", -1, 0, config->vocab_size - 1));
  }
  auto number = [&](const char* key, double min, double max, std::optional<float>* field) {
    if (reader.has(key)) *field = static_cast<float>(reader.optional_number(key, min, min, max));
  };
  number("temperature", 0.0, 100.0, &config->default_temperature);
  number("top_p", 0.0, 1.0, &config->default_top_p);
  number("min_p", 0.0, 1.0, &config->default_min_p);
  number("repetition_penalty", 1e-3, 1e3, &config->default_repetition_penalty);
  if (reader.has("top_k")) {
    config->default_top_k = static_cast<int32_t>(reader.optional_int("top_k", 0, 0, kMaxVocab));
  }
  // "do_sample": false asks for the most likely token, whatever the other fields say.
  if (!reader.optional_bool("do_sample", true)) config->default_temperature = 0.0f;
  return reader.status();
}

Result<std::string> read_small_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return not_found("{}: cannot be opened", path.string());
  std::string text(kMaxConfigBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(std::max<std::streamsize>(file.gcount(), 0)));
  if (file.bad()) return unavailable("{}: cannot be read", path.string());
  if (text.size() > kMaxConfigBytes) {
    return invalid_argument("{}: is larger than {} bytes", path.string(), kMaxConfigBytes);
  }
  return text;
}

}  // namespace

void read_kv_heads(ConfigReader& reader, int32_t fallback, ModelConfig* config) {
  config->kv_heads = static_cast<int32_t>(
      fallback > 0 ? reader.optional_int("num_key_value_heads", fallback, 1, kMaxHeads)
                   : reader.required_int("num_key_value_heads", 1, kMaxHeads));
}

void read_head_dim(ConfigReader& reader, ModelConfig* config) {
  if (!reader.has("head_dim") && config->hidden_size % config->heads != 0) {
    reader.fail(invalid_argument("hidden_size ({}) must be a multiple of num_attention_heads ({}) without head_dim",
                                 config->hidden_size, config->heads));
    return;
  }
  config->head_dim = static_cast<int32_t>(
      reader.optional_int("head_dim", config->hidden_size / config->heads, 1, kMaxHeadDim));
  // The fallback was not checked by the reader.
  if (config->head_dim > kMaxHeadDim) {
    reader.fail(invalid_argument("hidden_size / num_attention_heads is {}; at most {}", config->head_dim,
                                 kMaxHeadDim));
  }
}

void read_qwen_sliding_window(ConfigReader& reader, ModelConfig* config) {
  bool use = reader.optional_bool("use_sliding_window", false);
  int64_t window = reader.optional_int("sliding_window", use ? 4096 : 0, 1, kMaxPositions);
  int64_t full_layers = reader.optional_int("max_window_layers", 28, 0, kMaxPositions);
  if (!use) return;
  config->sliding_window = static_cast<int32_t>(window);
  if (reader.has("layer_types")) return;  // says the same, layer by layer
  for (int32_t layer = 0; layer < config->layers; layer++) config->sliding_layers.push_back(layer >= full_layers);
  if (full_layers >= config->layers) {
    config->sliding_window = 0;
    config->sliding_layers.clear();
  }
}

Result<ModelConfig> ModelConfig::parse(std::string_view config_json, std::string_view generation_config_json) {
  ModelConfig config;
  json object;
  BATON_RETURN_IF_ERROR(parse_json_object(config_json, "config.json", &object));
  BATON_RETURN_IF_ERROR(read_config(object, &config));
  if (!generation_config_json.empty()) {
    BATON_RETURN_IF_ERROR(parse_json_object(generation_config_json, "generation_config.json", &object));
    BATON_RETURN_IF_ERROR(read_generation_config(object, &config));
  }
  return config;
}

Result<ModelConfig> ModelConfig::load(const std::filesystem::path& model_dir) {
  std::error_code error;
  if (!std::filesystem::is_directory(model_dir, error)) {
    return not_found("{}: no such folder; a model is a folder in Hugging Face format", model_dir.string());
  }
  BATON_ASSIGN_OR_RETURN(std::string config_json, read_small_file(model_dir / "config.json"));
  std::string generation_json;
  if (std::filesystem::exists(model_dir / "generation_config.json", error)) {
    BATON_ASSIGN_OR_RETURN(generation_json, read_small_file(model_dir / "generation_config.json"));
  }
  auto config = parse(config_json, generation_json);
  if (!config.ok()) return config.status().with_context(model_dir.string());
  return config;
}

int64_t ModelConfig::parameters() const {
  const int64_t hidden = hidden_size, inter = intermediate_size;
  const int64_t q = int64_t{heads} * head_dim, kv = int64_t{kv_heads} * head_dim;
  int64_t layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * inter + 2 * hidden;
  if (qkv_bias) layer += q + 2 * kv;
  if (o_bias) layer += hidden;
  if (mlp_bias) layer += 2 * inter + hidden;
  if (qk_norm) layer += 2 * head_dim;
  int64_t embeddings = int64_t{vocab_size} * hidden * (tie_word_embeddings ? 1 : 2);
  return embeddings + layers * layer + hidden;
}

int32_t ModelConfig::window_of(int32_t layer) const {
  if (sliding_layers.empty()) return sliding_window;
  return sliding_layers[static_cast<size_t>(layer)] ? sliding_window : 0;
}

std::string ModelConfig::canonical() const {
  std::string sliding;
  for (bool layer : sliding_layers) sliding += layer ? '1' : '0';
  return fmt::format(
      "{} vocab={} hidden={} inter={} layers={} heads={} kv_heads={} head_dim={} eps={} tied={} qkv_bias={} o_bias={} "
      "mlp_bias={} qk_norm={} window={}:{} rope={},{},{},{},{},{},{},{},{},{},{},{}",
      architecture, vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads, head_dim, rms_norm_eps,
      tie_word_embeddings, qkv_bias, o_bias, mlp_bias, qk_norm, sliding_window, sliding,
      static_cast<int>(rope.type), rope.theta, rope.factor, rope.low_freq_factor, rope.high_freq_factor,
      rope.original_max_positions, rope.beta_fast, rope.beta_slow, rope.attention_factor, rope.mscale,
      rope.mscale_all_dim, rope.truncate);
}

}  // namespace baton
