#pragma once

#include <memory>
#include <string>

#include "model/architecture.h"
#include "model/model.h"
#include "model/weight_source.h"

namespace baton {

/// A model's folder, opened and checked: what every device's load() begins with.
struct ModelFiles {
  ModelConfig config;
  const Architecture* architecture = nullptr;
  std::unique_ptr<WeightSource> source;
  int32_t max_model_len = 0;

  /// `threads` must outlive the files. Errors name file and field.
  static Result<ModelFiles> open(const ModelOptions& options, ThreadPool& threads);

  /// The same for the same weights wherever they lie and however they are sharded, so that a pair of workers with
  /// different weights is refused. After everything was fetched.
  std::string model_id() const;
};

}  // namespace baton
