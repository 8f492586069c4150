// How fast a tokenizer.json encodes and decodes, on one core.
//
//   tokenizer_bench TOKENIZER_JSON [TEXT_FILE] [seconds]
//
// Without a text file: 1 MB of made-up prose, code and numbers. Beside it stands what reading the text
// costs at least (a scan that checks its UTF-8). Hugging Face's figure on the same text:
//   tools/check_tokenizers.py --speed TEXT_FILE TOKENIZER_JSON

#include <fmt/format.h>
#include <time.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "text/detokenizer.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace {

// CPU time of this thread: neighbours on a shared machine don't count.
double now_s() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

// Median CPU seconds of one call, over `total_s`, at least three calls.
template <typename Work>
double median_seconds(double total_s, const Work& work) {
  std::vector<double> times;
  const double end = now_s() + total_s;
  while (now_s() < end || times.size() < 3) {
    const double start = now_s();
    work();
    times.push_back(now_s() - start);
  }
  std::nth_element(times.begin(), times.begin() + static_cast<ptrdiff_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

std::string made_up_text(size_t bytes) {
  static constexpr std::string_view kParts[] = {
      "The ", "cache ", "of ", "a ", "decode worker ", "holds ", "every ", "block ", "that ", "it ", "was ", "granted, ",
      "and ", "returns ", "them.\n", "It's ", "we'll ", "    for (int i = 0; i < n; ++i) {\n", "\treturn value_;\n}\n\n",
      "naïve ", "Привет ", "мир ", "你好，", "世界。", "日本語 ", "한국어 ", "emoji 🎉 ", "http://example.com/", "user_id ", "HTTPServer "};
  std::mt19937 random(1);
  std::string text;
  while (text.size() < bytes) {
    const uint32_t pick = random() % 40;
    if (pick < std::size(kParts)) {
      text += kParts[pick];
    } else if (pick < 33) {
      text += fmt::format("{} ", random() % 100000);
    } else {  // a word of its own, so that not everything is in the cache
      for (uint32_t i = 0, n = 2 + random() % 4; i < n; ++i) {
        text += "bdfgklmnprstvz"[random() % 14];
        text += "aeiou"[random() % 5];
      }
      text += ' ';
    }
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fmt::print(stderr, "usage: tokenizer_bench TOKENIZER_JSON [TEXT_FILE] [seconds]\n");
    return 2;
  }
  const double load_start = now_s();
  auto loaded = baton::Tokenizer::load(argv[1]);
  if (!loaded.ok()) {
    fmt::print(stderr, "{}\n", loaded.status().to_string());
    return 1;
  }
  const baton::Tokenizer& tokenizer = **loaded;
  const double load_s = now_s() - load_start;
  std::string text;
  if (argc > 2) {
    std::ifstream file(argv[2], std::ios::binary);
    text.assign(std::istreambuf_iterator<char>(file), {});
    text.resize(baton::unicode::valid_prefix(text));
  } else {
    text = made_up_text(1 << 20);
  }
  if (text.empty()) {
    fmt::print(stderr, "{} is empty or can't be read\n", argv[2]);
    return 1;
  }
  const double seconds = argc > 3 ? std::atof(argv[3]) : 2;
  const double megabytes = static_cast<double>(text.size()) / 1e6;

  std::vector<int32_t> ids;
  const double first_start = now_s();
  ids = tokenizer.encode(text, false).value();
  const double first_s = now_s() - first_start;
  const double encode_s = median_seconds(seconds, [&] { ids = tokenizer.encode(text, false).value(); });
  std::string decoded;
  const double decode_s = median_seconds(seconds / 2, [&] { decoded = tokenizer.decode(ids, false); });
  const double stream_s = median_seconds(seconds / 2, [&] {
    baton::Detokenizer detokenizer(tokenizer, false);
    decoded.clear();
    for (int32_t id : ids) decoded += detokenizer.push(id);
  });
  size_t valid = 0;
  const double scan_s = median_seconds(seconds / 4, [&] { valid += baton::unicode::valid_prefix(text); });

  fmt::print("{}: {} tokens, loaded in {:.0f} ms; text of {:.2f} MB, {} ids\n", argv[1], tokenizer.vocab_size(), load_s * 1e3,
             megabytes, ids.size());
  fmt::print("  encode          {:8.1f} MB/s   (first time, nothing cached: {:.1f})\n", megabytes / encode_s, megabytes / first_s);
  fmt::print("  decode          {:8.1f} MB/s\n", megabytes / decode_s);
  fmt::print("  detokenizer     {:8.1f} MB/s   ({:.1f} million tokens/s)\n", megabytes / stream_s,
             static_cast<double>(ids.size()) / stream_s / 1e6);
  fmt::print("  UTF-8 scan      {:8.1f} MB/s   (the floor; {})\n", megabytes / scan_s, valid > 0 ? "valid" : "empty");
  return 0;
}
