#pragma once

#include <atomic>

#include "base/metrics.h"
#include "http/api.h"

namespace baton::http {

/// The frontend's own metrics; the workers' come on top in /metrics.
struct ApiMetrics {
  explicit ApiMetrics(MetricsRegistry& registry);

  prometheus::Family<prometheus::Counter>& requests;       ///< labels: endpoint, code
  prometheus::Histogram& ttft_s;
  prometheus::Histogram& itl_s;
  prometheus::Histogram& e2e_s;
  prometheus::Gauge& running;
  prometheus::Counter& prompt_tokens;
  prometheus::Counter& completion_tokens;
  prometheus::Counter& disconnects;
};

struct Api::Context {
  Context(const ServedModel& served, Router& router_ref, ApiLimits api_limits)
      : model(served), router(router_ref), limits(api_limits), metrics(registry) {}

  const ServedModel& model;
  Router& router;
  const ApiLimits limits;
  MetricsRegistry registry;
  ApiMetrics metrics;
  std::atomic<const Server*> server{nullptr};
  std::atomic<bool> draining{false};
  std::atomic<bool> started{false};

  /// The workers' limit where the model folder gives none or a larger one.
  int32_t max_model_len() const;
};

/// Answers with an error object; counts it.
void respond_error(Api::Context& context, Exchange& exchange, std::string_view endpoint, const ApiError& error);

/// Token ids of a chat by the model's template.
Result<std::vector<int32_t>> render_chat(const ServedModel& model, const std::string& messages_json,
                                         const std::string& tools_json, const std::string& kwargs_json,
                                         bool add_generation_prompt, bool add_special_tokens);

/// Serves one completion request; lives until its response is complete or its client gone. (completion.cc)
void start_completion(Api::Context& context, std::shared_ptr<Exchange> exchange, CompletionRequest request);

}  // namespace baton::http
