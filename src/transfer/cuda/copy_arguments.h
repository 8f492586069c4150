#pragma once

#include <cstdint>

/// What the host and the copy kernel have to agree on. Read by nvcc, too: plain data, fixed layout.
namespace baton::transfer::cuda {

inline constexpr char kCopyKernelName[] = "baton_transfer_copy";
inline constexpr uint32_t kCopyThreads = 512;
/// So many pieces travel with the launch itself; longer lists are read from mapped host memory.
inline constexpr uint32_t kInlinePieces = 8;
inline constexpr uint32_t kInlineBlocks = 3 * kInlinePieces;

struct Piece {
  uint64_t source_offset;
  uint64_t target_offset;
  uint64_t bytes;
};

/// A block and where it goes: 8 bytes instead of 24 for a list that the GPU fetches from the host.
struct BlockIds {
  uint32_t source;
  uint32_t target;
};

/// Copies bytes [source + source_offset, + bytes) to target + target_offset for every piece, then, when all of it is
/// visible to the whole system, stores `done_value` at `done_flag`. With block_bytes > 0 there are no pieces but BlockIds: of
/// each, block_bytes from source + id * source_stride to target + id * target_stride.
struct CopyArguments {
  uint64_t source;
  uint64_t target;
  uint64_t pieces;       // device address of [piece_count] Piece or BlockIds; 0: they are inline
  uint64_t done_flag;    // device address of a uint64_t in mapped host memory
  uint64_t done_value;
  uint64_t cta_counter;  // device address of a uint32_t that is 0 before and after
  uint32_t piece_count;
  uint32_t unit_bytes;       // what one warp copies at a time: a multiple of 16
  uint32_t units_per_piece;  // ceil(the largest piece / unit_bytes)
  uint32_t reserved;
  uint64_t source_stride;
  uint64_t target_stride;
  uint64_t block_bytes;
  union {
    Piece inline_pieces[kInlinePieces];
    BlockIds inline_blocks[kInlineBlocks];
  };
};
static_assert(sizeof(Piece) == 24 && sizeof(BlockIds) == 8 && sizeof(CopyArguments) == 88 + kInlinePieces * 24);

}  // namespace baton::transfer::cuda
