#include "model/model.h"

#include "model/checkpoint.h"
#include "model/model_files.h"
#include "model/registry.h"
#include "model/transformer.h"
#include "xxhash.h"

namespace baton {

Result<ModelFiles> ModelFiles::open(const ModelOptions& options, ThreadPool& threads) {
  ModelFiles files;
  BATON_ASSIGN_OR_RETURN(files.config, ModelConfig::load(options.path));
  BATON_ASSIGN_OR_RETURN(files.architecture, find_architecture(files.config.architecture));
  if (options.max_model_len < 0 || options.max_model_len > files.config.max_position_embeddings) {
    return invalid_argument("max_model_len is {}; {} has at most {} positions", options.max_model_len,
                            options.path.string(), files.config.max_position_embeddings);
  }
  files.max_model_len = options.max_model_len > 0 ? options.max_model_len : files.config.max_position_embeddings;
  if (options.load_format == "dummy") {
    files.source = make_dummy_weights(options.dummy_seed, threads);
  } else if (options.load_format == "auto") {
    BATON_ASSIGN_OR_RETURN(files.source, Checkpoint::open(options.path));
  } else {
    return invalid_argument("load format \"{}\" is not known; there are auto, dummy", options.load_format);
  }
  return files;
}

std::string ModelFiles::model_id() const {
  const std::string canonical = config.canonical();
  const uint64_t hash = XXH3_64bits_withSeed(canonical.data(), canonical.size(), source->identity());
  return fmt::format("{}-{:016x}", config.model_type, hash);
}

Result<std::unique_ptr<Model>> Model::load(const ModelOptions& options, Kernels& kernels) {
  BATON_ASSIGN_OR_RETURN(ModelFiles files, ModelFiles::open(options, kernels.threads()));
  const ModelConfig& config = files.config;
  Status shape = kernels.validate_attention_shape(config.heads, config.kv_heads, config.head_dim);
  if (!shape.ok()) return shape.with_context(options.path.string());
  BATON_ASSIGN_OR_RETURN(TransformerWeights weights,
                         load_transformer_weights(config, files.architecture->tensor_names(), *files.source, kernels,
                                                  options.progress));
  BATON_ASSIGN_OR_RETURN(RopeTables rope, RopeTables::create(config.rope, config.head_dim, files.max_model_len));
  std::string id = files.model_id();
  return std::unique_ptr<Model>(std::make_unique<Transformer>(std::move(files.config), std::move(weights), std::move(rope),
                                                              kernels, std::move(id), files.max_model_len));
}

}  // namespace baton
