// config.json and generation_config.json, separated by a NUL: what is accepted has sizes that fit together and a
// RoPE that can be computed.
#include <cmath>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "base/log.h"
#include "model/model_config.h"
#include "model/rope.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  baton::set_log_level(baton::LogLevel::kError);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view text(reinterpret_cast<const char*>(data), size);
  size_t split = text.find('\0');
  std::string_view generation = split == std::string_view::npos ? std::string_view() : text.substr(split + 1);
  auto config = baton::ModelConfig::parse(text.substr(0, split), generation);
  if (!config.ok()) {
    BATON_CHECK(!config.status().message().empty());
    return 0;
  }
  BATON_CHECK(config->layers > 0 && config->heads > 0 && config->kv_heads > 0 && config->head_dim > 0);
  BATON_CHECK(config->heads % config->kv_heads == 0 && config->head_dim % 2 == 0);
  BATON_CHECK(config->parameters() > 0);
  for (int32_t layer = 0; layer < config->layers; layer++) BATON_CHECK(config->window_of(layer) >= 0);
  for (double frequency : baton::rope_frequencies(config->rope, config->head_dim).inverse_frequencies) {
    BATON_CHECK(std::isfinite(frequency) && frequency >= 0) << config->canonical();
  }
  return 0;
}
