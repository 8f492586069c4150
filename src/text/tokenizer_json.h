#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/normalizer.h"
#include "text/pre_tokenizer.h"
#include "text/token_decoder.h"

namespace baton {

/// One element of a post-processor's template for a single sequence.
struct TemplatePiece {
  bool is_sequence = false;
  std::vector<int32_t> ids;  ///< of a special token
};

/// Everything a tokenizer.json says, checked and made ready.
struct TokenizerParts {
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::vector<TemplatePiece> post_processor;  ///< empty: the sequence alone
  TokenDecoder decoder;
  Bpe::Config model;
  std::vector<AddedToken> added_tokens;  ///< in the file's order, ids not yet given
};

/// Reads tokenizer.json. Every failure is kInvalidArgument and says where in the file and why; a
/// component of an unknown type is refused with its name and the types that are supported.
/// `truncation` and `padding` are not applied: serving neither cuts nor pads a prompt.
Result<TokenizerParts> parse_tokenizer_json(std::string_view json);

inline constexpr size_t kMaxTokenizerFileBytes = size_t{256} << 20;
inline constexpr int32_t kMaxTokenId = 1 << 24;

}  // namespace baton
