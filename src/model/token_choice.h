#pragma once

#include <cstdint>

namespace baton {

/// A change of one logit before a token is chosen: l += bias; l = l > 0 ? l / repetition : l * repetition; l -= frequency;
/// l -= presence.
struct LogitEdit {
  int32_t token = 0;
  float bias = 0;         ///< -infinity: the token may not be chosen
  float repetition = 1;
  float frequency = 0;    ///< the frequency penalty times occurrences in the output
  float presence = 0;
};

/// How a row's token is chosen, for devices that do it themselves. What the numbers mean: SamplingParams (engine/request.h).
struct TokenChoice {
  bool greedy = true;     ///< the first of the most likely ones; only the edits matter besides
  double uniform = 0;     ///< in [0, 1): the draw
  float temperature = 1;
  float top_p = 1;
  float min_p = 0;
  int32_t top_k = 0;
  /// Of ForwardBatch::edits, [edit_begin, edit_begin + edit_count): each names a token once.
  int32_t edit_begin = 0;
  int32_t edit_count = 0;
};

inline constexpr int32_t kChosenNotFinite = -1;  ///< a NaN or +infinity among the logits
inline constexpr int32_t kChosenNone = -2;       ///< every token is masked

}  // namespace baton
