#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/random.h"
#include "engine/engine.h"
#include "engine/testing/async_fake_model.h"
#include "protocol/in_memory_network.h"
#include "transfer/sim/sim_fabric.h"
#include "worker/agent_transfer.h"
#include "worker/worker_core.h"

namespace baton::sim {

struct ClusterOptions {
  uint64_t seed = 1;
  int64_t kv_blocks = 64;
  int32_t block_tokens = 4;
  int32_t max_batched_tokens = 32;
  int32_t max_model_len = 128;
  bool runs_ahead = false;  ///< the workers' models run beside the host
  bool prefix_cache = true;
  int32_t local_prefill_tokens = 8;
  int64_t lease_ms = 300;
  int64_t max_frame_delay_us = 2000;
  int64_t max_message_delay_us = 3000;
  int64_t max_step_us = 2000;   ///< simulated duration of an engine step
  bool reorder = true;
};

/// The agent's transfer, with a fence that takes its time and sometimes can't reach the peer: until it is through, late
/// writes land.
class SlowFence final : public worker::KvTransfer {
 public:
  SlowFence(worker::AgentTransfer& inner, const Clock& clock, uint64_t seed)
      : inner_(inner), clock_(clock), random_(seed) {}
  Epoch epoch() const override { return inner_.epoch(); }
  std::string metadata() const override { return inner_.metadata(); }
  uint32_t pool() const override { return inner_.pool(); }
  std::string describe() const override { return inner_.describe(); }
  transfer::AgentStats stats() override { return inner_.stats(); }
  Result<std::unique_ptr<worker::KvLink>> connect(Epoch peer, const std::string& metadata,
                                                  uint32_t remote_pool) override {
    return inner_.connect(peer, metadata, remote_pool);
  }
  Result<transfer::Tag> open_inbox() override { return inner_.open_inbox(); }
  Status expect(transfer::Tag tag, uint64_t messages, std::function<void()> on_complete) override {
    return inner_.expect(tag, messages, std::move(on_complete));
  }
  void close_inbox(transfer::Tag tag) override { inner_.close_inbox(tag); }
  void fence(Epoch peer, std::function<void(const Status&)> on_done) override;
  /// Does what is due.
  void poll();

 private:
  struct Job {
    int64_t due_ns = 0;
    Epoch peer{};
    std::function<void(const Status&)> on_done;
  };
  worker::AgentTransfer& inner_;
  const Clock& clock_;
  Random random_;
  std::vector<Job> jobs_;
};

/// One life of a worker process.
struct SimWorker {
  std::string name;
  std::string address;
  std::unique_ptr<testing::FakeModel> model;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<transfer::Agent> agent;
  std::unique_ptr<worker::AgentTransfer> agent_transfer;
  std::unique_ptr<SlowFence> transfer;
  std::shared_ptr<worker::Mailbox> mailbox;
  worker::WorkerMetrics metrics;
  std::unique_ptr<worker::WorkerCore> core;
  std::unique_ptr<protocol::Listener> listener;
  int64_t busy_until_ns = 0;
  int64_t steps = 0;
  bool frozen = false;
};

/// Workers, the network between them and time. Nothing happens but inside run_for().
class Cluster {
 public:
  explicit Cluster(ClusterOptions options);
  ~Cluster();

  /// Starts the process (again, after kill()) at "<name>:1".
  SimWorker& start(const std::string& name, protocol::Role role = protocol::ROLE_BOTH);
  /// kill -9.
  void kill(const std::string& name);
  /// SIGSTOP, SIGCONT.
  void freeze(const std::string& name);
  void thaw(const std::string& name);
  SimWorker* worker(const std::string& name);
  const std::map<std::string, std::unique_ptr<SimWorker>>& workers() const { return workers_; }
  static std::string address_of(const std::string& name) { return name + ":1"; }

  /// Lets `ms` of simulated time pass; `done` (optional) ends it early. True when `done` did.
  bool run_for(int64_t ms, const std::function<bool()>& done = {});
  /// Called once per turn: what else lives in this world (routers).
  void add_actor(std::function<void()> actor) { actors_.push_back(std::move(actor)); }

  ManualClock clock;
  Random random;
  protocol::InMemoryNetwork network;
  const ClusterOptions options;

 private:
  void turn();

  transfer::SimFabric fabric_;
  std::map<std::string, std::unique_ptr<SimWorker>> workers_;
  std::vector<std::unique_ptr<SimWorker>> graves_;  // their memory may still be read by what is on its way
  std::vector<std::function<void()>> actors_;
};

}  // namespace baton::sim
