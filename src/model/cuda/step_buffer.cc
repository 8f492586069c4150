#include "model/cuda/step_buffer.h"

#include <algorithm>

#include "base/check.h"
#include "model/cuda/sample_rows.h"

namespace baton {
namespace {

constexpr size_t kAlignment = 256;

int64_t table_entries(const SequenceSlice& slice, int32_t block_tokens) {
  return (int64_t{slice.start_pos} + slice.rows + block_tokens - 1) / block_tokens;
}

}  // namespace

template <typename T>
StepBuffer::Array<T> StepBuffer::array(size_t* at, int64_t count) const {
  Array<T> out;
  out.at = *at;
  out.device = reinterpret_cast<const T*>(device_.address() + *at);
  *at += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  return out;
}

Result<StepBuffer> StepBuffer::create(std::shared_ptr<const cuda::Gpu> gpu, StepCapacity capacity) {
  StepBuffer buffer;
  buffer.gpu_ = std::move(gpu);
  buffer.capacity_ = capacity;
  const auto bytes = static_cast<size_t>(capacity.rows * 12 + capacity.sequences * 16 + capacity.logit_rows * (32 + static_cast<int64_t>(sizeof(cuda::SampleRow))) +
                                         capacity.edits * static_cast<int64_t>(sizeof(cuda::SampleEdit)) +
                                         capacity.tiles * 8 + capacity.table_entries * 4) + 13 * kAlignment;
  buffer.bytes_ = bytes / kAlignment * kAlignment;
  BATON_ASSIGN_OR_RETURN(buffer.host_, cuda::PinnedMemory::allocate(buffer.gpu_, 2 * buffer.bytes_));
  BATON_ASSIGN_OR_RETURN(buffer.device_, cuda::DeviceMemory::allocate(buffer.gpu_, buffer.bytes_));
  size_t at = 0;
  buffer.tokens_ = buffer.array<int32_t>(&at, capacity.rows);
  buffer.positions_ = buffer.array<int32_t>(&at, capacity.rows);
  buffer.slots_ = buffer.array<int32_t>(&at, capacity.rows);
  buffer.sequences_ = buffer.array<cuda::DeviceSequence>(&at, capacity.sequences);
  buffer.kept_rows_ = buffer.array<int32_t>(&at, capacity.logit_rows);
  buffer.kept_positions_ = buffer.array<int32_t>(&at, capacity.logit_rows);
  buffer.kept_sequences_ = buffer.array<cuda::DeviceSequence>(&at, capacity.logit_rows);
  buffer.tiles_ = buffer.array<cuda::PrefillTile>(&at, capacity.tiles);
  buffer.kept_tiles_ = buffer.array<cuda::PrefillTile>(&at, capacity.logit_rows);
  buffer.choices_ = buffer.array<cuda::SampleRow>(&at, capacity.logit_rows);
  buffer.table_begin_ = at;
  buffer.tables_ = buffer.array<int32_t>(&at, capacity.table_entries);
  buffer.edits_begin_ = at;
  buffer.edits_ = buffer.array<cuda::SampleEdit>(&at, capacity.edits);
  BATON_CHECK(at <= buffer.bytes_) << at << " of " << buffer.bytes_;
  return buffer;
}

StepCapacity StepBuffer::measure(const ForwardBatch& batch, int32_t tile_tokens) {
  StepCapacity out;
  out.rows = std::ssize(batch.tokens);
  out.sequences = std::ssize(batch.sequences);
  out.logit_rows = std::ssize(batch.logit_rows);
  out.edits = std::ssize(batch.edits);
  for (const SequenceSlice& slice : batch.sequences) {
    out.table_entries += table_entries(slice, batch.block_tokens);
    out.tiles += (slice.rows + tile_tokens - 1) / tile_tokens;
  }
  return out;
}

StepPlan StepBuffer::build(const ForwardBatch& batch, int32_t padded_rows, int32_t tile_tokens, bool only_tiles) {
  const auto rows = static_cast<int32_t>(batch.tokens.size()), sequences = static_cast<int32_t>(batch.sequences.size());
  const int32_t unused = padded_rows - rows;
  half_ = 1 - half_;
  StepPlan plan;
  plan.keeps_all = batch.logit_rows.size() == batch.tokens.size();
  plan.step = {tokens_.device, positions_.device, slots_.device, sequences_.device, tables_.device, padded_rows, sequences + unused};
  plan.kept = {nullptr, kept_positions_.device, nullptr, kept_sequences_.device, tables_.device,
               static_cast<int32_t>(batch.logit_rows.size()), static_cast<int32_t>(batch.logit_rows.size())};
  if (plan.keeps_all) plan.kept = plan.step;
  plan.kept_rows = kept_rows_.device;
  plan.tiles = tiles_.device;
  plan.kept_tiles = kept_tiles_.device;
  plan.choices = choices_.device;
  plan.edits = edits_.device;
  build_choices(batch, plan.keeps_all ? padded_rows : static_cast<int32_t>(batch.logit_rows.size()));

  std::copy(batch.tokens.begin(), batch.tokens.end(), host(tokens_));
  int32_t entries = 0;
  size_t kept = 0;
  std::span<cuda::PrefillTile> tiles(host(tiles_), static_cast<size_t>(capacity_.tiles));
  for (int32_t s = 0; s < sequences; ++s) {
    const SequenceSlice& slice = batch.sequences[static_cast<size_t>(s)];
    const auto blocks = static_cast<int32_t>(table_entries(slice, batch.block_tokens));
    BATON_CHECK(entries + blocks <= capacity_.table_entries) << entries << " + " << blocks;
    std::copy(slice.block_table, slice.block_table + blocks, host(tables_) + entries);
    host(sequences_)[s] = {slice.first_row, slice.rows, slice.start_pos, entries};
    for (int32_t r = 0; r < slice.rows; ++r) {
      const int32_t position = slice.start_pos + r, row = slice.first_row + r;
      host(positions_)[row] = position;
      host(slots_)[row] = slice.block_table[position / batch.block_tokens] * batch.block_tokens + position % batch.block_tokens;
      if (!plan.keeps_all && kept < batch.logit_rows.size() && batch.logit_rows[kept] == row) {
        host(kept_rows_)[kept] = row;
        host(kept_positions_)[kept] = position;
        host(kept_sequences_)[kept] = {static_cast<int32_t>(kept), 1, position, entries};
        host(kept_tiles_)[kept] = {static_cast<int32_t>(kept), 0};
        ++kept;
      }
    }
    const bool decode = slice.rows == 1 && !only_tiles;
    if (decode) plan.decodes = true;
    for (int32_t begin = 0; !decode && begin < slice.rows; begin += tile_tokens) {
      tiles[static_cast<size_t>(plan.tile_count++)] = {s, begin};
    }
    entries += blocks;
  }
  for (int32_t i = 0; i < unused; ++i) {
    host(tokens_)[rows + i] = 0;
    host(positions_)[rows + i] = 0;
    host(slots_)[rows + i] = -1;
    host(sequences_)[sequences + i] = {rows + i, 0, 0, 0};
  }
  // The longest first, so that the last thread blocks are short ones.
  const auto keys = [&](const cuda::PrefillTile& tile) {
    return host(sequences_)[tile.sequence].start_pos + tile.token_begin;
  };
  std::stable_sort(tiles.begin(), tiles.begin() + plan.tile_count,
                   [&](const cuda::PrefillTile& a, const cuda::PrefillTile& b) { return keys(a) > keys(b); });
  used_bytes_ = table_begin_ + static_cast<size_t>(entries) * sizeof(int32_t);
  return plan;
}

/// A row that nobody chooses for is a greedy one: it changes no logit.
void StepBuffer::build_choices(const ForwardBatch& batch, int32_t padded_rows) {
  for (size_t i = 0; i < static_cast<size_t>(padded_rows); ++i) {
    host(choices_)[i] = sample_row(i < batch.choices.size() ? batch.choices[i] : TokenChoice());
  }
  for (size_t i = 0; i < batch.edits.size(); ++i) host(edits_)[i] = sample_edit(batch.edits[i]);
  edit_bytes_ = batch.edits.size() * sizeof(cuda::SampleEdit);
}

Status StepBuffer::send(cuda::CUstream stream) {
  const cuda::Driver& cu = gpu_->driver();
  const cuda::CUdeviceptr sent = host_.address() + half_ * bytes_;
  BATON_RETURN_IF_ERROR(cu.check(cu.copy_async(device_.address(), sent, used_bytes_, stream), "sending a step to the GPU"));
  if (edit_bytes_ == 0) return {};
  return cu.check(cu.copy_async(device_.address() + edits_begin_, sent + edits_begin_, edit_bytes_, stream),
                  "sending a step to the GPU");
}

}  // namespace baton
