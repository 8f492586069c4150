#include "engine/batch.h"

#include "base/check.h"

namespace baton {

void Batch::clear() {
  tokens_.clear();
  sequences_.clear();
  logit_rows_.clear();
}

int32_t Batch::add(std::span<const TokenId> tokens, int32_t start, int32_t rows, std::span<const BlockId> table,
                   bool wants_logits) {
  BATON_CHECK(start >= 0 && rows > 0 && static_cast<size_t>(start) + static_cast<size_t>(rows) <= tokens.size())
      << start << " + " << rows << " of " << tokens.size() << " tokens";
  SequenceSlice slice;
  slice.first_row = this->rows();
  slice.rows = rows;
  slice.start_pos = start;
  slice.block_table = table.data();
  sequences_.push_back(slice);
  const auto part = tokens.subspan(static_cast<size_t>(start), static_cast<size_t>(rows));
  tokens_.insert(tokens_.end(), part.begin(), part.end());
  if (!wants_logits) return -1;
  logit_rows_.push_back(this->rows() - 1);
  return logit_rows() - 1;
}

int32_t Batch::add_chosen(int32_t chosen_row, int32_t start, std::span<const BlockId> table) {
  const TokenId token = chosen_before(chosen_row);
  const int32_t first_row = rows();
  const int32_t logits = add({&token, 1}, 0, 1, table, /*wants_logits=*/true);
  sequences_.back() = {.first_row = first_row, .rows = 1, .start_pos = start, .block_table = table.data()};
  return logits;
}

ForwardBatch Batch::view() const {
  ForwardBatch batch;
  batch.tokens = tokens_;
  batch.sequences = sequences_;
  batch.logit_rows = logit_rows_;
  return batch;
}

}  // namespace baton
