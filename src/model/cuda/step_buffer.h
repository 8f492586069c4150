#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "base/cuda/gpu.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/sample_arguments.h"
#include "model/model.h"

namespace baton {

/// How large a step may be.
struct StepCapacity {
  int64_t rows = 0;
  int64_t sequences = 0;
  int64_t logit_rows = 0;
  int64_t table_entries = 0;
  int64_t tiles = 0;
  int64_t edits = 0;

  bool holds(const StepCapacity& other) const {
    return rows >= other.rows && sequences >= other.sequences && logit_rows >= other.logit_rows &&
           table_entries >= other.table_entries && tiles >= other.tiles && edits >= other.edits;
  }
};

/// What a step has to do, in device memory (the pointers are the same in every step of one StepBuffer).
struct StepPlan {
  cuda::StepView step{};
  bool decodes = false;                      ///< some sequence has one row
  const cuda::PrefillTile* tiles = nullptr;  ///< of the sequences with more
  int32_t tile_count = 0;
  const cuda::PrefillTile* kept_tiles = nullptr;  ///< [kept.rows] of `kept`, one each
  /// The rows whose logits are wanted, each as a sequence of one row.
  cuda::StepView kept{};
  const int32_t* kept_rows = nullptr;        ///< [kept.rows] their rows in `step`
  bool keeps_all = false;                    ///< `kept` is `step`
  const cuda::SampleRow* choices = nullptr;  ///< [kept.rows]
  const cuda::SampleEdit* edits = nullptr;
};

/// A step's description, written by the host into page-locked memory and sent to the GPU in one copy. One thread. The host's memory
/// is there twice: a step may be built and sent while the one before is under way, but not the one before that. All are sent on one
/// stream: there is one place for them on the GPU.
class StepBuffer {
 public:
  static Result<StepBuffer> create(std::shared_ptr<const cuda::Gpu> gpu, StepCapacity capacity);
  StepBuffer() = default;

  /// Fills in `batch` (checked before, within capacity()); `padded_rows` at least its rows: the rest is rows and
  /// sequences that are not used. `tile_tokens` as CudaKernels::prefill_tile_tokens(). `only_tiles`: no sequence is a decode.
  StepPlan build(const ForwardBatch& batch, int32_t padded_rows, int32_t tile_tokens, bool only_tiles);
  /// What `batch` takes.
  static StepCapacity measure(const ForwardBatch& batch, int32_t tile_tokens);
  Status send(cuda::CUstream stream);

  const StepCapacity& capacity() const { return capacity_; }

 private:
  template <typename T>
  struct Array {
    size_t at = 0;  // bytes, in both memories
    const T* device = nullptr;
  };
  template <typename T>
  T* host(const Array<T>& array) const { return reinterpret_cast<T*>(host_.data() + half_ * bytes_ + array.at); }
  void build_choices(const ForwardBatch& batch, int32_t padded_rows);
  template <typename T>
  Array<T> array(size_t* at, int64_t count) const;

  std::shared_ptr<const cuda::Gpu> gpu_;
  StepCapacity capacity_;
  size_t bytes_ = 0;
  cuda::PinnedMemory host_;  // [2][bytes_]
  cuda::DeviceMemory device_;
  size_t half_ = 0;          // that the newest step was built in
  size_t table_begin_ = 0, used_bytes_ = 0, edits_begin_ = 0, edit_bytes_ = 0;
  Array<int32_t> tokens_, positions_, slots_, kept_rows_, kept_positions_, tables_;
  Array<cuda::SampleRow> choices_;
  Array<cuda::SampleEdit> edits_;
  Array<cuda::DeviceSequence> sequences_, kept_sequences_;
  Array<cuda::PrefillTile> tiles_, kept_tiles_;
};

}  // namespace baton
