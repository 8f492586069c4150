#include "text/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "text/normalizer.h"
#include "text/unicode.h"

namespace baton {
namespace {

constexpr size_t kCacheSets = 1 << 14;  // of two 64-byte entries: 2 MiB
constexpr size_t kMaxCachedBytes = 22;
constexpr size_t kMaxCachedIds = 8;
constexpr size_t kShortWord = 48;  // symbols; longer words use a heap
constexpr int32_t kNoMerge = std::numeric_limits<int32_t>::max();
constexpr std::string_view kMetaspace = "\xE2\x96\x81";

uint64_t mix(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a ^ 0x9E3779B97F4A7C15ULL) * (b ^ 0xD6E8FEB86659FD93ULL);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t hash_bytes(std::string_view text) {
  uint64_t hash = text.size();
  const char* at = text.data();
  size_t left = text.size();
  uint64_t word;
  for (; left >= 8; left -= 8, at += 8) {
    std::memcpy(&word, at, 8);
    hash = mix(hash, word);
  }
  if (left > 0) {
    word = 0;
    std::memcpy(&word, at, left);
    hash = mix(hash, word);
  }
  return mix(hash, 0x2545F4914F6CDD1DULL);
}

uint64_t pair_key(int32_t left, int32_t right) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
}

size_t slots_for(size_t items) {
  size_t slots = 16;
  while (slots * 5 < items * 8) slots *= 2;  // at most 5/8 full
  return slots;
}

}  // namespace

void StringTable::grow(size_t count) {
  std::vector<Slot> old(count);
  old.swap(slots_);
  for (const Slot& slot : old) {
    if (slot.id < 0) continue;
    const uint64_t hash = hash_bytes(std::string_view(arena_).substr(slot.begin, slot.length));
    size_t at = hash & (slots_.size() - 1);
    while (slots_[at].id >= 0) at = (at + 1) & (slots_.size() - 1);
    slots_[at] = slot;
  }
}

void StringTable::reserve(size_t strings, size_t bytes) {
  arena_.reserve(bytes);
  if (slots_for(strings) > slots_.size()) grow(slots_for(strings));
}

void StringTable::insert(std::string_view text, int32_t id) {
  if (slots_for(count_ + 1) > slots_.size()) grow(slots_for(count_ + 1));
  const uint64_t hash = hash_bytes(text);
  const auto tag = static_cast<uint32_t>(hash >> 32);
  size_t at = hash & (slots_.size() - 1);
  for (; slots_[at].id >= 0; at = (at + 1) & (slots_.size() - 1)) {
    const Slot& slot = slots_[at];
    if (slot.tag == tag && std::string_view(arena_).substr(slot.begin, slot.length) == text) {
      slots_[at].id = id;
      return;
    }
  }
  slots_[at] = {tag, id, static_cast<uint32_t>(arena_.size()), static_cast<uint32_t>(text.size())};
  arena_.append(text);
  ++count_;
}

int32_t StringTable::find(std::string_view text) const {
  if (slots_.empty()) return -1;
  const uint64_t hash = hash_bytes(text);
  const auto tag = static_cast<uint32_t>(hash >> 32);
  for (size_t at = hash & (slots_.size() - 1); slots_[at].id >= 0; at = (at + 1) & (slots_.size() - 1)) {
    const Slot& slot = slots_[at];
    if (slot.tag == tag && slot.length == text.size() && std::memcmp(arena_.data() + slot.begin, text.data(), text.size()) == 0) {
      return slot.id;
    }
  }
  return -1;
}

class Bpe::Cache {
 public:
  struct alignas(64) Entry {
    std::array<uint64_t, 3> key{};  // the word, zero padded; its length in the last byte
    std::array<int32_t, kMaxCachedIds> ids{};
    uint8_t count = 0;  // 0: free
  };

  Cache() : sets_(std::make_unique<std::array<Entry, 2>[]>(kCacheSets)) {}

  static std::array<uint64_t, 3> key_of(std::string_view word) {
    std::array<uint64_t, 3> key{};
    std::memcpy(key.data(), word.data(), word.size());
    key[2] |= static_cast<uint64_t>(word.size()) << 56;
    return key;
  }
  std::array<Entry, 2>& set_of(const std::array<uint64_t, 3>& key) {
    return sets_[mix(mix(key[0], key[1]), key[2]) & (kCacheSets - 1)];
  }

 private:
  std::unique_ptr<std::array<Entry, 2>[]> sets_;
};

struct Bpe::Scratch {
  struct Candidate {
    int32_t rank;
    uint32_t at;
    int32_t id;
    // For a heap whose top is the lowest rank, the leftmost of equals.
    bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };
  Cache cache;
  std::vector<int32_t> symbols;
  std::vector<Merge> merges;
  std::vector<Candidate> heap;
  std::vector<int32_t> previous, next;
};

void Bpe::ScratchDeleter::operator()(Scratch* scratch) const { delete scratch; }
Bpe::ScratchPtr Bpe::make_scratch() { return ScratchPtr(new Scratch); }

Result<Bpe> Bpe::build(Config config) {
  Bpe bpe;
  size_t bytes = 0;
  for (const auto& [token, id] : config.vocab) bytes += token.size();
  bpe.vocab_.reserve(config.vocab.size(), bytes);
  for (const auto& [token, id] : config.vocab) bpe.vocab_.insert(token, id);
  if (bpe.vocab_.size() != config.vocab.size()) return invalid_argument("tokenizer.json: model.vocab: a token is there twice");

  bpe.prefix_ = config.continuing_subword_prefix;
  bpe.suffix_ = config.end_of_word_suffix;
  bpe.fuse_unk_ = config.fuse_unk;
  bpe.byte_fallback_ = config.byte_fallback;
  bpe.ignore_merges_ = config.ignore_merges;
  bpe.byte_level_ = config.byte_level;
  // An unknown token that is not in the vocabulary is taken for none; byte-level files have such.
  if (config.unk_token) bpe.unk_id_ = bpe.vocab_.find(*config.unk_token);
  bpe.byte_symbols_.fill(-1);
  for (int b = 0; b < 256; ++b) {
    const char byte = static_cast<char>(b);
    if (config.byte_level) {
      bpe.byte_symbols_[b] = bpe.vocab_.find(to_byte_level({&byte, 1}));
    } else if (b < 128) {
      bpe.byte_symbols_[b] = bpe.vocab_.find({&byte, 1});
    }
    bpe.fallback_symbols_[b] = bpe.vocab_.find(fmt::format("<0x{:02X}>", b));
  }
  if (config.byte_level && config.ignore_merges) {
    bpe.byte_words_.reserve(config.vocab.size(), bytes);
    for (const auto& [token, id] : config.vocab) {
      std::string raw;
      size_t at = 0;
      while (at < token.size()) {
        const auto [c, length] = unicode::decode(token.data() + at);
        const int byte = byte_of_level_char(c);
        if (byte < 0) break;
        raw += static_cast<char>(byte);
        at += length;
      }
      if (at == token.size()) bpe.byte_words_.insert(raw, id);
    }
  }
  BATON_RETURN_IF_ERROR(bpe.add_merges(config));
  bpe.detect_safe_split(config);
  return bpe;
}

Status Bpe::add_merges(const Config& config) {
  merges_.resize(slots_for(config.merges.size()));
  merge_mask_ = merges_.size() - 1;
  int32_t rank = 0;
  for (const auto& [left, right] : config.merges) {
    const int32_t left_id = vocab_.find(left), right_id = vocab_.find(right);
    if (right.size() < prefix_.size()) return invalid_argument("model.merges[{}]: \"{}\" is shorter than the prefix", rank, right);
    const std::string joined = left + right.substr(prefix_.size());
    const int32_t id = vocab_.find(joined);
    if (left_id < 0 || right_id < 0 || id < 0) {
      return invalid_argument("model.merges[{}]: token \"{}\" is not in the vocabulary", rank,
                              left_id < 0 ? left : right_id < 0 ? right : joined);
    }
    const uint64_t key = pair_key(left_id, right_id);
    size_t at = mix(key, 0) & merge_mask_;
    while (merges_[at].pair != ~uint64_t{0} && merges_[at].pair != key) at = (at + 1) & merge_mask_;
    merges_[at] = {key, rank, id};
    ++rank;
  }
  return {};
}

void Bpe::detect_safe_split(const Config& config) {
  if (byte_level_ || ignore_merges_ || !prefix_.empty() || !suffix_.empty() || vocab_.find(kMetaspace) < 0) return;
  for (const auto& [left, right] : config.merges) {
    const std::string joined = left + right;
    for (size_t at = joined.find(kMetaspace, 1); at != std::string::npos; at = joined.find(kMetaspace, at + 1)) {
      if (!std::string_view(joined).substr(0, at).ends_with(kMetaspace)) return;
    }
  }
  safe_split_ = true;
}

Bpe::Merge Bpe::find_merge(int32_t left, int32_t right) const {
  const uint64_t key = pair_key(left, right);
  for (size_t at = mix(key, 0) & merge_mask_;; at = (at + 1) & merge_mask_) {
    const MergeSlot& slot = merges_[at];
    if (slot.pair == key) return {slot.rank, slot.id};
    if (slot.pair == ~uint64_t{0}) return {kNoMerge, 0};
  }
}

void Bpe::encode(std::string_view word, std::vector<int32_t>& ids, Scratch& scratch) const {
  if (!safe_split_) {
    encode_cached(word, ids, scratch);
    return;
  }
  size_t begin = 0;
  for (size_t at = word.find(kMetaspace, 1); at != std::string_view::npos; at = word.find(kMetaspace, at + kMetaspace.size())) {
    if (word.substr(begin, at - begin).ends_with(kMetaspace)) continue;  // inside a run
    encode_cached(word.substr(begin, at - begin), ids, scratch);
    begin = at;
  }
  encode_cached(word.substr(begin), ids, scratch);
}

void Bpe::encode_cached(std::string_view word, std::vector<int32_t>& ids, Scratch& scratch) const {
  Cache::Entry* slot = nullptr;
  std::array<uint64_t, 3> key;
  if (word.size() <= kMaxCachedBytes) {
    key = Cache::key_of(word);
    auto& set = scratch.cache.set_of(key);
    for (Cache::Entry& entry : set) {
      if (entry.key == key && entry.count != 0) {
        ids.insert(ids.end(), entry.ids.begin(), entry.ids.begin() + entry.count);
        return;
      }
    }
    std::swap(set[0], set[1]);  // the older of the two is replaced
    slot = &set[0];
    slot->count = 0;
  }

  const size_t begin = ids.size();
  int32_t whole = -1;
  if (ignore_merges_) whole = byte_level_ ? byte_words_.find(word) : vocab_.find(word);
  if (whole >= 0) {
    ids.push_back(whole);
  } else {
    std::vector<int32_t>& symbols = scratch.symbols;
    symbols.clear();
    symbols_of(word, symbols);
    if (symbols.size() <= kShortWord) {
      merge_short(symbols, scratch);
    } else {
      merge_long(symbols, scratch);
    }
    ids.insert(ids.end(), symbols.begin(), symbols.end());
  }
  const size_t count = ids.size() - begin;
  if (slot != nullptr && count > 0 && count <= kMaxCachedIds) {
    slot->key = key;
    slot->count = static_cast<uint8_t>(count);
    std::copy(ids.begin() + static_cast<ptrdiff_t>(begin), ids.end(), slot->ids.begin());
  }
}

void Bpe::symbols_of(std::string_view word, std::vector<int32_t>& symbols) const {
  if (!byte_level_ || !prefix_.empty() || !suffix_.empty()) {
    symbols_of_text(byte_level_ ? to_byte_level(word) : word, symbols);
    return;
  }
  for (char c : word) {
    const int32_t symbol = byte_symbols_[static_cast<unsigned char>(c)];
    if (symbol < 0) {  // an alphabet with holes: unknown tokens come into it
      symbols.clear();
      symbols_of_text(to_byte_level(word), symbols);
      return;
    }
    symbols.push_back(symbol);
  }
}

void Bpe::symbols_of_text(std::string_view word, std::vector<int32_t>& symbols) const {
  bool unknown = false;  // an unknown token waits to be added, so that more may fuse with it
  std::string with_affix;
  for (size_t at = 0; at < word.size();) {
    const uint32_t length = unicode::sequence_length(word[at]);
    std::string_view c = word.substr(at, length);
    const bool first = at == 0, last = at + length == word.size();
    at += length;
    int32_t id;
    if ((!first && !prefix_.empty()) || (last && !suffix_.empty())) {
      with_affix = (first ? std::string() : prefix_) + std::string(c) + (last ? suffix_ : std::string());
      c = with_affix;
      id = vocab_.find(c);
    } else if (length == 1 && !byte_level_) {
      id = byte_symbols_[static_cast<unsigned char>(c.front())];
    } else {
      id = vocab_.find(c);
    }
    if (id >= 0) {
      if (unknown) symbols.push_back(unk_id_);
      unknown = false;
      symbols.push_back(id);
      continue;
    }
    if (byte_fallback_ && std::all_of(c.begin(), c.end(), [&](char b) { return fallback_symbols_[static_cast<unsigned char>(b)] >= 0; })) {
      // A waiting unknown token stays behind these bytes, as it does in `tokenizers`.
      for (char b : c) symbols.push_back(fallback_symbols_[static_cast<unsigned char>(b)]);
      continue;
    }
    if (unk_id_ >= 0) {
      if (unknown && !fuse_unk_) symbols.push_back(unk_id_);
      unknown = true;
    }
  }
  if (unknown) symbols.push_back(unk_id_);
}

// The lowest rank first, the leftmost of equals: over and over on a small array.
void Bpe::merge_short(std::vector<int32_t>& symbols, Scratch& scratch) const {
  size_t count = symbols.size();
  if (count < 2) return;
  std::vector<Merge>& merges = scratch.merges;
  merges.resize(count);
  for (size_t i = 0; i + 1 < count; ++i) merges[i] = find_merge(symbols[i], symbols[i + 1]);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (merges[i].rank < merges[best].rank) best = i;
    }
    if (merges[best].rank == kNoMerge) break;
    symbols[best] = merges[best].id;
    std::copy(symbols.begin() + static_cast<ptrdiff_t>(best) + 2, symbols.begin() + static_cast<ptrdiff_t>(count),
              symbols.begin() + static_cast<ptrdiff_t>(best) + 1);
    std::copy(merges.begin() + static_cast<ptrdiff_t>(best) + 2, merges.begin() + static_cast<ptrdiff_t>(count),
              merges.begin() + static_cast<ptrdiff_t>(best) + 1);
    --count;
    if (best > 0) merges[best - 1] = find_merge(symbols[best - 1], symbols[best]);
    if (best + 1 < count) merges[best] = find_merge(symbols[best], symbols[best + 1]);
  }
  symbols.resize(count);
}

// The same order by a heap over a linked list. Entries of pairs that are gone stay in the heap; they
// are known by the id that they would give, since a symbol's text only ever grows.
void Bpe::merge_long(std::vector<int32_t>& symbols, Scratch& scratch) const {
  const auto count = static_cast<int32_t>(symbols.size());
  auto& heap = scratch.heap;
  auto& previous = scratch.previous;
  auto& next = scratch.next;
  heap.clear();
  previous.resize(symbols.size());
  next.resize(symbols.size());
  constexpr int32_t kGone = -2;
  for (int32_t i = 0; i < count; ++i) {
    previous[static_cast<size_t>(i)] = i - 1;
    next[static_cast<size_t>(i)] = i + 1 < count ? i + 1 : -1;
    if (i + 1 < count) {
      const Merge merge = find_merge(symbols[static_cast<size_t>(i)], symbols[static_cast<size_t>(i) + 1]);
      if (merge.rank != kNoMerge) heap.push_back({merge.rank, static_cast<uint32_t>(i), merge.id});
    }
  }
  std::make_heap(heap.begin(), heap.end());
  const auto push = [&](int32_t left, int32_t right) {
    const Merge merge = find_merge(symbols[static_cast<size_t>(left)], symbols[static_cast<size_t>(right)]);
    if (merge.rank == kNoMerge) return;
    heap.push_back({merge.rank, static_cast<uint32_t>(left), merge.id});
    std::push_heap(heap.begin(), heap.end());
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Scratch::Candidate top = heap.back();
    heap.pop_back();
    const int32_t right = next[top.at];
    if (right < 0) continue;  // gone, or the last symbol
    const Merge merge = find_merge(symbols[top.at], symbols[static_cast<size_t>(right)]);
    if (merge.rank == kNoMerge || merge.id != top.id) continue;
    symbols[top.at] = top.id;
    const int32_t behind = next[static_cast<size_t>(right)];
    next[static_cast<size_t>(right)] = kGone;
    next[top.at] = behind;
    if (behind >= 0) previous[static_cast<size_t>(behind)] = static_cast<int32_t>(top.at);
    if (previous[top.at] >= 0) push(previous[top.at], static_cast<int32_t>(top.at));
    if (behind >= 0) push(static_cast<int32_t>(top.at), behind);
  }
  size_t kept = 0;
  for (int32_t i = 0; i < count; ++i) {
    if (next[static_cast<size_t>(i)] != kGone) symbols[kept++] = symbols[static_cast<size_t>(i)];
  }
  symbols.resize(kept);
}

}  // namespace baton
