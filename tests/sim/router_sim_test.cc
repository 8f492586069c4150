// The real router over simulated workers, network and time: every request ends exactly once, with the oracle's tokens, whatever
// dies. A seed alone: BATON_SIM_SEED=123 router_sim_test
#include <gtest/gtest.h>

#include <cstdlib>

#include "base/log.h"
#include "router/router.h"
#include "tests/sim/sim_client.h"
#include "worker/convert.h"

namespace baton::sim {
namespace {

/// RouterCore as an actor of the cluster, with a book of what its clients saw.
class SimRouter {
 public:
  struct Call {
    std::vector<TokenId> prompt;
    SamplingParams sampling;
    std::vector<TokenId> tokens;
    int finished = 0;
    bool cancelled = false;
    int finish_reason = 0;
    Status status;
  };

  SimRouter(Cluster& cluster, const std::string& name, const std::vector<std::string>& workers) {
    RouterConfig config;
    config.name = name;
    for (const auto& worker : workers) config.workers.push_back(Cluster::address_of(worker));
    config.max_attempts = 1000;  // the chaos is not the requests' fault
    config.worker_silence_ms = 3000;
    config.queue_timeout_ms = 60'000;
    protocol::ChannelHandler handler;
    handler.on_frame = [this](std::shared_ptr<protocol::Channel> channel, protocol::Frame&& frame) {
      core_->on_frame(channel, std::move(frame));
    };
    handler.on_closed = [this](std::shared_ptr<protocol::Channel> channel, Status status) {
      core_->on_closed(channel, status);
    };
    core_ = std::make_unique<RouterCore>(config, cluster.clock, cluster.network.process(name), handler);
    core_->start();
    cluster.add_actor([this] { core_->tick(); });
  }
  ~SimRouter() { core_->shutdown(); }

  void submit(std::vector<TokenId> prompt, SamplingParams sampling) {
    uint64_t id = next_id_++;
    Call& call = calls_[id];
    call.prompt = prompt;
    call.sampling = sampling;
    RouterRequest request;
    request.prompt = std::move(prompt);
    worker::to_proto(sampling, &request.sampling);
    Status status = core_->submit(id, std::move(request), [&call](RouterEvent&& event) {
      EXPECT_FALSE(call.cancelled) << "an event after the cancel";
      EXPECT_EQ(call.finished, 0) << "an event after the end";
      for (const auto& token : event.tokens) {
        if (token.has_token()) call.tokens.push_back(token.token());
        if (token.finish() != 0) call.finish_reason = token.finish();
      }
      if (event.finished) {
        ++call.finished;
        call.status = event.status;
      }
    });
    EXPECT_TRUE(status.ok()) << status.to_string();
  }
  void cancel_one(Random& random) {
    if (calls_.empty()) return;
    auto it = std::next(calls_.begin(), static_cast<long>(random.below(calls_.size())));
    if (it->second.finished != 0) return;
    it->second.cancelled = true;
    core_->cancel(it->first);
  }
  bool all_ended() const {
    return std::all_of(calls_.begin(), calls_.end(),
                       [](const auto& call) { return call.second.cancelled || call.second.finished == 1; });
  }
  std::string check(Oracle& oracle) const {
    std::string errors;
    for (const auto& [id, call] : calls_) {
      Oracle::Answer answer = oracle.answer(call.prompt, call.sampling);
      bool prefix = call.tokens.size() <= answer.tokens.size() &&
                    std::equal(call.tokens.begin(), call.tokens.end(), answer.tokens.begin());
      if (!prefix) errors += fmt::format("call {}: wrong tokens\n", id);
      if (call.cancelled) continue;
      if (call.finished != 1) errors += fmt::format("call {}: ended {} times\n", id, call.finished);
      if (call.finished == 1 && !call.status.ok()) {
        if (call.status.code() != StatusCode::kResourceExhausted) errors += fmt::format("call {}: {}\n", id, call.status.to_string());
      } else if (call.finished == 1 && (call.tokens != answer.tokens || call.finish_reason != static_cast<int>(answer.finish))) {
        errors += fmt::format("call {}: {} tokens instead of {}\n", id, call.tokens.size(), answer.tokens.size());
      }
    }
    return errors;
  }
  RouterCore& core() { return *core_; }

 private:
  std::unique_ptr<RouterCore> core_;
  std::map<uint64_t, Call> calls_;  // stable addresses
  uint64_t next_id_ = 1;
};

std::string run(uint64_t seed, RouterStats* stats) {
  Random random(seed);
  ClusterOptions options;
  options.seed = seed;
  options.kv_blocks = 64 + static_cast<int64_t>(random.below(100));
  options.prefix_cache = random.chance(0.7);
  options.max_message_delay_us = 1 << random.below(14);
  options.max_step_us = static_cast<int64_t>(random.below(4000));
  Cluster cluster(options);
  const std::vector<std::string> names = {"p0", "p1", "d0", "d1"};
  auto role = [](const std::string& name) { return name[0] == 'p' ? protocol::ROLE_PREFILL : protocol::ROLE_DECODE; };
  for (const auto& name : names) cluster.start(name, role(name));
  Oracle oracle(options);
  SimRouter router(cluster, "router", names);
  cluster.run_for(300);
  std::map<std::string, int64_t> restart_ms, thaw_ms;
  for (int turn = 0; turn < 60; ++turn) {
    for (uint64_t i = random.below(3); i > 0; --i) {
      std::vector<TokenId> prompt(1 + random.below(70));
      for (TokenId& token : prompt) token = static_cast<TokenId>(2 + random.below(120));
      SamplingParams sampling;
      sampling.temperature = random.chance(0.5) ? 0.0f : 1.0f;
      sampling.seed = random();
      sampling.max_tokens = 1 + static_cast<int32_t>(random.below(30));
      sampling.ignore_eos = random.chance(0.5);
      router.submit(std::move(prompt), sampling);
    }
    if (random.chance(0.1)) router.cancel_one(random);
    const std::string& victim = names[random.below(names.size())];
    if (random.chance(0.1) && cluster.worker(victim) != nullptr) {
      cluster.kill(victim);
      thaw_ms.erase(victim);
      restart_ms[victim] = cluster.clock.now_ms() + 20 + static_cast<int64_t>(random.below(500));
    } else if (random.chance(0.06) && cluster.worker(victim) != nullptr) {
      cluster.freeze(victim);
      thaw_ms[victim] = cluster.clock.now_ms() + 20 + static_cast<int64_t>(random.below(5000));
    } else if (random.chance(0.05)) {
      cluster.network.break_channels("router", victim);
    }
    cluster.run_for(5 + static_cast<int64_t>(random.below(40)));
    std::erase_if(restart_ms, [&](const auto& item) {
      if (item.second > cluster.clock.now_ms()) return false;
      cluster.start(item.first, role(item.first));
      return true;
    });
    std::erase_if(thaw_ms, [&](const auto& item) {
      if (item.second > cluster.clock.now_ms()) return false;
      cluster.thaw(item.first);
      return true;
    });
  }
  for (const auto& [name, at] : restart_ms) cluster.start(name, role(name));
  for (const auto& [name, at] : thaw_ms) cluster.thaw(name);
  std::string errors;
  if (!cluster.run_for(120'000, [&] { return router.all_ended(); })) errors += "a request hangs\n";
  auto leftovers = [&] {
    std::string text;
    for (const auto& [name, worker] : cluster.workers()) {
      EngineStats engine = worker->engine->stats();
      if (engine.blocks.used + engine.blocks.quarantined + engine.running + engine.waiting != 0) {
        text += fmt::format("{}: used {} quarantined {} running {} waiting {}\n", name, engine.blocks.used,
                            engine.blocks.quarantined, engine.running, engine.waiting);
      }
    }
    return text;
  };
  cluster.run_for(8000, [&] { return leftovers().empty(); });
  errors += leftovers() + router.check(oracle);
  cluster.run_for(6000, [&] { return router.core().health().ready && !router.core().health().degraded; });
  RouterHealth health = router.core().health();
  if (!health.ready || health.degraded) errors += "not well again: " + health.why_not + "\n";
  if (health.requests != 0) errors += fmt::format("{} requests are left in the router\n", health.requests);
  *stats = router.core().stats();
  return errors;
}

TEST(RouterSimulation, EveryRequestEndsOnceWithTheRightTokens) {
  if (std::getenv("BATON_SIM_LOG") == nullptr) set_log_sink([](LogLevel, std::string_view) {});
  const char* one = std::getenv("BATON_SIM_SEED");
  const char* count = std::getenv("BATON_SIM_SEEDS");
  uint64_t first = one != nullptr ? std::strtoull(one, nullptr, 10) : 1;
  uint64_t seeds = one != nullptr ? 1 : count != nullptr ? std::strtoull(count, nullptr, 10) : 100;
  uint64_t replays = 0, losses = 0;
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    RouterStats stats;
    ASSERT_EQ(run(seed, &stats), "") << "BATON_SIM_SEED=" << seed;
    replays += stats.replays;
    losses += stats.worker_losses;
  }
  if (one == nullptr) {
    EXPECT_GT(replays, seeds / 2) << "the faults should have hit running requests";
    EXPECT_GT(losses, seeds);
  }
  set_log_sink(nullptr);
}

}  // namespace
}  // namespace baton::sim
