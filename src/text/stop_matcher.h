#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace baton {

/// Streams text through while looking for stop strings. What could still become a stop string is
/// held back, never more than the longest stop string less one byte; all else goes on at once.
/// The first stop string to be *complete* wins (of two that end at the same byte, the longer one).
/// One per sequence; not thread-safe. Cost: O(1) amortised per byte and stop string.
class StopMatcher {
 public:
  struct Out {
    std::string text;      ///< text that can go to the client
    bool stopped = false;  ///< a stop string is complete; what came after it is dropped
    size_t which = 0;      ///< index in `stops` of the one that matched, when stopped
  };

  /// Empty stop strings are ignored. With `include_stop` the matched string is part of the text.
  explicit StopMatcher(std::vector<std::string> stops, bool include_stop = false);

  /// After a stop every further push returns an empty, stopped Out.
  Out push(std::string_view text);
  /// The end of the sequence: what was held back, since it can no longer become a stop string.
  std::string flush();

 private:
  struct Stop {
    std::string text;
    std::vector<size_t> border;  // Knuth-Morris-Pratt: longest proper border of each prefix
    size_t matched = 0;          // bytes of `text` that the end of the stream matches
    size_t index = 0;            // in the caller's list
  };

  std::vector<Stop> stops_;
  bool include_stop_;
  bool stopped_ = false;
  size_t which_ = 0;
  std::string held_;
};

}  // namespace baton
