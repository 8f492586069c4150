#include "http/api.h"

#include <ctime>
#include <set>

#include "base/log.h"
#include "http/api_context.h"
#include "http/api_render.h"
#include "http/health_json.h"
#include "http/json_text.h"
#include "protocol/metrics_codec.h"

namespace baton::http {

ApiMetrics::ApiMetrics(MetricsRegistry& registry)
    : requests(prometheus::BuildCounter()
                   .Name("baton_http_requests_total")
                   .Help("Completed API requests by endpoint and HTTP status (499: the client went away)")
                   .Register(registry)),
      ttft_s(prometheus::BuildHistogram()
                 .Name("baton_ttft_seconds")
                 .Help("Time from the request's arrival to its first token, at the frontend")
                 .Register(registry)
                 .Add({}, latency_buckets_s())),
      itl_s(prometheus::BuildHistogram()
                .Name("baton_itl_seconds")
                .Help("Gap between two tokens of a sequence, at the frontend")
                .Register(registry)
                .Add({}, itl_buckets_s())),
      e2e_s(prometheus::BuildHistogram()
                .Name("baton_e2e_seconds")
                .Help("Time from a request's arrival to its end")
                .Register(registry)
                .Add({}, latency_buckets_s())),
      running(prometheus::BuildGauge()
                  .Name("baton_http_requests_running")
                  .Help("Completion requests being served")
                  .Register(registry)
                  .Add({})),
      prompt_tokens(prometheus::BuildCounter()
                        .Name("baton_prompt_tokens_total")
                        .Help("Prompt tokens of completed requests")
                        .Register(registry)
                        .Add({})),
      completion_tokens(prometheus::BuildCounter()
                            .Name("baton_completion_tokens_total")
                            .Help("Generated tokens of completed requests")
                            .Register(registry)
                            .Add({})),
      disconnects(prometheus::BuildCounter()
                      .Name("baton_http_client_disconnects_total")
                      .Help("Requests cancelled because the client went away or read too slowly")
                      .Register(registry)
                      .Add({})) {}

int32_t Api::Context::max_model_len() const {
  int32_t workers = router.max_model_len();
  if (model.max_model_len == 0) return workers;
  return workers == 0 ? model.max_model_len : std::min(workers, model.max_model_len);
}

void respond_error(Api::Context& context, Exchange& exchange, std::string_view endpoint, const ApiError& error) {
  HttpResponse response;
  response.status = error.http_status;
  response.body = render_error(error);
  if (error.http_status == 429 || error.http_status == 503) response.headers.emplace_back("Retry-After", "1");
  exchange.respond(std::move(response));
  context.metrics.requests.Add({{"endpoint", std::string(endpoint)}, {"code", std::to_string(error.http_status)}})
      .Increment();
}

Result<std::vector<int32_t>> render_chat(const ServedModel& model, const std::string& messages_json,
                                         const std::string& tools_json, const std::string& kwargs_json,
                                         bool add_generation_prompt, bool add_special_tokens) {
  if (model.tokenizer == nullptr) {
    return invalid_argument("model '{}' has no tokenizer.json; use /v1/completions with token ids", model.name);
  }
  if (model.chat_template == nullptr) {
    return invalid_argument("model '{}' has no chat template; use /v1/completions", model.name);
  }
  ChatTemplateInputs inputs;
  inputs.messages_json = messages_json;
  inputs.tools_json = tools_json;
  inputs.extra_json = kwargs_json;
  inputs.add_generation_prompt = add_generation_prompt;
  inputs.now_unix_s = std::time(nullptr);
  BATON_ASSIGN_OR_RETURN(std::string text, model.chat_template->render(inputs));
  return model.tokenizer->encode(text, add_special_tokens);
}

namespace {

void respond_json(Exchange& exchange, int status, std::string body) {
  exchange.respond({status, "application/json", std::move(body), {}});
}

bool check_model(Api::Context& context, Exchange& exchange, std::string_view endpoint, const std::string& model,
                 bool may_be_empty = true) {
  if (model == context.model.name || (model.empty() && may_be_empty)) return true;
  ApiError error;
  error.http_status = 404;
  error.message = fmt::format("The model '{}' does not exist; this server has '{}'.", model, context.model.name);
  error.param = "model";
  error.code = "model_not_found";
  respond_error(context, exchange, endpoint, error);
  return false;
}

void handle_completion(Api::Context& context, std::shared_ptr<Exchange> exchange, bool chat) {
  std::string_view endpoint = chat ? "/v1/chat/completions" : "/v1/completions";
  if (context.draining) {
    ApiError error;
    error.http_status = 503;
    error.type = "service_unavailable_error";
    error.message = "the server is shutting down; send the request again, to another one";
    return respond_error(context, *exchange, endpoint, error);
  }
  auto parsed = parse_completion_request(exchange->take_body(), chat, context.model.defaults, context.limits);
  if (auto* error = std::get_if<ApiError>(&parsed)) return respond_error(context, *exchange, endpoint, *error);
  auto& request = std::get<CompletionRequest>(parsed);
  if (!check_model(context, *exchange, endpoint, request.model)) return;
  start_completion(context, std::move(exchange), std::move(request));
}

void handle_tokenize(Api::Context& context, Exchange& exchange) {
  auto parsed = parse_tokenize_request(exchange.request().body);
  if (auto* error = std::get_if<ApiError>(&parsed)) return respond_error(context, exchange, "/tokenize", *error);
  auto& request = std::get<TokenizeRequest>(parsed);
  if (!check_model(context, exchange, "/tokenize", request.model)) return;
  Result<std::vector<int32_t>> ids = [&]() -> Result<std::vector<int32_t>> {
    if (request.has_messages) {
      return render_chat(context.model, request.messages_json, request.tools_json, request.template_kwargs_json,
                         request.add_generation_prompt, request.add_special_tokens.value_or(false));
    }
    if (context.model.tokenizer == nullptr) {
      return invalid_argument("model '{}' has no tokenizer.json", context.model.name);
    }
    return context.model.tokenizer->encode(request.prompt, request.add_special_tokens.value_or(true));
  }();
  if (!ids.ok()) return respond_error(context, exchange, "/tokenize", to_api_error(ids.status()));
  std::string body = fmt::format("{{\"count\":{},\"max_model_len\":{},\"tokens\":[{}]", ids->size(),
                                 context.max_model_len(), fmt::join(*ids, ","));
  if (request.return_token_strings) {
    body += ",\"token_strs\":[";
    for (size_t i = 0; i < ids->size(); ++i) {
      if (i > 0) body += ',';
      append_json_string(body, context.model.tokenizer->id_to_token((*ids)[i]));
    }
    body += ']';
  }
  respond_json(exchange, 200, body + "}");
}

void handle_detokenize(Api::Context& context, Exchange& exchange) {
  auto parsed = parse_detokenize_request(exchange.request().body);
  if (auto* error = std::get_if<ApiError>(&parsed)) return respond_error(context, exchange, "/detokenize", *error);
  auto& request = std::get<DetokenizeRequest>(parsed);
  if (!check_model(context, exchange, "/detokenize", request.model)) return;
  Status status;
  if (context.model.tokenizer == nullptr) {
    status = invalid_argument("model '{}' has no tokenizer.json", context.model.name);
  } else {
    for (int32_t id : request.tokens) {
      if (context.model.vocab_size > 0 && id >= context.model.vocab_size) {
        status = invalid_argument("token id {} is outside the vocabulary of {} tokens", id, context.model.vocab_size);
        break;
      }
    }
  }
  if (!status.ok()) return respond_error(context, exchange, "/detokenize", to_api_error(status));
  respond_json(exchange, 200,
               "{\"prompt\":" + json_string(context.model.tokenizer->decode(request.tokens, false)) + "}");
}

std::string model_object(Api::Context& context) {
  return fmt::format("{{\"id\":{},\"object\":\"model\",\"created\":{},\"owned_by\":\"baton\",\"max_model_len\":{}}}",
                     json_string(context.model.name), context.model.created_s, context.max_model_len());
}

void handle_metrics(Api::Context& context, Exchange& exchange) {
  MetricFamilies own = context.registry.Collect();
  auto add = [&](std::string name, std::string help, prometheus::MetricType type, double value) {
    prometheus::MetricFamily family;
    family.name = std::move(name);
    family.help = std::move(help);
    family.type = type;
    prometheus::ClientMetric metric;
    if (type == prometheus::MetricType::Counter) {
      metric.counter.value = value;
    } else {
      metric.gauge.value = value;
    }
    family.metric.push_back(std::move(metric));
    own.push_back(std::move(family));
  };
  using prometheus::MetricType;
  RouterStats stats = context.router.stats();
  RouterHealth health = context.router.health();
  add("baton_router_requests_accepted_total", "Sequences taken by the router", MetricType::Counter, static_cast<double>(stats.accepted));
  add("baton_router_requests_refused_total", "Sequences refused because of a bound", MetricType::Counter, static_cast<double>(stats.refused));
  add("baton_router_requests_finished_total", "Sequences that ended well", MetricType::Counter, static_cast<double>(stats.finished));
  add("baton_router_requests_failed_total", "Sequences that ended with an error", MetricType::Counter, static_cast<double>(stats.failed));
  add("baton_router_requests_cancelled_total", "Sequences cancelled (client gone, stop string)", MetricType::Counter, static_cast<double>(stats.cancelled));
  add("baton_router_replays_total", "Sequences started again on another worker after a failure", MetricType::Counter, static_cast<double>(stats.replays));
  add("baton_router_worker_losses_total", "Ready workers whose channel closed", MetricType::Counter, static_cast<double>(stats.worker_losses));
  add("baton_router_requests", "Sequences in the router", MetricType::Gauge, static_cast<double>(health.requests));
  add("baton_router_ready", "1 when a request can be served end to end", MetricType::Gauge, health.ready ? 1 : 0);
  add("baton_router_degraded", "1 when it is served, but not as configured (see /health)", MetricType::Gauge, health.degraded ? 1 : 0);
  if (const Server* server = context.server.load()) {
    ServerStats http = server->stats();
    add("baton_http_connections", "Open client connections", MetricType::Gauge, static_cast<double>(http.connections));
    add("baton_http_connections_refused_total", "Connections refused because of the limit", MetricType::Counter, static_cast<double>(http.refused));
    add("baton_http_slow_clients_total", "Clients disconnected because they read too slowly", MetricType::Counter, static_cast<double>(http.slow_clients));
  }
  std::vector<MetricFamilies> sources;
  sources.push_back(std::move(own));
  for (const auto& [name, encoded] : context.router.worker_metrics()) {
    Result<MetricFamilies> families = protocol::decode_metrics(encoded);
    if (!families.ok()) continue;
    add_label(*families, "worker", name);
    sources.push_back(std::move(families).value());
  }
  exchange.respond({200, "text/plain; version=0.0.4; charset=utf-8",
                    to_prometheus_text(merge_families(std::move(sources))), {}});
}

void handle_health(Api::Context& context, Exchange& exchange, std::string_view path) {
  RouterHealth health = context.router.health();
  bool draining = context.draining.load();
  bool ready = health.ready && !draining;
  if (ready) context.started = true;
  if (path == "/live") return respond_json(exchange, 200, R"({"status":"live"})");
  if (path == "/startup") {
    bool started = context.started.load();
    return respond_json(exchange, started ? 200 : 503, started ? R"({"status":"started"})" : R"({"status":"starting"})");
  }
  respond_json(exchange, ready ? 200 : 503, health_json(health, context.model.name, draining));
}

}  // namespace

Api::Api(const ServedModel& model, Router& router, ApiLimits limits)
    : context_(std::make_unique<Context>(model, router, limits)) {}
Api::~Api() = default;

void Api::set_server(const Server* server) { context_->server = server; }
void Api::set_draining() { context_->draining = true; }

void Api::handle(std::shared_ptr<Exchange> exchange) {
  static const std::set<std::string_view> kPosts = {"/v1/completions", "/v1/chat/completions", "/tokenize",
                                                    "/detokenize"};
  static const std::set<std::string_view> kGets = {"/v1/models", "/live", "/ready", "/startup",
                                                   "/health", "/metrics", "/version"};
  const HttpRequest& request = exchange->request();
  std::string path = request.path;
  bool is_model = path.starts_with("/v1/models/");
  bool is_get = kGets.contains(path) || is_model, is_post = kPosts.contains(path);
  if (!is_get && !is_post) {
    ApiError error;
    error.http_status = 404;
    error.message = fmt::format("there is no {} here; see docs/api.md", path.substr(0, 200));
    return respond_error(*context_, *exchange, "other", error);
  }
  bool get = request.method == "GET" || request.method == "HEAD";
  if ((is_get && !get) || (is_post && request.method != "POST")) {
    ApiError error;
    error.http_status = 405;
    error.message = fmt::format("{} takes {}, not {}", path, is_get ? "GET" : "POST", request.method);
    HttpResponse response{405, "application/json", render_error(error), {{"Allow", is_get ? "GET, HEAD" : "POST"}}};
    context_->metrics.requests.Add({{"endpoint", "other"}, {"code", "405"}}).Increment();
    return exchange->respond(std::move(response));
  }
  if (path == "/v1/completions") return handle_completion(*context_, std::move(exchange), false);
  if (path == "/v1/chat/completions") return handle_completion(*context_, std::move(exchange), true);
  if (path == "/tokenize") return handle_tokenize(*context_, *exchange);
  if (path == "/detokenize") return handle_detokenize(*context_, *exchange);
  if (path == "/metrics") return handle_metrics(*context_, *exchange);
  if (path == "/version") return respond_json(*exchange, 200, fmt::format("{{\"version\":\"{}\"}}", BATON_VERSION));
  if (path == "/v1/models") {
    return respond_json(*exchange, 200, "{\"object\":\"list\",\"data\":[" + model_object(*context_) + "]}");
  }
  if (is_model) {
    if (!check_model(*context_, *exchange, "/v1/models", path.substr(std::string_view("/v1/models/").size()), false)) return;
    return respond_json(*exchange, 200, model_object(*context_));
  }
  handle_health(*context_, *exchange, path);
}

}  // namespace baton::http
