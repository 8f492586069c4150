#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace prometheus {
struct MetricFamily;
}

namespace baton {
struct EngineStats;
}

namespace baton::worker {

/// The worker's metrics by what happens, not by how Prometheus wants it; docs/metrics.md lists the names.
/// collect() may be called from any thread, the rest from the engine's.
class WorkerMetrics {
 public:
  WorkerMetrics();
  ~WorkerMetrics();

  // The decode side.
  void request_started(double queue_s);                    ///< it has blocks (or a place in the engine's queue)
  void first_output(bool remote, double ttft_s);
  void request_done(const char* outcome);                  ///< "finished", "cancelled", "failed", "refused"
  /// side: "decode" or "prefill"; outcome: "committed", "failed", "cancelled"; reason: a word.
  void handoff_done(const char* side, const char* outcome, const char* reason);
  void handoff_admitted(double handoff_s, double peer_queue_s, double peer_compute_s, double exposed_s);

  void local_prefill_tokens(int32_t tokens);               ///< what is prefilled here now

  // The prefill side.
  void transferred(const std::string& peer, const std::string& transport, uint64_t bytes, double seconds);
  void transfer_failed(const std::string& peer, const std::string& transport);

  /// Integrity mode: of the KV blocks here that prefill workers had checked, all so far, and those that were wrong.
  void checked(uint64_t blocks, uint64_t corrupt_blocks);

  /// `seconds` 0: outputs without a step.
  void step(double seconds, int64_t outputs);
  void peer_ready(const std::string& peer, bool ready);
  void forget_peer(const std::string& peer);
  /// Gauges and the engine's own counters.
  void update(const EngineStats& stats, int64_t queued, int64_t quarantined_handoffs, int64_t active_prefills,
              int64_t routers);

  std::vector<prometheus::MetricFamily> collect() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace baton::worker
