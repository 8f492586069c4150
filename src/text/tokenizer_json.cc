#include "text/tokenizer_json.h"

#include <fmt/format.h>
#include <simdjson.h>

#include <algorithm>
#include <array>
#include <functional>
#include <utility>

namespace baton {
namespace {

using simdjson::dom::array;
using simdjson::dom::element;
using simdjson::dom::object;

constexpr size_t kMaxJsonDepth = 64;
constexpr int kMaxComponentDepth = 16;
constexpr size_t kMaxComponents = 128;
constexpr size_t kMaxVocab = size_t{4} << 20;
constexpr size_t kMaxMerges = size_t{8} << 20;
constexpr size_t kMaxTokenBytes = 64 * 1024;
constexpr size_t kMaxAddedTokenBytes = 4096;
constexpr size_t kMaxAllAddedTokenBytes = size_t{4} << 20;
constexpr size_t kMaxContentBytes = 1024;

// A value and the way to it, for messages.
struct Node {
  element value;
  std::string path;

  Status fail(std::string_view why) const { return invalid_argument("tokenizer.json: {}: {}", path.empty() ? "top level" : path, why); }
};

bool has_value(const Node& node, const char* key) {
  element value;
  return node.value.is_object() && node.value[key].get(value) == simdjson::SUCCESS && !value.is_null();
}

Result<Node> member(const Node& node, const char* key) {
  element value;
  if (!node.value.is_object()) return node.fail("should be an object");
  if (node.value[key].get(value) != simdjson::SUCCESS) return node.fail(fmt::format("has no \"{}\"", key));
  return Node{value, node.path.empty() ? key : fmt::format("{}.{}", node.path, key)};
}

Result<std::string> get_string(const Node& node, const char* key, std::optional<std::string> fallback = std::nullopt,
                               size_t max_bytes = kMaxContentBytes) {
  if (fallback && !has_value(node, key)) return *fallback;
  BATON_ASSIGN_OR_RETURN(const Node child, member(node, key));
  std::string_view text;
  if (child.value.get(text) != simdjson::SUCCESS) return child.fail("should be a string");
  if (text.size() > max_bytes) return child.fail(fmt::format("has {} bytes, at most {} are accepted", text.size(), max_bytes));
  return std::string(text);
}

Result<bool> get_bool(const Node& node, const char* key, std::optional<bool> fallback = std::nullopt) {
  if (fallback && !has_value(node, key)) return *fallback;
  BATON_ASSIGN_OR_RETURN(const Node child, member(node, key));
  bool value = false;
  if (child.value.get(value) != simdjson::SUCCESS) return child.fail("should be true or false");
  return value;
}

Result<int64_t> get_integer(const Node& node, const char* key, int64_t low, int64_t high) {
  BATON_ASSIGN_OR_RETURN(const Node child, member(node, key));
  int64_t value = 0;
  if (child.value.get(value) != simdjson::SUCCESS || value < low || value > high) {
    return child.fail(fmt::format("should be a whole number from {} to {}", low, high));
  }
  return value;
}

Result<int32_t> token_id(const Node& node) {
  int64_t value = 0;
  if (node.value.get(value) != simdjson::SUCCESS || value < 0 || value >= kMaxTokenId) {
    return node.fail(fmt::format("should be a token id from 0 to {}", kMaxTokenId - 1));
  }
  return static_cast<int32_t>(value);
}

Result<array> get_array(const Node& node) {
  array value;
  if (node.value.get(value) != simdjson::SUCCESS) return node.fail("should be a list");
  return value;
}

Result<std::string> one_character(const Node& node, const char* key, std::optional<std::string> fallback = std::nullopt) {
  BATON_ASSIGN_OR_RETURN(std::string text, get_string(node, key, std::move(fallback)));
  if (text.empty() || unicode::sequence_length(text.front()) != text.size()) {
    return node.fail(fmt::format("\"{}\" should be one character", key));
  }
  return text;
}

// {"String": "..."} or {"Regex": "..."}.
Result<Pattern> get_pattern(const Node& node) {
  BATON_ASSIGN_OR_RETURN(const Node child, member(node, "pattern"));
  constexpr size_t kMaxPatternBytes = 16 * 1024;
  if (has_value(child, "Regex")) {
    BATON_ASSIGN_OR_RETURN(const std::string text, get_string(child, "Regex", std::nullopt, kMaxPatternBytes));
    auto pattern = Pattern::regex(text);
    if (!pattern.ok()) return child.fail(pattern.status().message());
    return pattern;
  }
  BATON_ASSIGN_OR_RETURN(std::string text, get_string(child, "String", std::nullopt, kMaxPatternBytes));
  return Pattern::literal(std::move(text));
}

Result<SplitBehavior> get_behavior(const Node& node, std::optional<std::string> fallback = std::nullopt) {
  static constexpr std::pair<std::string_view, SplitBehavior> kNames[] = {
      {"Removed", SplitBehavior::kRemoved},
      {"Isolated", SplitBehavior::kIsolated},
      {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
      {"MergedWithNext", SplitBehavior::kMergedWithNext},
      {"Contiguous", SplitBehavior::kContiguous}};
  BATON_ASSIGN_OR_RETURN(const std::string name, get_string(node, "behavior", std::move(fallback)));
  for (const auto& [known, behavior] : kNames) {
    if (name == known) return behavior;
  }
  return node.fail(fmt::format(
      "unknown behavior \"{}\"; supported: Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous", name));
}

// Walks a component and the Sequences in it, calling `leaf(type, node)` for every other one.
class ComponentWalk {
 public:
  ComponentWalk(const char* list_key, std::string supported, std::function<Result<bool>(const std::string&, const Node&)> leaf)
      : list_key_(list_key), supported_(std::move(supported)), leaf_(std::move(leaf)) {}

  Status run(const Node& node, int depth = 0) {
    if (depth > kMaxComponentDepth) return node.fail("Sequences are nested too deeply");
    if (++count_ > kMaxComponents) return node.fail(fmt::format("more than {} components", kMaxComponents));
    BATON_ASSIGN_OR_RETURN(const std::string type, get_string(node, "type"));
    if (type != "Sequence") {
      BATON_ASSIGN_OR_RETURN(const bool known, leaf_(type, node));
      if (known) return {};
      return node.fail(fmt::format("the type \"{}\" is not supported; supported: {}, Sequence", type, supported_));
    }
    BATON_ASSIGN_OR_RETURN(const Node list, member(node, list_key_));
    BATON_ASSIGN_OR_RETURN(const array items, get_array(list));
    size_t index = 0;
    for (element item : items) {
      BATON_RETURN_IF_ERROR(run(Node{item, fmt::format("{}[{}]", list.path, index++)}, depth + 1));
    }
    return {};
  }

 private:
  const char* list_key_;
  std::string supported_;
  std::function<Result<bool>(const std::string&, const Node&)> leaf_;
  size_t count_ = 0;
};

Result<Normalizer> parse_normalizer(const Node& root) {
  std::vector<Normalizer::Step> steps;
  if (!has_value(root, "normalizer")) return Normalizer();
  BATON_ASSIGN_OR_RETURN(const Node node, member(root, "normalizer"));
  ComponentWalk walk("normalizers",
                     "NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Strip, Replace, Prepend, ByteLevel, BertNormalizer",
                     [&](const std::string& type, const Node& item) -> Result<bool> {
                       static constexpr std::pair<std::string_view, unicode::Form> kForms[] = {
                           {"NFC", unicode::Form::kNfc},
                           {"NFD", unicode::Form::kNfd},
                           {"NFKC", unicode::Form::kNfkc},
                           {"NFKD", unicode::Form::kNfkd}};
                       for (const auto& [name, form] : kForms) {
                         if (type == name) {
                           steps.emplace_back(Normalizer::UnicodeForm{form});
                           return true;
                         }
                       }
                       if (type == "Lowercase") {
                         steps.emplace_back(Normalizer::Lowercase{});
                       } else if (type == "StripAccents") {
                         steps.emplace_back(Normalizer::StripAccents{});
                       } else if (type == "Strip") {
                         BATON_ASSIGN_OR_RETURN(const bool left, get_bool(item, "strip_left"));
                         BATON_ASSIGN_OR_RETURN(const bool right, get_bool(item, "strip_right"));
                         steps.emplace_back(Normalizer::Strip{left, right});
                       } else if (type == "Prepend") {
                         BATON_ASSIGN_OR_RETURN(std::string text, get_string(item, "prepend"));
                         steps.emplace_back(Normalizer::Prepend{std::move(text)});
                       } else if (type == "Replace") {
                         BATON_ASSIGN_OR_RETURN(Pattern pattern, get_pattern(item));
                         BATON_ASSIGN_OR_RETURN(std::string content, get_string(item, "content"));
                         steps.emplace_back(Normalizer::Replace{std::move(pattern), std::move(content)});
                       } else if (type == "ByteLevel") {
                         steps.emplace_back(Normalizer::ByteLevel{});
                       } else if (type == "BertNormalizer") {
                         BATON_ASSIGN_OR_RETURN(const bool clean, get_bool(item, "clean_text"));
                         BATON_ASSIGN_OR_RETURN(const bool chinese, get_bool(item, "handle_chinese_chars"));
                         BATON_ASSIGN_OR_RETURN(const bool lower, get_bool(item, "lowercase"));
                         BATON_ASSIGN_OR_RETURN(const bool accents, get_bool(item, "strip_accents", lower));
                         steps.emplace_back(Normalizer::Bert{clean, chinese, accents, lower});
                       } else {
                         return false;
                       }
                       return true;
                     });
  BATON_RETURN_IF_ERROR(walk.run(node));
  return Normalizer(std::move(steps));
}

// prepend_scheme, or add_prefix_space of files before tokenizers 0.15.
Result<PreTokenizer::Prepend> get_prepend_scheme(const Node& node) {
  BATON_ASSIGN_OR_RETURN(const std::string scheme, get_string(node, "prepend_scheme", "always"));
  BATON_ASSIGN_OR_RETURN(const bool add_prefix_space, get_bool(node, "add_prefix_space", true));
  if (!add_prefix_space) {
    if (has_value(node, "prepend_scheme") && scheme != "never") return node.fail("add_prefix_space contradicts prepend_scheme");
    return PreTokenizer::Prepend::kNever;
  }
  if (scheme == "first") return PreTokenizer::Prepend::kFirst;
  if (scheme == "never") return PreTokenizer::Prepend::kNever;
  if (scheme == "always") return PreTokenizer::Prepend::kAlways;
  return node.fail(fmt::format("unknown prepend_scheme \"{}\"; supported: first, never, always", scheme));
}

Result<bool> parse_pre_tokenizer_step(const std::string& type, const Node& item, std::vector<PreTokenizer::Step>& steps) {
  const auto split_by = [&](Pattern pattern, SplitBehavior behavior, bool invert) {
    steps.emplace_back(PreTokenizer::Split{std::move(pattern), behavior, invert});
  };
  if (type == "Split") {
    BATON_ASSIGN_OR_RETURN(Pattern pattern, get_pattern(item));
    BATON_ASSIGN_OR_RETURN(const SplitBehavior behavior, get_behavior(item));
    BATON_ASSIGN_OR_RETURN(const bool invert, get_bool(item, "invert"));
    split_by(std::move(pattern), behavior, invert);
  } else if (type == "ByteLevel") {
    BATON_ASSIGN_OR_RETURN(const bool add_prefix_space, get_bool(item, "add_prefix_space"));
    BATON_ASSIGN_OR_RETURN(const bool use_regex, get_bool(item, "use_regex", true));
    PreTokenizer::ByteLevel step{add_prefix_space, std::nullopt};
    if (use_regex) {
      BATON_ASSIGN_OR_RETURN(step.pattern, Pattern::regex(kGpt2Pattern));
    }
    steps.emplace_back(std::move(step));
  } else if (type == "Digits") {
    BATON_ASSIGN_OR_RETURN(const bool individual, get_bool(item, "individual_digits"));
    split_by(Pattern::any_of(unicode::kRustNumeric), individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous, false);
  } else if (type == "Punctuation") {
    BATON_ASSIGN_OR_RETURN(const SplitBehavior behavior, get_behavior(item, "Isolated"));
    split_by(Pattern::any_of(unicode::kPunctuation), behavior, false);
  } else if (type == "WhitespaceSplit") {
    split_by(Pattern::any_of(unicode::kRustSpace), SplitBehavior::kRemoved, false);
  } else if (type == "Whitespace") {
    // \w+|[^\w\s]+ of Rust's regex crate, whose \w is wider than Oniguruma's and PCRE2's.
    split_by(Pattern::any_of(unicode::kRustSpace), SplitBehavior::kRemoved, false);
    split_by(Pattern::any_of(unicode::kRustWord), SplitBehavior::kContiguous, false);
  } else if (type == "CharDelimiterSplit") {
    BATON_ASSIGN_OR_RETURN(std::string delimiter, one_character(item, "delimiter"));
    BATON_ASSIGN_OR_RETURN(Pattern pattern, Pattern::literal(std::move(delimiter)));
    split_by(std::move(pattern), SplitBehavior::kRemoved, false);
  } else if (type == "Metaspace") {
    BATON_ASSIGN_OR_RETURN(std::string replacement, one_character(item, "replacement"));
    BATON_ASSIGN_OR_RETURN(const PreTokenizer::Prepend scheme, get_prepend_scheme(item));
    BATON_ASSIGN_OR_RETURN(const bool split, get_bool(item, "split", true));
    steps.emplace_back(PreTokenizer::Metaspace{std::move(replacement), scheme, split});
  } else {
    return false;
  }
  return true;
}

Result<PreTokenizer> parse_pre_tokenizer(const Node& root) {
  if (!has_value(root, "pre_tokenizer")) return PreTokenizer();
  BATON_ASSIGN_OR_RETURN(const Node node, member(root, "pre_tokenizer"));
  std::vector<PreTokenizer::Step> steps;
  ComponentWalk walk("pretokenizers",
                     "Split, ByteLevel, Digits, Punctuation, Whitespace, WhitespaceSplit, CharDelimiterSplit, Metaspace",
                     [&](const std::string& type, const Node& item) { return parse_pre_tokenizer_step(type, item, steps); });
  BATON_RETURN_IF_ERROR(walk.run(node));
  return PreTokenizer(std::move(steps));
}

Result<bool> parse_decoder_step(const std::string& type, const Node& item, std::vector<TokenDecoder::Step>& steps) {
  if (type == "ByteLevel") {
    steps.emplace_back(TokenDecoder::ByteLevel{});
  } else if (type == "ByteFallback") {
    steps.emplace_back(TokenDecoder::ByteFallback{});
  } else if (type == "Fuse") {
    steps.emplace_back(TokenDecoder::Fuse{});
  } else if (type == "Strip") {
    BATON_ASSIGN_OR_RETURN(std::string content, one_character(item, "content"));
    BATON_ASSIGN_OR_RETURN(const int64_t start, get_integer(item, "start", 0, 1024));
    BATON_ASSIGN_OR_RETURN(const int64_t stop, get_integer(item, "stop", 0, 1024));
    steps.emplace_back(TokenDecoder::Strip{std::move(content), static_cast<size_t>(start), static_cast<size_t>(stop)});
  } else if (type == "Replace") {
    BATON_ASSIGN_OR_RETURN(Pattern pattern, get_pattern(item));
    BATON_ASSIGN_OR_RETURN(std::string content, get_string(item, "content"));
    steps.emplace_back(TokenDecoder::Replace{std::move(pattern), std::move(content)});
  } else if (type == "Metaspace") {
    BATON_ASSIGN_OR_RETURN(std::string replacement, one_character(item, "replacement"));
    BATON_ASSIGN_OR_RETURN(const PreTokenizer::Prepend scheme, get_prepend_scheme(item));
    steps.emplace_back(TokenDecoder::Metaspace{std::move(replacement), scheme != PreTokenizer::Prepend::kNever});
  } else {
    return false;
  }
  return true;
}

Result<TokenDecoder> parse_decoder(const Node& root) {
  if (!has_value(root, "decoder")) return TokenDecoder();
  BATON_ASSIGN_OR_RETURN(const Node node, member(root, "decoder"));
  std::vector<TokenDecoder::Step> steps;
  ComponentWalk walk("decoders", "ByteLevel, ByteFallback, Fuse, Strip, Replace, Metaspace",
                     [&](const std::string& type, const Node& item) { return parse_decoder_step(type, item, steps); });
  BATON_RETURN_IF_ERROR(walk.run(node));
  return TokenDecoder(std::move(steps));
}

Result<std::vector<TemplatePiece>> parse_template(const Node& node) {
  std::vector<TemplatePiece> out;
  BATON_ASSIGN_OR_RETURN(const Node single, member(node, "single"));
  BATON_ASSIGN_OR_RETURN(const array pieces, get_array(single));
  if (pieces.size() > kMaxComponents) return single.fail("has too many pieces");
  size_t index = 0;
  for (element item : pieces) {
    const Node piece{item, fmt::format("{}[{}]", single.path, index++)};
    if (has_value(piece, "Sequence")) {
      BATON_ASSIGN_OR_RETURN(const Node sequence, member(piece, "Sequence"));
      BATON_ASSIGN_OR_RETURN(const std::string id, get_string(sequence, "id"));
      if (id != "A") return sequence.fail("a single sequence has no second one");
      out.push_back({true, {}});
      continue;
    }
    BATON_ASSIGN_OR_RETURN(const Node special, member(piece, "SpecialToken"));
    BATON_ASSIGN_OR_RETURN(const std::string name, get_string(special, "id", std::nullopt, kMaxAddedTokenBytes));
    BATON_ASSIGN_OR_RETURN(const Node table, member(node, "special_tokens"));
    object tokens;
    element entry;
    if (table.value.get(tokens) != simdjson::SUCCESS || tokens.at_key(name).get(entry) != simdjson::SUCCESS) {
      return table.fail(fmt::format("has no \"{}\", which the template uses", name));
    }
    BATON_ASSIGN_OR_RETURN(const Node ids, member(Node{entry, fmt::format("{}[\"{}\"]", table.path, name)}, "ids"));
    BATON_ASSIGN_OR_RETURN(const array list, get_array(ids));
    if (list.size() > kMaxComponents) return ids.fail("has too many ids");
    TemplatePiece out_piece;
    for (element id : list) {
      BATON_ASSIGN_OR_RETURN(const int32_t value, token_id(Node{id, ids.path}));
      out_piece.ids.push_back(value);
    }
    out.push_back(std::move(out_piece));
  }
  return out;
}

// ["</s>", 2]
Result<int32_t> parse_token_pair(const Node& node, const char* key) {
  BATON_ASSIGN_OR_RETURN(const Node pair, member(node, key));
  BATON_ASSIGN_OR_RETURN(const array list, get_array(pair));
  element id;
  if (list.size() != 2 || list.at(1).get(id) != simdjson::SUCCESS) return pair.fail("should be [token, id]");
  return token_id(Node{id, pair.path});
}

Result<std::vector<TemplatePiece>> parse_post_processor(const Node& root) {
  std::vector<TemplatePiece> out;
  if (!has_value(root, "post_processor")) return out;
  BATON_ASSIGN_OR_RETURN(const Node node, member(root, "post_processor"));
  ComponentWalk walk("processors", "TemplateProcessing, ByteLevel, RobertaProcessing, BertProcessing",
                     [&](const std::string& type, const Node& item) -> Result<bool> {
                       if (type == "ByteLevel") return true;  // concerns offsets only
                       if (type != "TemplateProcessing" && type != "RobertaProcessing" && type != "BertProcessing") return false;
                       if (!out.empty()) return item.fail("only one post-processor may add tokens");
                       if (type == "TemplateProcessing") {
                         BATON_ASSIGN_OR_RETURN(out, parse_template(item));
                         if (out.empty()) return item.fail("the template is empty");
                       } else {
                         BATON_ASSIGN_OR_RETURN(const int32_t cls, parse_token_pair(item, "cls"));
                         BATON_ASSIGN_OR_RETURN(const int32_t sep, parse_token_pair(item, "sep"));
                         out = {{false, {cls}}, {true, {}}, {false, {sep}}};
                       }
                       return true;
                     });
  BATON_RETURN_IF_ERROR(walk.run(node));
  return out;
}

Status parse_merges(const Node& model, Bpe::Config& config) {
  BATON_ASSIGN_OR_RETURN(const Node node, member(model, "merges"));
  BATON_ASSIGN_OR_RETURN(const array list, get_array(node));
  size_t index = 0;
  for (element item : list) {
    const size_t at = index++;
    const auto fail = [&](std::string_view why) { return Node{item, fmt::format("{}[{}]", node.path, at)}.fail(why); };
    if (at >= kMaxMerges) return node.fail(fmt::format("more than {} merges", kMaxMerges));
    std::string_view text;
    array pair;
    if (item.get(text) == simdjson::SUCCESS) {
      if (text.starts_with("#version")) continue;
      const size_t space = text.find(' ');
      if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos) {
        return fail("should be two tokens with one space between them");
      }
      config.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    } else if (item.get(pair) == simdjson::SUCCESS) {
      std::array<std::string_view, 2> sides;
      size_t count = 0;
      for (element side : pair) {
        if (count == 2 || side.get(sides[count]) != simdjson::SUCCESS) return fail("should be [token, token]");
        ++count;
      }
      if (count != 2) return fail("should be [token, token]");
      config.merges.emplace_back(sides[0], sides[1]);
    } else {
      return fail("should be \"a b\" or [\"a\", \"b\"]");
    }
  }
  return {};
}

Result<Bpe::Config> parse_model(const Node& root) {
  Bpe::Config config;
  BATON_ASSIGN_OR_RETURN(const Node model, member(root, "model"));
  BATON_ASSIGN_OR_RETURN(const std::string type, get_string(model, "type", "BPE"));
  if (type != "BPE") return model.fail(fmt::format("the type \"{}\" is not supported; supported: BPE", type));
  if (has_value(model, "dropout")) {
    BATON_ASSIGN_OR_RETURN(const Node node, member(model, "dropout"));
    double dropout = 0;
    if (node.value.get(dropout) != simdjson::SUCCESS || dropout != 0) return node.fail("dropout is for training; remove it or set it to null");
  }
  if (has_value(model, "unk_token")) {
    BATON_ASSIGN_OR_RETURN(config.unk_token, get_string(model, "unk_token"));
  }
  BATON_ASSIGN_OR_RETURN(config.continuing_subword_prefix, get_string(model, "continuing_subword_prefix", ""));
  BATON_ASSIGN_OR_RETURN(config.end_of_word_suffix, get_string(model, "end_of_word_suffix", ""));
  BATON_ASSIGN_OR_RETURN(config.fuse_unk, get_bool(model, "fuse_unk", false));
  BATON_ASSIGN_OR_RETURN(config.byte_fallback, get_bool(model, "byte_fallback", false));
  BATON_ASSIGN_OR_RETURN(config.ignore_merges, get_bool(model, "ignore_merges", false));

  BATON_ASSIGN_OR_RETURN(const Node vocab_node, member(model, "vocab"));
  object vocab;
  if (vocab_node.value.get(vocab) != simdjson::SUCCESS) return vocab_node.fail("should be an object of token: id");
  std::vector<bool> taken;
  for (const auto field : vocab) {
    if (config.vocab.size() >= kMaxVocab) return vocab_node.fail(fmt::format("more than {} tokens", kMaxVocab));
    const auto where = [&] { return Node{field.value, fmt::format("{}[\"{}\"]", vocab_node.path, field.key.substr(0, 100))}; };
    int64_t value = 0;
    if (field.value.get(value) != simdjson::SUCCESS || value < 0 || value >= kMaxTokenId) {
      return where().fail(fmt::format("should be a token id from 0 to {}", kMaxTokenId - 1));
    }
    if (field.key.size() > kMaxTokenBytes) return where().fail(fmt::format("a token has more than {} bytes", kMaxTokenBytes));
    const auto id = static_cast<size_t>(value);
    if (id >= taken.size()) taken.resize(std::max(id + 1, taken.size() * 2));
    if (taken[id]) return where().fail(fmt::format("the id {} is given to two tokens", id));
    taken[id] = true;
    config.vocab.emplace_back(field.key, static_cast<int32_t>(id));
  }
  BATON_RETURN_IF_ERROR(parse_merges(model, config));
  return config;
}

Result<std::vector<AddedToken>> parse_added_tokens(const Node& root) {
  std::vector<AddedToken> out;
  if (!has_value(root, "added_tokens")) return out;
  BATON_ASSIGN_OR_RETURN(const Node list, member(root, "added_tokens"));
  BATON_ASSIGN_OR_RETURN(const array items, get_array(list));
  size_t bytes = 0;
  for (element item : items) {
    const Node node{item, fmt::format("{}[{}]", list.path, out.size())};
    AddedToken token;
    BATON_ASSIGN_OR_RETURN(token.content, get_string(node, "content", std::nullopt, kMaxAddedTokenBytes));
    BATON_ASSIGN_OR_RETURN(const int64_t id, get_integer(node, "id", 0, kMaxTokenId - 1));
    token.id = static_cast<int32_t>(id);
    BATON_ASSIGN_OR_RETURN(token.single_word, get_bool(node, "single_word", false));
    BATON_ASSIGN_OR_RETURN(token.lstrip, get_bool(node, "lstrip", false));
    BATON_ASSIGN_OR_RETURN(token.rstrip, get_bool(node, "rstrip", false));
    BATON_ASSIGN_OR_RETURN(token.normalized, get_bool(node, "normalized", true));
    BATON_ASSIGN_OR_RETURN(token.special, get_bool(node, "special", false));
    bytes += token.content.size();
    if (bytes > kMaxAllAddedTokenBytes || out.size() >= kMaxVocab) return list.fail("has too many tokens");
    out.push_back(std::move(token));
  }
  return out;
}

}  // namespace

Result<TokenizerParts> parse_tokenizer_json(std::string_view json) {
  if (json.size() > kMaxTokenizerFileBytes) {
    return invalid_argument("tokenizer.json has {} bytes, at most {} are accepted", json.size(), kMaxTokenizerFileBytes);
  }
  simdjson::dom::parser parser;
  if (parser.allocate(json.size(), kMaxJsonDepth) != simdjson::SUCCESS) return resource_exhausted("no memory to read tokenizer.json");
  element document;
  if (const auto error = parser.parse(json.data(), json.size()).get(document); error != simdjson::SUCCESS) {
    return invalid_argument("tokenizer.json is not valid JSON: {}", simdjson::error_message(error));
  }
  const Node root{document, ""};
  BATON_ASSIGN_OR_RETURN(const std::string version, get_string(root, "version", "1.0"));
  if (version != "1.0") return root.fail(fmt::format("version \"{}\" is not known; supported: 1.0", version));
  TokenizerParts parts;
  BATON_ASSIGN_OR_RETURN(parts.normalizer, parse_normalizer(root));
  BATON_ASSIGN_OR_RETURN(parts.pre_tokenizer, parse_pre_tokenizer(root));
  BATON_ASSIGN_OR_RETURN(parts.post_processor, parse_post_processor(root));
  BATON_ASSIGN_OR_RETURN(parts.decoder, parse_decoder(root));
  BATON_ASSIGN_OR_RETURN(parts.model, parse_model(root));
  BATON_ASSIGN_OR_RETURN(parts.added_tokens, parse_added_tokens(root));
  return parts;
}

}  // namespace baton
