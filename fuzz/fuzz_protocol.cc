// Frames from outside: whatever a router, a decode worker, a prefill worker or a stranger sends, a worker stays whole and
// holds nothing once they are gone. The input is a list of records: who (1 byte), length (1 byte), a Frame.
#include <cstdint>
#include <memory>
#include <vector>

#include <prometheus/metric_family.h>

#include "base/check.h"
#include "base/log.h"
#include "engine/engine.h"
#include "engine/testing/fake_model.h"
#include "protocol/baton.pb.h"
#include "protocol/in_memory_network.h"
#include "protocol/metrics_codec.h"
#include "protocol/validate.h"
#include "transfer/sim/sim_fabric.h"
#include "worker/agent_transfer.h"
#include "worker/worker_core.h"

namespace {

using namespace baton;

struct Peer {
  std::shared_ptr<protocol::Channel> channel;
  protocol::ChannelHandler handler() {
    return {[this](std::shared_ptr<protocol::Channel> from, protocol::Frame&&) { channel = from; },
            [](std::shared_ptr<protocol::Channel>, Status) {}};
  }
};

class World {
 public:
  World() {
    EngineConfig config;
    config.block_tokens = 4;
    config.kv_blocks = 32;
    config.max_model_len = 64;
    config.max_batched_tokens = 32;
    engine_ = Engine::create(config, model_, clock_).value();
    transfer::AgentConfig agent_config;
    agent_config.manual_progress = true;
    agent_ = transfer::create_sim_agent(fabric_, agent_config, clock_).value();
    auto region = agent_->register_memory(engine_->kv_pool(), transfer::MemoryKind::kHost).value();
    auto pool = agent_->add_pool({region, static_cast<uint64_t>(engine_->layout().block_bytes()), 32}).value();
    // The other side of grants is an agent, too, so that writes really go somewhere.
    other_agent_ = transfer::create_sim_agent(fabric_, agent_config, clock_).value();
    other_memory_.resize(static_cast<size_t>(engine_->layout().block_bytes()) * 32);
    auto other_region = other_agent_->register_memory(other_memory_, transfer::MemoryKind::kHost).value();
    auto other_pool =
        other_agent_->add_pool({other_region, static_cast<uint64_t>(engine_->layout().block_bytes()), 32}).value();
    transfer_ = std::make_unique<worker::AgentTransfer>(*agent_, pool, false);
    worker::CoreConfig core;
    core.max_model_len = 64;
    core.local_prefill_tokens = 4;
    core.lease_ms = 200;
    core.quarantine_timeout_ms = 500;
    core_ = std::make_unique<worker::WorkerCore>(core, *engine_, *transfer_, network_.process("w"), mailbox_, metrics_,
                                                 clock_);
    listener_ = network_.process("w").listen("w:1", core_->handler()).value();
    prefill_listener_ = network_.process("o").listen("o:1", prefill_.handler()).value();

    router_.channel = network_.process("o").connect("w:1", router_.handler());
    decode_.channel = network_.process("o").connect("w:1", decode_.handler());
    stranger_.channel = network_.process("o").connect("w:1", stranger_.handler());
    protocol::Frame frame;
    protocol::Hello& hello = *frame.mutable_hello();
    hello.set_protocol_version(protocol::kProtocolVersion);
    hello.set_epoch(static_cast<uint64_t>(other_agent_->epoch()));
    hello.set_name("other");
    hello.set_role(protocol::ROLE_ROUTER);
    send(router_, frame);
    hello.set_role(protocol::ROLE_BOTH);
    hello.set_fingerprint(engine_->layout().fingerprint());
    hello.set_vocab_size(model_.config().vocab_size);
    hello.set_max_model_len(64);
    hello.set_block_tokens(4);
    hello.set_transfer_metadata(other_agent_->metadata());
    hello.set_kv_pool(static_cast<uint32_t>(other_pool));
    send(decode_, frame);
    protocol::Frame peers;
    peers.mutable_set_peers()->add_prefill()->set_address("o:1");
    send(router_, peers);
    run(20);
    send(prefill_, frame);  // the answer to the worker's Hello
    protocol::Frame load;
    load.mutable_load()->add_pairs()->set_ready(true);
    send(prefill_, load);
    run(20);
  }

  void send(Peer& peer, const protocol::Frame& frame) {
    if (peer.channel != nullptr) ignore_status(peer.channel->send(frame));
  }
  Peer& peer(int which) {
    Peer* all[] = {&router_, &decode_, &prefill_, &stranger_};
    return *all[which & 3];
  }
  void run(int64_t ms) {
    const int64_t end_ms = clock_.now_ms() + ms;
    do {
      network_.pump();
      agent_->progress();
      other_agent_->progress();
      core_->run_once(mailbox_->take(0));
      clock_.advance_ms(5);
    } while (clock_.now_ms() < end_ms);
  }
  void expect_empty_after_all_leave() {
    for (int i = 0; i < 4; ++i) {
      if (peer(i).channel != nullptr) peer(i).channel->close();
    }
    prefill_listener_.reset();
    run(1500);
    EngineStats stats = engine_->stats();
    BATON_CHECK(core_->drained()) << "requests or prefills are left";
    BATON_CHECK(stats.blocks.used == 0 && stats.blocks.quarantined == 0 && stats.running == 0 && stats.waiting == 0)
        << "used " << stats.blocks.used << " quarantined " << stats.blocks.quarantined;
  }

 private:
  ManualClock clock_;
  protocol::InMemoryNetwork network_{clock_, 1};
  transfer::SimFabric fabric_{transfer::SimOptions{}};
  testing::FakeModel model_;
  std::unique_ptr<Engine> engine_;
  std::vector<std::byte> other_memory_;
  std::unique_ptr<transfer::Agent> agent_, other_agent_;
  std::unique_ptr<worker::AgentTransfer> transfer_;
  std::shared_ptr<worker::Mailbox> mailbox_ = std::make_shared<worker::Mailbox>(1u << 20);
  worker::WorkerMetrics metrics_;
  std::unique_ptr<worker::WorkerCore> core_;
  Peer router_, decode_, prefill_, stranger_;
  std::unique_ptr<protocol::Listener> listener_, prefill_listener_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool quiet = (set_log_level(LogLevel::kError), set_log_sink([](LogLevel, std::string_view) {}), true);
  (void)quiet;
  ignore_status(protocol::decode_metrics({reinterpret_cast<const char*>(data), size}).status());

  World world;
  int frames = 0;
  while (size >= 2 && frames < 64) {
    const int who = data[0];
    const size_t length = std::min<size_t>(data[1], size - 2);
    protocol::Frame frame;
    if (frame.ParseFromArray(data + 2, static_cast<int>(length))) {
      for (auto sender : {protocol::Sender::kWorker, protocol::Sender::kStranger}) {
        ignore_status(protocol::validate_frame(frame, sender));
      }
      world.send(world.peer(who), frame);
      ++frames;
      if (who & 4) world.run(10);
    }
    data += 2 + length;
    size -= 2 + length;
  }
  world.run(10);
  world.expect_empty_after_all_leave();
  return 0;
}
