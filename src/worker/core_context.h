#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "base/clock.h"
#include "engine/engine.h"
#include "protocol/baton.pb.h"
#include "worker/kv_transfer.h"
#include "worker/mailbox.h"
#include "worker/worker_metrics.h"

namespace baton::worker {

/// What the handoff logic needs to know; part of WorkerConfig.
struct CoreConfig {
  std::string name = "worker";
  protocol::Role role = protocol::ROLE_BOTH;
  std::string kernels;  // Kernels::name()
  std::string served_model_name = "model";
  int32_t max_model_len = 4096;
  /// Prompts with fewer tokens to compute than this are prefilled here; BreakEven::kMeasured: learned.
  int32_t local_prefill_tokens = 256;
  /// Without a sign of progress for so long, a prefill worker is given up (and a peer that is silent, not used).
  int64_t lease_ms = 5000;
  /// Requests that wait for a place, and prefills that do.
  int32_t max_queued = 4096;
  int64_t default_queue_timeout_ms = 30'000;
  /// A prefill that can't start for so long goes back to the decode worker.
  int64_t prefill_queue_timeout_ms = 10'000;
  /// A grant whose peer neither acknowledges nor goes away: then its channel is closed and the peer fenced.
  int64_t quarantine_timeout_ms = 30'000;
  int64_t load_min_interval_ms = 50;
  int64_t load_max_interval_ms = 1000;
  int64_t reconnect_min_ms = 100;
  int64_t reconnect_max_ms = 5000;
  int64_t connect_timeout_ms = 5000;
  uint64_t seed = 1;  ///< of the jitter
  /// Over this transport a prefill's layers are sent in a few bursts, not one by one.
  std::string burst_transport = "cuda_ipc";
  /// Prefill workers tell the decode worker when its Commit is near.
  bool heads_up = false;
};

/// Who waits for blocks, oldest first, over both roles: nobody overtakes. The arrival number is the key.
class AdmissionQueue {
 public:
  enum class Side { kDecode, kPrefill };
  void add(uint64_t arrival, Side side) { entries_.emplace(arrival, side); }
  void remove(uint64_t arrival) { entries_.erase(arrival); }
  bool empty() const { return entries_.empty(); }
  size_t size() const { return entries_.size(); }
  std::pair<uint64_t, Side> front() const { return *entries_.begin(); }

 private:
  std::map<uint64_t, Side> entries_;
};

/// What the parts of a worker share. All of it belongs to the engine's thread, but for the mailbox.
struct CoreContext {
  CoreConfig config;
  Engine& engine;
  KvTransfer& transfer;
  const Clock& clock;
  std::shared_ptr<Mailbox> mailbox;
  WorkerMetrics& metrics;
  AdmissionQueue admission;
  uint64_t next_id = 1;       // of engine requests, handoffs and arrivals: never used twice in this life
  bool draining = false;

  int64_t now_ms() const { return clock.now_ms(); }
  /// Whether `tokens` more can be given to the engine without making it queue for blocks. Its queue has no
  /// time limit, ours has; so what can't start soon waits with us.
  bool has_room(int64_t tokens) const {
    EngineStats stats = engine.stats();
    if (stats.waiting == 0) return true;
    if (stats.waiting >= engine.config().max_running) return false;
    int64_t needed = engine.layout().tokens_to_blocks(stats.waiting_tokens + tokens) + stats.waiting;
    return needed <= stats.blocks.free + stats.blocks.cached;
  }
};

inline double seconds_between_ms(int64_t from_ms, int64_t to_ms) { return static_cast<double>(to_ms - from_ms) * 1e-3; }

}  // namespace baton::worker
