#include "text/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include <unistd.h>

namespace baton {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

const std::filesystem::path kGolden = std::filesystem::path(BATON_SOURCE_DIR) / "tests/golden/templates";

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<std::string> read_lines(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

/// strftime_now() shows local time: the fixtures were made in UTC.
class ChatTemplateTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    setenv("TZ", "UTC", 1);
    tzset();
  }
};

Result<std::string> render(const std::string& source, const std::string& messages = "[]", const std::string& extra = "",
                           bool generate = false) {
  auto chat = ChatTemplate::parse(source, "<s>", "</s>");
  if (!chat.ok()) return chat.status();
  ChatTemplateInputs inputs;
  inputs.messages_json = messages;
  inputs.extra_json = extra;
  inputs.add_generation_prompt = generate;
  return (*chat)->render(inputs);
}

std::string error_of(const std::string& source, const std::string& messages = "[]", const std::string& extra = "") {
  const auto result = render(source, messages, extra);
  EXPECT_FALSE(result.ok()) << "rendered: " << *result;
  if (result.ok()) return "";
  EXPECT_EQ(result.status().code(), StatusCode::kInvalidArgument);
  return result.status().message();
}

TEST_F(ChatTemplateTest, SmallTemplatesRenderAsJinja2DoesIt) {
  const auto lines = read_lines(kGolden / "micro.jsonl");
  ASSERT_GT(lines.size(), 500u);
  const auto header = nlohmann::ordered_json::parse(lines[0]);
  // Parsed by us from the text: the test's JSON library would make the big integer a float.
  const std::string& first = lines[0];
  const std::size_t start = first.find('{', 1);
  const std::size_t end = first.rfind("}, \"now\"");
  ASSERT_NE(end, std::string::npos);
  ChatTemplateInputs inputs;
  inputs.messages_json = "[]";
  inputs.extra_json = first.substr(start, end + 1 - start);
  inputs.add_generation_prompt = false;
  inputs.now_unix_s = header.at("now");
  for (std::size_t i = 1; i < lines.size(); ++i) {
    const auto item = json::parse(lines[i]);
    const std::string source = item.at("template");
    auto chat = ChatTemplate::parse(source, "", "");
    const Result<std::string> text = chat.ok() ? (*chat)->render(inputs) : Result<std::string>(chat.status());
    if (item.contains("error")) {
      EXPECT_FALSE(text.ok()) << source << "\nJinja2: " << item["error"] << "\nours: " << *text;
    } else if (text.ok()) {
      EXPECT_EQ(*text, item["expected"].get<std::string>()) << source;
    } else {
      ADD_FAILURE() << source << "\nJinja2: " << item["expected"] << "\nours: " << text.status().message();
    }
  }
}

TEST_F(ChatTemplateTest, ChatsInTheStyleOfEachFamilyRenderAsInTransformers) {
  const auto lines = read_lines(kGolden / "chats.jsonl");
  ASSERT_GT(lines.size(), 500u);
  std::map<std::string, ChatTemplateInputs> cases;
  std::map<std::string, std::unique_ptr<ChatTemplate>> templates;
  std::int64_t now = 0;
  std::size_t compared = 0;
  for (const std::string& line : lines) {
    const auto item = nlohmann::ordered_json::parse(line);
    if (item.contains("now")) {
      now = item["now"];
    } else if (item.contains("messages")) {
      ChatTemplateInputs& inputs = cases[item["name"]];
      inputs.messages_json = item["messages"];
      inputs.tools_json = item["tools"];
      inputs.extra_json = item["extra"];
      inputs.add_generation_prompt = item["add_generation_prompt"];
      inputs.now_unix_s = now;
      inputs.normalize_messages = false;
    } else {
      const std::string file = item["template"];
      auto& chat = templates[file];
      if (chat == nullptr) {
        auto parsed = ChatTemplate::parse(read(kGolden / file), "<s>", "</s>");
        ASSERT_TRUE(parsed.ok()) << file << ": " << parsed.status().message();
        chat = std::move(parsed).value();
      }
      const std::string name = item["name"];
      const auto text = chat->render(cases.at(name));
      ++compared;
      if (item.contains("error")) {
        EXPECT_FALSE(text.ok()) << file << " " << name << "\nJinja2: " << item["error"];
      } else if (text.ok()) {
        EXPECT_EQ(*text, item["expected"].get<std::string>()) << file << " " << name;
      } else {
        ADD_FAILURE() << file << " " << name << ": " << text.status().message();
      }
    }
  }
  EXPECT_GT(compared, 500u);
}

TEST_F(ChatTemplateTest, ErrorsSayTheLineAndWhatHappened) {
  EXPECT_EQ(error_of("a\nb\n{{ x.y }}"), "chat template, line 3: 'x' is undefined");
  EXPECT_EQ(error_of("{% if true %}\n\n{% endfor %}"), "chat template, line 3: unknown tag 'endfor'");
  EXPECT_EQ(error_of("{{ 'a' + 1 }}"), "chat template, line 1: can only concatenate str (not \"int\") to str");
  EXPECT_THAT(error_of("\n{{ x | nosuch }}"), HasSubstr("line 2: no filter named 'nosuch'"));
  EXPECT_THAT(error_of("{% for m in messages %}\n{{ m.a.b }}{% endfor %}", "[{}]"),
              HasSubstr("line 2: 'dict object' has no attribute 'a'"));
}

TEST_F(ChatTemplateTest, RaiseExceptionIsPassedOnVerbatim) {
  EXPECT_EQ(error_of("x\n{{ raise_exception('Roles must alternate: ' ~ messages[0].role) }}", R"([{"role": "x"}])"),
            "Roles must alternate: x");
}

TEST_F(ChatTemplateTest, InputsThatAreNotWhatTheyShouldBeAreRefused) {
  EXPECT_THAT(error_of("x", "[1"), HasSubstr("messages are not valid JSON"));
  EXPECT_THAT(error_of("x", "{}"), HasSubstr("messages must be an array"));
  EXPECT_THAT(error_of("x", "[1]"), HasSubstr("messages[0] must be an object"));
  EXPECT_THAT(error_of("x", "[]", "[]"), HasSubstr("chat_template_kwargs must be an object"));
  EXPECT_THAT(error_of("x", "[]", R"({"messages": []})"), HasSubstr("must not contain 'messages'"));
  EXPECT_THAT(error_of("x", std::string(200, '[') + std::string(200, ']')), HasSubstr("nested more than"));
  EXPECT_THAT(error_of("x", "[{\"content\": \"\xff\"}]"), HasSubstr("not valid JSON"));
  EXPECT_THAT(error_of("\xff"), HasSubstr("not valid UTF-8"));
}

TEST_F(ChatTemplateTest, EndlessTemplatesEndWithAnError) {
  EXPECT_THAT(error_of("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"), HasSubstr("steps"));
  EXPECT_THAT(error_of("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), HasSubstr("nested more than"));
  EXPECT_THAT(error_of("{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}"), HasSubstr("nested more than"));
  EXPECT_THAT(error_of("{{ 'x' * 99999999999 }}"), HasSubstr("longer than the limit"));
  EXPECT_THAT(error_of("{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}"),
              HasSubstr("limit"));
  EXPECT_THAT(error_of("{% set n = namespace(s='x') %}{% for i in range(99999) %}{% set n.s = [n.s] %}{% endfor %}"),
              HasSubstr("levels deep"));
  EXPECT_THAT(error_of("{% set n = namespace(s=1) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}"),
              ::testing::AnyOf(HasSubstr("limit"), HasSubstr("steps"), HasSubstr("bytes")));
  EXPECT_THAT(error_of("{% for i in range(999) %}{{ 'x' * 99999 }}{% endfor %}"), HasSubstr("limit"));
  EXPECT_THAT(error_of("{% set a = namespace() %}{% set a.self = a %}{{ a }}"), HasSubstr("contains itself"));
}

TEST_F(ChatTemplateTest, DeepSourceIsRefused) {
  EXPECT_THAT(error_of("{{ " + std::string(500, '(') + "1" + std::string(500, ')') + " }}"), HasSubstr("levels deep"));
  EXPECT_THAT(error_of("{{ " + std::string(5000, '-') + "1 }}"), HasSubstr("levels deep"));
  std::string sum = "{{ 1";
  for (int i = 0; i < 2000; ++i) sum += " + 1";
  EXPECT_THAT(error_of(sum + " }}"), HasSubstr("operations deep"));
  std::string nested;
  for (int i = 0; i < 500; ++i) nested += "{% if 1 %}";
  EXPECT_THAT(error_of(nested), HasSubstr("levels deep"));
  EXPECT_THAT(error_of(std::string(2u << 20, 'x')), HasSubstr("more than the limit"));
}

TEST_F(ChatTemplateTest, CyclesThroughNamespacesAndMacrosDoNotLeak) {  // the leak sanitizer watches
  const auto text = render(
      "{% set n = namespace() %}{% set n.me = n %}{% macro m() %}x{% endmacro %}{% set n.m = m %}"
      "{% for i in range(3) %}{% macro inner() %}{{ i }}{% endmacro %}{% set n.f = inner %}{% set n.l = loop %}{% endfor %}{{ n.f() }}");
  ASSERT_TRUE(text.ok()) << text.status().message();
  EXPECT_EQ(*text, "2");
}

TEST_F(ChatTemplateTest, LongConversationsAreNoProblem) {
  std::string messages = "[";
  for (int i = 0; i < 2000; ++i) {
    if (i > 0) messages += ',';
    messages += R"({"role": ")" + std::string(i % 2 == 0 ? "user" : "assistant") + R"(", "content": ")" + std::string(500, 'a') + R"("})";
  }
  const auto chat = ChatTemplate::parse(read(kGolden / "chatml_tools.jinja"), "", "");
  ASSERT_TRUE(chat.ok());
  ChatTemplateInputs inputs;
  inputs.messages_json = messages + "]";
  const auto text = (*chat)->render(inputs);
  ASSERT_TRUE(text.ok()) << text.status().message();
  EXPECT_GT(text->size(), 1'000'000u);
}

TEST_F(ChatTemplateTest, PartsBecomeTextForTemplatesThatExpectText) {
  const std::string messages = R"([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])";
  EXPECT_EQ(*render("{% for m in messages %}{{ m.content }}{% endfor %}", messages), "a\nb");
  // A template with a loop over the parts gets them.
  EXPECT_EQ(*render("{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}", messages), "<a><b>");
  EXPECT_EQ(*render("{% for m in messages %}{% set c = m['content'] %}{% for p in c %}<{{ p.text }}>{% endfor %}{% endfor %}", messages),
            "<a><b>");
  EXPECT_THAT(error_of("{{ messages[0].content }}", R"([{"content": [{"type": "image_url", "image_url": {}}]}])"),
              HasSubstr("content of type 'image_url'"));
}

TEST_F(ChatTemplateTest, ArgumentsOfToolCallsBecomeObjects) {
  const std::string source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}";
  const auto call = [](const std::string& arguments) {
    return R"([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": )" + arguments + "}}]}]";
  };
  EXPECT_EQ(*render(source, call(R"("{\"a\": [1]}")")), R"({"a": [1]})");
  EXPECT_EQ(*render(source, call(R"("")")), "{}");
  EXPECT_EQ(*render(source, call(R"({"a": 1})")), R"({"a": 1})");
  EXPECT_THAT(error_of(source, call(R"("{")")), HasSubstr("arguments of a tool call are not valid JSON"));
}

TEST_F(ChatTemplateTest, ReasoningIsFoundUnderAllItsNames) {
  const std::string source = "{{ messages[0].thinking }}/{{ messages[0].reasoning_content }}";
  EXPECT_EQ(*render(source, R"([{"reasoning": "r"}])"), "r/r");
  EXPECT_EQ(*render(source, R"([{"thinking": "t"}])"), "t/t");
  EXPECT_EQ(*render(source, R"([{"thinking": null, "content": "x"}])"), "None/");
}

TEST_F(ChatTemplateTest, SpecialTokensAndFlagsAreVariables) {
  EXPECT_EQ(*render("{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ tools is none }}"), "<s></s>FalseTrue");
  EXPECT_EQ(*render("{{ add_generation_prompt }}", "[]", "", true), "True");
  EXPECT_EQ(*render("{{ enable_thinking }}{{ bos_token }}", "[]", R"({"enable_thinking": false, "bos_token": "B"})"), "FalseB");
}

TEST_F(ChatTemplateTest, ManyThreadsRenderTheSameTemplate) {
  const auto chat = ChatTemplate::parse(read(kGolden / "typed_channels.jinja"), "", "");
  ASSERT_TRUE(chat.ok());
  ChatTemplateInputs inputs;
  inputs.messages_json = R"([{"role": "user", "content": "hi"}])";
  const auto expected = (*chat)->render(inputs);
  ASSERT_TRUE(expected.ok());
  std::vector<std::thread> threads;
  std::vector<int> equal(4, 0);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) equal[static_cast<std::size_t>(t)] += *(*chat)->render(inputs) == *expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(equal, ::testing::Each(50));
}

class ModelFolder {
 public:
  ModelFolder() : path_(std::filesystem::temp_directory_path() / ("chat_template_test_" + std::to_string(::getpid()))) {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~ModelFolder() { std::filesystem::remove_all(path_); }
  void write(const char* name, const std::string& text) { std::ofstream(path_ / name, std::ios::binary) << text; }
  std::string render(const std::string& tools = "") {
    const auto chat = ChatTemplate::load(path_);
    if (!chat.ok()) return chat.status().to_string();
    ChatTemplateInputs inputs;
    inputs.messages_json = "[]";
    inputs.tools_json = tools;
    const auto text = (*chat)->render(inputs);
    return text.ok() ? *text : text.status().to_string();
  }

 private:
  std::filesystem::path path_;
};

TEST_F(ChatTemplateTest, TemplatesAreFoundWhereModelsKeepThem) {
  ModelFolder folder;
  EXPECT_THAT(folder.render(), HasSubstr("NOT_FOUND"));
  folder.write("tokenizer_config.json", R"({"bos_token": null})");
  EXPECT_THAT(folder.render(), HasSubstr("NOT_FOUND"));
  folder.write("chat_template.json", R"({"chat_template": "from chat_template.json"})");
  EXPECT_EQ(folder.render(), "from chat_template.json");
  folder.write("tokenizer_config.json",
               R"({"bos_token": {"content": "<b>", "special": true}, "eos_token": "<e>", "chat_template": "{{ bos_token }}{{ eos_token }}"})");
  EXPECT_EQ(folder.render(), "<b><e>");
  folder.write("tokenizer_config.json",
               R"({"chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]})");
  EXPECT_EQ(folder.render(), "plain");
  EXPECT_EQ(folder.render("[]"), "with tools");
  folder.write("chat_template.jinja", "from chat_template.jinja");
  EXPECT_EQ(folder.render(), "from chat_template.jinja");
  folder.write("tokenizer_config.json", "{");
  EXPECT_THAT(folder.render(), HasSubstr("tokenizer_config.json"));
  folder.write("tokenizer_config.json", "{}");
  folder.write("chat_template.jinja", "\n{% oops %}");
  EXPECT_THAT(folder.render(), HasSubstr("line 2: unknown tag 'oops'"));
}

}  // namespace
}  // namespace baton
