#include "text/splitter.h"

#include <algorithm>
#include <utility>

namespace baton {

Result<Pattern> Pattern::regex(std::string_view oniguruma_pattern, bool allow_word_matcher) {
  Pattern out;
  if (allow_word_matcher) out.word_matcher_ = find_word_matcher(oniguruma_pattern);
  if (out.word_matcher_ == nullptr) {
    BATON_ASSIGN_OR_RETURN(out.regex_, Regex::compile(oniguruma_pattern));
  }
  return out;
}

Result<Pattern> Pattern::literal(std::string text) {
  if (text.empty()) return regex("");  // matches between all characters
  Pattern out;
  out.literal_ = std::move(text);
  return out;
}

Pattern Pattern::any_of(unicode::CharFlag flag) {
  Pattern out;
  out.flag_ = flag;
  return out;
}

Status Pattern::find(std::string_view text, std::vector<TextSpan>& matches, Regex::Scratch& scratch) const {
  matches.clear();
  if (word_matcher_ != nullptr) {
    word_matcher_(text, matches);
    return {};
  }
  if (regex_) return regex_->find_all(text, matches, scratch);
  if (!literal_.empty()) {
    for (size_t at = text.find(literal_); at != std::string_view::npos; at = text.find(literal_, at + literal_.size())) {
      matches.push_back({static_cast<uint32_t>(at), static_cast<uint32_t>(at + literal_.size())});
    }
    return {};
  }
  const unicode::CharTable& table = unicode::CharTable::instance();
  for (size_t at = 0; at < text.size();) {
    const auto [c, length] = unicode::decode(text.data() + at);
    if (table[c] & flag_) matches.push_back({static_cast<uint32_t>(at), static_cast<uint32_t>(at + length)});
    at += length;
  }
  return {};
}

Result<std::string> Pattern::replace_all(std::string_view text, std::string_view content) const {
  std::string out;
  size_t copied = 0;
  if (!literal_.empty()) {
    for (size_t at = text.find(literal_); at != std::string_view::npos; at = text.find(literal_, copied)) {
      out.append(text.substr(copied, at - copied));
      out.append(content);
      copied = at + literal_.size();
    }
  } else {
    std::vector<TextSpan> matches;
    Regex::Scratch scratch;
    BATON_RETURN_IF_ERROR(find(text, matches, scratch));
    for (const TextSpan& match : matches) {
      out.append(text.substr(copied, match.begin - copied));
      out.append(content);
      copied = match.end;
    }
  }
  out.append(text.substr(copied));
  return out;
}

namespace {

struct Segment {
  TextSpan span;
  bool is_match;
};

// Neighbours joined as `behavior` says; `segments` in text order.
std::vector<TextSpan> join(const std::vector<Segment>& segments, SplitBehavior behavior) {
  std::vector<TextSpan> out;
  bool previous_match = false;
  const auto fold = [&](const Segment& segment, bool joins, bool backwards) {
    if (joins && !out.empty()) {
      (backwards ? out.back().begin : out.back().end) = backwards ? segment.span.begin : segment.span.end;
    } else {
      out.push_back(segment.span);
    }
    previous_match = segment.is_match;
  };
  if (behavior == SplitBehavior::kMergedWithNext) {
    for (auto at = segments.rbegin(); at != segments.rend(); ++at) fold(*at, at->is_match && !previous_match, true);
    std::reverse(out.begin(), out.end());
    return out;
  }
  for (const Segment& segment : segments) {
    fold(segment, behavior == SplitBehavior::kContiguous ? segment.is_match == previous_match : segment.is_match && !previous_match,
         false);
  }
  return out;
}

}  // namespace

void split_at(const std::vector<TextSpan>& matches, size_t size, SplitBehavior behavior, bool invert, uint32_t offset,
              std::vector<TextSpan>& pieces) {
  const auto add = [&](uint32_t begin, uint32_t end) {
    if (begin < end) pieces.push_back({begin + offset, end + offset});
  };
  const auto end = static_cast<uint32_t>(size);
  uint32_t at = 0;
  if (behavior == SplitBehavior::kIsolated || behavior == SplitBehavior::kRemoved) {
    const bool keep_matches = behavior == SplitBehavior::kIsolated || invert;
    const bool keep_gaps = behavior == SplitBehavior::kIsolated || !invert;
    for (const TextSpan& match : matches) {
      if (keep_gaps) add(at, match.begin);
      if (keep_matches) add(match.begin, match.end);
      at = match.end;
    }
    if (keep_gaps) add(at, end);
    return;
  }
  std::vector<Segment> segments;
  segments.reserve(matches.size() * 2 + 1);
  for (const TextSpan& match : matches) {
    if (at != match.begin) segments.push_back({{at, match.begin}, invert});
    segments.push_back({match, !invert});
    at = match.end;
  }
  if (at != end) segments.push_back({{at, end}, invert});
  for (const TextSpan& span : join(segments, behavior)) add(span.begin, span.end);
}

}  // namespace baton
