#include "model/model.h"

#include "model/checkpoint.h"
#include "model/registry.h"
#include "model/transformer.h"
#include "xxhash.h"

namespace baton {
namespace {

Result<std::unique_ptr<WeightSource>> open_weights(const ModelOptions& options, Kernels& kernels) {
  if (options.load_format == "dummy") return make_dummy_weights(options.dummy_seed, kernels.threads());
  if (options.load_format != "auto") {
    return invalid_argument("load format \"{}\" is not known; there are auto, dummy", options.load_format);
  }
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<WeightSource> checkpoint, Checkpoint::open(options.path));
  return checkpoint;
}

/// The same for the same weights wherever they lie and however they are sharded, so that a pair of workers with
/// different weights is refused.
std::string model_id(const ModelConfig& config, const WeightSource& source) {
  const std::string canonical = config.canonical();
  const uint64_t hash = XXH3_64bits_withSeed(canonical.data(), canonical.size(), source.identity());
  return fmt::format("{}-{:016x}", config.model_type, hash);
}

}  // namespace

Result<std::unique_ptr<Model>> Model::load(const ModelOptions& options, Kernels& kernels) {
  BATON_ASSIGN_OR_RETURN(ModelConfig config, ModelConfig::load(options.path));
  BATON_ASSIGN_OR_RETURN(const Architecture* architecture, find_architecture(config.architecture));
  if (options.max_model_len < 0 || options.max_model_len > config.max_position_embeddings) {
    return invalid_argument("max_model_len is {}; {} has at most {} positions", options.max_model_len,
                            options.path.string(), config.max_position_embeddings);
  }
  Status shape = kernels.validate_attention_shape(config.heads, config.kv_heads, config.head_dim);
  if (!shape.ok()) return shape.with_context(options.path.string());
  const int32_t max_model_len = options.max_model_len > 0 ? options.max_model_len : config.max_position_embeddings;
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<WeightSource> source, open_weights(options, kernels));
  BATON_ASSIGN_OR_RETURN(TransformerWeights weights,
                         load_transformer_weights(config, architecture->tensor_names(), *source, kernels,
                                                  options.progress));
  BATON_ASSIGN_OR_RETURN(RopeTables rope, RopeTables::create(config.rope, config.head_dim, max_model_len));
  std::string id = model_id(config, *source);
  return std::unique_ptr<Model>(std::make_unique<Transformer>(std::move(config), std::move(weights), std::move(rope),
                                                              kernels, std::move(id), max_model_len));
}

}  // namespace baton
