#include "worker/worker.h"

#include <prometheus/metric_family.h>
#include <pthread.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "base/log.h"
#include "worker/agent_transfer.h"
#include "worker/worker_core.h"

namespace baton {

namespace {

using worker::AgentTransfer;
using worker::Mailbox;
using worker::WorkerCore;
using worker::WorkerMetrics;

constexpr size_t kMaxMailboxBytes = 512u << 20;
/// After the time to drain: for flushing writes and sending the last frames.
constexpr int64_t kFlushTimeoutMs = 2000;

Result<protocol::Role> parse_role(const std::string& role) {
  if (role == "prefill") return protocol::ROLE_PREFILL;
  if (role == "decode") return protocol::ROLE_DECODE;
  if (role == "both") return protocol::ROLE_BOTH;
  return invalid_argument("role is '{}'; there are prefill, decode and both", role);
}

class WorkerImpl final : public Worker {
 public:
  WorkerImpl(WorkerConfig config, protocol::Network& network) : config_(std::move(config)), network_(network) {}
  ~WorkerImpl() override { stop(0); }

  Status load_model() {
    const int64_t begin_ns = SteadyClock::instance().now_ns();
    BATON_ASSIGN_OR_RETURN(own_model_, load_on_device(config_.model, config_.device));
    log_info("{} loaded in {:.2f} s: {} of weights, {}", config_.served_model_name,
             static_cast<double>(SteadyClock::instance().now_ns() - begin_ns) * 1e-9,
             fmt::format("{:.1f} MiB", static_cast<double>(own_model_.model->weight_bytes()) / (1 << 20)), own_model_.name);
    return {};
  }

  Status start(Model* model) {
    if (model == nullptr) {
      BATON_RETURN_IF_ERROR(load_model());
      model = own_model_.model.get();
    }
    BATON_ASSIGN_OR_RETURN(engine_, Engine::create(config_.engine, *model));
    transfer::AgentConfig agent_config = config_.transfer;
    agent_config.name = config_.name;
    // So few thread blocks leave the GPU to computing, and are nearly as fast.
    constexpr uint32_t kCopyCtas = 16;
    if (agent_config.cuda_max_ctas == 0) agent_config.cuda_max_ctas = kCopyCtas;
    BATON_ASSIGN_OR_RETURN(agent_, transfer::Agent::create(agent_config));
    const auto kind = engine_->kv_place() == MemoryPlace::kCuda ? transfer::MemoryKind::kCuda : transfer::MemoryKind::kHost;
    BATON_ASSIGN_OR_RETURN(auto region, agent_->register_memory(engine_->kv_pool(), kind));
    const uint64_t block_bytes = static_cast<uint64_t>(engine_->layout().block_bytes());
    BATON_ASSIGN_OR_RETURN(
        auto pool, agent_->add_pool({std::move(region), block_bytes, engine_->kv_pool().size() / block_bytes}));
    transfer_ = std::make_unique<AgentTransfer>(*agent_, pool);

    worker::CoreConfig core;
    core.name = config_.name;
    BATON_ASSIGN_OR_RETURN(core.role, parse_role(config_.role));
    core.served_model_name = config_.served_model_name;
    core.kernels = own_model_.name;
    core.max_model_len = engine_->config().max_model_len;
    core.local_prefill_tokens = config_.local_prefill_tokens;
    core.lease_ms = config_.lease_ms;
    core.max_queued = config_.max_queued;
    core.default_queue_timeout_ms = config_.queue_timeout_ms;
    core.prefill_queue_timeout_ms = config_.prefill_queue_timeout_ms;
    core.quarantine_timeout_ms = config_.quarantine_timeout_ms;
    core.seed = static_cast<uint64_t>(agent_->epoch());
    if (kind == transfer::MemoryKind::kCuda) {
      // A GPU's host has cores to spare: two of them poll for the milliseconds in which a handoff's next frame is due.
      constexpr int64_t kAwakeMs = 20;
      mailbox_->set_awake_ms(kAwakeMs);
      core.heads_up = true;
    }
    core_ = std::make_unique<WorkerCore>(core, *engine_, *transfer_, network_, mailbox_, metrics_,
                                         SteadyClock::instance());
    BATON_ASSIGN_OR_RETURN(listener_, network_.listen(config_.listen_address, core_->handler()));
    address_ = listener_->address();
    publish_health();
    thread_ = std::thread([this] { run(); });
    log_info("{} ({}) listens on {}; {} KV blocks of {} tokens, {:.1f} MiB", config_.name, config_.role, address_,
             engine_->config().kv_blocks, engine_->config().block_tokens,
             static_cast<double>(engine_->kv_pool().size()) / (1 << 20));
    return {};
  }

  const std::string& address() const override { return address_; }

  void stop(int64_t drain_timeout_ms) override {
    if (thread_.joinable()) {
      drain_timeout_ms_.store(drain_timeout_ms);
      mailbox_->wake();
      thread_.join();
    }
    listener_.reset();
    mailbox_->close();
  }

  WorkerHealth health() const override {
    std::lock_guard lock(health_mutex_);
    return health_;
  }
  std::vector<prometheus::MetricFamily> metrics() const override { return metrics_.collect(); }

 private:
  void run() {
    pthread_setname_np(pthread_self(), "baton-engine");
    const Clock& clock = SteadyClock::instance();
    int64_t published_ms = 0;
    int64_t drain_end_ms = -1;
    bool dropped = false;
    for (;;) {
      // What waits for a GPU's step to be nearly done must not oversleep.
      constexpr int64_t kAwakeNs = 500'000;
      core_->run_once(mailbox_->take(core_->idle_ns(), core_->device_busy() ? kAwakeNs : 0));
      if (!core_->device().ok()) {
        log_error("{}: the device is lost: {}", config_.name, core_->device().message());
        core_->disconnect();
        if (config_.on_device_lost) config_.on_device_lost(core_->device());
        return;
      }
      const int64_t now_ms = clock.now_ms();
      if (now_ms - published_ms >= 200) {
        published_ms = now_ms;
        publish_health();
      }
      const int64_t drain_ms = drain_timeout_ms_.load();
      if (drain_ms < 0) continue;
      if (drain_end_ms < 0) {
        core_->begin_drain();
        drain_end_ms = now_ms + drain_ms;
      }
      if (core_->drained()) break;
      if (now_ms < drain_end_ms) continue;
      if (!dropped) {
        dropped = true;
        drain_end_ms = now_ms + kFlushTimeoutMs;
        log_warning("{} is stopped with work left", config_.name);
        core_->drop_all();
      } else {
        log_error("{} could not flush what is under way in {} ms", config_.name, kFlushTimeoutMs);
        break;
      }
    }
    core_->run_once({});  // the last outputs and the last word on the load
    core_->disconnect();
  }

  void publish_health() {
    worker::CoreHealth core = core_->health();
    WorkerHealth health;
    health.name = config_.name;
    health.role = config_.role;
    health.address = address_;
    health.transport = transfer_->describe();
    health.epoch = static_cast<uint64_t>(core.epoch);
    health.draining = core.draining;
    health.engine = core.engine;
    health.requests = core.requests;
    health.queued = core.queued;
    health.active_prefills = core.active_prefills;
    health.quarantined_handoffs = core.quarantined_handoffs;
    health.routers = core.routers;
    health.decode_peers = core.decode_peers;
    for (const auto& pair : core.load.pairs()) {
      health.pairs.push_back({pair.peer(), pair.address(), pair.ready(), pair.why_not(), pair.transport(),
                              pair.provider(), pair.reason(), pair.rails(), pair.bandwidth_bytes_per_s()});
    }
    std::lock_guard lock(health_mutex_);
    health_ = std::move(health);
  }

  // In the order in which they need each other; destroyed in reverse. The listener is reset first, in stop().
  const WorkerConfig config_;
  protocol::Network& network_;
  std::string address_;
  std::shared_ptr<Mailbox> mailbox_ = std::make_shared<Mailbox>(kMaxMailboxBytes);
  WorkerMetrics metrics_;
  DeviceModel own_model_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<transfer::Agent> agent_;
  std::unique_ptr<AgentTransfer> transfer_;
  std::unique_ptr<WorkerCore> core_;
  std::unique_ptr<protocol::Listener> listener_;
  mutable std::mutex health_mutex_;
  WorkerHealth health_;
  std::atomic<int64_t> drain_timeout_ms_{-1};
  std::thread thread_;
};

Result<std::unique_ptr<Worker>> start_worker(WorkerConfig config, Model* model, protocol::Network& network) {
  BATON_RETURN_IF_ERROR(config.validate());
  auto worker = std::make_unique<WorkerImpl>(std::move(config), network);
  BATON_RETURN_IF_ERROR(worker->start(model));
  return std::unique_ptr<Worker>(std::move(worker));
}

}  // namespace

Status WorkerConfig::validate() const {
  auto range = [](std::string_view field, int64_t value, int64_t low, int64_t high) -> Status {
    if (value >= low && value <= high) return {};
    return invalid_argument("{} is {}; allowed are {} to {}", field, value, low, high);
  };
  if (name.empty() || name.size() > 64) return invalid_argument("name has {} characters; allowed are 1 to 64", name.size());
  for (char c : name) {
    if (c <= ' ' || c > '~') return invalid_argument("name '{}' has a character that isn't printable ASCII", name);
  }
  BATON_RETURN_IF_ERROR(parse_role(role).status());
  if (listen_address.empty()) return invalid_argument("listen_address is empty");
  BATON_RETURN_IF_ERROR(range("threads", device.threads, 0, 4096));
  BATON_RETURN_IF_ERROR(device.validate());
  BATON_RETURN_IF_ERROR(range("local_prefill_tokens", local_prefill_tokens, -1, INT32_MAX));
  BATON_RETURN_IF_ERROR(range("lease_ms", lease_ms, 100, 3'600'000));
  BATON_RETURN_IF_ERROR(range("max_queued", max_queued, 1, 1 << 20));
  BATON_RETURN_IF_ERROR(range("queue_timeout_ms", queue_timeout_ms, 1, 86'400'000));
  BATON_RETURN_IF_ERROR(range("prefill_queue_timeout_ms", prefill_queue_timeout_ms, 1, 86'400'000));
  BATON_RETURN_IF_ERROR(range("quarantine_timeout_ms", quarantine_timeout_ms, 1000, 86'400'000));
  BATON_RETURN_IF_ERROR(engine.validate());
  return transfer.validate();
}

Result<std::unique_ptr<Worker>> Worker::start(WorkerConfig config, protocol::Network& network) {
  return start_worker(std::move(config), nullptr, network);
}

Result<std::unique_ptr<Worker>> Worker::start(WorkerConfig config, Model& model, protocol::Network& network) {
  return start_worker(std::move(config), &model, network);
}

}  // namespace baton
