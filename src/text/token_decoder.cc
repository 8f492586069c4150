#include "text/token_decoder.h"

#include <algorithm>
#include <utility>

#include "text/normalizer.h"
#include "text/unicode.h"

namespace baton {
namespace {

constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";
constexpr size_t kMaxWindowTokens = 256;

// The byte of "<0x0A>", or -1. As lenient as Rust's from_str_radix, which takes a sign.
int byte_of_fallback_token(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token.back() != '>') return -1;
  const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10 : -1; };
  const int low = digit(token[4]);
  const int high = token[3] == '+' ? 0 : digit(token[3]);
  return low < 0 || high < 0 ? -1 : high * 16 + low;
}

// Bytes of a token in byte-level characters; a token with any other character stands for itself.
void append_byte_level(std::string& out, std::string_view token) {
  const size_t before = out.size();
  for (size_t at = 0; at < token.size();) {
    const auto [c, length] = unicode::decode(token.data() + at);
    const int byte = byte_of_level_char(c);
    if (byte < 0) {
      out.resize(before);
      out.append(token);
      return;
    }
    out += static_cast<char>(byte);
    at += length;
  }
}

// A pattern that gives up leaves the token as it is: decoding cannot fail.
std::string replace_all(const TokenDecoder::Replace& step, std::string_view token) {
  auto replaced = step.pattern.replace_all(token, step.content);
  return replaced.ok() ? std::move(*replaced) : std::string(token);
}

std::string_view strip(const TokenDecoder::Strip& step, std::string_view token) {
  for (size_t i = 0; i < step.start && token.starts_with(step.content); ++i) token.remove_prefix(step.content.size());
  for (size_t i = 0; i < step.stop && token.ends_with(step.content); ++i) token.remove_suffix(step.content.size());
  return token;
}

std::string metaspace(const TokenDecoder::Metaspace& step, std::string_view token, bool first) {
  std::string out;
  for (size_t at = 0; at < token.size();) {
    if (token.substr(at).starts_with(step.replacement)) {
      if (!first || !step.drop_first) out += ' ';
      at += step.replacement.size();
    } else {
      out += token[at++];
    }
  }
  return out;
}

std::vector<std::string> join_bytes(const std::vector<std::string>& tokens) {
  std::vector<std::string> out;
  std::string bytes;
  const auto end_run = [&] {
    if (bytes.empty()) return;
    if (unicode::valid_prefix(bytes) == bytes.size()) {
      out.push_back(bytes);
    } else {
      out.insert(out.end(), bytes.size(), std::string(kReplacementCharacter));
    }
    bytes.clear();
  };
  for (const std::string& token : tokens) {
    if (const int byte = byte_of_fallback_token(token); byte >= 0) {
      bytes += static_cast<char>(byte);
    } else {
      end_run();
      out.push_back(token);
    }
  }
  end_run();
  return out;
}

std::string join(const std::vector<std::string>& tokens, std::string_view between) {
  std::string out;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) out += between;
    out += tokens[i];
  }
  return out;
}

template <typename T>
bool is(const TokenDecoder::Step& step) {
  return std::holds_alternative<T>(step);
}

}  // namespace

std::string TokenDecoder::decode(std::vector<std::string> tokens) const {
  if (!present_) return join(tokens, " ");
  for (const Step& step : steps_) {
    if (is<ByteLevel>(step)) {
      std::string bytes, text;
      for (const std::string& token : tokens) append_byte_level(bytes, token);
      unicode::append_lossy(text, bytes, false);
      tokens = {std::move(text)};
    } else if (is<ByteFallback>(step)) {
      tokens = join_bytes(tokens);
    } else if (is<Fuse>(step)) {
      tokens = {join(tokens, "")};
    } else if (const auto* s = std::get_if<Strip>(&step)) {
      for (std::string& token : tokens) token = std::string(strip(*s, token));
    } else if (const auto* r = std::get_if<Replace>(&step)) {
      for (std::string& token : tokens) token = replace_all(*r, token);
    } else if (const auto* m = std::get_if<Metaspace>(&step)) {
      for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = metaspace(*m, tokens[i], i == 0);
    }
  }
  return join(tokens, "");
}

std::string TokenDecoder::bytes_of(std::string token) const {
  for (const Step& step : steps_) {
    if (is<ByteLevel>(step)) {
      std::string bytes;
      append_byte_level(bytes, token);
      return bytes;
    }
    if (is<ByteFallback>(step)) {
      if (const int byte = byte_of_fallback_token(token); byte >= 0) return std::string(1, static_cast<char>(byte));
    } else if (is<Fuse>(step)) {
      break;
    } else if (const auto* r = std::get_if<Replace>(&step)) {
      token = replace_all(*r, token);
    } else if (const auto* m = std::get_if<Metaspace>(&step)) {
      token = metaspace(*m, token, false);
    }
  }
  return token;
}

StreamDecoder::StreamDecoder(const TokenDecoder& decoder) : decoder_(decoder), states_(decoder.steps_.size()) {
  bool fused = false;
  for (const TokenDecoder::Step& step : decoder.steps_) {
    fused_.push_back(fused);
    if (fused && !is<TokenDecoder::Strip>(step) && !is<TokenDecoder::Fuse>(step)) windowed_ = true;
    if (is<TokenDecoder::ByteLevel>(step) || is<TokenDecoder::Fuse>(step)) fused = true;
  }
}

std::string StreamDecoder::push(std::string_view token) {
  if (windowed_) return push_windowed(token);
  std::string out;
  if (!decoder_.present_) {
    if (count_++ > 0) out += ' ';
    out += token;
    return out;
  }
  feed(0, token, out);
  return out;
}

std::string StreamDecoder::flush() {
  std::string out;
  if (windowed_) {
    const std::vector<std::string> done(window_.begin(), window_.begin() + static_cast<ptrdiff_t>(window_done_));
    const std::string all = decoder_.decode(window_), before = decoder_.decode(done);
    window_.clear();
    window_done_ = 0;
    return all.size() > before.size() ? all.substr(before.size()) : std::string();
  }
  for (size_t step = 0; step < states_.size(); ++step) finish(step, out);
  return out;
}

void StreamDecoder::feed(size_t index, std::string_view token, std::string& out) {
  if (index == states_.size()) {
    out += token;
    return;
  }
  const TokenDecoder::Step& step = decoder_.steps_[index];
  State& state = states_[index];
  if (is<TokenDecoder::ByteLevel>(step)) {
    append_byte_level(state.held, token);
    std::string text;
    state.held.erase(0, unicode::append_lossy(text, state.held, true));
    if (!text.empty()) feed(index + 1, text, out);
  } else if (is<TokenDecoder::ByteFallback>(step)) {
    const int byte = byte_of_fallback_token(token);
    if (byte < 0) {
      finish(index, out);
      feed(index + 1, token, out);
      return;
    }
    state.held += static_cast<char>(byte);
    if (!state.ill_formed && unicode::is_incomplete_character(state.held)) return;
    if (!state.ill_formed && unicode::valid_prefix(state.held) == state.held.size()) {
      feed(index + 1, std::exchange(state.held, {}), out);
      return;
    }
    // From here to the end of the run every byte is replaced.
    state.ill_formed = true;
    const size_t count = std::exchange(state.held, {}).size();
    for (size_t i = 0; i < count; ++i) feed(index + 1, kReplacementCharacter, out);
  } else if (is<TokenDecoder::Fuse>(step)) {
    feed(index + 1, token, out);
  } else if (const auto* strip_step = std::get_if<TokenDecoder::Strip>(&step)) {
    if (!fused_[index]) {
      feed(index + 1, strip(*strip_step, token), out);
      return;
    }
    while (state.count < strip_step->start && !token.empty()) {
      if (token.starts_with(strip_step->content)) {
        token.remove_prefix(strip_step->content.size());
        ++state.count;
      } else {
        state.count = strip_step->start;
      }
    }
    state.held += token;
    std::string_view kept = state.held;
    for (size_t i = 0; i < strip_step->stop && kept.ends_with(strip_step->content); ++i) kept.remove_suffix(strip_step->content.size());
    const std::string text(kept);
    state.held.erase(0, text.size());
    if (!text.empty()) feed(index + 1, text, out);
  } else if (const auto* replace = std::get_if<TokenDecoder::Replace>(&step)) {
    feed(index + 1, replace_all(*replace, token), out);
  } else if (const auto* meta = std::get_if<TokenDecoder::Metaspace>(&step)) {
    feed(index + 1, metaspace(*meta, token, state.count++ == 0), out);
  }
}

// The end of the input of one step; what it holds goes on, except what a Strip holds.
void StreamDecoder::finish(size_t index, std::string& out) {
  State& state = states_[index];
  const std::string held = std::exchange(state.held, {});
  if (is<TokenDecoder::ByteLevel>(decoder_.steps_[index])) {
    std::string text;
    unicode::append_lossy(text, held, false);
    if (!text.empty()) feed(index + 1, text, out);
  } else if (is<TokenDecoder::ByteFallback>(decoder_.steps_[index])) {
    state.ill_formed = false;
    for (size_t i = 0; i < held.size(); ++i) feed(index + 1, kReplacementCharacter, out);
  }
}

std::string StreamDecoder::push_windowed(std::string_view token) {
  window_.emplace_back(token);
  const std::vector<std::string> done(window_.begin(), window_.begin() + static_cast<ptrdiff_t>(window_done_));
  const std::string before = decoder_.decode(done);
  const std::string all = decoder_.decode(window_);
  const bool may_change = all.ends_with(kReplacementCharacter) && window_.size() - window_done_ < kMaxWindowTokens;
  if (all.size() <= before.size() || may_change) return {};
  std::string text = all.substr(before.size());
  window_.erase(window_.begin(), window_.begin() + static_cast<ptrdiff_t>(window_done_));
  window_done_ = window_.size();
  return text;
}

}  // namespace baton
