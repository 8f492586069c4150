#pragma once

#include <cstdint>

/// What the host and the copy kernel have to agree on. Read by nvcc, too: plain data, fixed layout.
namespace baton::transfer::cuda {

inline constexpr char kCopyKernelName[] = "baton_transfer_copy";
inline constexpr uint32_t kCopyThreads = 512;
/// So many pieces travel with the launch itself; longer lists are read from mapped host memory.
inline constexpr uint32_t kInlinePieces = 8;

struct Piece {
  uint64_t source_offset;
  uint64_t target_offset;
  uint64_t bytes;
};

/// Copies bytes [source + source_offset, + bytes) to target + target_offset for every piece, then, when all of it is
/// visible to the whole system, stores `done_value` at `done_flag`.
struct CopyArguments {
  uint64_t source;
  uint64_t target;
  uint64_t pieces;       // device address of [piece_count] Piece; 0: inline_pieces
  uint64_t done_flag;    // device address of a uint64_t in mapped host memory
  uint64_t done_value;
  uint64_t cta_counter;  // device address of a uint32_t that is 0 before and after
  uint32_t piece_count;
  uint32_t unit_bytes;       // what one warp copies at a time: a multiple of 16
  uint32_t units_per_piece;  // ceil(the largest piece / unit_bytes)
  uint32_t reserved;
  Piece inline_pieces[kInlinePieces];
};
static_assert(sizeof(Piece) == 24 && sizeof(CopyArguments) == 64 + kInlinePieces * 24);

}  // namespace baton::transfer::cuda
