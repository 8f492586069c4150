#pragma once

#include <cmath>
#include <limits>

#include "kernels/cuda/sample_arguments.h"
#include "model/token_choice.h"

namespace baton {

/// What the GPU's sampler takes.
inline cuda::SampleRow sample_row(const TokenChoice& choice) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  cuda::SampleRow row = {.uniform = 0, .scale = 1, .top_p = 1, .min_p_offset = kNone, .top_k = 0,
                         .greedy = choice.greedy ? 1 : 0, .edit_begin = choice.edit_begin, .edit_count = choice.edit_count};
  if (choice.greedy) return row;
  row.uniform = choice.uniform;
  row.scale = 1.0f / choice.temperature;
  row.top_p = choice.top_p;
  row.top_k = choice.top_k;
  if (choice.min_p > 0) row.min_p_offset = choice.temperature * std::log(choice.min_p);
  return row;
}

inline cuda::SampleEdit sample_edit(const LogitEdit& edit) {
  return {edit.token, edit.bias, edit.repetition, edit.frequency, edit.presence};
}

}  // namespace baton
