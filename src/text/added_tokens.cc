#include "text/added_tokens.h"

#include <algorithm>
#include <utility>

#include "text/unicode.h"

namespace baton {
namespace {

bool has(std::string_view text, size_t at, unicode::CharFlag flag) {
  return (unicode::CharTable::instance()[unicode::decode(text.data() + at).code_point] & flag) != 0;
}

size_t spaces_before(std::string_view text, size_t at) {
  while (at > 0) {
    const size_t last = unicode::previous(text, at);
    if (!has(text, last, unicode::kRustSpace)) break;
    at = last;
  }
  return at;
}

size_t spaces_behind(std::string_view text, size_t at) {
  while (at < text.size() && has(text, at, unicode::kRustSpace)) at += unicode::sequence_length(text[at]);
  return at;
}

}  // namespace

void AddedTokenMatcher::add(std::string_view pattern, const AddedToken& token) {
  if (pattern.empty()) return;
  uint32_t node = 0;
  for (char c : pattern) {
    const auto byte = static_cast<unsigned char>(c);
    auto& edges = nodes_[node].edges;
    auto at = std::lower_bound(edges.begin(), edges.end(), byte, [](const auto& e, unsigned char b) { return e.first < b; });
    if (at != edges.end() && at->first == byte) {
      node = at->second;
    } else {
      const auto next = static_cast<uint32_t>(nodes_.size());
      edges.insert(at, {byte, next});
      nodes_.emplace_back();
      node = next;
    }
  }
  nodes_[node].rule = static_cast<int32_t>(tokens_.size());
  tokens_.push_back({token.id, token.single_word, token.lstrip, token.rstrip});
  can_start_[static_cast<unsigned char>(pattern.front())] = true;
}

void AddedTokenMatcher::split(std::string_view text, std::vector<Match>& out) const {
  out.clear();
  const auto size = static_cast<uint32_t>(text.size());
  uint32_t done = 0;  // everything before is in `out`
  uint32_t at = 0;
  while (!tokens_.empty() && at < size) {
    while (at < size && !can_start_[static_cast<unsigned char>(text[at])]) ++at;
    if (at == size) break;
    int32_t rule_index = -1;
    uint32_t match_end = at;
    uint32_t node = 0;
    for (uint32_t i = at; i < size; ++i) {
      const auto& edges = nodes_[node].edges;
      const auto byte = static_cast<unsigned char>(text[i]);
      const auto edge = std::lower_bound(edges.begin(), edges.end(), byte, [](const auto& e, unsigned char b) { return e.first < b; });
      if (edge == edges.end() || edge->first != byte) break;
      node = edge->second;
      if (nodes_[node].rule >= 0) {
        rule_index = nodes_[node].rule;
        match_end = i + 1;
      }
    }
    if (rule_index < 0) {
      ++at;
      continue;
    }
    const Rule& rule = tokens_[static_cast<size_t>(rule_index)];
    uint32_t begin = at, end = match_end;
    at = match_end;  // a match that is discarded is passed over all the same
    if (rule.single_word) {
      const bool word_before = begin > 0 && has(text, unicode::previous(text, begin), unicode::kRustWord);
      const bool word_behind = end < size && has(text, end, unicode::kRustWord);
      if (word_before || word_behind) continue;
    }
    // The white space may have gone to the token before it.
    if (rule.lstrip) begin = std::max(static_cast<uint32_t>(spaces_before(text, begin)), done);
    if (rule.rstrip) end = static_cast<uint32_t>(spaces_behind(text, end));
    if (done < begin) out.push_back({done, begin, -1});
    out.push_back({begin, end, rule.id});
    done = end;
  }
  if (done < size) out.push_back({done, size, -1});
}

}  // namespace baton
