#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace baton {

/// One entry of tokenizer.json's added_tokens.
struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = true;
  bool special = false;
};

/// Finds added tokens in text: the longest one at the leftmost place, as an Aho-Corasick automaton
/// with leftmost-longest matching would. Immutable after the last add().
class AddedTokenMatcher {
 public:
  struct Match {
    uint32_t begin;
    uint32_t end;
    int32_t id;  // -1: text between tokens
  };

  AddedTokenMatcher() : nodes_(1) {}
  /// Matches `pattern`; `token` says how. Of two tokens with the same pattern the last one stays.
  void add(std::string_view pattern, const AddedToken& token);
  bool empty() const { return tokens_.empty(); }
  /// Cuts `text` (valid UTF-8) into tokens and what is between them; replaces `out`. With lstrip
  /// and rstrip a token takes the white space beside it.
  void split(std::string_view text, std::vector<Match>& out) const;

 private:
  struct Rule {
    int32_t id;
    bool single_word, lstrip, rstrip;
  };
  struct Node {
    int32_t rule = -1;
    std::vector<std::pair<unsigned char, uint32_t>> edges;  // by byte
  };

  std::vector<Node> nodes_;
  std::vector<Rule> tokens_;
  std::array<bool, 256> can_start_{};
};

}  // namespace baton
