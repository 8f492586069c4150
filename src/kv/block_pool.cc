#include "kv/block_pool.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/random.h"

namespace baton {

BlockPool::BlockPool(int64_t total_blocks, int32_t block_tokens, bool prefix_cache)
    : block_tokens_(block_tokens), prefix_cache_(prefix_cache) {
  BATON_CHECK(total_blocks >= 0 && total_blocks <= std::numeric_limits<BlockId>::max()) << total_blocks;
  BATON_CHECK(block_tokens >= 1) << block_tokens;
  blocks_.resize(static_cast<size_t>(total_blocks));
  free_.reserve(blocks_.size());
  for (int64_t block = total_blocks - 1; block >= 0; --block) free_.push_back(static_cast<BlockId>(block));
  if (prefix_cache_) {
    idle_.reserve(blocks_.size());
    buckets_.assign(std::bit_ceil(std::max<size_t>(blocks_.size(), 1)), kNone);
    tokens_ = std::make_unique_for_overwrite<TokenId[]>(blocks_.size() * static_cast<size_t>(block_tokens));
  }
}

const BlockPool::Block& BlockPool::at(BlockId block) const {
  BATON_CHECK(block >= 0 && static_cast<size_t>(block) < blocks_.size()) << "block " << block;
  return blocks_[static_cast<size_t>(block)];
}

BlockPool::Block& BlockPool::at(BlockId block) { return const_cast<Block&>(std::as_const(*this).at(block)); }

std::span<const TokenId> BlockPool::tokens_of(BlockId block) const {
  const size_t count = static_cast<size_t>(block_tokens_);
  return {tokens_.get() + static_cast<size_t>(block) * count, count};
}

uint64_t BlockPool::child_hash(BlockId parent, std::span<const TokenId> tokens) const {
  uint64_t hash = parent == kNone ? 0x6261746f6eull : at(parent).hash;
  size_t i = 0;
  for (; i + 2 <= tokens.size(); i += 2) {  // two tokens to a mix: this runs over every prompt
    hash = mix_bits(hash ^ (static_cast<uint64_t>(static_cast<uint32_t>(tokens[i])) << 32 |
                            static_cast<uint32_t>(tokens[i + 1])));
  }
  if (i < tokens.size()) hash = mix_bits(hash ^ static_cast<uint32_t>(tokens[i]));
  return hash;
}

BlockId BlockPool::find_child(BlockId parent, uint64_t hash, std::span<const TokenId> tokens) const {
  BlockId block = buckets_[hash & (buckets_.size() - 1)];
  for (; block != kNone; block = at(block).next_in_bucket) {
    const Block& candidate = at(block);
    if (candidate.hash == hash && candidate.parent == parent && std::ranges::equal(tokens_of(block), tokens)) {
      return block;
    }
  }
  return kNone;
}

template <typename Visitor>
void BlockPool::walk_prefix(std::span<const TokenId> tokens, int64_t max_tokens, Visitor visit) const {
  if (!prefix_cache_) return;
  const int64_t count = std::min(std::ssize(tokens), max_tokens) / block_tokens_;
  BlockId parent = kNone;
  for (int64_t i = 0; i < count; ++i) {
    const auto part = tokens.subspan(static_cast<size_t>(i * block_tokens_), static_cast<size_t>(block_tokens_));
    const BlockId block = find_child(parent, child_hash(parent, part), part);
    if (block == kNone) return;
    visit(block);
    parent = block;
  }
}

std::vector<BlockId> BlockPool::match_prefix(std::span<const TokenId> tokens, int64_t max_tokens) {
  std::vector<BlockId> found;
  walk_prefix(tokens, max_tokens, [&](BlockId block) { found.push_back(block); });
  for (BlockId block : found) add_reference(block);
  return found;
}

int64_t BlockPool::peek_prefix(std::span<const TokenId> tokens, int64_t max_tokens) const {
  return peek_prefix_blocks(tokens, max_tokens).tokens;
}

BlockPool::PrefixPeek BlockPool::peek_prefix_blocks(std::span<const TokenId> tokens, int64_t max_tokens) const {
  PrefixPeek peek;
  walk_prefix(tokens, max_tokens, [&](BlockId block) {
    peek.tokens += block_tokens_;
    peek.idle_blocks += at(block).references == 0;
  });
  return peek;
}

Result<std::vector<BlockId>> BlockPool::allocate(int64_t count) {
  std::vector<BlockId> table;
  BATON_RETURN_IF_ERROR(allocate_into(count, &table));
  return table;
}

Status BlockPool::allocate_into(int64_t count, std::vector<BlockId>* table) {
  BATON_CHECK(count >= 0) << count;
  if (!can_allocate(count)) {
    const BlockCounts now = counts();
    return resource_exhausted(
        "{} KV blocks are wanted and {} can be given ({} free, {} cached; {} in use, {} quarantined, {} in all)",
        count, available(), now.free, now.cached, now.used, now.quarantined, now.total);
  }
  table->reserve(table->size() + static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) table->push_back(take_free());
  return {};
}

BlockId BlockPool::take_free() {
  if (free_.empty()) evict_one();
  const BlockId block = free_.back();
  free_.pop_back();
  at(block).references = 1;
  return block;
}

void BlockPool::publish(std::span<const TokenId> tokens, std::span<const BlockId> blocks) {
  PublishCursor from_start;
  publish(tokens, blocks, &from_start);
}

void BlockPool::publish(std::span<const TokenId> tokens, std::span<const BlockId> blocks, PublishCursor* cursor) {
  if (!prefix_cache_) return;
  // The block that the cursor names may be another sequence's (the older of two equal ones) and gone by now.
  if (cursor->blocks > 0) {
    const Block& last = at(cursor->last);
    if (!last.published || last.serial != cursor->last_serial) *cursor = {};
  }
  const int64_t count = std::min(std::ssize(tokens) / block_tokens_, std::ssize(blocks));
  for (int64_t i = cursor->blocks; i < count; ++i) {
    const auto part = tokens.subspan(static_cast<size_t>(i * block_tokens_), static_cast<size_t>(block_tokens_));
    const BlockId own = blocks[static_cast<size_t>(i)];
    BATON_CHECK(at(own).references > 0) << "block " << own << " is published by nobody";
    const uint64_t hash = child_hash(cursor->last, part);
    BlockId known = find_child(cursor->last, hash, part);
    if (known == kNone) {
      BATON_CHECK(!at(own).published) << "block " << own << " holds another prefix already";
      insert(own, cursor->last, hash, part);
      known = own;
    }
    *cursor = {.blocks = i + 1, .last = known, .last_serial = at(known).serial};
  }
}

void BlockPool::insert(BlockId id, BlockId parent, uint64_t hash, std::span<const TokenId> tokens) {
  Block& block = at(id);
  block.published = true;
  block.hash = hash;
  block.serial = next_serial_++;
  block.parent = parent;
  std::ranges::copy(tokens, tokens_.get() + static_cast<size_t>(id) * static_cast<size_t>(block_tokens_));

  BlockId& bucket = buckets_[hash & (buckets_.size() - 1)];
  block.next_in_bucket = bucket;
  bucket = id;

  if (parent == kNone) return;
  Block& above = at(parent);
  const bool was_leaf = above.first_child == kNone;
  block.next_sibling = above.first_child;
  if (above.first_child != kNone) at(above.first_child).previous_sibling = id;
  above.first_child = id;
  if (was_leaf && above.heap_index >= 0) heap_fix(above.heap_index);  // no longer a leaf
}

/// Takes a block out of the tree, with everything that hangs below it: what continues a prefix that cannot
/// be found any more cannot be found either. Blocks without references become free.
void BlockPool::unpublish(BlockId root) {
  scratch_.assign(1, root);
  const BlockId parent = at(root).parent;
  if (parent != kNone) {
    Block& block = at(root);
    Block& above = at(parent);
    if (block.previous_sibling != kNone) {
      at(block.previous_sibling).next_sibling = block.next_sibling;
    } else {
      above.first_child = block.next_sibling;
    }
    if (block.next_sibling != kNone) at(block.next_sibling).previous_sibling = block.previous_sibling;
    if (above.first_child == kNone && above.heap_index >= 0) heap_fix(above.heap_index);  // a leaf now
  }
  while (!scratch_.empty()) {
    const BlockId id = scratch_.back();
    scratch_.pop_back();
    Block& block = at(id);
    for (BlockId child = block.first_child; child != kNone; child = at(child).next_sibling) {
      scratch_.push_back(child);
    }
    BlockId* link = &buckets_[block.hash & (buckets_.size() - 1)];
    while (*link != id) link = &at(*link).next_in_bucket;
    *link = block.next_in_bucket;
    if (block.heap_index >= 0) {
      heap_remove(id);
      free_.push_back(id);
    }
    const int32_t references = block.references;
    block = Block{};
    block.references = references;
  }
}

void BlockPool::evict_one() {
  BATON_CHECK(!idle_.empty()) << "eviction from an empty cache";
  unpublish(idle_.front());
}

void BlockPool::add_reference(BlockId id) {
  Block& block = at(id);
  if (block.heap_index >= 0) heap_remove(id);
  ++block.references;
}

void BlockPool::release(std::span<const BlockId> blocks) {
  for (size_t i = blocks.size(); i-- > 0;) {
    Block& block = at(blocks[i]);
    BATON_CHECK(block.references > 0) << "block " << blocks[i] << " is released once too often";
    if (--block.references > 0) continue;
    if (block.published) {
      block.last_used = ++tick_;
      heap_push(blocks[i]);
    } else {
      free_.push_back(blocks[i]);
    }
  }
}

int64_t BlockPool::releasable(std::span<const BlockId> blocks) const {
  return std::ranges::count_if(blocks, [&](BlockId block) { return at(block).references == 1; });
}

void BlockPool::quarantine(std::span<const BlockId> blocks) {
  for (BlockId id : blocks) {
    Block& block = at(id);
    BATON_CHECK(block.references == 1 && !block.published && !block.quarantined)
        << "block " << id << " with " << block.references << " references cannot be quarantined";
    block.references = 0;
    block.quarantined = true;
    ++quarantined_;
  }
}

void BlockPool::unquarantine(std::span<const BlockId> blocks) {
  for (BlockId id : blocks) {
    Block& block = at(id);
    BATON_CHECK(block.quarantined) << "block " << id << " is not in quarantine";
    block.quarantined = false;
    --quarantined_;
    free_.push_back(id);
  }
}

BlockCounts BlockPool::counts() const {
  BlockCounts counts;
  counts.total = std::ssize(blocks_);
  counts.free = std::ssize(free_);
  counts.cached = std::ssize(idle_);
  counts.quarantined = quarantined_;
  counts.used = counts.total - counts.free - counts.cached - counts.quarantined;
  return counts;
}

void BlockPool::clear_cache() {
  while (!idle_.empty()) evict_one();
}

// -- The heap of cached blocks: leaves before inner blocks, then by time. -------------------------------------

bool BlockPool::evict_before(BlockId a, BlockId b) const {
  const Block& x = blocks_[static_cast<size_t>(a)];
  const Block& y = blocks_[static_cast<size_t>(b)];
  const bool x_inner = x.first_child != kNone, y_inner = y.first_child != kNone;
  if (x_inner != y_inner) return y_inner;
  return x.last_used < y.last_used;
}

void BlockPool::heap_push(BlockId block) {
  at(block).heap_index = static_cast<int32_t>(idle_.size());
  idle_.push_back(block);
  heap_fix(at(block).heap_index);
}

void BlockPool::heap_remove(BlockId block) {
  const int32_t index = std::exchange(at(block).heap_index, -1);
  const BlockId moved = idle_.back();
  idle_.pop_back();
  if (moved == block) return;
  idle_[static_cast<size_t>(index)] = moved;
  at(moved).heap_index = index;
  heap_fix(index);
}

/// Restores the order after the key of one entry changed in either direction.
void BlockPool::heap_fix(int32_t start) {
  size_t index = static_cast<size_t>(start);
  const auto swap_with = [&](size_t other) {
    std::swap(idle_[index], idle_[other]);
    at(idle_[index]).heap_index = static_cast<int32_t>(index);
    at(idle_[other]).heap_index = static_cast<int32_t>(other);
    index = other;
  };
  while (index > 0 && evict_before(idle_[index], idle_[(index - 1) / 2])) swap_with((index - 1) / 2);
  for (;;) {
    size_t first = index;
    for (size_t child = 2 * index + 1; child <= 2 * index + 2 && child < idle_.size(); ++child) {
      if (evict_before(idle_[child], idle_[first])) first = child;
    }
    if (first == index) return;
    swap_with(first);
  }
}

void BlockPool::check_invariants() const {
  std::vector<int> seen(blocks_.size(), 0);
  for (BlockId id : free_) {
    const Block& block = at(id);
    ++seen[static_cast<size_t>(id)];
    BATON_CHECK(block.references == 0 && !block.published && !block.quarantined && block.heap_index < 0) << id;
  }
  for (size_t i = 0; i < idle_.size(); ++i) {
    const Block& block = at(idle_[i]);
    ++seen[static_cast<size_t>(idle_[i])];
    BATON_CHECK(block.heap_index == static_cast<int32_t>(i) && block.published && block.references == 0) << i;
    BATON_CHECK(i == 0 || !evict_before(idle_[i], idle_[(i - 1) / 2])) << "heap order at " << i;
  }
  int64_t published = 0, quarantined = 0;
  for (BlockId id = 0; id < std::ssize(blocks_); ++id) {
    const Block& block = at(id);
    BATON_CHECK(block.references >= 0) << id;
    const int held = (block.references > 0) + block.quarantined;
    BATON_CHECK(seen[static_cast<size_t>(id)] + held == 1) << "block " << id << " is in two states or in none";
    quarantined += block.quarantined;
    BATON_CHECK((block.heap_index >= 0) == (block.published && block.references == 0)) << id;
    if (!block.published) {
      BATON_CHECK(block.first_child == kNone && block.parent == kNone) << id;
      continue;
    }
    ++published;
    BATON_CHECK(!block.quarantined) << id;
    BATON_CHECK(block.parent == kNone || at(block.parent).published) << id << " continues an unpublished block";
    BATON_CHECK(block.hash == child_hash(block.parent, tokens_of(id))) << id;
    BATON_CHECK(find_child(block.parent, block.hash, tokens_of(id)) == id) << id << " is published twice";
    for (BlockId child = block.first_child, last = kNone; child != kNone; child = at(child).next_sibling) {
      BATON_CHECK(at(child).parent == id && at(child).previous_sibling == last) << id;
      last = child;
    }
  }
  int64_t in_buckets = 0;
  for (BlockId head : buckets_) {
    for (BlockId id = head; id != kNone; id = at(id).next_in_bucket) ++in_buckets;
  }
  BATON_CHECK(in_buckets == published) << in_buckets << " in the table, " << published << " published";
  BATON_CHECK(quarantined == quarantined_) << quarantined;
}

}  // namespace baton
