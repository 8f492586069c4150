#pragma once

#include <cstdint>
#include <memory>
#include <span>
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

  bool operator==(const BlockCounts&) const = default;
};

/// How far a sequence's blocks are published, so that publishing one more block does not walk the whole
/// sequence again. Belongs to one sequence; reset it ({}) when the sequence's blocks change.
struct PublishCursor {
  int64_t blocks = 0;        ///< how many leading blocks are known to be in the cache
  BlockId last = -1;         ///< the block that the cache has for the last of them
  uint64_t last_serial = 0;  ///< tells whether it is still the same publication
};

/// Which blocks are whose, and which prefix is where. Knows tokens and block ids, never requests nor memory.
///
/// Published blocks form a forest: the children of a block continue its prefix. A block is found by a hash of
/// its parent's hash and its tokens, and a hit counts only when parent and tokens are equal, so that by
/// induction the whole prefix is: a collision, even a crafted one, never serves another prompt's KV.
/// Eviction takes the least recently used cached leaf; a block with published children goes only when no
/// leaf is left (its children are then all in use, and lose their publication).
/// Costs: O(log cached) per block acquired, released or evicted, no allocation but the returned vectors.
/// One thread (the engine's) owns it.
class BlockPool {
 public:
  BlockPool(int64_t total_blocks, int32_t block_tokens, bool prefix_cache);

  /// The longest cached prefix of `tokens` in whole blocks, each with one more reference for the caller. At
  /// most `max_tokens` tokens are matched (the last token must be computed, to have logits).
  std::vector<BlockId> match_prefix(std::span<const TokenId> tokens, int64_t max_tokens);
  /// As match_prefix, but only says how many tokens would match; takes no reference.
  int64_t peek_prefix(std::span<const TokenId> tokens, int64_t max_tokens) const;
  struct PrefixPeek {
    int64_t tokens = 0;
    int64_t idle_blocks = 0;  ///< matched blocks that nobody uses: taking them lowers what can be allocated
  };
  PrefixPeek peek_prefix_blocks(std::span<const TokenId> tokens, int64_t max_tokens) const;

  /// `count` blocks with one reference each, evicting cached ones as needed; all or nothing
  /// (resource_exhausted with the counts).
  Result<std::vector<BlockId>> allocate(int64_t count);
  /// The same, appended to a block table.
  Status allocate_into(int64_t count, std::vector<BlockId>* table);
  /// Whether allocate(count) would succeed now.
  bool can_allocate(int64_t count) const { return count <= available(); }
  /// Blocks that allocate() could give: free and cached ones.
  int64_t available() const { return static_cast<int64_t>(free_.size() + idle_.size()); }

  /// Makes the full blocks of a sequence findable: blocks[i] holds tokens [i * block_tokens, ...).
  /// Only blocks whose tokens are all computed. Where an equal prefix is already cached, the older one stays.
  /// The caller holds a reference to every block.
  void publish(std::span<const TokenId> tokens, std::span<const BlockId> blocks);
  /// The same, going on where the cursor stands: O(new blocks).
  void publish(std::span<const TokenId> tokens, std::span<const BlockId> blocks, PublishCursor* cursor);

  /// Gives back one reference of each block. The first ones stay longest in the cache.
  void release(std::span<const BlockId> blocks);
  /// How many of `blocks` would become available by releasing them once.
  int64_t releasable(std::span<const BlockId> blocks) const;

  /// Takes the caller's references into quarantine: not reused until unquarantine(). The caller must be the
  /// only holder, and the blocks not published: a block that a peer may write into is nobody else's.
  void quarantine(std::span<const BlockId> blocks);
  void unquarantine(std::span<const BlockId> blocks);

  BlockCounts counts() const;
  int32_t block_tokens() const { return block_tokens_; }
  /// References of one block; for tests.
  int32_t references(BlockId block) const { return at(block).references; }
  /// Forgets every cached prefix that nobody uses.
  void clear_cache();
  /// Walks everything and CHECKs the invariants; for tests.
  void check_invariants() const;

 private:
  static constexpr BlockId kNone = -1;

  struct Block {
    int32_t references = 0;
    bool quarantined = false;
    bool published = false;
    int32_t heap_index = -1;     // in idle_, when published and without references
    BlockId parent = kNone;      // the rest is of published blocks only
    BlockId first_child = kNone;
    BlockId next_sibling = kNone;
    BlockId previous_sibling = kNone;
    BlockId next_in_bucket = kNone;
    uint64_t hash = 0;
    uint64_t serial = 0;         // of this publication, never used twice
    uint64_t last_used = 0;
  };

  const Block& at(BlockId block) const;
  Block& at(BlockId block);
  std::span<const TokenId> tokens_of(BlockId block) const;
  uint64_t child_hash(BlockId parent, std::span<const TokenId> tokens) const;
  BlockId find_child(BlockId parent, uint64_t hash, std::span<const TokenId> tokens) const;
  /// Walks the cached blocks of a prefix, root first.
  template <typename Visitor>
  void walk_prefix(std::span<const TokenId> tokens, int64_t max_tokens, Visitor visit) const;

  void insert(BlockId block, BlockId parent, uint64_t hash, std::span<const TokenId> tokens);
  void unpublish(BlockId block);
  void evict_one();
  BlockId take_free();
  void add_reference(BlockId block);

  // A binary heap of ids, the next to evict on top; Block::heap_index points back.
  bool evict_before(BlockId a, BlockId b) const;
  void heap_push(BlockId block);
  void heap_remove(BlockId block);
  void heap_fix(int32_t index);

  int32_t block_tokens_;
  bool prefix_cache_;
  std::vector<Block> blocks_;
  std::unique_ptr<TokenId[]> tokens_;  // [total_blocks][block_tokens], written when published
  std::vector<BlockId> free_;          // a stack: memory that was touched is used again first
  std::vector<BlockId> idle_;          // cached blocks, heap
  std::vector<BlockId> buckets_;       // hash table, chained through Block::next_in_bucket
  std::vector<BlockId> scratch_;
  int64_t quarantined_ = 0;
  uint64_t tick_ = 0;                  // orders last_used
  uint64_t next_serial_ = 1;
};

}  // namespace baton
