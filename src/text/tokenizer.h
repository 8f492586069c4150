#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace baton {

/// A Hugging Face tokenizer.json (model BPE, byte-level or with byte fallback), with exactly the
/// results of the `tokenizers` library. docs/tokenizer.md lists what is supported.
///
/// Immutable after load; all functions are const and safe from any number of threads at once.
class Tokenizer {
 public:
  /// Longest text that encode() takes. Callers bound prompts far below this.
  static constexpr size_t kMaxTextBytes = size_t{64} << 20;

  /// kNotFound when there is no such file, kInvalidArgument when it is wrong or not supported.
  static Result<std::unique_ptr<Tokenizer>> load(const std::filesystem::path& tokenizer_json);
  static Result<std::unique_ptr<Tokenizer>> from_json(std::string_view json);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  /// Text to token ids. Added and special tokens in the text are recognised as they are written;
  /// `add_special_tokens` is about those of the post-processor (a BOS, say).
  /// kInvalidArgument when the text is not valid UTF-8 (the message names the byte) or too long;
  /// kResourceExhausted when a regular expression of the tokenizer gives up on it.
  Result<std::vector<int32_t>> encode(std::string_view utf8, bool add_special_tokens) const;

  /// Token ids to text; ids that do not exist are passed over, bytes that are no UTF-8 become U+FFFD.
  std::string decode(std::span<const int32_t> ids, bool skip_special_tokens) const;

  std::optional<int32_t> token_to_id(std::string_view token) const;
  /// The token as tokenizer.json writes it ("Ġhello", "▁hello", "<0x0A>"); empty when there is none.
  std::string id_to_token(int32_t id) const;
  /// The bytes that the token adds to a text ("\x20hello"), which alone may be no valid UTF-8.
  std::string token_bytes(int32_t id) const;

  /// The highest token id plus one: logits of a model may have more columns, never fewer.
  int32_t vocab_size() const;
  /// True for added tokens that are marked special.
  bool is_special(int32_t id) const;

 private:
  friend class Detokenizer;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

}  // namespace baton
