#pragma once

#include <cstdint>

/// What the host and the sampling kernel have to agree on. Read by nvcc, too.
namespace baton::cuda {

/// How one row's token is chosen; an element of a device array.
struct SampleRow {
  double uniform;        ///< in [0, 1): the draw
  float scale;           ///< 1 / temperature
  float top_p;           ///< 1: all
  float min_p_offset;    ///< temperature * log(min_p): logits below the maximum plus this are left out; -infinity: none
  int32_t top_k;         ///< 0: all; ties of the k-th are kept
  int32_t greedy;        ///< not 0: the first maximum, and nothing else of this matters but the edits
  int32_t edit_begin;    ///< edits [edit_begin, edit_begin + edit_count) are of this row
  int32_t edit_count;
};

/// A change of one logit: l += bias; l = l > 0 ? l / repetition : l * repetition; l -= frequency; l -= presence. A row names a
/// token once at most.
struct SampleEdit {
  int32_t token;
  float bias;            ///< -infinity: the token may not be chosen
  float repetition;      ///< 1: none
  float frequency;       ///< frequency penalty times occurrences
  float presence;
};

inline constexpr int32_t kSampleNotFinite = -1;  ///< a NaN or +infinity among the logits
inline constexpr int32_t kSampleNoToken = -2;    ///< all are -infinity

struct SampleArguments {
  float* logits;         // [rows, vocab]
  const SampleRow* rows;
  const SampleEdit* edits;
  int32_t* tokens;
  int64_t vocab;
  float unit;            // a weight of 1 as an integer, a power of two: sums over a vocabulary stay below 2^62
};

inline constexpr int32_t kSampleThreads = 512;
inline constexpr int32_t kSampleBins = 256;
inline constexpr int32_t kSampleSharedBytes = kSampleBins * 32 * 8;  // a histogram for each lane
inline constexpr int32_t kTeamBlocks = 8;                            // that share a row on Hopper and newer

}  // namespace baton::cuda
