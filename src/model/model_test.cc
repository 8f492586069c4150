// Loading: what the golden tests do not reach. Numbers are in golden_test.cc.
#include "model/model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <numeric>

namespace baton {
namespace {

using testing::HasSubstr;

const std::filesystem::path kGolden = std::filesystem::path(BATON_SOURCE_DIR) / "tests/golden/models";

class ModelLoad : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "baton-model-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    auto kernels = make_cpu_kernels("plain", 2);
    ASSERT_TRUE(kernels.ok());
    kernels_ = std::move(kernels).value();
  }
  void TearDown() override {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  void copy(const std::string& model) {
    for (const auto& entry : std::filesystem::directory_iterator(kGolden / model)) {
      std::filesystem::copy_file(entry.path(), folder_ / entry.path().filename(),
                                 std::filesystem::copy_options::overwrite_existing);
    }
  }
  void replace_in_config(const std::string& from, const std::string& to) {
    std::ifstream in(folder_ / "config.json");
    std::string text((std::istreambuf_iterator<char>(in)), {});
    size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    std::ofstream(folder_ / "config.json") << text.replace(at, from.size(), to);
  }

  Result<std::unique_ptr<Model>> load(const std::string& format = "auto", uint64_t seed = 0, int32_t max_len = 0) {
    ModelOptions options;
    options.path = folder_;
    options.load_format = format;
    options.dummy_seed = seed;
    options.max_model_len = max_len;
    options.progress = [&](int64_t done, int64_t total) {
      EXPECT_GT(done, done_);
      EXPECT_LE(done, total);
      done_ = done;
      total_ = total;
    };
    done_ = total_ = 0;
    return Model::load(options, *kernels_);
  }
  std::string message() { return load().status().message(); }

  std::vector<float> logits(Model& model) {
    std::vector<int32_t> tokens{3, 1, 4, 1, 5, 9, 2, 6}, rows{7}, table{0};
    std::vector<SequenceSlice> slices{{0, 8, 0, table.data()}};
    auto pool = Buffer::allocate(static_cast<size_t>(model.layout(16).block_bytes()));
    ForwardBatch batch{tokens, slices, rows, pool->data(), 16, {}, {}, {}, {}};
    std::vector<float> logits(static_cast<size_t>(model.config().vocab_size));
    EXPECT_TRUE(model.forward(batch, logits.data()).ok());
    return logits;
  }

  std::filesystem::path folder_;
  std::unique_ptr<Kernels> kernels_;
  int64_t done_ = 0, total_ = 0;
};

TEST_F(ModelLoad, ProgressEndsAtTheTotal) {
  for (const char* name : {"qwen3", "llama-yarn", "mistral"}) {
    copy(name);
    auto model = load();
    ASSERT_TRUE(model.ok()) << model.status().to_string();
    EXPECT_EQ(done_, total_) << "parameters() counts what is loaded";
    EXPECT_EQ(total_, 2 * (*model)->config().parameters());
    EXPECT_GE((*model)->weight_bytes(), total_);
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directory(folder_);
  }
}

TEST_F(ModelLoad, ConfigAndWeightsMustAgree) {
  copy("llama3");
  replace_in_config("\"intermediate_size\": 128", "\"intermediate_size\": 130");
  EXPECT_THAT(message(), HasSubstr("model.safetensors: tensor \"model.layers.0.mlp.gate_proj.weight\" has shape "
                                   "[128, 64]; the config asks for [130, 64]"));
  copy("llama3");
  replace_in_config("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
  EXPECT_THAT(message(), HasSubstr("tensor \"model.layers.2.input_layernorm.weight\" is missing"));
  replace_in_config("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 1");
  EXPECT_THAT(message(), HasSubstr("tensor \"model.layers.1.input_layernorm.weight\" has no place in the model"));
  copy("llama3");
  replace_in_config("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
  EXPECT_TRUE(load().ok()) << "a copy of tied embeddings may be there";
  copy("llama3");
  replace_in_config("\"attention_bias\": false", "\"attention_bias\": true");
  EXPECT_THAT(message(), HasSubstr("self_attn.q_proj.bias\" is missing"));
  copy("llama-yarn");
  replace_in_config("\"mlp_bias\": true", "\"mlp_bias\": false");
  EXPECT_THAT(message(), HasSubstr("mlp.down_proj.bias\" has no place in the model"));
}

TEST_F(ModelLoad, OptionsAreChecked) {
  copy("llama3");
  EXPECT_THAT(load("pickle").status().message(), HasSubstr("load format \"pickle\" is not known; there are auto, dummy"));
  EXPECT_THAT(load("auto", 0, 131073).status().message(), HasSubstr("max_model_len is 131073"));
  replace_in_config("\"hidden_size\": 64", "\"hidden_size\": 64, \"head_dim\": 12");
  EXPECT_THAT(message(), HasSubstr("head_dim 12"));
  copy("llama3");
  EXPECT_THAT(load("auto", 0, -1).status().message(), HasSubstr("max_model_len is -1"));
  auto model = load("auto", 0, 100);
  ASSERT_TRUE(model.ok());
  EXPECT_EQ((*model)->max_model_len(), 100);
}

TEST_F(ModelLoad, DummyNeedsOnlyTheConfig) {
  copy("qwen2");
  std::filesystem::remove(folder_ / "model.safetensors");
  auto one = load("dummy", 7), again = load("dummy", 7), other = load("dummy", 8);
  ASSERT_TRUE(one.ok() && again.ok() && other.ok());
  EXPECT_EQ(done_, total_);
  std::vector<float> values = logits(**one);
  EXPECT_EQ(values, logits(**again));
  EXPECT_NE(values, logits(**other));
  double square = std::inner_product(values.begin(), values.end(), values.begin(), 0.0) / static_cast<double>(values.size());
  EXPECT_GT(square, 0.1) << "logits are neither nothing";
  EXPECT_LT(square, 10.0) << "nor blown up";
  EXPECT_EQ((*one)->layout(16).fingerprint(), (*again)->layout(16).fingerprint());
  EXPECT_NE((*one)->layout(16).fingerprint(), (*other)->layout(16).fingerprint());
}

TEST_F(ModelLoad, LayoutNamesTheWeights) {
  copy("qwen2");
  auto here = load();
  ASSERT_TRUE(here.ok());
  ModelOptions options;
  options.path = kGolden / "qwen2";
  auto there = Model::load(options, *kernels_);
  ASSERT_TRUE(there.ok());
  BlockLayout layout = (*here)->layout(16);
  EXPECT_TRUE(layout.validate().ok()) << layout.validate().to_string();
  EXPECT_EQ(layout.fingerprint(), (*there)->layout(16).fingerprint()) << "the path does not matter";
  EXPECT_EQ(layout.block_bytes(), 2 * 2 * 2 * 16 * 16 * 2);
  EXPECT_NE(layout.model_id, (*load("dummy"))->layout(16).model_id);
  // The same weights with another RoPE make another cache.
  replace_in_config("1000000.0", "2000000.0");
  EXPECT_NE(layout.model_id, (*load())->layout(16).model_id);
}

}  // namespace
}  // namespace baton
