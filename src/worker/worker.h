#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/engine.h"
#include "model/device_model.h"
#include "protocol/channel.h"
#include "transfer/include/baton/transfer.h"

namespace prometheus {
struct MetricFamily;
}

namespace baton {

struct WorkerConfig {
  std::string name = "worker-0";
  /// "prefill", "decode" or "both": only reported, every worker can do both.
  std::string role = "both";
  /// "host:port" (port 0: any) or "unix:/path".
  std::string listen_address = "127.0.0.1:0";
  std::string served_model_name = "model";
  ModelOptions model;
  EngineConfig engine;
  transfer::AgentConfig transfer;
  DeviceOptions device;
  /// Prompts with fewer tokens to compute are prefilled by the decode worker itself. -1: from measured handoffs, 256 until
  /// there are some (worker/break_even.h).
  int32_t local_prefill_tokens = 256;
  int64_t lease_ms = 5000;
  int32_t max_queued = 4096;
  int64_t queue_timeout_ms = 30'000;           ///< of requests that name none
  int64_t prefill_queue_timeout_ms = 10'000;
  int64_t quarantine_timeout_ms = 30'000;
  /// Called once, from the engine's thread, when the device is lost: the worker has closed its channels, so that routers go
  /// on elsewhere, and only stop() is left to do.
  std::function<void(const Status&)> on_device_lost = {};

  Status validate() const;
};

/// A pair of this worker with a prefill worker that may write into its memory.
struct WorkerPair {
  std::string peer, address;
  bool ready = false;
  std::string why_not;
  std::string transport, provider, reason;
  uint32_t rails = 0;
  double bandwidth_bytes_per_s = 0;
};

struct WorkerHealth {
  std::string name, role, address, transport;
  uint64_t epoch = 0;
  bool draining = false;
  EngineStats engine;
  int64_t requests = 0;              ///< of routers, in any state
  int64_t queued = 0;                ///< of them and of prefills, without blocks yet
  int64_t active_prefills = 0;       ///< for other workers, until delivered
  int64_t quarantined_handoffs = 0;
  int64_t routers = 0, decode_peers = 0;
  std::vector<WorkerPair> pairs;
};

/// One engine on one device, its transfer agent and its channels: what `baton worker` runs. Threads: the engine's
/// (owns all state), the agent's, the network's, and one for what may block when peers go.
class Worker {
 public:
  /// Loads the model (seconds, for large ones), registers the KV pool, listens, and serves until stop(). `network`
  /// must outlive the worker.
  static Result<std::unique_ptr<Worker>> start(WorkerConfig config, protocol::Network& network);
  /// As start(), with a model that is there already; it must outlive the worker. For tests.
  static Result<std::unique_ptr<Worker>> start(WorkerConfig config, Model& model, protocol::Network& network);
  virtual ~Worker() = default;

  /// Where it listens, with the real port.
  virtual const std::string& address() const = 0;
  /// Refuses new requests, lets running ones finish and KV be delivered for up to `drain_timeout_ms`, gives up the
  /// rest (routers replay elsewhere) and ends every thread. Idempotent; the destructor does it with 0.
  virtual void stop(int64_t drain_timeout_ms) = 0;

  /// At most a second old (older during a long step). Any thread.
  virtual WorkerHealth health() const = 0;
  virtual std::vector<prometheus::MetricFamily> metrics() const = 0;
};

}  // namespace baton
