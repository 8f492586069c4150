#include "kv/block_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <vector>

#include "base/random.h"

namespace baton {
namespace {

using Tokens = std::vector<TokenId>;
using Blocks = std::vector<BlockId>;

Tokens range(TokenId from, int count) {
  Tokens tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), from);
  return tokens;
}

Blocks take(BlockPool& pool, int64_t count) { return std::move(pool.allocate(count)).value(); }

TEST(BlockPool, AllocatesAllOrNothing) {
  BlockPool pool(4, 2, true);
  Blocks three = take(pool, 3);
  EXPECT_EQ(three, (Blocks{0, 1, 2}));
  const Status status = pool.allocate(2).status();
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(), "2 KV blocks are wanted and 1 can be given (1 free, 0 cached; 3 in use, "
                              "0 quarantined, 4 in all)");
  EXPECT_EQ(pool.counts(), (BlockCounts{.total = 4, .free = 1, .cached = 0, .used = 3, .quarantined = 0}));
  pool.release(three);
  EXPECT_EQ(pool.counts().free, 4);
  pool.check_invariants();
}

TEST(BlockPool, MatchesTheLongestPublishedPrefix) {
  BlockPool pool(8, 2, true);
  const Tokens tokens = range(0, 7);
  Blocks blocks = take(pool, 4);
  pool.publish(tokens, blocks);  // three full blocks; the fourth is half full
  pool.release(blocks);
  EXPECT_EQ(pool.counts().cached, 3);
  EXPECT_EQ(pool.peek_prefix(tokens, 7), 6);
  EXPECT_EQ(pool.peek_prefix(tokens, 5), 4);  // the last token must be computed
  Tokens other = tokens;
  other[3] = 99;
  EXPECT_EQ(pool.match_prefix(other, 7), (Blocks{blocks[0]}));
  EXPECT_EQ(pool.references(blocks[0]), 1);
  EXPECT_EQ(pool.match_prefix(tokens, 7), (Blocks{blocks[0], blocks[1], blocks[2]}));
  EXPECT_EQ(pool.references(blocks[0]), 2);
  pool.check_invariants();
}

TEST(BlockPool, FreeingASharedBlockKeepsItAlive) {
  BlockPool pool(2, 2, true);
  const Tokens tokens = range(0, 4);
  Blocks blocks = take(pool, 2);
  pool.publish(tokens, blocks);
  Blocks again = pool.match_prefix(tokens, 4);
  pool.release(blocks);
  EXPECT_FALSE(pool.can_allocate(1));
  pool.release(again);
  EXPECT_TRUE(pool.can_allocate(2));
}

TEST(BlockPool, EvictsTheLeastRecentlyUsedLeafFirst) {
  BlockPool pool(4, 1, true);
  Blocks old_chain = take(pool, 2), young_chain = take(pool, 2);
  pool.publish(range(0, 2), old_chain);
  pool.publish(range(10, 2), young_chain);
  pool.release(old_chain);
  pool.release(young_chain);
  Blocks one = take(pool, 1);
  EXPECT_EQ(one, (Blocks{old_chain[1]}));
  EXPECT_EQ(pool.peek_prefix(range(0, 2), 2), 1);
  pool.release(pool.match_prefix(range(0, 1), 1));  // touched: now the youngest
  Blocks two = take(pool, 2);
  EXPECT_EQ(two, (Blocks{young_chain[1], young_chain[0]}));
  EXPECT_EQ(pool.peek_prefix(range(0, 2), 2), 1);
  pool.check_invariants();
}

TEST(BlockPool, TheOlderOfTwoEqualPrefixesStays) {
  BlockPool pool(6, 1, true);
  Blocks first = take(pool, 2), second = take(pool, 3);
  pool.publish(range(0, 2), first);
  pool.publish(range(0, 3), second);
  EXPECT_EQ(pool.peek_prefix(range(0, 3), 3), 3);
  EXPECT_EQ(pool.match_prefix(range(0, 3), 3), (Blocks{first[0], first[1], second[2]}));
  pool.release(Blocks{first[0], first[1], second[2]});
  pool.release(first);
  // first[0] and first[1] are idle, but second[2], which continues them, is in use: they can still be
  // given away, and what continued them is then forgotten.
  Blocks rest = take(pool, 3);
  EXPECT_EQ(pool.peek_prefix(range(0, 3), 3), 0);
  pool.check_invariants();
  pool.release(rest);
  pool.release(second);
  EXPECT_EQ(pool.counts().free, 6);
}

TEST(BlockPool, ACursorSurvivesTheEvictionOfWhatItNames) {
  BlockPool pool(6, 1, true);
  Blocks first = take(pool, 2), second = take(pool, 3);
  pool.publish(range(0, 2), first);
  PublishCursor cursor;
  pool.publish(range(0, 2), second, &cursor);
  EXPECT_EQ(cursor.blocks, 2);
  EXPECT_EQ(cursor.last, first[1]);
  pool.release(first);
  Blocks rest = take(pool, 3);  // evicts both
  pool.publish(range(0, 3), second, &cursor);
  EXPECT_EQ(cursor.last, second[2]);
  EXPECT_EQ(pool.match_prefix(range(0, 3), 3), second);
  pool.check_invariants();
}

TEST(BlockPool, QuarantinedBlocksAreNotReused) {
  BlockPool pool(4, 1, true);
  Blocks granted = take(pool, 3);
  pool.quarantine(granted);
  EXPECT_EQ(pool.counts(), (BlockCounts{.total = 4, .free = 1, .cached = 0, .used = 0, .quarantined = 3}));
  EXPECT_FALSE(pool.can_allocate(2));
  pool.check_invariants();
  pool.unquarantine(granted);
  EXPECT_TRUE(pool.can_allocate(4));
}

TEST(BlockPool, WithoutPrefixCacheNothingIsFound) {
  BlockPool pool(4, 1, false);
  Blocks blocks = take(pool, 2);
  pool.publish(range(0, 2), blocks);
  EXPECT_TRUE(pool.match_prefix(range(0, 2), 2).empty());
  pool.release(blocks);
  EXPECT_EQ(pool.counts().free, 4);
  pool.clear_cache();
  pool.check_invariants();
}

TEST(BlockPool, ClearCacheKeepsWhatIsUsed) {
  BlockPool pool(4, 1, true);
  Blocks used = take(pool, 1), idle = take(pool, 2);
  pool.publish(range(0, 1), used);
  pool.publish(range(5, 2), idle);
  pool.release(idle);
  pool.clear_cache();
  EXPECT_EQ(pool.counts().free, 3);
  EXPECT_EQ(pool.peek_prefix(range(0, 1), 1), 1);
  pool.check_invariants();
}

/// block_tokens = 2: the pool's hash of a block is mix_bits(parent's hash ^ both tokens), which can be inverted, so
/// anybody can make two prompts collide. (If that formula changes, change it here.)
TEST(BlockPool, ACraftedCollisionServesNobodyElsesPrefix) {
  const auto pack = [](TokenId a, TokenId b) {
    return static_cast<uint64_t>(static_cast<uint32_t>(a)) << 32 | static_cast<uint32_t>(b);
  };
  const uint64_t hash_a = mix_bits(0x6261746f6eull ^ pack(1, 2)), hash_b = mix_bits(0x6261746f6eull ^ pack(3, 4));
  const uint64_t colliding = hash_a ^ pack(5, 6) ^ hash_b;
  ASSERT_EQ(mix_bits(hash_a ^ pack(5, 6)), mix_bits(hash_b ^ colliding));
  const Tokens a = {1, 2, 5, 6, 7, 8};
  const Tokens b = {3, 4, static_cast<TokenId>(colliding >> 32), static_cast<TokenId>(colliding), 7, 8};

  BlockPool pool(8, 2, true);
  Blocks blocks_a = take(pool, 3), blocks_b = take(pool, 3);
  pool.publish(a, blocks_a);
  pool.publish(Tokens(b.begin(), b.begin() + 4), blocks_b);
  // The third blocks have equal tokens and parents with equal hashes, but not the same parent.
  EXPECT_EQ(pool.peek_prefix(b, 6), 4);
  pool.publish(b, blocks_b);
  EXPECT_EQ(pool.match_prefix(a, 6), blocks_a);
  EXPECT_EQ(pool.match_prefix(b, 6), blocks_b);
  pool.check_invariants();
}

TEST(BlockPoolDeathTest, MisuseIsABug) {
  BlockPool pool(4, 1, true);
  Blocks blocks = take(pool, 2);
  EXPECT_DEATH(pool.unquarantine(blocks), "not in quarantine");
  EXPECT_DEATH(pool.release(Blocks{blocks[0], blocks[0]}), "once too often");
  EXPECT_DEATH(pool.release(Blocks{7}), "block 7");
  pool.publish(range(0, 2), blocks);
  EXPECT_DEATH(pool.quarantine(blocks), "cannot be quarantined");
}

/// The pool's rules written down naively: prefixes as whole token strings, every search a scan.
class Oracle {
 public:
  explicit Oracle(int64_t total) : references_(static_cast<size_t>(total), 0), free_(total) {}

  std::vector<BlockId> match(const Tokens& tokens, int64_t max_tokens, int block_tokens) const {
    Blocks found;
    for (int64_t end = block_tokens; end <= std::min<int64_t>(std::ssize(tokens), max_tokens); end += block_tokens) {
      auto it = nodes_.find(Tokens(tokens.begin(), tokens.begin() + end));
      if (it == nodes_.end()) break;
      found.push_back(it->second.block);
    }
    return found;
  }
  void acquire(const Blocks& blocks) {
    for (BlockId block : blocks) ++references_[static_cast<size_t>(block)];
  }
  /// The pool took `blocks` new ones: evict until they fit, then hold them.
  void allocate(const Blocks& blocks) {
    for (BlockId block : blocks) {
      if (free_ == 0) evict();
      --free_;
      ASSERT_EQ(references_[static_cast<size_t>(block)]++, 0);
      ASSERT_TRUE(std::ranges::none_of(nodes_, [&](const auto& node) { return node.second.block == block; }));
    }
  }
  void publish(const Tokens& tokens, const Blocks& blocks, int block_tokens) {
    for (size_t i = 0; i < blocks.size() && (i + 1) * block_tokens <= tokens.size(); ++i) {
      nodes_.try_emplace(Tokens(tokens.begin(), tokens.begin() + (i + 1) * block_tokens), Node{blocks[i], 0});
    }
  }
  void release(const Blocks& blocks) {
    for (size_t i = blocks.size(); i-- > 0;) {
      if (--references_[static_cast<size_t>(blocks[i])] > 0) continue;
      bool published = false;
      for (auto& [tokens, node] : nodes_) {
        if (node.block == blocks[i]) {
          node.last_used = ++tick_;
          published = true;
        }
      }
      if (!published) ++free_;
    }
  }
  int64_t free() const { return free_; }
  int64_t cached() const {
    return std::ranges::count_if(nodes_, [&](const auto& node) { return idle(node.second); });
  }

 private:
  struct Node {
    BlockId block;
    uint64_t last_used;
  };
  bool idle(const Node& node) const { return references_[static_cast<size_t>(node.block)] == 0; }
  static bool extends(const Tokens& longer, const Tokens& prefix) {
    return longer.size() > prefix.size() && std::equal(prefix.begin(), prefix.end(), longer.begin());
  }
  void evict() {
    const std::pair<const Tokens, Node>* best = nullptr;
    bool best_inner = true;
    for (const auto& entry : nodes_) {
      if (!idle(entry.second)) continue;
      const bool inner = std::ranges::any_of(nodes_, [&](const auto& o) { return extends(o.first, entry.first); });
      if (best == nullptr || std::pair(inner, entry.second.last_used) < std::pair(best_inner, best->second.last_used)) {
        best = &entry;
        best_inner = inner;
      }
    }
    ASSERT_NE(best, nullptr);
    const Tokens root = best->first;
    for (auto it = nodes_.begin(); it != nodes_.end();) {
      const bool gone = it->first == root || extends(it->first, root);
      if (gone && idle(it->second)) ++free_;
      it = gone ? nodes_.erase(it) : std::next(it);
    }
  }

  std::map<Tokens, Node> nodes_;
  std::vector<int> references_;
  int64_t free_;
  uint64_t tick_ = 0;
};

TEST(BlockPool, RandomWalkEqualsTheOracle) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    Random random(seed);
    const int block_tokens = 1 + static_cast<int>(random.below(3));
    const int64_t total = 6 + static_cast<int64_t>(random.below(30));
    BlockPool pool(total, block_tokens, true);
    Oracle oracle(total);
    struct Sequence {
      Tokens tokens;
      Blocks blocks;
      PublishCursor cursor;
    };
    std::vector<Sequence> live;
    std::vector<Blocks> quarantined;
    const auto random_tokens = [&] {  // few values, so that prefixes are shared
      Tokens tokens(1 + random.below(static_cast<uint64_t>(6 * block_tokens)));
      for (TokenId& token : tokens) token = static_cast<TokenId>(random.below(2));
      return tokens;
    };

    for (int op = 0; op < 3000 && !HasFatalFailure(); ++op) {
      const uint64_t dice = random.below(100);
      if (dice < 35) {  // a new sequence: match, allocate the rest
        Sequence sequence{random_tokens(), {}, {}};
        const int64_t most = std::ssize(sequence.tokens) - static_cast<int64_t>(random.below(2));
        sequence.blocks = pool.match_prefix(sequence.tokens, most);
        ASSERT_EQ(sequence.blocks, oracle.match(sequence.tokens, most, block_tokens)) << "seed " << seed << " op " << op;
        oracle.acquire(sequence.blocks);
        const int64_t need = (std::ssize(sequence.tokens) + block_tokens - 1) / block_tokens;
        const size_t matched = sequence.blocks.size();
        if (pool.allocate_into(need - std::ssize(sequence.blocks), &sequence.blocks).ok()) {
          oracle.allocate(Blocks(sequence.blocks.begin() + static_cast<int64_t>(matched), sequence.blocks.end()));
          live.push_back(std::move(sequence));
        } else {
          pool.release(sequence.blocks);
          oracle.release(sequence.blocks);
        }
      } else if (dice < 55 && !live.empty()) {  // publish a part
        Sequence& sequence = live[random.below(live.size())];
        const Tokens done(sequence.tokens.begin(),
                          sequence.tokens.begin() + static_cast<int64_t>(random.below(sequence.tokens.size() + 1)));
        if (random.chance(0.5)) {
          pool.publish(done, sequence.blocks);
        } else {
          pool.publish(done, sequence.blocks, &sequence.cursor);
        }
        oracle.publish(done, sequence.blocks, block_tokens);
      } else if (dice < 65 && !live.empty()) {  // grow by one token
        Sequence& sequence = live[random.below(live.size())];
        if (std::ssize(sequence.tokens) % block_tokens == 0) {
          if (!pool.allocate_into(1, &sequence.blocks).ok()) continue;
          oracle.allocate({sequence.blocks.back()});
        }
        sequence.tokens.push_back(static_cast<TokenId>(random.below(2)));
      } else if (dice < 90 && !live.empty()) {
        const size_t which = random.below(live.size());
        pool.release(live[which].blocks);
        oracle.release(live[which].blocks);
        live.erase(live.begin() + static_cast<int64_t>(which));
      } else if (dice < 94 && quarantined.size() < 3) {
        const int64_t count = 1 + static_cast<int64_t>(random.below(2));
        Result<Blocks> blocks = pool.allocate(count);
        if (!blocks.ok()) continue;
        oracle.allocate(*blocks);
        pool.quarantine(*blocks);
        quarantined.push_back(*blocks);
      } else if (dice < 99 && !quarantined.empty()) {
        pool.unquarantine(quarantined.back());
        oracle.release(quarantined.back());
        quarantined.pop_back();
      } else {
        const Tokens tokens = random_tokens();
        const auto expected = oracle.match(tokens, 1000, block_tokens);
        ASSERT_EQ(pool.peek_prefix(tokens, 1000), std::ssize(expected) * block_tokens);
      }
      pool.check_invariants();
      int64_t in_quarantine = 0;
      for (const Blocks& blocks : quarantined) in_quarantine += std::ssize(blocks);
      const BlockCounts counts = pool.counts();
      ASSERT_EQ(counts.free, oracle.free()) << "seed " << seed << " op " << op;
      ASSERT_EQ(counts.cached, oracle.cached()) << "seed " << seed << " op " << op;
      ASSERT_EQ(counts.quarantined, in_quarantine);
    }
    for (const Sequence& sequence : live) pool.release(sequence.blocks);
    for (const Blocks& blocks : quarantined) pool.unquarantine(blocks);
    pool.clear_cache();
    pool.check_invariants();
    EXPECT_EQ(pool.counts().free, total);
  }
}

}  // namespace
}  // namespace baton
