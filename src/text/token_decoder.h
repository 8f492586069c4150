#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/status.h"
#include "text/splitter.h"

namespace baton {

/// The decoder of a tokenizer.json, flattened from its Sequences: token strings to text. Immutable.
class TokenDecoder {
 public:
  struct ByteLevel {};
  struct ByteFallback {};
  struct Fuse {};
  struct Strip { std::string content; size_t start, stop; };  // content: one character
  struct Replace { Pattern pattern; std::string content; };
  struct Metaspace { std::string replacement; bool drop_first; };
  using Step = std::variant<ByteLevel, ByteFallback, Fuse, Strip, Replace, Metaspace>;

  /// No steps and `present` false: no decoder, tokens are joined by spaces.
  TokenDecoder() = default;
  explicit TokenDecoder(std::vector<Step> steps) : steps_(std::move(steps)), present_(true) {}

  /// What Hugging Face's decoder makes of these tokens.
  std::string decode(std::vector<std::string> tokens) const;
  /// The bytes that one token stands for wherever it is, before anything is stripped.
  std::string bytes_of(std::string token) const;

 private:
  friend class StreamDecoder;
  std::vector<Step> steps_;
  bool present_ = false;
};

/// The same decoding, token by token, holding back what may still change: an incomplete character,
/// or characters that a Strip at the end would remove. What was given out equals decode() of all
/// tokens, with one exception: a run of byte tokens that turns out ill-formed after a whole
/// character was given out (decode() then replaces that character as well).
class StreamDecoder {
 public:
  explicit StreamDecoder(const TokenDecoder& decoder);
  std::string push(std::string_view token);
  std::string flush();

 private:
  struct State {
    std::string held;
    size_t count = 0;
    bool ill_formed = false;
  };
  void feed(size_t step, std::string_view token, std::string& out);
  void finish(size_t step, std::string& out);
  std::string push_windowed(std::string_view token);

  const TokenDecoder& decoder_;
  std::vector<State> states_;
  std::vector<bool> fused_;  // the step sees one long string
  size_t count_ = 0;
  // Decoders with steps that need the whole text: decode a window of tokens twice and compare.
  bool windowed_ = false;
  std::vector<std::string> window_;
  size_t window_done_ = 0;   // tokens of the window whose text is out
};

}  // namespace baton
