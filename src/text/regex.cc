#include "text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <utility>

#include "base/check.h"
#include "text/unicode.h"

namespace baton {
namespace {

constexpr uint32_t kMatchLimit = 10'000'000;  // steps of backtracking for one match
constexpr uint32_t kHeapLimitKib = 64 * 1024;
constexpr size_t kJitStackBytes = 512 * 1024;
constexpr size_t kMaxTranslatedBytes = 1024 * 1024;

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* value) const {
    Free(value);
  }
};
using Code = std::unique_ptr<pcre2_code, Deleter<pcre2_code_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context, Deleter<pcre2_compile_context_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Deleter<pcre2_match_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Deleter<pcre2_match_data_free>>;
using JitStack = std::unique_ptr<pcre2_jit_stack, Deleter<pcre2_jit_stack_free>>;

std::string error_text(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

// True, and `replaced` filled, when `text` has characters that PCRE2's tables may not know.
bool put_stand_ins(std::string_view text, std::string& replaced) {
  const unicode::CharTable& table = unicode::CharTable::instance();
  bool any = false;
  for (size_t at = 0; at < text.size();) {
    if (static_cast<unsigned char>(text[at]) < 0xE0) {  // one or two bytes: old enough for all
      ++at;
      continue;
    }
    const auto [c, length] = unicode::decode(text.data() + at);
    if (table[c] & unicode::kStandIn) {
      if (!any) replaced.assign(text);
      any = true;
      std::string bytes;
      unicode::append_utf8(bytes, unicode::stand_in(c));
      BATON_CHECK(bytes.size() == length);
      replaced.replace(at, length, bytes);
    }
    at += length;
  }
  return any;
}

}  // namespace

struct Regex::Impl {
  Code code;
  bool jit = false;
};

struct Regex::Scratch::Impl {
  MatchData data;
  MatchContext context;
  JitStack stack;
  std::string replaced;
};

Regex::Scratch::Scratch() : impl_(std::make_unique<Impl>()) {
  impl_->data.reset(pcre2_match_data_create(1, nullptr));
  impl_->context.reset(pcre2_match_context_create(nullptr));
  impl_->stack.reset(pcre2_jit_stack_create(32 * 1024, kJitStackBytes, nullptr));
  BATON_CHECK(impl_->data && impl_->context) << "out of memory for a regular expression";
  pcre2_set_match_limit(impl_->context.get(), kMatchLimit);
  pcre2_set_heap_limit(impl_->context.get(), kHeapLimitKib);
  if (impl_->stack) pcre2_jit_stack_assign(impl_->context.get(), nullptr, impl_->stack.get());
}
Regex::Scratch::~Scratch() = default;
Regex::Scratch::Scratch(Scratch&&) noexcept = default;
Regex::Scratch& Regex::Scratch::operator=(Scratch&&) noexcept = default;

Regex::Regex(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

Result<Regex> Regex::compile(std::string_view oniguruma_pattern) {
  BATON_ASSIGN_OR_RETURN(std::string pattern, translate_oniguruma(oniguruma_pattern));
  if (pattern.size() > kMaxTranslatedBytes) return invalid_argument("a regular expression is too large");
  CompileContext context(pcre2_compile_context_create(nullptr));
  BATON_CHECK(context) << "out of memory for a regular expression";
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_bsr(context.get(), PCRE2_BSR_UNICODE);
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto impl = std::make_unique<Impl>();
  impl->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &offset,
                                 context.get()));
  if (!impl->code) {
    return invalid_argument("regular expression \"{}\": {}", oniguruma_pattern.substr(0, 200), error_text(error));
  }
  impl->jit = pcre2_jit_compile(impl->code.get(), PCRE2_JIT_COMPLETE) == 0;
  return Regex(std::move(impl));
}

Status Regex::find_all(std::string_view text, std::vector<TextSpan>& matches, Scratch& scratch) const {
  matches.clear();
  Scratch::Impl& memory = *scratch.impl_;
  if (put_stand_ins(text, memory.replaced)) text = memory.replaced;
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const PCRE2_SIZE* found = pcre2_get_ovector_pointer(memory.data.get());

  constexpr size_t kNone = static_cast<size_t>(-1);
  size_t at = 0, last_match_end = kNone;
  while (at <= text.size()) {
    int rc = PCRE2_ERROR_JIT_STACKLIMIT;
    if (impl_->jit) {
      rc = pcre2_jit_match(impl_->code.get(), subject, text.size(), at, 0, memory.data.get(), memory.context.get());
    }
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter keeps its stack on the heap
      rc = pcre2_match(impl_->code.get(), subject, text.size(), at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, memory.data.get(),
                       memory.context.get());
    }
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      return resource_exhausted("a regular expression of the tokenizer gave up on this text at byte {}: {}", at, error_text(rc));
    }
    const size_t begin = found[0], end = found[1];
    if (begin == end && last_match_end == end) {
      if (at >= text.size()) break;
      at += unicode::sequence_length(text[at]);
      continue;
    }
    matches.push_back({static_cast<uint32_t>(begin), static_cast<uint32_t>(end)});
    at = end;
    last_match_end = end;
  }
  return {};
}

}  // namespace baton
