// Reads texts on stdin, writes what the tokenizer makes of them on stdout; for tools/check_tokenizers.py.
//
//   tokenizer_check TOKENIZER_JSON encode [no-special]
//     stdin: (uint32 bytes, text)*    stdout: (uint32 count, int32 ids[count])*, count 0xFFFFFFFF: an error
//   tokenizer_check TOKENIZER_JSON decode | decode-skip | stream | stream-skip
//     stdin: (uint32 count, int32 ids[count])*    stdout: (uint32 bytes, text)*

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace {

template <typename T>
bool read_items(std::vector<T>& items) {
  uint32_t count = 0;
  if (std::fread(&count, sizeof count, 1, stdin) != 1) return false;
  items.resize(count);
  return std::fread(items.data(), sizeof(T), count, stdin) == count;
}

void write_items(const void* items, uint32_t count, size_t item_bytes) {
  std::fwrite(&count, sizeof count, 1, stdout);
  std::fwrite(items, item_bytes, count, stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: tokenizer_check TOKENIZER_JSON encode|decode|decode-skip|stream|stream-skip [no-special]\n");
    return 2;
  }
  auto tokenizer = baton::Tokenizer::load(argv[1]);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s\n", tokenizer.status().to_string().c_str());
    return 1;
  }
  const std::string_view mode = argv[2];
  if (mode == "encode") {
    const bool add_special_tokens = argc < 4 || std::strcmp(argv[3], "no-special") != 0;
    std::vector<char> text;
    while (read_items(text)) {
      const auto ids = (*tokenizer)->encode({text.data(), text.size()}, add_special_tokens);
      if (ids.ok()) {
        write_items(ids->data(), static_cast<uint32_t>(ids->size()), sizeof(int32_t));
      } else {
        const uint32_t error = 0xFFFFFFFF;
        std::fwrite(&error, sizeof error, 1, stdout);
        std::fprintf(stderr, "%s\n", ids.status().to_string().c_str());
      }
    }
    return 0;
  }
  const bool skip = mode.ends_with("-skip");
  std::vector<int32_t> ids;
  while (read_items(ids)) {
    std::string text;
    if (mode.starts_with("stream")) {
      baton::Detokenizer detokenizer(**tokenizer, skip);
      for (int32_t id : ids) text += detokenizer.push(id);
      text += detokenizer.flush();
    } else {
      text = (*tokenizer)->decode(ids, skip);
    }
    write_items(text.data(), static_cast<uint32_t>(text.size()), 1);
  }
  return 0;
}
