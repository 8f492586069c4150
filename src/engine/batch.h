#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kv/block_pool.h"
#include "model/model.h"

namespace baton {

/// Collects the slices of one step into the arrays that a forward pass reads. Keeps its memory from step to step.
class Batch {
 public:
  void clear();
  /// Rows for tokens[start, start + rows) of a sequence. `table` must stay where it is until the pass is
  /// launched. With `wants_logits` the last row's logits are computed. Returns the index of its logits, or -1.
  int32_t add(std::span<const TokenId> tokens, int32_t start, int32_t rows, std::span<const BlockId> table,
              bool wants_logits);
  /// One row with logits, for the token that the step before chooses for its logit row `chosen_row`.
  int32_t add_chosen(int32_t chosen_row, int32_t start, std::span<const BlockId> table);

  int32_t rows() const { return static_cast<int32_t>(tokens_.size()); }
  int32_t logit_rows() const { return static_cast<int32_t>(logit_rows_.size()); }
  bool empty() const { return tokens_.empty(); }
  /// Views into this batch, valid until it changes. kv_pool and layer_done are the caller's to set.
  ForwardBatch view() const;

 private:
  std::vector<int32_t> tokens_;            // [rows]
  std::vector<SequenceSlice> sequences_;
  std::vector<int32_t> logit_rows_;
};

}  // namespace baton
