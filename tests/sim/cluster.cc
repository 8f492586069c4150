#include "tests/sim/cluster.h"

#include <algorithm>

#include "base/check.h"

namespace baton::sim {

namespace {
transfer::SimOptions fabric_options(const ClusterOptions& options) {
  transfer::SimOptions fabric;
  fabric.seed = mix_bits(options.seed, 2);
  fabric.max_delay_ns = options.max_message_delay_us * 1000;
  fabric.again = 0.05;
  fabric.reorder = options.reorder;
  fabric.max_message_bytes = 256;  // several messages per write
  return fabric;
}
}  // namespace

void SlowFence::fence(Epoch peer, std::function<void(const Status&)> on_done) {
  int64_t delay_ns = random_.chance(0.5) ? 0 : static_cast<int64_t>(random_.below(100'000'000));
  jobs_.push_back({clock_.now_ns() + delay_ns, peer, std::move(on_done)});
}

void SlowFence::poll() {
  for (size_t i = 0; i < jobs_.size();) {
    if (clock_.now_ns() < jobs_[i].due_ns) {
      ++i;
      continue;
    }
    Job job = std::move(jobs_[i]);
    jobs_.erase(jobs_.begin() + static_cast<ptrdiff_t>(i));
    if (random_.chance(0.2)) {
      job.on_done(unavailable("out of reach, says the simulation"));
    } else {
      inner_.fence(job.peer, std::move(job.on_done));
    }
  }
}

Cluster::Cluster(ClusterOptions cluster_options)
    : random(mix_bits(cluster_options.seed, 1)),
      network(clock, mix_bits(cluster_options.seed, 3),
              {.min_delay_us = 50, .max_delay_us = cluster_options.max_frame_delay_us, .limits = {}}),
      options(cluster_options),
      fabric_(fabric_options(cluster_options)) {}

Cluster::~Cluster() {
  std::vector<std::string> names;
  for (const auto& [name, worker] : workers_) names.push_back(name);
  for (const auto& name : names) kill(name);
}

SimWorker& Cluster::start(const std::string& name, protocol::Role role) {
  BATON_CHECK(!workers_.contains(name));
  auto owned = std::make_unique<SimWorker>();
  SimWorker& worker = *owned;
  worker.name = name;
  worker.address = address_of(name);
  EngineConfig engine;
  engine.block_tokens = options.block_tokens;
  engine.kv_blocks = options.kv_blocks;
  engine.max_batched_tokens = options.max_batched_tokens;
  engine.max_model_len = options.max_model_len;
  engine.prefix_cache = options.prefix_cache;
  engine.max_running = 16;
  if (options.runs_ahead) {
    auto model = std::make_unique<testing::AsyncFakeModel>(testing::FakeModel::Options(), options.seed);
    model->has_events = false;
    model->mostly_done_chance = 0.5;
    worker.model = std::move(model);
  } else {
    worker.model = std::make_unique<testing::FakeModel>();
  }
  worker.engine = Engine::create(engine, *worker.model, clock).value();
  transfer::AgentConfig agent;
  agent.name = name;
  agent.manual_progress = true;
  agent.default_timeout_ms = 2000;
  agent.stall_timeout_ms = 200;
  worker.agent = transfer::create_sim_agent(fabric_, agent, clock).value();
  auto region = worker.agent->register_memory(worker.engine->kv_pool(), transfer::MemoryKind::kHost).value();
  const uint64_t block_bytes = static_cast<uint64_t>(worker.engine->layout().block_bytes());
  auto pool = worker.agent->add_pool({region, block_bytes, static_cast<uint64_t>(options.kv_blocks)}).value();
  worker.agent_transfer = std::make_unique<worker::AgentTransfer>(*worker.agent, pool, /*background=*/false);
  worker.transfer = std::make_unique<SlowFence>(*worker.agent_transfer, clock, random());
  worker.mailbox = std::make_shared<worker::Mailbox>(64u << 20);
  worker::CoreConfig core;
  core.name = name;
  core.role = role;
  core.max_model_len = options.max_model_len;
  core.local_prefill_tokens = options.local_prefill_tokens;
  core.lease_ms = options.lease_ms;
  core.default_queue_timeout_ms = 5000;
  core.prefill_queue_timeout_ms = 1000;
  core.quarantine_timeout_ms = 2000;
  core.load_max_interval_ms = options.lease_ms / 3;
  core.reconnect_min_ms = 20;
  core.reconnect_max_ms = 300;
  core.connect_timeout_ms = 300;
  core.seed = random();
  worker.core = std::make_unique<worker::WorkerCore>(core, *worker.engine, *worker.transfer, network.process(name),
                                                     worker.mailbox, worker.metrics, clock);
  worker.listener = network.process(name).listen(worker.address, worker.core->handler()).value();
  workers_[name] = std::move(owned);
  return worker;
}

void Cluster::kill(const std::string& name) {
  auto it = workers_.find(name);
  if (it == workers_.end()) return;
  SimWorker& worker = *it->second;
  network.kill(name);
  fabric_.kill(worker.agent->epoch());
  worker.listener.reset();
  worker.core.reset();
  worker.transfer.reset();
  worker.agent_transfer.reset();
  worker.agent.reset();
  graves_.push_back(std::move(it->second));
  workers_.erase(it);
}

void Cluster::freeze(const std::string& name) {
  SimWorker* found = worker(name);
  if (found == nullptr || found->frozen) return;
  found->frozen = true;
  network.freeze(name);
  fabric_.stall(found->agent->epoch());
}

void Cluster::thaw(const std::string& name) {
  SimWorker* found = worker(name);
  if (found == nullptr || !found->frozen) return;
  found->frozen = false;
  network.thaw(name);
  fabric_.resume(found->agent->epoch());
}

SimWorker* Cluster::worker(const std::string& name) {
  auto it = workers_.find(name);
  return it == workers_.end() ? nullptr : it->second.get();
}

void Cluster::turn() {
  network.pump();
  for (auto& [name, worker] : workers_) {
    if (worker->frozen) continue;
    while (worker->agent->progress() > 0) {
    }
    worker->transfer->poll();
    if (clock.now_ns() < worker->busy_until_ns) continue;
    worker->core->run_once(worker->mailbox->take(0));
    int64_t steps = worker->engine->stats().steps;
    if (steps != worker->steps && options.max_step_us > 0) {
      worker->steps = steps;
      worker->busy_until_ns =
          clock.now_ns() + static_cast<int64_t>(random.below(static_cast<uint64_t>(options.max_step_us))) * 1000;
    }
  }
  for (auto& actor : actors_) actor();
}

bool Cluster::run_for(int64_t ms, const std::function<bool()>& done) {
  const int64_t end_ns = clock.now_ns() + ms * 1'000'000;
  while (clock.now_ns() < end_ns) {
    turn();
    if (done && done()) return true;
    // To the next thing that is due; at least a little, so that time passes, at most a tick of the cores.
    int64_t next_ns = clock.now_ns() + 10'000'000;
    next_ns = std::min(next_ns, network.next_event_ns().value_or(next_ns));
    next_ns = std::min(next_ns, fabric_.next_event_ns());
    for (auto& [name, worker] : workers_) {
      if (worker->frozen) continue;
      int64_t due_ns = std::max(worker->busy_until_ns, clock.now_ns() + worker->core->idle_ns());
      next_ns = std::min(next_ns, due_ns);
    }
    next_ns = std::min(std::max(next_ns, clock.now_ns() + 100'000), end_ns);
    clock.advance_ns(next_ns - clock.now_ns());
  }
  return done && done();
}

}  // namespace baton::sim
