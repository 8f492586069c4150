#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "kv/block_layout.h"

namespace baton {

using BlockId = int32_t;
using TokenId = int32_t;

/// Blocks by what holds them. total = free + cached + used + quarantined.
struct BlockCounts {
  int64_t total = 0;
  int64_t free = 0;         ///< nobody's, content meaningless
  int64_t cached = 0;       ///< nobody's, content is a prefix that may be matched or evicted
  int64_t used = 0;         ///< referenced by at least one sequence
  int64_t quarantined = 0;  ///< a peer may still write into them: not to be reused
};

/// Which blocks are whose, and which prefix is where. Knows tokens and block ids, never requests nor memory.
/// Full blocks are found again by hash (parent hash + tokens); eviction takes the least recently used cached
/// leaf. One thread (the engine's) owns it.
class BlockPool {
 public:
  BlockPool(int64_t total_blocks, int32_t block_tokens, bool prefix_cache);

  /// The longest cached prefix of `tokens` in whole blocks, each with one more reference for the caller. At
  /// most `max_tokens` tokens are matched (the last token must be computed, to have logits).
  std::vector<BlockId> match_prefix(std::span<const TokenId> tokens, int64_t max_tokens);
  /// As match_prefix, but only says how many tokens would match; takes no reference.
  int64_t peek_prefix(std::span<const TokenId> tokens, int64_t max_tokens) const;

  /// `count` blocks with one reference each, evicting cached ones as needed; all or nothing
  /// (resource_exhausted with the counts).
  Result<std::vector<BlockId>> allocate(int64_t count);
  /// Whether allocate(count) would succeed now.
  bool can_allocate(int64_t count) const;

  /// Makes the full blocks of a sequence findable: blocks[i] holds tokens [i * block_tokens, ...).
  /// Only blocks whose tokens are all computed. Where an equal prefix is already cached, the older one stays.
  void publish(std::span<const TokenId> tokens, std::span<const BlockId> blocks);

  /// Gives back one reference of each block.
  void release(std::span<const BlockId> blocks);

  /// Takes the caller's references into quarantine: not reused until unquarantine().
  void quarantine(std::span<const BlockId> blocks);
  void unquarantine(std::span<const BlockId> blocks);

  BlockCounts counts() const;
  int32_t block_tokens() const { return block_tokens_; }
  /// Forgets every cached prefix that nobody uses.
  void clear_cache();
  /// Walks everything and CHECKs the invariants; for tests.
  void check_invariants() const;

 private:
  struct Block {
    int32_t references = 0;
    bool quarantined = false;
    uint64_t hash = 0;          // 0: not published
    BlockId parent = -1;
    int32_t cached_children = 0;
    uint64_t last_used = 0;
    std::vector<TokenId> tokens;  // of a published block: a hash match is verified, never trusted
  };
  // The owner of this file completes the private part as needed.
  int32_t block_tokens_;
  bool prefix_cache_;
  std::vector<Block> blocks_;
};

}  // namespace baton
