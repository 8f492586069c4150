#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace baton {

/// Bytes [begin, end) of a text.
struct TextSpan {
  uint32_t begin;
  uint32_t end;
  bool operator==(const TextSpan&) const = default;
};

/// A regular expression in Oniguruma's syntax, as tokenizer.json holds them, run by PCRE2 (JIT).
/// The two differ; the pattern is translated, and what cannot be translated exactly (\X, \K, absent
/// operators, subroutine calls) is refused. The one known difference: in a case-insensitive
/// group Oniguruma also matches several letters against one (ss and ß); PCRE2 doesn't.
/// Immutable; any number of threads may match at once, each with its own Scratch.
class Regex {
 public:
  /// Memory that matching needs: one per thread and moment, reusable for any Regex.
  class Scratch {
   public:
    Scratch();
    ~Scratch();
    Scratch(Scratch&&) noexcept;
    Scratch& operator=(Scratch&&) noexcept;

   private:
    friend class Regex;
    struct Impl;
    std::unique_ptr<Impl> impl_;
  };

  static Result<Regex> compile(std::string_view oniguruma_pattern);
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  /// Replaces `matches` with all matches in `text` (valid UTF-8), left to right, not overlapping;
  /// an empty match is not accepted right behind another match. Fails with kResourceExhausted when
  /// the pattern backtracks beyond the limit on this text.
  Status find_all(std::string_view text, std::vector<TextSpan>& matches, Scratch& scratch) const;

 private:
  struct Impl;
  explicit Regex(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// The translation by itself, for tests.
Result<std::string> translate_oniguruma(std::string_view pattern);

}  // namespace baton
