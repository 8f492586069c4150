#pragma once

#include <string>
#include <variant>
#include <vector>

#include "base/status.h"
#include "text/normalizer.h"
#include "text/splitter.h"

namespace baton {

/// The pre-tokenizer of a tokenizer.json, flattened from its Sequences. Immutable.
class PreTokenizer {
 public:
  struct Split { Pattern pattern; SplitBehavior behavior; bool invert; };
  /// With `use_regex` first split by GPT-2's pattern. Then every byte becomes its printable
  /// character; for the last step that is left to the model, which works on the bytes.
  struct ByteLevel { bool add_prefix_space; std::optional<Pattern> pattern; };
  enum class Prepend { kFirst, kNever, kAlways };
  struct Metaspace { std::string replacement; Prepend prepend; bool split; };
  using Step = std::variant<Split, ByteLevel, Metaspace>;

  /// Pieces of one part of the input, and memory to make them in; reusable.
  struct Pieces {
    std::string_view text;
    std::vector<TextSpan> spans;  ///< of `text`, none empty
    size_t origin_bytes = 0;      ///< see TextPart

    std::string buffers[2];
    std::vector<TextSpan> next;
    std::vector<TextSpan> matches;
  };

  PreTokenizer() = default;
  explicit PreTokenizer(std::vector<Step> steps) : steps_(std::move(steps)) {}

  /// True when the pieces hold raw bytes that stand for byte-level characters.
  bool ends_in_byte_level() const { return !steps_.empty() && std::holds_alternative<ByteLevel>(steps_.back()); }

  Status apply(TextPart part, Pieces& pieces, Regex::Scratch& scratch) const;

 private:
  Status apply_split(const Pattern& pattern, SplitBehavior behavior, bool invert, Pieces& pieces, Regex::Scratch& scratch) const;
  std::vector<Step> steps_;
};

}  // namespace baton
