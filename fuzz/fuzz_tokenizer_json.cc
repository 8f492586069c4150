// Any bytes as tokenizer.json; when it loads, any text through it and back.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace {

// A tokenizer to which the input may be a text, so that the way through it is fuzzed from the start.
const baton::Tokenizer& byte_tokenizer() {
  static const auto tokenizer = baton::Tokenizer::from_json(R"({
    "normalizer": {"type": "NFKC"},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": true},
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "_"}, "content": " "},
      {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "added_tokens": [{"id": 9, "content": "<s>", "special": true, "lstrip": true, "rstrip": true, "normalized": false}],
    "model": {"type": "BPE", "unk_token": "?", "fuse_unk": true,
      "vocab": {"?": 0, "_": 1, "a": 2, "b": 3, "c": 4, "ab": 5, "abc": 6, "_a": 7, "_ab": 8},
      "merges": [["a", "b"], ["ab", "c"], ["_", "a"], ["_a", "b"]]}})");
  return **tokenizer;
}

void round_trip(const baton::Tokenizer& tokenizer, std::string_view text) {
  auto ids = tokenizer.encode(text, true);
  if (!ids.ok()) return;
  const std::string decoded = tokenizer.decode(*ids, false);
  BATON_CHECK(baton::unicode::valid_prefix(decoded) == decoded.size());
  baton::Detokenizer detokenizer(tokenizer, false);
  std::string streamed;
  for (int32_t id : *ids) {
    const std::string piece = detokenizer.push(id);
    BATON_CHECK(baton::unicode::valid_prefix(piece) == piece.size());
    streamed += piece;
    (void)tokenizer.token_bytes(id);
  }
  streamed += detokenizer.flush();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool quiet = [] {
    baton::set_log_sink([](baton::LogLevel, std::string_view) {});
    return true;
  }();
  (void)quiet;
  if (size > 64 * 1024) return 0;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  round_trip(byte_tokenizer(), input);
  auto tokenizer = baton::Tokenizer::from_json(input);
  if (!tokenizer.ok()) return 0;
  round_trip(**tokenizer, "Hello  world, ▁it's\n\n 12345 naïve 你好 <s>\xF0\x9F\x8E\x89 ab abc");
  round_trip(**tokenizer, input.substr(0, 512));
  std::vector<int32_t> ids;
  for (uint8_t byte : input.substr(0, 64)) ids.push_back(byte);
  (void)(*tokenizer)->decode(ids, true);
  return 0;
}
