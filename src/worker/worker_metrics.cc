#include "worker/worker_metrics.h"

#include <algorithm>
#include <array>
#include <map>

#include "base/metrics.h"
#include "engine/engine.h"

namespace baton::worker {

using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;

struct WorkerMetrics::Impl {
  MetricsRegistry registry;

  prometheus::Family<Counter>& counters(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
  }
  Gauge& gauge(const char* name, const char* help) {
    return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({});
  }
  prometheus::Family<Histogram>& histograms(const char* name, const char* help) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
  }
  Histogram& latency(const char* name, const char* help) { return histograms(name, help).Add({}, latency_buckets_s()); }

  prometheus::Family<Counter>& requests = counters("baton_worker_requests_total", "Requests that ended, by outcome.");
  Histogram& queue = latency("baton_worker_ttft_queue_seconds", "Arrival of a request to its start.");
  prometheus::Family<Histogram>& ttft =
      histograms("baton_worker_ttft_seconds", "Arrival of a request to its first token, by path.");
  Histogram& ttft_local = ttft.Add({{"path", "local"}}, latency_buckets_s());
  Histogram& ttft_remote = ttft.Add({{"path", "remote"}}, latency_buckets_s());

  prometheus::Family<Counter>& handoffs =
      counters("baton_worker_handoffs_total", "Handoffs that ended, by side, outcome and reason.");
  Histogram& handoff = latency("baton_worker_handoff_seconds", "Prefill sent to sequence admitted, on the decode side.");
  Histogram& handoff_queue = latency("baton_worker_handoff_queue_seconds", "Waited at the prefill worker.");
  Histogram& handoff_compute = latency("baton_worker_handoff_compute_seconds", "Computed by the prefill worker.");
  Histogram& handoff_exposed =
      latency("baton_worker_handoff_exposed_seconds", "Last layer computed to last write done.");

  prometheus::Family<Counter>& transfer_bytes =
      counters("baton_worker_transfer_bytes_total", "KV bytes written into a decode worker, by path.");
  prometheus::Family<Counter>& transfer_seconds =
      counters("baton_worker_transfer_seconds_total", "Time with at least one write under way, by path.");
  prometheus::Family<Counter>& transfer_failures =
      counters("baton_worker_transfer_failures_total", "Writes that failed, by path.");

  Counter& checked_blocks =
      counters("baton_worker_transfer_checked_blocks_total", "KV blocks that a writer in integrity mode had checked here.").Add({});
  Counter& corrupt_blocks =
      counters("baton_worker_transfer_corrupt_blocks_total", "Those that did not hold what was sent.").Add({});

  prometheus::Family<Gauge>& blocks =
      prometheus::BuildGauge().Name("baton_worker_kv_blocks").Help("KV blocks by state.").Register(registry);
  Gauge& blocks_free = blocks.Add({{"state", "free"}});
  Gauge& blocks_cached = blocks.Add({{"state", "cached"}});
  Gauge& blocks_used = blocks.Add({{"state", "used"}});
  Gauge& blocks_quarantined = blocks.Add({{"state", "quarantined"}});
  Gauge& local_prefill = gauge("baton_worker_local_prefill_tokens", "Prompts with fewer new tokens are prefilled by the decode worker.");
  Gauge& quarantined = gauge("baton_worker_quarantined_handoffs", "Grants whose blocks a peer may still write into.");
  Gauge& queued = gauge("baton_worker_queued_requests", "Requests and prefills not yet given to the engine.");
  Gauge& waiting = gauge("baton_worker_waiting_requests", "Requests waiting in the engine.");
  Gauge& running = gauge("baton_worker_running_requests", "Requests running in the engine.");
  Gauge& reserved = gauge("baton_worker_reserved_requests", "Requests whose KV is being written by a peer.");
  Gauge& prefills = gauge("baton_worker_active_prefills", "Prefills for other workers, until their KV is delivered.");
  Gauge& routers = gauge("baton_worker_routers", "Connected routers.");
  prometheus::Family<Gauge>& ready = prometheus::BuildGauge()
                                         .Name("baton_worker_peer_ready")
                                         .Help("Whether a prefill worker can be used.")
                                         .Register(registry);

  Counter& prefix_query = counters("baton_worker_prefix_query_tokens_total", "Prompt tokens looked up.").Add({});
  Counter& prefix_hit = counters("baton_worker_prefix_hit_tokens_total", "Prompt tokens found in the cache.").Add({});
  Counter& steps = counters("baton_worker_steps_total", "Engine steps.").Add({});
  Counter& steps_ahead =
      counters("baton_worker_steps_ahead_total", "Engine steps that were launched before the step before had ended.").Add({});
  Counter& prefill_tokens = counters("baton_worker_prefill_tokens_total", "Prompt tokens computed.").Add({});
  Counter& decode_tokens = counters("baton_worker_decode_tokens_total", "Decode tokens computed.").Add({});
  Counter& preemptions = counters("baton_worker_preemptions_total", "Sequences recomputed for want of blocks.").Add({});
  Counter& outputs = counters("baton_worker_output_tokens_total", "Tokens given out.").Add({});
  Histogram& step_time = histograms("baton_worker_step_seconds", "Duration of an engine step.").Add({}, itl_buckets_s());

  std::map<std::string, Gauge*> peers;
};

namespace {
/// Brings a counter up to a total that somebody else counts.
void raise_to(Counter& counter, int64_t total) {
  double behind = static_cast<double>(total) - counter.Value();
  if (behind > 0) counter.Increment(behind);
}
}  // namespace

WorkerMetrics::WorkerMetrics() : impl_(std::make_unique<Impl>()) {}
WorkerMetrics::~WorkerMetrics() = default;

void WorkerMetrics::request_started(double queue_s) { impl_->queue.Observe(queue_s); }
void WorkerMetrics::first_output(bool remote, double ttft_s) {
  (remote ? impl_->ttft_remote : impl_->ttft_local).Observe(ttft_s);
}
void WorkerMetrics::request_done(const char* outcome) { impl_->requests.Add({{"outcome", outcome}}).Increment(); }
void WorkerMetrics::local_prefill_tokens(int32_t tokens) { impl_->local_prefill.Set(tokens); }
void WorkerMetrics::handoff_done(const char* side, const char* outcome, const char* reason) {
  impl_->handoffs.Add({{"side", side}, {"outcome", outcome}, {"reason", reason}}).Increment();
}
void WorkerMetrics::handoff_admitted(double handoff_s, double peer_queue_s, double peer_compute_s, double exposed_s) {
  impl_->handoff.Observe(handoff_s);
  impl_->handoff_queue.Observe(peer_queue_s);
  impl_->handoff_compute.Observe(peer_compute_s);
  impl_->handoff_exposed.Observe(exposed_s);
}
void WorkerMetrics::transferred(const std::string& peer, const std::string& transport, uint64_t bytes,
                                double seconds) {
  impl_->transfer_bytes.Add({{"peer", peer}, {"transport", transport}}).Increment(static_cast<double>(bytes));
  if (seconds > 0) impl_->transfer_seconds.Add({{"peer", peer}, {"transport", transport}}).Increment(seconds);
}
void WorkerMetrics::transfer_failed(const std::string& peer, const std::string& transport) {
  impl_->transfer_failures.Add({{"peer", peer}, {"transport", transport}}).Increment();
}
void WorkerMetrics::step(double seconds, int64_t outputs) {
  if (seconds > 0) impl_->step_time.Observe(seconds);
  impl_->outputs.Increment(static_cast<double>(outputs));
}
void WorkerMetrics::peer_ready(const std::string& peer, bool ready) {
  Gauge*& gauge = impl_->peers[peer];
  if (gauge == nullptr) gauge = &impl_->ready.Add({{"peer", peer}});
  gauge->Set(ready ? 1 : 0);
}
void WorkerMetrics::forget_peer(const std::string& peer) {
  auto it = impl_->peers.find(peer);
  if (it == impl_->peers.end()) return;
  impl_->ready.Remove(it->second);
  impl_->peers.erase(it);
}

void WorkerMetrics::checked(uint64_t blocks, uint64_t corrupt_blocks) {
  raise_to(impl_->checked_blocks, static_cast<int64_t>(blocks));
  raise_to(impl_->corrupt_blocks, static_cast<int64_t>(corrupt_blocks));
}

void WorkerMetrics::update(const EngineStats& stats, int64_t queued, int64_t quarantined_handoffs,
                           int64_t active_prefills, int64_t routers) {
  auto set = [](Gauge& gauge, int64_t value) { gauge.Set(static_cast<double>(value)); };
  set(impl_->blocks_free, stats.blocks.free);
  set(impl_->blocks_cached, stats.blocks.cached);
  set(impl_->blocks_used, stats.blocks.used);
  set(impl_->blocks_quarantined, stats.blocks.quarantined);
  set(impl_->quarantined, quarantined_handoffs);
  set(impl_->queued, queued);
  set(impl_->waiting, stats.waiting);
  set(impl_->running, stats.running);
  set(impl_->reserved, stats.reserved);
  set(impl_->prefills, active_prefills);
  set(impl_->routers, routers);
  raise_to(impl_->prefix_query, stats.prefix_query_tokens);
  raise_to(impl_->prefix_hit, stats.prefix_hit_tokens);
  raise_to(impl_->steps, stats.steps);
  raise_to(impl_->steps_ahead, stats.steps_ahead);
  raise_to(impl_->prefill_tokens, stats.prefill_tokens);
  raise_to(impl_->decode_tokens, stats.decode_tokens);
  raise_to(impl_->preemptions, stats.preemptions);
}

std::vector<prometheus::MetricFamily> WorkerMetrics::collect() const { return impl_->registry.Collect(); }

}  // namespace baton::worker
