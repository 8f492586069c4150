#include "kernels/cpu/packed_matrix.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace baton::cpu {
namespace {

constexpr int64_t kChunkPairs = 64;  // of k at a time: 32 rows x 256 bytes stay in the first-level cache

using HalfTable = std::vector<uint16_t>;  // binary16 bits to bf16 bits

HalfTable make_half_table() {
  HalfTable table(1 << 16);
  for (uint32_t i = 0; i < table.size(); ++i) {
    table[i] = bf16(f16_to_float(static_cast<uint16_t>(i))).bits;
  }
  return table;
}

/// `count` elements from `offset` of a row as bf16.
void load_row(const Kernels::MatrixPart& part, int64_t element, int64_t count, const HalfTable& half, uint16_t* out) {
  switch (part.dtype) {
    case DType::kBF16:
      std::memcpy(out, static_cast<const uint16_t*>(part.data) + element, static_cast<size_t>(count) * 2);
      return;
    case DType::kF16: {
      const uint16_t* const source = static_cast<const uint16_t*>(part.data) + element;
      for (int64_t i = 0; i < count; ++i) out[i] = half[source[i]];
      return;
    }
    default: {
      const float* const source = static_cast<const float*>(part.data) + element;
      for (int64_t i = 0; i < count; ++i) out[i] = bf16(source[i]).bits;
      return;
    }
  }
}

struct Row {
  const Kernels::MatrixPart* part = nullptr;  // null: padding
  int64_t index = 0;                          // inside the part
};

Row find_row(std::span<const Kernels::MatrixPart> parts, int64_t row) {
  for (const Kernels::MatrixPart& part : parts) {
    if (row < part.out_features) return {&part, row};
    row -= part.out_features;
  }
  return {};
}

void pack_panel(std::span<const Kernels::MatrixPart> parts, int64_t panel, int64_t k_pairs, const HalfTable& half,
                uint32_t* out) {
  std::array<Row, kPanelLanes> rows;
  for (int64_t lane = 0; lane < kPanelLanes; ++lane) {
    rows[static_cast<size_t>(lane)] = find_row(parts, panel * kPanelLanes + lane);
  }
  alignas(64) uint32_t chunk[kPanelLanes][kChunkPairs];
  for (int64_t begin = 0; begin < k_pairs; begin += kChunkPairs) {
    const int64_t count = std::min(kChunkPairs, k_pairs - begin);
    for (int64_t lane = 0; lane < kPanelLanes; ++lane) {
      const Row& row = rows[static_cast<size_t>(lane)];
      if (row.part == nullptr) {
        std::memset(chunk[lane], 0, sizeof(chunk[lane]));
      } else {
        load_row(*row.part, row.index * k_pairs * 2 + begin * 2, count * 2, half,
                 reinterpret_cast<uint16_t*>(chunk[lane]));
      }
    }
    for (int64_t kk = 0; kk < count; ++kk) {
      uint32_t* const line = out + (begin + kk) * kPanelLanes;
      for (int64_t lane = 0; lane < kPanelLanes; ++lane) line[lane] = chunk[lane][kk];
    }
  }
}

}  // namespace

Result<std::unique_ptr<CpuPackedMatrix>> CpuPackedMatrix::pack(std::span<const Kernels::MatrixPart> parts,
                                                               int64_t in_features, ThreadPool& threads) {
  // Bounds that no model comes near; below them no product overflows.
  constexpr int64_t kMaxFeatures = int64_t{1} << 24;
  if (in_features <= 0 || in_features % 2 != 0 || in_features > kMaxFeatures) {
    return invalid_argument("in_features is {}: a weight matrix needs an even number up to {}", in_features,
                            kMaxFeatures);
  }
  int64_t out_features = 0;
  bool any_half = false;
  for (const Kernels::MatrixPart& part : parts) {
    if (part.data == nullptr || part.out_features <= 0 || part.out_features > kMaxFeatures - out_features) {
      return invalid_argument("a weight matrix part of {} rows after {} rows: expected data and at most {} rows",
                              part.out_features, out_features, kMaxFeatures);
    }
    if (part.dtype != DType::kBF16 && part.dtype != DType::kF16 && part.dtype != DType::kF32) {
      return invalid_argument("weights of dtype {}: expected bfloat16, float16 or float32", dtype_name(part.dtype));
    }
    any_half = any_half || part.dtype == DType::kF16;
    out_features += part.out_features;
  }
  if (out_features == 0) return invalid_argument("a weight matrix without rows");

  const int64_t panels = (out_features + kPanelLanes - 1) / kPanelLanes;
  const int64_t k_pairs = in_features / 2;
  const size_t bytes = static_cast<size_t>(panels) * static_cast<size_t>(k_pairs) * kPanelLanes * 4;
  BATON_ASSIGN_OR_RETURN(Buffer buffer, Buffer::allocate(bytes));
  const HalfTable half = any_half ? make_half_table() : HalfTable();
  uint32_t* const words = buffer.as<uint32_t>();
  const auto body = [&](int64_t begin, int64_t end, int) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_panel(parts, panel, k_pairs, half, words + panel * k_pairs * kPanelLanes);
    }
  };
  // About 2 MiB a piece: each huge page is faulted in by one thread.
  const int64_t grain = std::max<int64_t>(1, (int64_t{2} << 20) / (k_pairs * kPanelLanes * 4));
  threads.parallel_for(panels, grain, std::cref(body));
  return std::unique_ptr<CpuPackedMatrix>(new CpuPackedMatrix(out_features, k_pairs, std::move(buffer)));
}

void CpuPackedMatrix::unpack_row(int64_t index, float* x) const {
  const uint32_t* const lane = words() + index / kPanelLanes * k_pairs_ * kPanelLanes + index % kPanelLanes;
  for (int64_t kk = 0; kk < k_pairs_; ++kk) {
    const uint32_t pair = lane[kk * kPanelLanes];
    x[2 * kk] = std::bit_cast<float>(pair << 16);
    x[2 * kk + 1] = std::bit_cast<float>(pair & 0xffff0000u);
  }
}

}  // namespace baton::cpu
