#include "text/detokenizer.h"

#include "text/token_decoder.h"
#include "text/tokenizer_impl.h"

namespace baton {

struct Detokenizer::Impl {
  const Tokenizer::Impl& tokenizer;
  bool skip_special_tokens;
  StreamDecoder decoder;
};

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens, std::span<const int32_t> prompt_tail)
    : impl_(new Impl{*tokenizer.impl_, skip_special_tokens, StreamDecoder(tokenizer.impl_->decoder)}) {
  for (int32_t id : prompt_tail) push(id);
}
Detokenizer::~Detokenizer() = default;
Detokenizer::Detokenizer(Detokenizer&&) noexcept = default;
Detokenizer& Detokenizer::operator=(Detokenizer&&) noexcept = default;

std::string Detokenizer::push(int32_t id) {
  const Tokenizer::Impl::Token* token = impl_->tokenizer.token(id, impl_->skip_special_tokens);
  return token == nullptr ? std::string() : impl_->decoder.push(token->text);
}

std::string Detokenizer::flush() { return impl_->decoder.flush(); }

}  // namespace baton
