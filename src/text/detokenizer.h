#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "text/tokenizer.h"

namespace baton {

/// Text of one sequence, token by token, never half a character: what may still change is held back.
/// All that push() and flush() return, joined, is the tokenizer's decode() of all ids (with one
/// exception for ill-formed byte tokens, see StreamDecoder). O(1) amortised per token.
/// The tokenizer must outlive it. Not thread-safe; may move between threads.
class Detokenizer {
 public:
  /// `prompt_tail`: the last few ids of the prompt (about 8 are enough), so that the text continues it:
  /// a first word keeps its space, a character begun in the prompt is completed. Its own text is not
  /// returned.
  Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens, std::span<const int32_t> prompt_tail = {});
  ~Detokenizer();
  Detokenizer(Detokenizer&&) noexcept;
  Detokenizer& operator=(Detokenizer&&) noexcept;

  /// Newly complete text; may be empty.
  std::string push(int32_t id);
  /// The end: what was held back, U+FFFD for incomplete characters.
  std::string flush();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace baton
