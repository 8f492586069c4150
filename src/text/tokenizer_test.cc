#include "text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "text/detokenizer.h"

namespace baton {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

const std::string kGolden = BATON_SOURCE_DIR "/tests/golden/tokenizers/";

std::string read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

std::unique_ptr<Tokenizer> load(const std::string& family) {
  auto tokenizer = Tokenizer::load(kGolden + family + ".json");
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().to_string();
  return std::move(*tokenizer);
}

// The format is described in tools/make_tokenizer_fixtures.py.
class CaseReader {
 public:
  explicit CaseReader(std::string bytes) : bytes_(std::move(bytes)) {}
  uint32_t number() {
    uint32_t value = 0;
    std::memcpy(&value, bytes_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }
  std::string text(uint32_t count) {
    at_ += count;
    return bytes_.substr(at_ - count, count);
  }
  std::vector<int32_t> ids(uint32_t count) {
    std::vector<int32_t> out(count);
    if (count > 0) std::memcpy(out.data(), bytes_.data() + at_, count * sizeof(int32_t));
    at_ += count * sizeof(int32_t);
    return out;
  }
  bool done() const { return at_ == bytes_.size(); }

 private:
  std::string bytes_;
  size_t at_ = 0;
};

bool has_byte_tokens(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  for (int32_t id : ids) {
    if (tokenizer.id_to_token(id).starts_with("<0x")) return true;
  }
  return false;
}

TEST(Tokenizer, AgreesWithHuggingFaceOnTheGoldenCases) {
  constexpr uint32_t kSame = 0xFFFFFFFF;
  std::ifstream families(kGolden + "families.txt");
  CaseReader cases(read_all(kGolden + "cases.bin"));
  size_t total = 0;
  for (std::string family; std::getline(families, family);) {
    SCOPED_TRACE(family);
    const auto tokenizer = load(family);
    const uint32_t count = cases.number();
    for (uint32_t i = 0; i < count; ++i, ++total) {
      const std::string text = cases.text(cases.number());
      SCOPED_TRACE(text);
      const std::vector<int32_t> ids = cases.ids(cases.number());
      const uint32_t plain_count = cases.number();
      const std::vector<int32_t> plain = plain_count == kSame ? ids : cases.ids(plain_count);
      ASSERT_EQ(tokenizer->encode(text, true).value(), ids);
      ASSERT_EQ(tokenizer->encode(text, false).value(), plain);
      for (bool skip : {true, false}) {
        const uint32_t bytes = cases.number();
        const std::string decoded = bytes == kSame ? text : cases.text(bytes);
        ASSERT_EQ(tokenizer->decode(ids, skip), decoded);
        Detokenizer detokenizer(*tokenizer, skip);
        std::string streamed;
        for (int32_t id : ids) streamed += detokenizer.push(id);
        streamed += detokenizer.flush();
        ASSERT_EQ(streamed, decoded);
      }
    }
  }
  EXPECT_TRUE(cases.done());
  EXPECT_GE(total, 2000U);
}

TEST(Tokenizer, RefusesTextThatIsNoUtf8AndNamesTheByte) {
  const auto tokenizer = load("qwen");
  for (const std::string text : {"ab\xFF", "ab\xC3", "ab\xED\xA0\x80", "ab\xC0\x80", "ab\xF4\x90\x80\x80"}) {
    const auto ids = tokenizer->encode(text, true);
    ASSERT_FALSE(ids.ok());
    EXPECT_EQ(ids.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(ids.status().message(), HasSubstr("byte 2"));
  }
}

TEST(Tokenizer, KnowsItsTokens) {
  const auto tokenizer = load("qwen");
  const int32_t end = tokenizer->token_to_id("<|im_end|>").value();
  EXPECT_TRUE(tokenizer->is_special(end));
  EXPECT_FALSE(tokenizer->is_special(tokenizer->token_to_id("<think>").value()));
  EXPECT_EQ(tokenizer->id_to_token(end), "<|im_end|>");
  EXPECT_EQ(tokenizer->token_bytes(end), "<|im_end|>");
  EXPECT_EQ(tokenizer->token_bytes(tokenizer->token_to_id("Ġ").value()), " ");
  EXPECT_EQ(tokenizer->token_to_id("no such token"), std::nullopt);
  EXPECT_EQ(tokenizer->id_to_token(-1), "");
  EXPECT_EQ(tokenizer->id_to_token(tokenizer->vocab_size()), "");
  EXPECT_FALSE(tokenizer->is_special(1 << 30));
  EXPECT_EQ(tokenizer->decode(std::vector<int32_t>{-1, 1 << 30}, false), "");

  const auto llama = load("llama2");
  EXPECT_EQ(llama->token_bytes(llama->token_to_id("<0x0A>").value()), "\n");
  EXPECT_EQ(llama->token_bytes(llama->token_to_id("▁").value()), " ");
}

TEST(Tokenizer, RecognisesSpecialTokensInTextAndAddsItsOwnOnDemand) {
  const auto tokenizer = load("llama3");
  const int32_t bos = tokenizer->token_to_id("<|begin_of_text|>").value();
  const int32_t eot = tokenizer->token_to_id("<|eot_id|>").value();
  EXPECT_THAT(tokenizer->encode("<|eot_id|>", true).value(), ElementsAre(bos, eot));
  EXPECT_THAT(tokenizer->encode("<|eot_id|>", false).value(), ElementsAre(eot));
  EXPECT_EQ(tokenizer->decode(std::vector<int32_t>{bos, eot}, true), "");
  EXPECT_EQ(tokenizer->decode(std::vector<int32_t>{bos, eot}, false), "<|begin_of_text|><|eot_id|>");
}

TEST(Tokenizer, LongWordsStayFast) {
  const auto tokenizer = load("qwen");
  std::string word;
  for (int i = 0; i < 200'000; ++i) word += static_cast<char>('a' + i * 7 % 26);
  const auto ids = tokenizer->encode(word, false).value();
  EXPECT_EQ(tokenizer->decode(ids, false), word);
  const std::string spaces(100'000, ' ');
  EXPECT_EQ(tokenizer->decode(tokenizer->encode(spaces, false).value(), false), spaces);
}

TEST(Tokenizer, ManyThreadsMayEncodeAtOnce) {
  const auto tokenizer = load("gpt_oss");
  const std::string text = "The quick brown fox can't jump over 12345 lazy dogs. Ελλάδα 日本語\n";
  const auto expected = tokenizer->encode(text, true).value();
  std::vector<std::jthread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 200; ++n) ASSERT_EQ(tokenizer->encode(text, true).value(), expected);
    });
  }
}

// A tokenizer.json with one part replaced.
std::string json_with(const std::string& part) {
  return R"({"version":"1.0","model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]})" + (part.empty() ? "" : "," + part) + "}";
}

void expect_refused(const std::string& json, const std::string& message) {
  const auto tokenizer = Tokenizer::from_json(json);
  ASSERT_FALSE(tokenizer.ok()) << json;
  EXPECT_EQ(tokenizer.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(tokenizer.status().message(), HasSubstr(message));
}

TEST(TokenizerJson, NamesWhatItDoesNotSupport) {
  ASSERT_TRUE(Tokenizer::from_json(json_with("")).ok());
  expect_refused(json_with(R"("pre_tokenizer":{"type":"UnicodeScripts"})"), "pre_tokenizer: the type \"UnicodeScripts\" is not supported; supported: Split");
  expect_refused(json_with(R"("pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Foo"}]})"), "pre_tokenizer.pretokenizers[0]");
  expect_refused(json_with(R"("normalizer":{"type":"Precompiled"})"), "normalizer: the type \"Precompiled\"");
  expect_refused(json_with(R"("decoder":{"type":"WordPiece"})"), "decoder: the type \"WordPiece\"");
  expect_refused(json_with(R"("post_processor":{"type":"Foo"})"), "post_processor: the type \"Foo\"");
  expect_refused(R"({"model":{"type":"Unigram","vocab":[]}})", "model: the type \"Unigram\" is not supported; supported: BPE");
}

TEST(TokenizerJson, RefusesWrongFilesWithTheirPlace) {
  expect_refused("", "not valid JSON");
  expect_refused("[]", "should be an object");
  expect_refused("{}", "has no \"model\"");
  expect_refused(R"({"model":{"vocab":{"a":0,"b":0},"merges":[]}})", "the id 0 is given to two tokens");
  expect_refused(R"({"model":{"vocab":{"a":-1},"merges":[]}})", "model.vocab[\"a\"]");
  expect_refused(R"({"model":{"vocab":{"a":99999999},"merges":[]}})", "token id");
  expect_refused(R"({"model":{"vocab":{"a":0,"b":1},"merges":["a b"]}})", "model.merges[0]: token \"ab\" is not in the vocabulary");
  expect_refused(R"({"model":{"vocab":{"a":0},"merges":["a b c"]}})", "model.merges[0]: should be two tokens");
  expect_refused(R"({"model":{"vocab":{"a":0},"merges":[["a"]]}})", "model.merges[0]: should be [token, token]");
  expect_refused(R"({"version":"2.0","model":{"vocab":{},"merges":[]}})", "version \"2.0\" is not known");
  expect_refused(json_with(R"("added_tokens":[{"content":"x"}])"), "added_tokens[0]: has no \"id\"");
  expect_refused(json_with(R"("pre_tokenizer":{"type":"Split","pattern":{"Regex":"("},"behavior":"Isolated","invert":false})"), "pre_tokenizer.pattern");
  expect_refused(json_with(R"("pre_tokenizer":{"type":"Split","pattern":{"String":"a"},"behavior":"Foo","invert":false})"), "unknown behavior \"Foo\"");
  expect_refused(json_with(R"("post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}}],"special_tokens":{}})"),
                 "has no \"<s>\"");
  std::string deep = R"({"type":"Sequence","normalizers":[)", tail = "]}";
  std::string nested;
  for (int i = 0; i < 20; ++i) nested += deep;
  nested += R"({"type":"NFC"})";
  for (int i = 0; i < 20; ++i) nested += tail;
  expect_refused(json_with("\"normalizer\":" + nested), "nested too deeply");
  EXPECT_EQ(Tokenizer::load("/nonexistent/tokenizer.json").status().code(), StatusCode::kNotFound);
}

TEST(Detokenizer, HoldsBackHalfCharacters) {
  const auto tokenizer = load("qwen");
  Detokenizer detokenizer(*tokenizer, true);
  std::vector<std::string> out;
  for (char byte : std::string("\xF0\x9F\x8E\x89!")) {
    // One token a byte: look each up by what it stands for.
    for (int32_t id = 0; id < tokenizer->vocab_size(); ++id) {
      if (tokenizer->token_bytes(id) == std::string(1, byte)) {
        out.push_back(detokenizer.push(id));
        break;
      }
    }
  }
  EXPECT_THAT(out, ElementsAre("", "", "", "\xF0\x9F\x8E\x89", "!"));
  EXPECT_EQ(detokenizer.flush(), "");
}

TEST(Detokenizer, FlushesAnIncompleteCharacterAsOneReplacement) {
  const auto tokenizer = load("mistral");
  Detokenizer detokenizer(*tokenizer, true);
  EXPECT_EQ(detokenizer.push(tokenizer->token_to_id("<0xE2>").value()), "");
  EXPECT_EQ(detokenizer.push(tokenizer->token_to_id("<0x82>").value()), "");
  EXPECT_EQ(detokenizer.flush(), "\uFFFD\uFFFD");  // as Hugging Face: one for each byte token
}

TEST(Detokenizer, ContinuesThePrompt) {
  const auto tokenizer = load("llama2");
  const std::vector<int32_t> ids = tokenizer->encode("hello world", false).value();
  for (size_t prompt = 1; prompt < ids.size(); ++prompt) {
    const std::span<const int32_t> all(ids);
    const std::string before = tokenizer->decode(all.first(prompt), true);
    Detokenizer detokenizer(*tokenizer, true, all.first(prompt));
    std::string text;
    for (int32_t id : all.subspan(prompt)) text += detokenizer.push(id);
    EXPECT_EQ(before + text + detokenizer.flush(), "hello world");
  }
}

TEST(Detokenizer, EmitsWholeCharactersOfARunOfByteTokensAtOnce) {
  const auto tokenizer = load("llama2");
  const auto ids = tokenizer->encode("\xF0\x9F\xA6\x84\xF0\x9F\xA6\x84", false).value();
  ASSERT_TRUE(has_byte_tokens(*tokenizer, ids));
  Detokenizer detokenizer(*tokenizer, true);
  size_t pieces = 0;
  for (int32_t id : ids) pieces += detokenizer.push(id).empty() ? 0 : 1;
  EXPECT_GE(pieces, 2U);
}

}  // namespace
}  // namespace baton
