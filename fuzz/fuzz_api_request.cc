// JSON bodies of every POST route, and what is made of them: nothing may crash, every refusal has a message.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "http/api_render.h"
#include "http/api_request.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace baton::http;
  std::string_view body(reinterpret_cast<const char*>(data), size);
  auto check = [](const auto& result) {
    if (const auto* error = std::get_if<ApiError>(&result)) {
      BATON_CHECK(!error->message.empty() && error->http_status >= 400);
      BATON_CHECK(!render_error(*error).empty());
    }
  };
  for (bool chat : {false, true}) {
    auto result = parse_completion_request(body, chat, {}, {});
    check(result);
    if (const auto* request = std::get_if<CompletionRequest>(&result)) {
      BATON_CHECK(request->n >= 1 && request->sampling.max_tokens() >= 1);
      BATON_CHECK(chat || !request->prompts.empty());
    }
  }
  check(parse_tokenize_request(body));
  check(parse_detokenize_request(body));
  return 0;
}
