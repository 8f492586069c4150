#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "http/api_request.h"
#include "http/server.h"
#include "router/router.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace baton::http {

/// What the frontend knows of the model that is served. Tokenizer and template may be missing (a model folder
/// with only a config.json): then prompts must be token ids.
struct ServedModel {
  std::string name;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;
  int32_t vocab_size = 0;
  int32_t max_model_len = 0;       ///< 0: what the workers say
  SamplingDefaults defaults;
  int64_t created_s = 0;
};

/// The OpenAI API on top of a router: one handler for Server. Routes: POST /v1/completions, /v1/chat/completions,
/// /tokenize, /detokenize; GET /v1/models, /live, /ready, /startup, /health, /metrics, /version.
/// Thread-safe; router and model must outlive the server that calls it.
class Api {
 public:
  Api(const ServedModel& model, Router& router, ApiLimits limits = {});
  ~Api();

  void handle(std::shared_ptr<Exchange> exchange);
  RequestHandler handler() {
    return [this](std::shared_ptr<Exchange> exchange) { handle(std::move(exchange)); };
  }
  /// Connections and slow clients for /metrics; set once the server runs.
  void set_server(const Server* server);
  /// From now on /ready and new completions are answered 503; what runs goes on.
  void set_draining();

  struct Context;

 private:
  std::unique_ptr<Context> context_;
};

}  // namespace baton::http
