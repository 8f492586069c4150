#pragma once

// Private to the library: what tokenizer.cc and detokenizer.cc share.

#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "text/tokenizer.h"
#include "text/tokenizer_json.h"

namespace baton {

struct Tokenizer::Impl {
  struct Token {
    std::string text;
    bool exists = false;
    bool special = false;
  };

  /// Memory for one encode at a time, with the cache of words seen.
  struct Scratch {
    Bpe::ScratchPtr bpe = Bpe::make_scratch();
    Regex::Scratch regex;
    PreTokenizer::Pieces pieces;
    std::vector<AddedTokenMatcher::Match> raw_matches, normalized_matches;
    std::string normalized;
  };

  Impl(TokenizerParts parts, Bpe model)
      : normalizer(std::move(parts.normalizer)), pre_tokenizer(std::move(parts.pre_tokenizer)),
        post_processor(std::move(parts.post_processor)), decoder(std::move(parts.decoder)), bpe(std::move(model)) {}

  Status add_tokens(std::vector<AddedToken> added);
  Status encode_part(TextPart part, std::vector<int32_t>& ids, Scratch& scratch) const;
  Status encode_text(std::string_view text, std::vector<int32_t>& ids, Scratch& scratch) const;

  /// Null when there is no such token, or when it is special and those are skipped.
  const Token* token(int32_t id, bool skip_special) const {
    if (id < 0 || static_cast<size_t>(id) >= tokens.size()) return nullptr;
    const Token& found = tokens[static_cast<size_t>(id)];
    return found.exists && !(skip_special && found.special) ? &found : nullptr;
  }

  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::vector<TemplatePiece> post_processor;
  TokenDecoder decoder;
  Bpe bpe;
  std::vector<Token> tokens;  // by id
  std::unordered_map<std::string, int32_t> added_ids;
  AddedTokenMatcher raw_tokens, normalized_tokens;

  // Scratches not in use. A lock for taking and returning one; none while encoding.
  static constexpr size_t kMaxIdleScratches = 8;
  mutable std::mutex mutex;
  mutable std::vector<std::unique_ptr<Scratch>> idle;
};

}  // namespace baton
