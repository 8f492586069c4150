#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace baton {

/// Token text → id. Open addressing over one arena; built once.
class StringTable {
 public:
  void reserve(size_t strings, size_t bytes);
  /// The last id given to a text stays.
  void insert(std::string_view text, int32_t id);
  int32_t find(std::string_view text) const;  // -1: none
  size_t size() const { return count_; }

 private:
  struct Slot {
    uint32_t tag = 0;  // upper half of the hash
    int32_t id = -1;
    uint32_t begin = 0;
    uint32_t length = 0;
  };
  void grow(size_t slots);
  std::vector<Slot> slots_;
  std::string arena_;
  size_t count_ = 0;
};

/// Byte-pair encoding, with the results of Hugging Face's model "BPE". Immutable.
class Bpe {
 public:
  struct Config {
    std::vector<std::pair<std::string, int32_t>> vocab;
    std::vector<std::pair<std::string, std::string>> merges;  ///< by rank
    std::optional<std::string> unk_token;
    std::string continuing_subword_prefix;
    std::string end_of_word_suffix;
    bool fuse_unk = false;
    bool byte_fallback = false;
    bool ignore_merges = false;
    bool byte_level = false;  ///< words come as raw bytes that stand for byte-level characters
  };

  /// Words to ids, remembered: 64-byte entries, two to a set. One per thread and moment.
  class Cache;
  /// Memory for one encode at a time.
  struct Scratch;
  struct ScratchDeleter {
    void operator()(Scratch* scratch) const;
  };
  using ScratchPtr = std::unique_ptr<Scratch, ScratchDeleter>;
  static ScratchPtr make_scratch();

  static Result<Bpe> build(Config config);

  /// Appends the ids of one word (a piece of the pre-tokenizer, not empty).
  /// O(n log n) in its length, O(1) when it is short and was seen lately.
  void encode(std::string_view word, std::vector<int32_t>& ids, Scratch& scratch) const;

  int32_t find(std::string_view token) const { return vocab_.find(token); }
  /// Number of entries in the vocabulary (not the highest id).
  size_t size() const { return vocab_.size(); }

 private:
  struct MergeSlot {
    uint64_t pair = ~uint64_t{0};
    int32_t rank = 0;
    int32_t id = 0;
  };
  struct Merge {
    int32_t rank;  // INT32_MAX: the pair doesn't merge
    int32_t id;
  };

  Bpe() = default;
  Status add_merges(const Config& config);
  void detect_safe_split(const Config& config);
  Merge find_merge(int32_t left, int32_t right) const;
  void encode_cached(std::string_view word, std::vector<int32_t>& ids, Scratch& scratch) const;
  void symbols_of(std::string_view word, std::vector<int32_t>& symbols) const;
  void symbols_of_text(std::string_view word, std::vector<int32_t>& symbols) const;
  void merge_short(std::vector<int32_t>& symbols, Scratch& scratch) const;
  void merge_long(std::vector<int32_t>& symbols, Scratch& scratch) const;

  StringTable vocab_;
  StringTable byte_words_;  // byte-level tokens by their raw bytes, for ignore_merges
  std::vector<MergeSlot> merges_;
  uint64_t merge_mask_ = 0;
  std::array<int32_t, 256> byte_symbols_{};  // byte-level: the symbol of a byte; else that of an ASCII character
  std::array<int32_t, 256> fallback_symbols_{};  // <0x00> ... <0xFF>
  int32_t unk_id_ = -1;
  bool fuse_unk_ = false;
  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
  bool byte_level_ = false;
  // No merge joins U+2581 to what stands before it: a long text may be cut there and its parts be
  // cached as words are.
  bool safe_split_ = false;
  std::string prefix_, suffix_;
};

}  // namespace baton
