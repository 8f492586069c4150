#pragma once

#include <memory>
#include <span>

#include "kernels/cpu/isa.h"
#include "kernels/kernels.h"

namespace baton::cpu {

/// A weight matrix in panels, the same layout for every instruction set (isa.h describes it). Lanes beyond
/// out_features are zero.
class CpuPackedMatrix final : public PackedMatrix {
 public:
  /// See Kernels::pack. Errors: invalid_argument for shapes and dtypes, resource_exhausted for memory.
  static Result<std::unique_ptr<CpuPackedMatrix>> pack(std::span<const Kernels::MatrixPart> parts,
                                                       int64_t in_features, ThreadPool& threads);

  int64_t out_features() const override { return out_features_; }
  int64_t in_features() const override { return k_pairs_ * 2; }
  size_t bytes() const override { return buffer_.bytes(); }
  std::span<const std::byte> memory() const override { return buffer_.span(); }

  int64_t k_pairs() const { return k_pairs_; }
  int64_t panels() const { return (out_features_ + kPanelLanes - 1) / kPanelLanes; }
  const uint32_t* words() const { return buffer_.as<const uint32_t>(); }

  /// x[0..in_features) = row `index`, widened.
  void unpack_row(int64_t index, float* x) const;

 private:
  CpuPackedMatrix(int64_t out_features, int64_t k_pairs, Buffer buffer)
      : out_features_(out_features), k_pairs_(k_pairs), buffer_(std::move(buffer)) {}

  int64_t out_features_;
  int64_t k_pairs_;
  Buffer buffer_;
};

}  // namespace baton::cpu
