#include "model/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/log.h"
#include "model/registry.h"

namespace baton {
namespace {

using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

const std::filesystem::path kSource = BATON_SOURCE_DIR;

json llama() {
  return json::parse(R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100,
      "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
      "max_position_embeddings": 512})");
}

json with(json object, const char* changes) {
  object.merge_patch(json::parse(changes));  // null removes
  return object;
}

json qwen2(const char* changes) {
  return with(with(llama(), R"({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                                "num_key_value_heads": 2})"), changes);
}

ModelConfig parsed(const json& object, std::string_view generation = "") {
  auto config = ModelConfig::parse(object.dump(), generation);
  EXPECT_TRUE(config.ok()) << config.status().to_string();
  return config.ok() ? *config : ModelConfig();
}

TEST(ModelConfig, ShapeOfQwen3) {
  auto config = ModelConfig::load(kSource / "models/shapes/Qwen3-0.6B");
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_TRUE(config->qk_norm);
  EXPECT_FALSE(config->qkv_bias);
  EXPECT_EQ(config->sliding_window, 0);
  EXPECT_EQ(config->parameters(), 596'049'920);  // as published: 0.6B, 0.44B without embeddings
  EXPECT_THAT(config->eos_token_ids, ElementsAre(151645));
}

TEST(ModelConfig, ShapeOfLlama) {
  auto config = ModelConfig::load(kSource / "models/shapes/Llama-3.1-8B");
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->parameters(), 8'030'261'248);  // as published
  EXPECT_EQ(config->rope.type, RopeConfig::Type::kLlama3);
  EXPECT_EQ(config->rope.original_max_positions, 8192);
}

TEST(ModelConfig, BothStylesOfRopeReadTheSame) {
  ModelConfig old_style = parsed(with(llama(), R"({"rope_theta": 500000.0, "torch_dtype": "float16",
      "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}})"));
  ModelConfig new_style = parsed(with(llama(), R"({"dtype": "float16", "rope_parameters": {"rope_theta": 500000.0,
      "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}})"));
  EXPECT_EQ(old_style.canonical(), new_style.canonical());
  EXPECT_EQ(new_style.rope.type, RopeConfig::Type::kYarn);
  EXPECT_EQ(new_style.rope.theta, 500000.0);
  EXPECT_EQ(old_style.dtype, DType::kF16);
  EXPECT_EQ(new_style.dtype, DType::kF16);
}

TEST(ModelConfig, YarnExtendsTheContext) {
  EXPECT_EQ(parsed(with(llama(), R"({"rope_scaling": {"type": "yarn", "factor": 4.0,
      "original_max_position_embeddings": 512}})")).max_position_embeddings, 2048);
}

TEST(ModelConfig, DefaultsAreThoseOfTransformers) {
  ModelConfig config = parsed(llama());
  EXPECT_EQ(config.kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.rms_norm_eps, 1e-6f);
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_EQ(config.rope.theta, 10000.0);
  EXPECT_EQ(config.bos_token_id, -1);
  EXPECT_THAT(config.eos_token_ids, IsEmpty());
  const char* mistral = R"({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2})";
  EXPECT_EQ(parsed(with(llama(), mistral)).sliding_window, 4096);
  json no_window = with(llama(), mistral);
  no_window["sliding_window"] = nullptr;
  EXPECT_EQ(parsed(no_window).sliding_window, 0);
}

TEST(ModelConfig, WindowsByLayer) {
  ModelConfig config = parsed(qwen2(R"({"use_sliding_window": true, "sliding_window": 32, "max_window_layers": 1})"));
  EXPECT_EQ(config.window_of(0), 0);
  EXPECT_EQ(config.window_of(1), 32);
  config = parsed(qwen2(R"({"use_sliding_window": true, "sliding_window": 32,
                            "layer_types": ["sliding_attention", "full_attention"]})"));
  EXPECT_EQ(config.window_of(0), 32);
  EXPECT_EQ(config.window_of(1), 0);
  config = parsed(qwen2(R"({"use_sliding_window": false, "sliding_window": 32, "max_window_layers": 0})"));
  EXPECT_EQ(config.window_of(1), 0);
  EXPECT_TRUE(config.qkv_bias);
  EXPECT_FALSE(config.o_bias);
}

TEST(ModelConfig, GenerationConfig) {
  ModelConfig config = parsed(with(llama(), R"({"eos_token_id": 5})"),
                              R"({"eos_token_id": [7, 9], "bos_token_id": 3, "temperature": 0.5, "top_p": 0.9,
                                  "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "do_sample": true})");
  EXPECT_THAT(config.eos_token_ids, ElementsAre(7, 9));
  EXPECT_EQ(config.bos_token_id, 3);
  EXPECT_EQ(config.default_temperature, 0.5f);
  EXPECT_EQ(config.default_top_p, 0.9f);
  EXPECT_EQ(config.default_top_k, 20);
  EXPECT_EQ(config.default_min_p, 0.1f);
  EXPECT_EQ(config.default_repetition_penalty, 1.1f);
  config = parsed(with(llama(), R"({"eos_token_id": 5})"), R"({"do_sample": false})");
  EXPECT_THAT(config.eos_token_ids, ElementsAre(5));
  EXPECT_EQ(config.default_temperature, 0.0f);
  EXPECT_FALSE(config.default_top_p.has_value());
}

TEST(ModelConfig, BiasesOfLlama) {
  ModelConfig config = parsed(with(llama(), R"({"attention_bias": true, "mlp_bias": true})"));
  EXPECT_TRUE(config.qkv_bias && config.o_bias && config.mlp_bias);
}

TEST(ModelConfig, UnknownFieldsAreTold) {
  std::vector<std::string> lines;
  set_log_sink([&](LogLevel, std::string_view line) { lines.emplace_back(line); });
  parsed(with(llama(), R"({"frobnicate": 1, "use_cache": true, "nothing": null})"));
  set_log_sink(nullptr);
  EXPECT_THAT(lines, ElementsAre(HasSubstr("frobnicate is not known")));
}

TEST(ModelConfig, UnknownArchitectureListsThoseThatExist) {
  auto config = ModelConfig::parse(with(llama(), R"({"architectures": ["GPT2LMHeadModel"]})").dump(), "");
  EXPECT_EQ(config.status().code(), StatusCode::kUnimplemented);
  EXPECT_THAT(config.status().message(), HasSubstr("\"GPT2LMHeadModel\" is not known"));
  for (const Architecture* architecture : architectures()) {
    EXPECT_THAT(config.status().message(), HasSubstr(std::string(architecture->name)));
  }
}

TEST(ModelConfig, NoFolderAndNoFile) {
  EXPECT_THAT(ModelConfig::load("/nonexistent/model").status().message(), HasSubstr("/nonexistent/model: no such folder"));
  EXPECT_THAT(ModelConfig::load(kSource / "models/shapes").status().message(), HasSubstr("config.json: cannot be opened"));
}

struct Broken {
  const char* changes;
  const char* message;
};

class BrokenConfig : public testing::TestWithParam<Broken> {};

TEST_P(BrokenConfig, IsRefusedWithTheField) {
  auto config = ModelConfig::parse(with(llama(), GetParam().changes).dump(), "");
  ASSERT_FALSE(config.ok());
  EXPECT_THAT(config.status().message(), testing::AllOf(HasSubstr("config.json"), HasSubstr(GetParam().message)));
}

INSTANTIATE_TEST_SUITE_P(
    Table, BrokenConfig,
    testing::Values(
        Broken{R"({"architectures": null})", "architectures is missing"},
        Broken{R"({"architectures": "LlamaForCausalLM"})", "architectures"},
        Broken{R"({"architectures": [1]})", "architectures"},
        Broken{R"({"model_type": "qwen3"})", "model_type is \"qwen3\", but LlamaForCausalLM is \"llama\""},
        Broken{R"({"vocab_size": null})", "vocab_size is missing"},
        Broken{R"({"vocab_size": 0})", "vocab_size is 0; it must be in [1, "},
        Broken{R"({"hidden_size": -64})", "hidden_size is -64"},
        Broken{R"({"hidden_size": 65.5})", "hidden_size is 65.5; it must be an integer"},
        Broken{R"({"hidden_size": "64"})", "hidden_size is \"64\""},
        Broken{R"({"hidden_size": 1e300})", "hidden_size is 1e+300"},
        Broken{R"({"hidden_size": 18446744073709551615})", "hidden_size"},
        Broken{R"({"num_hidden_layers": 100000})", "num_hidden_layers is 100000"},
        Broken{R"({"hidden_size": 66})", "hidden_size (66) must be a multiple of num_attention_heads (4)"},
        Broken{R"({"head_dim": 15})", "head_dim is 15; it must be even"},
        Broken{R"({"num_key_value_heads": 3})", "must be a multiple of num_key_value_heads (3)"},
        Broken{R"({"rms_norm_eps": -1})", "rms_norm_eps"},
        Broken{R"({"tie_word_embeddings": "yes"})", "tie_word_embeddings"},
        Broken{R"({"hidden_act": "gelu"})", "hidden_act \"gelu\" is not supported"},
        Broken{R"({"torch_dtype": "int8"})", "dtype \"int8\" is not supported"},
        Broken{R"({"eos_token_id": 100})", "eos_token_id is 100; it must be in [0, 99]"},
        Broken{R"({"eos_token_id": [1, -2]})", "eos_token_id is -2"},
        Broken{R"({"rope_theta": 0})", "rope_theta is 0"},
        Broken{R"({"rope_scaling": [1]})", "rope_scaling is [1]; it must be an object"},
        Broken{R"({"rope_scaling": {"type": "dynamic", "factor": 2}})", "rope_type \"dynamic\" is not supported; there are"},
        Broken{R"({"rope_scaling": {"type": "linear"}})", "rope_scaling: factor is missing"},
        Broken{R"({"rope_scaling": {"type": "linear", "factor": 0}})", "rope_scaling: factor is 0"},
        Broken{R"({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}})",
               "high_freq_factor (4) must be above low_freq_factor (4)"},
        Broken{R"({"rope_parameters": {"full_attention": {"rope_type": "default"}}})", "differs by layer type"},
        Broken{R"({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}})", "mrope_section is not supported"},
        Broken{R"({"partial_rotary_factor": 0.5})", "partial_rotary_factor"},
        Broken{R"({"quantization_config": {"quant_method": "awq"}})", "quantization_config"},
        Broken{R"({"num_local_experts": 8})", "mixture-of-experts"},
        Broken{R"({"sliding_window": 128})", "sliding_window is 128"},
        Broken{R"({"use_sliding_window": true})", "use_sliding_window"},
        Broken{R"({"layer_types": ["full_attention"]})", "layer_types has 1 items for 2 layers"},
        Broken{R"({"layer_types": ["full_attention", "linear_attention"]})", "layer type \"linear_attention\""},
        Broken{R"({"layer_types": ["full_attention", "sliding_attention"]})", "no sliding_window is in use"}));

TEST(ModelConfig, NoJson) {
  for (const char* text : {"", "{", "[]", "1", "\xff", "{\"a\": 1e}", "nul"}) {
    auto config = ModelConfig::parse(text, "");
    ASSERT_FALSE(config.ok()) << text;
    EXPECT_THAT(config.status().message(), HasSubstr("config.json")) << text;
  }
  EXPECT_THAT(ModelConfig::parse(llama().dump(), "{").status().message(), HasSubstr("generation_config.json"));
  EXPECT_THAT(ModelConfig::parse(llama().dump(), R"({"top_p": 2})").status().message(),
              HasSubstr("generation_config.json: top_p is 2"));
}

TEST(ModelConfig, DeepNestingIsHarmless) {
  std::string text = "{\"a\":" + std::string(100'000, '[');
  EXPECT_FALSE(ModelConfig::parse(text, "").ok());
  text += std::string(100'000, ']') + "}";
  EXPECT_FALSE(ModelConfig::parse(text, "").ok());
}

}  // namespace
}  // namespace baton
