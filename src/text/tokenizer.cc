#include "text/tokenizer.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <map>
#include <set>
#include <utility>

#include "base/log.h"
#include "text/tokenizer_impl.h"
#include "text/unicode.h"

namespace baton {
namespace {

Result<std::string> read_file(const std::filesystem::path& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (error) return not_found("{}: {}", path.string(), error.message());
  if (size > kMaxTokenizerFileBytes) {
    return invalid_argument("{} has {} bytes, at most {} are accepted", path.string(), size, kMaxTokenizerFileBytes);
  }
  std::ifstream file(path, std::ios::binary);
  std::string content(size, '\0');
  if (!file.read(content.data(), static_cast<std::streamsize>(size))) {
    return unavailable("{} could not be read: {}", path.string(), std::strerror(errno));
  }
  return content;
}

/// A scratch on loan from the tokenizer's idle ones.
template <typename Impl>
class Loan {
 public:
  explicit Loan(const Impl& owner) : owner_(owner) {
    {
      const std::lock_guard lock(owner_.mutex);
      if (!owner_.idle.empty()) {
        scratch_ = std::move(owner_.idle.back());
        owner_.idle.pop_back();
      }
    }
    if (!scratch_) scratch_ = std::make_unique<typename Impl::Scratch>();
  }
  ~Loan() {
    const std::lock_guard lock(owner_.mutex);
    if (owner_.idle.size() < Impl::kMaxIdleScratches) owner_.idle.push_back(std::move(scratch_));
  }
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;
  typename Impl::Scratch& operator*() { return *scratch_; }

 private:
  const Impl& owner_;
  std::unique_ptr<typename Impl::Scratch> scratch_;
};

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

Result<std::unique_ptr<Tokenizer>> Tokenizer::load(const std::filesystem::path& tokenizer_json) {
  BATON_ASSIGN_OR_RETURN(const std::string json, read_file(tokenizer_json));
  auto tokenizer = from_json(json);
  if (!tokenizer.ok()) return tokenizer.status().with_context(tokenizer_json.string());
  return tokenizer;
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::from_json(std::string_view json) {
  BATON_ASSIGN_OR_RETURN(TokenizerParts parts, parse_tokenizer_json(json));
  Bpe::Config config = std::move(parts.model);
  config.byte_level = parts.pre_tokenizer.ends_in_byte_level();
  std::vector<AddedToken> added = std::move(parts.added_tokens);

  int32_t highest = -1;
  for (const auto& [text, id] : config.vocab) highest = std::max(highest, id);
  std::vector<Impl::Token> tokens(static_cast<size_t>(highest) + 1);
  for (const auto& [text, id] : config.vocab) tokens[static_cast<size_t>(id)] = {text, true, false};

  BATON_ASSIGN_OR_RETURN(Bpe model, Bpe::build(std::move(config)));
  auto impl = std::make_unique<Impl>(std::move(parts), std::move(model));
  impl->tokens = std::move(tokens);
  BATON_RETURN_IF_ERROR(impl->add_tokens(std::move(added)));
  for (const TemplatePiece& piece : impl->post_processor) {
    for (int32_t id : piece.ids) {
      if (impl->token(id, false) == nullptr) return invalid_argument("tokenizer.json: post_processor: there is no token with id {}", id);
    }
  }
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(impl)));
}

// As AddedVocabulary::add_tokens of `tokenizers`: a token that the model knows keeps the model's id,
// others are numbered on from the size of the vocabulary, whatever id the file gives them.
Status Tokenizer::Impl::add_tokens(std::vector<AddedToken> added) {
  std::map<int32_t, AddedToken> by_id;
  std::set<std::string, std::less<>> special;
  auto next_id = static_cast<int32_t>(bpe.size());
  for (AddedToken& token : added) {
    if (token.content.empty()) continue;
    int32_t id;
    if (const auto known = added_ids.find(token.content); known != added_ids.end()) {
      id = known->second;
    } else {
      id = bpe.find(token.content);
      if (id < 0) id = next_id++;
    }
    if (id >= kMaxTokenId) return invalid_argument("tokenizer.json: more than {} tokens", kMaxTokenId);
    if (id != token.id) {
      log_warning("tokenizer.json gives the added token \"{}\" the id {}, but by its vocabulary it has {}", token.content, token.id, id);
    }
    token.id = id;
    added_ids[token.content] = id;
    if (token.special) special.insert(token.content);
    by_id.insert_or_assign(id, std::move(token));
  }

  Regex::Scratch scratch;
  for (const auto& [id, token] : by_id) {
    std::string text = token.content;
    if (token.normalized) {
      std::string buffer;
      BATON_ASSIGN_OR_RETURN(const TextPart part, normalizer.apply({token.content, 0}, buffer, scratch));
      text = std::string(part.text);
    }
    (token.normalized ? normalized_tokens : raw_tokens).add(text, token);
    if (static_cast<size_t>(id) >= tokens.size()) tokens.resize(static_cast<size_t>(id) + 1);
    tokens[static_cast<size_t>(id)] = {std::move(text), true, false};
  }
  // Special is what reads like a special token, even an entry of the model.
  if (!special.empty()) {
    for (Token& token : tokens) token.special = token.exists && special.contains(token.text);
  }
  return {};
}

Status Tokenizer::Impl::encode_part(TextPart part, std::vector<int32_t>& ids, Scratch& scratch) const {
  BATON_RETURN_IF_ERROR(pre_tokenizer.apply(part, scratch.pieces, scratch.regex));
  for (const TextSpan& span : scratch.pieces.spans) {
    bpe.encode(scratch.pieces.text.substr(span.begin, span.end - span.begin), ids, *scratch.bpe);
  }
  return {};
}

Status Tokenizer::Impl::encode_text(std::string_view text, std::vector<int32_t>& ids, Scratch& scratch) const {
  raw_tokens.split(text, scratch.raw_matches);
  for (const AddedTokenMatcher::Match& raw : scratch.raw_matches) {
    if (raw.id >= 0) {
      ids.push_back(raw.id);
      continue;
    }
    TextPart part{text.substr(raw.begin, raw.end - raw.begin), 0};
    if (raw.begin == 0) part.origin_bytes = unicode::sequence_length(part.text.front());
    BATON_ASSIGN_OR_RETURN(part, normalizer.apply(part, scratch.normalized, scratch.regex));
    if (normalized_tokens.empty()) {
      BATON_RETURN_IF_ERROR(encode_part(part, ids, scratch));
      continue;
    }
    normalized_tokens.split(part.text, scratch.normalized_matches);
    for (const AddedTokenMatcher::Match& match : scratch.normalized_matches) {
      if (match.id >= 0) {
        ids.push_back(match.id);
        continue;
      }
      const size_t origin_bytes = part.origin_bytes > match.begin ? part.origin_bytes - match.begin : 0;
      BATON_RETURN_IF_ERROR(encode_part({part.text.substr(match.begin, match.end - match.begin), origin_bytes}, ids, scratch));
    }
  }
  return {};
}

Result<std::vector<int32_t>> Tokenizer::encode(std::string_view utf8, bool add_special_tokens) const {
  if (utf8.size() > kMaxTextBytes) {
    return invalid_argument("the text has {} bytes, at most {} can be tokenized at once", utf8.size(), kMaxTextBytes);
  }
  if (const size_t valid = unicode::valid_prefix(utf8); valid != utf8.size()) {
    return invalid_argument("the text is not valid UTF-8 at byte {} (0x{:02X})", valid, static_cast<unsigned char>(utf8[valid]));
  }
  Loan scratch(*impl_);
  std::vector<int32_t> ids;
  ids.reserve(utf8.size() / 3 + 8);
  if (impl_->post_processor.empty()) {
    BATON_RETURN_IF_ERROR(impl_->encode_text(utf8, ids, *scratch));
    return ids;
  }
  for (const TemplatePiece& piece : impl_->post_processor) {
    if (piece.is_sequence) {
      BATON_RETURN_IF_ERROR(impl_->encode_text(utf8, ids, *scratch));
    } else if (add_special_tokens) {
      ids.insert(ids.end(), piece.ids.begin(), piece.ids.end());
    }
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (int32_t id : ids) {
    if (const Impl::Token* token = impl_->token(id, skip_special_tokens)) tokens.push_back(token->text);
  }
  return impl_->decoder.decode(std::move(tokens));
}

std::optional<int32_t> Tokenizer::token_to_id(std::string_view token) const {
  if (const auto found = impl_->added_ids.find(std::string(token)); found != impl_->added_ids.end()) return found->second;
  const int32_t id = impl_->bpe.find(token);
  return id < 0 ? std::nullopt : std::optional(id);
}

std::string Tokenizer::id_to_token(int32_t id) const {
  const Impl::Token* token = impl_->token(id, false);
  return token == nullptr ? std::string() : token->text;
}

std::string Tokenizer::token_bytes(int32_t id) const {
  const Impl::Token* token = impl_->token(id, false);
  return token == nullptr ? std::string() : impl_->decoder.bytes_of(token->text);
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->tokens.size()); }

bool Tokenizer::is_special(int32_t id) const {
  const Impl::Token* token = impl_->token(id, false);
  return token != nullptr && token->special;
}

}  // namespace baton
