#include "http/api_request.h"

#include <gtest/gtest.h>

#include <cmath>

#include "http/api_render.h"
#include "http/json_text.h"

namespace baton::http {
namespace {

CompletionRequest parse(std::string_view body, bool chat = false, SamplingDefaults defaults = {}) {
  auto result = parse_completion_request(body, chat, defaults, {});
  if (auto* error = std::get_if<ApiError>(&result)) {
    ADD_FAILURE() << error->message;
    return {};
  }
  return std::get<CompletionRequest>(std::move(result));
}

ApiError refuse(std::string_view body, bool chat = false) {
  auto result = parse_completion_request(body, chat, {}, {});
  if (auto* error = std::get_if<ApiError>(&result)) return *error;
  ADD_FAILURE() << "accepted: " << body;
  return {};
}

TEST(CompletionRequest, PromptComesInFourForms) {
  EXPECT_EQ(std::get<std::string>(parse(R"({"prompt":"a"})").prompts.at(0)), "a");
  EXPECT_EQ(parse(R"({"prompt":["a","b"]})").prompts.size(), 2u);
  EXPECT_EQ(std::get<std::vector<int32_t>>(parse(R"({"prompt":[1,2,3]})").prompts.at(0)),
            (std::vector<int32_t>{1, 2, 3}));
  auto lists = parse(R"({"prompt":[[1,2],[3]]})");
  ASSERT_EQ(lists.prompts.size(), 2u);
  EXPECT_EQ(std::get<std::vector<int32_t>>(lists.prompts[1]), std::vector<int32_t>{3});
}

TEST(CompletionRequest, DefaultsAreOpenAIsUnlessTheModelHasItsOwn) {
  auto plain = parse(R"({"prompt":"a"})");
  EXPECT_EQ(plain.sampling.max_tokens(), 16);
  EXPECT_EQ(plain.sampling.temperature(), 1.0f);
  EXPECT_EQ(plain.sampling.logprobs(), -1);
  EXPECT_FALSE(plain.has_seed);
  SamplingDefaults defaults;
  defaults.temperature = 0.6f;
  defaults.top_k = 20;
  auto model = parse(R"({"prompt":"a"})", false, defaults);
  EXPECT_EQ(model.sampling.temperature(), 0.6f);
  EXPECT_EQ(model.sampling.top_k(), 20);
  auto own = parse(R"({"prompt":"a","temperature":0,"top_k":-1,"seed":-5})", false, defaults);
  EXPECT_EQ(own.sampling.temperature(), 0.0f);
  EXPECT_EQ(own.sampling.top_k(), 0);
  EXPECT_TRUE(own.has_seed);
}

TEST(CompletionRequest, NullIsAsIfAbsent) {
  auto request = parse(R"({"prompt":"a","temperature":null,"stop":null,"seed":null,"logprobs":null,"n":null})");
  EXPECT_EQ(request.n, 1);
  EXPECT_TRUE(request.stop.empty());
}

TEST(CompletionRequest, ChatKeepsMessagesAndToolsAsTheyCame) {
  auto request = parse(R"({"messages":[{"role":"user","content":"hi \u00e9"}],"tools":[{"type":"function"}],
                           "max_completion_tokens":7,"logprobs":true,"top_logprobs":3,
                           "chat_template_kwargs":{"enable_thinking":false}})", true);
  EXPECT_EQ(request.messages_json, "[{\"role\":\"user\",\"content\":\"hi \xc3\xa9\"}]");
  EXPECT_EQ(request.tools_json, "[{\"type\":\"function\"}]");
  EXPECT_EQ(request.template_kwargs_json, "{\"enable_thinking\":false}");
  EXPECT_EQ(request.sampling.max_tokens(), 7);
  EXPECT_EQ(request.sampling.logprobs(), 3);
}

TEST(CompletionRequest, WholeNumbersMayBeWrittenWithAPoint) {
  EXPECT_EQ(parse(R"({"prompt":"a","max_tokens":5.0})").sampling.max_tokens(), 5);
  EXPECT_EQ(parse(R"({"prompt":"a","n":2.0,"top_k":3e1})").sampling.top_k(), 30);
  EXPECT_NE(refuse(R"({"prompt":"a","seed":18446744073709551615})").message.find("between"), std::string::npos);
  EXPECT_NE(refuse(R"({"prompt":"a","max_tokens":1e300})").message.find("an integer"), std::string::npos);
}

// Workers take a number beyond the protocol's limits for a broken router.
TEST(CompletionRequest, NothingExceedsTheLimitsOfTheProtocol) {
  EXPECT_LE(parse(R"({"prompt":"a","top_k":2147483647})").sampling.top_k(), 1 << 30);
}

TEST(CompletionRequest, ChatTakesTextPartsOnly) {
  parse(R"({"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}]})", true);
  ApiError error = refuse(R"({"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]})", true);
  EXPECT_EQ(error.param, "messages");
  EXPECT_NE(error.message.find("image_url"), std::string::npos);
}

TEST(CompletionRequest, EveryRefusalNamesTheParameterAndTheLimit) {
  struct Case {
    const char* body;
    bool chat;
    const char* param;
    const char* message;
  };
  const Case cases[] = {
      {R"({"prompt":"a","temperature":-1})", false, "temperature", "between 0 and 100"},
      {R"({"prompt":"a","temperature":"hot"})", false, "temperature", "must be a number, not a string"},
      {R"({"prompt":"a","top_p":1.5})", false, "top_p", "between 0 and 1"},
      {R"({"prompt":"a","top_p":0})", false, "top_p", "greater"},
      {R"({"prompt":"a","max_tokens":0})", false, "max_tokens", "between 1"},
      {R"({"prompt":"a","max_tokens":1.5})", false, "max_tokens", "an integer"},
      {R"({"prompt":"a","n":1000})", false, "n", "between 1 and 128"},
      {R"({"prompt":[]})", false, "prompt", "empty array"},
      {R"({"prompt":[1,"a"]})", false, "prompt", "not a token id"},
      {R"({"prompt":[-1]})", false, "prompt", "not a token id"},
      {R"({"prompt":{}})", false, "prompt", "must be a string"},
      {R"({})", false, "prompt", "missing"},
      {R"({"prompt":"a","stop":[""]})", false, "stop", "empty string"},
      {R"({"prompt":"a","stop":[1]})", false, "stop", "array of strings"},
      {R"({"prompt":"a","logprobs":21})", false, "logprobs", "between 0 and 20"},
      {R"({"prompt":"a","logit_bias":{"x":1}})", false, "logit_bias", "not a token id"},
      {R"({"prompt":"a","logit_bias":{"5":101}})", false, "logit_bias", "-100 to 100"},
      {R"({"prompt":"a","stream_options":{"include_usage":true}})", false, "stream_options", "'stream': true"},
      {R"({"prompt":"a","suffix":"b"})", false, "suffix", "not supported"},
      {R"({"prompt":"a","best_of":3})", false, "best_of", "only the value"},
      {R"({"prompt":"a","echo":true,"logprobs":1})", false, "echo", "not supported"},
      {R"({"messages":[]})", true, "messages", "empty"},
      {R"({"messages":[{"content":"x"}]})", true, "messages", "'role'"},
      {R"({"messages":"x"})", true, "messages", "an array"},
      {R"({"messages":[{"role":"user"}],"top_logprobs":2})", true, "top_logprobs", "needs"},
      {R"({"messages":[{"role":"user"}],"response_format":{"type":"json_object"}})", true, "response_format", "only"},
      {R"({"messages":[{"role":"user"}],"tool_choice":"required"})", true, "tool_choice", "not supported"},
  };
  for (const Case& test : cases) {
    ApiError error = refuse(test.body, test.chat);
    EXPECT_EQ(error.param, test.param) << test.body;
    EXPECT_NE(error.message.find(test.message), std::string::npos) << test.body << ": " << error.message;
    EXPECT_EQ(error.http_status, 400);
  }
  EXPECT_NE(refuse("{").message.find("not valid JSON"), std::string::npos);
  EXPECT_NE(refuse("[1]").message.find("JSON object"), std::string::npos);
  EXPECT_NE(refuse("{\"prompt\":\"\xff\"}").message.find("not valid JSON"), std::string::npos);
}

TEST(JsonText, EscapesAndReplacesWhatIsNotUtf8) {
  EXPECT_EQ(json_string("a\"b\\c\n\t\x01"), "\"a\\\"b\\\\c\\n\\t\\u0001\"");
  EXPECT_EQ(json_string("\xc3\xa9"), "\"\xc3\xa9\"");
  EXPECT_EQ(json_string("x\xff\xc3"), "\"x\xef\xbf\xbd\xef\xbf\xbd\"");
  EXPECT_EQ(json_string("\xed\xa0\x80").substr(0, 4), "\"\xef\xbf\xbd");  // a surrogate is not a character
  std::string number;
  append_json_number(number, -INFINITY);
  EXPECT_EQ(number, "-9999");
}

TEST(Render, StreamEventHasTheShapeThatClientsParse) {
  ResponseHead head{true, "chatcmpl-1", 5, "m"};
  Choice choice;
  choice.text = "hi";
  EXPECT_EQ(render_stream_event(head, choice, true, false),
            "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":5,\"model\":\"m\",\"choices\":["
            "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"hi\"},\"logprobs\":null,\"finish_reason\":null,"
            "\"stop_reason\":null}]}\n\n");
}

TEST(ApiError, StatusesBecomeHttpStatuses) {
  EXPECT_EQ(to_api_error(invalid_argument("x")).http_status, 400);
  EXPECT_EQ(to_api_error(resource_exhausted("x")).http_status, 429);
  EXPECT_EQ(to_api_error(unavailable("x")).http_status, 503);
  EXPECT_EQ(to_api_error(deadline_exceeded("x")).http_status, 504);
  EXPECT_EQ(to_api_error(internal_error("x")).http_status, 500);
}

}  // namespace
}  // namespace baton::http
