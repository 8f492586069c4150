#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "engine/engine.h"
#include "engine/testing/fake_model.h"
#include "protocol/baton.pb.h"
#include "protocol/in_memory_network.h"
#include "transfer/sim/sim_fabric.h"
#include "worker/agent_transfer.h"
#include "worker/worker_core.h"

namespace baton::worker::testing {

/// The far end of one channel, played by a test or fuzzer: says what it is told to and keeps what it hears.
struct Puppet {
  std::shared_ptr<protocol::Channel> channel;
  std::vector<protocol::Frame> frames;
  bool closed = false;

  protocol::ChannelHandler handler() {
    return {[this](std::shared_ptr<protocol::Channel> from, protocol::Frame&& frame) {
              channel = std::move(from);
              frames.push_back(std::move(frame));
            },
            [this](std::shared_ptr<protocol::Channel> from, Status) {
              if (from == channel || channel == nullptr) closed = true;
            }};
  }
  void send(const protocol::Frame& frame) {
    if (channel != nullptr) ignore_status(channel->send(frame));
  }
  /// What it heard of one kind, in order.
  std::vector<protocol::Frame> heard(protocol::Frame::BodyCase kind) const {
    std::vector<protocol::Frame> found;
    for (const auto& frame : frames) {
      if (frame.body_case() == kind) found.push_back(frame);
    }
    return found;
  }
};

/// One real WorkerCore "w" with puppets around it: a router, a decode worker and a prefill worker (at "o:1") that share
/// one transfer agent, and a stranger. No threads; time moves in run().
class CoreWorld {
 public:
  struct Options {
    CoreConfig core = default_core();
    int64_t kv_blocks = 32;
    int32_t block_tokens = 4;
    int32_t max_model_len = 64;
    int32_t layers = 2;
    protocol::ChannelLimits limits;
    transfer::SimOptions fabric;
    bool others_check = false;  ///< the puppets' agent writes in integrity mode
  };
  static CoreConfig default_core() {
    CoreConfig core;
    core.name = "w";
    core.max_model_len = 64;
    core.local_prefill_tokens = 4;
    core.lease_ms = 200;
    core.default_queue_timeout_ms = 1000;
    core.prefill_queue_timeout_ms = 300;
    core.quarantine_timeout_ms = 1000;
    core.load_max_interval_ms = 100;
    core.reconnect_min_ms = 20;
    return core;
  }

  CoreWorld() : CoreWorld(Options()) {}
  explicit CoreWorld(const Options& options)
      : options_(options), network(clock, 1, {.min_delay_us = 0, .max_delay_us = 0, .limits = options.limits}) {
    EngineConfig config;
    config.block_tokens = options.block_tokens;
    config.kv_blocks = options.kv_blocks;
    config.max_model_len = options.max_model_len;
    config.max_batched_tokens = 32;
    config.max_running = 8;
    engine = Engine::create(config, model, clock).value();
    const uint64_t block_bytes = static_cast<uint64_t>(engine->layout().block_bytes());
    const uint64_t blocks = static_cast<uint64_t>(options.kv_blocks);
    transfer::AgentConfig agent_config;
    agent_config.manual_progress = true;
    agent = transfer::create_sim_agent(fabric, agent_config, clock).value();
    auto region = agent->register_memory(engine->kv_pool(), transfer::MemoryKind::kHost).value();
    auto pool = agent->add_pool({region, block_bytes, blocks}).value();
    agent_config.integrity = options.others_check;
    other_agent = transfer::create_sim_agent(fabric, agent_config, clock).value();
    other_memory.resize(block_bytes * blocks);
    auto other_region = other_agent->register_memory(other_memory, transfer::MemoryKind::kHost).value();
    other_pool = other_agent->add_pool({other_region, block_bytes, blocks}).value();
    transfer = std::make_unique<AgentTransfer>(*agent, pool, /*background=*/false);
    core = std::make_unique<WorkerCore>(options.core, *engine, *transfer, network.process("w"), mailbox, metrics, clock);
    listener = network.process("w").listen("w:1", core->handler()).value();
    prefill_listener = network.process("o").listen("o:1", prefill.handler()).value();
    for (Puppet* puppet : {&router, &decode, &stranger}) {
      puppet->channel = network.process("o").connect("w:1", puppet->handler());
    }
  }
  ~CoreWorld() {
    core.reset();  // its links go before the agents
    transfer.reset();
  }

  protocol::Frame router_hello() const {
    protocol::Frame frame;
    protocol::Hello& hello = *frame.mutable_hello();
    hello.set_protocol_version(protocol::kProtocolVersion);
    hello.set_epoch(static_cast<uint64_t>(other_agent->epoch()));
    hello.set_name("other");
    hello.set_role(protocol::ROLE_ROUTER);
    return frame;
  }
  protocol::Frame worker_hello() const {
    protocol::Frame frame = router_hello();
    protocol::Hello& hello = *frame.mutable_hello();
    hello.set_role(protocol::ROLE_BOTH);
    hello.set_fingerprint(engine->layout().fingerprint());
    hello.set_vocab_size(model.config().vocab_size);
    hello.set_max_model_len(options_.max_model_len);
    hello.set_block_tokens(options_.block_tokens);
    hello.set_transfer_metadata(other_agent->metadata());
    hello.set_kv_pool(static_cast<uint32_t>(other_pool));
    return frame;
  }
  /// Everybody but the stranger says Hello; afterwards the prefill puppet can be used.
  void introduce() {
    router.send(router_hello());
    decode.send(worker_hello());
    protocol::Frame peers;
    peers.mutable_set_peers()->add_prefill()->set_address("o:1");
    router.send(peers);
    run(20);
    prefill.send(worker_hello());
    prefill.send(ready_load());
    run(20);
  }
  static protocol::Frame ready_load() {
    protocol::Frame load;
    load.mutable_load()->add_pairs()->set_ready(true);
    return load;
  }

  void run(int64_t ms) {
    const int64_t end_ms = clock.now_ms() + ms;
    do {
      network.pump();
      agent->progress();
      other_agent->progress();
      core->run_once(mailbox->take(0));
      clock.advance_ms(5);
    } while (clock.now_ms() < end_ms);
  }
  /// As run(), with the prefill puppet showing that it lives.
  void run_with_prefill_alive(int64_t ms) {
    for (int64_t i = 0; i < ms; i += 50) {
      prefill.send(ready_load());
      run(50);
    }
  }

 private:
  const Options options_;

 public:
  ManualClock clock;
  protocol::InMemoryNetwork network;
  transfer::SimFabric fabric{options_.fabric};
  baton::testing::FakeModel model{{.layers = options_.layers}};
  std::unique_ptr<Engine> engine;
  std::vector<std::byte> other_memory;
  transfer::PoolId other_pool{};
  std::unique_ptr<transfer::Agent> agent, other_agent;
  std::unique_ptr<AgentTransfer> transfer;
  std::shared_ptr<Mailbox> mailbox = std::make_shared<Mailbox>(size_t{1} << 20);
  WorkerMetrics metrics;
  std::unique_ptr<WorkerCore> core;
  Puppet router, decode, prefill, stranger;
  std::unique_ptr<protocol::Listener> listener, prefill_listener;
};

}  // namespace baton::worker::testing
