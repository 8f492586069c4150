// A run is a function of its seed (but for epochs, which are random on purpose). On failure the seed is printed; to run
// one alone: BATON_SIM_SEED=123 sim_test --gtest_filter=Simulation.Chaos
#include <gtest/gtest.h>

#include <cstdlib>

#include "base/log.h"
#include "tests/sim/sim_client.h"

namespace baton::sim {
namespace {

std::vector<TokenId> random_prompt(Random& random, int64_t max_tokens) {
  // Few different beginnings, so that prefixes are shared.
  Random beginning(random.below(3));
  int64_t length = 1 + static_cast<int64_t>(random.below(static_cast<uint64_t>(max_tokens)));
  int64_t shared = static_cast<int64_t>(random.below(static_cast<uint64_t>(length) + 1));
  std::vector<TokenId> prompt;
  for (int64_t i = 0; i < length; ++i) {
    prompt.push_back(static_cast<TokenId>(2 + (i < shared ? beginning : random).below(120)));
  }
  return prompt;
}

SamplingParams random_sampling(Random& random, int32_t max_tokens) {
  SamplingParams sampling;
  sampling.temperature = random.chance(0.5) ? 0.0f : 1.0f;
  sampling.seed = random();
  sampling.max_tokens = 1 + static_cast<int32_t>(random.below(static_cast<uint64_t>(max_tokens)));
  sampling.ignore_eos = random.chance(0.5);
  if (random.chance(0.2)) sampling.repetition_penalty = 1.3f;
  if (random.chance(0.2)) sampling.frequency_penalty = 0.5f;
  return sampling;
}

struct QuietLog {
  QuietLog() {
    if (std::getenv("BATON_SIM_LOG") == nullptr) set_log_sink([](LogLevel, std::string_view) {});
  }
  ~QuietLog() { set_log_sink(nullptr); }
};

/// Nothing is held anywhere once nobody wants anything.
std::string leftovers(Cluster& cluster) {
  std::string text;
  for (const auto& [name, worker] : cluster.workers()) {
    EngineStats stats = worker->engine->stats();
    worker::CoreHealth health = worker->core->health();
    if (stats.blocks.used != 0 || stats.blocks.quarantined != 0 || stats.reserved != 0 || stats.held != 0 ||
        stats.running != 0 || stats.waiting != 0 || health.requests != 0 || health.active_prefills != 0 ||
        health.quarantined_handoffs != 0) {
      text += fmt::format("{}: used {} quarantined {} reserved {} held {} running {} waiting {}; {} requests, {} "
                          "prefills, {} quarantined handoffs\n",
                          name, stats.blocks.used, stats.blocks.quarantined, stats.reserved, stats.held, stats.running,
                          stats.waiting, health.requests, health.active_prefills, health.quarantined_handoffs);
    }
  }
  return text;
}

struct SimulationTest : ::testing::Test {
  QuietLog quiet;
};
using Simulation = SimulationTest;

TEST_F(Simulation, RemotePrefillGivesTheOraclesTokens) {
  ClusterOptions options;
  Cluster cluster(options);
  cluster.start("p0", protocol::ROLE_PREFILL);
  cluster.start("d0", protocol::ROLE_DECODE);
  Oracle oracle(options);
  SimClient client(cluster, oracle, "router", {"d0"}, {"p0"});
  cluster.run_for(500);
  ASSERT_TRUE(client.load("d0")->pairs(0).ready()) << client.load("d0")->pairs(0).why_not();
  for (int i = 0; i < 20; ++i) {
    client.generate(random_prompt(cluster.random, 60), random_sampling(cluster.random, 20));
  }
  EXPECT_TRUE(cluster.run_for(20'000, [&] { return client.all_ended(); }));
  client.check_answers();
  EXPECT_TRUE(client.errors().empty()) << fmt::format("{}", fmt::join(client.errors(), "\n"));
  EXPECT_GT(client.count_paths("remote:p0"), 5);
  EXPECT_GT(client.count_paths("local"), 0);
  cluster.run_for(500);
  EXPECT_EQ(leftovers(cluster), "");
}

TEST_F(Simulation, DifferentModelsAreRefusedWithBothValues) {
  ClusterOptions options;
  Cluster cluster(options);
  cluster.start("d0");
  ClusterOptions other = options;
  other.block_tokens = 8;
  const_cast<ClusterOptions&>(cluster.options) = other;
  cluster.start("p0");
  Oracle oracle(options);
  SimClient client(cluster, oracle, "router", {"d0"}, {"p0"});
  cluster.run_for(500);
  ASSERT_EQ(client.load("d0")->pairs_size(), 1);
  const std::string& why_not = client.load("d0")->pairs(0).why_not();
  EXPECT_FALSE(client.load("d0")->pairs(0).ready());
  EXPECT_NE(why_not.find("block_tokens"), std::string::npos) << why_not;
  EXPECT_NE(why_not.find('4'), std::string::npos) << why_not;
  EXPECT_NE(why_not.find('8'), std::string::npos) << why_not;
  client.generate(random_prompt(cluster.random, 60), random_sampling(cluster.random, 20));
  EXPECT_TRUE(cluster.run_for(2000, [&] { return client.all_ended(); }));
  EXPECT_EQ(client.count_paths("local"), 1);
}

TEST_F(Simulation, KilledPrefillWorkerCostsOnlyTime) {
  ClusterOptions options;
  options.max_message_delay_us = 20'000;  // long in flight
  options.kv_blocks = 400;
  Cluster cluster(options);
  cluster.start("p0");
  cluster.start("d0");
  Oracle oracle(options);
  SimClient client(cluster, oracle, "router", {"d0"}, {"p0"});
  cluster.run_for(500);
  for (int i = 0; i < 10; ++i) {
    client.generate(random_prompt(cluster.random, 100), random_sampling(cluster.random, 8));
  }
  cluster.run_for(15);
  EXPECT_GT(cluster.worker("d0")->engine->stats().reserved, 0) << "the kill should hit handoffs";
  cluster.kill("p0");
  EXPECT_TRUE(cluster.run_for(1000, [&] { return client.all_ended(); }));
  cluster.start("p0");
  cluster.run_for(1000);
  EXPECT_TRUE(client.load("d0")->pairs(0).ready()) << "a restarted worker is used again";
  for (int i = 0; i < 10; ++i) {
    client.generate(random_prompt(cluster.random, 100), random_sampling(cluster.random, 8));
  }
  EXPECT_TRUE(cluster.run_for(3000, [&] { return client.all_ended(); }));
  client.check_answers();
  EXPECT_TRUE(client.errors().empty()) << fmt::format("{}", fmt::join(client.errors(), "\n"));
  for (const auto& [id, call] : client.calls()) EXPECT_NE(call.finish, FinishReason::kError);
  cluster.run_for(500);
  EXPECT_EQ(leftovers(cluster), "");
}

TEST_F(Simulation, StoppedPrefillWorkerLosesItsLease) {
  ClusterOptions options;
  options.max_message_delay_us = 20'000;
  Cluster cluster(options);
  cluster.start("p0");
  cluster.start("d0");
  Oracle oracle(options);
  SimClient client(cluster, oracle, "router", {"d0"}, {"p0"});
  cluster.run_for(500);
  std::vector<TokenId> prompt(40, 7);
  client.generate(prompt, random_sampling(cluster.random, 8));
  cluster.run_for(10);
  ASSERT_EQ(cluster.worker("d0")->engine->stats().reserved, 1);
  cluster.freeze("p0");
  EXPECT_TRUE(cluster.run_for(3 * options.lease_ms, [&] { return client.all_ended(); }));
  EXPECT_EQ(client.count_paths("local"), 1);
  EXPECT_GT(cluster.worker("d0")->engine->stats().blocks.quarantined, 0) << "it may still write";
  EXPECT_FALSE(client.load("d0")->pairs(0).ready());
  cluster.thaw("p0");
  cluster.run_for(1000);
  EXPECT_EQ(cluster.worker("d0")->engine->stats().blocks.quarantined, 0);
  EXPECT_TRUE(client.load("d0")->pairs(0).ready());
  client.check_answers();
  EXPECT_TRUE(client.errors().empty());
  EXPECT_EQ(leftovers(cluster), "");
}

TEST_F(Simulation, CancelFreesBothSidesWithinASecond) {
  ClusterOptions options;
  options.max_message_delay_us = 50'000;
  for (int64_t wait_ms : {0, 2, 5, 10, 40, 100}) {
    Cluster cluster(options);
    cluster.start("p0");
    cluster.start("d0");
    Oracle oracle(options);
    SimClient client(cluster, oracle, "router", {"d0"}, {"p0"});
    cluster.run_for(500);
    SamplingParams sampling;
    sampling.max_tokens = 60;
    sampling.ignore_eos = true;
    uint64_t id = client.generate(std::vector<TokenId>(60, 9), sampling);
    cluster.run_for(wait_ms);
    client.cancel(id);
    cluster.run_for(1000);
    EXPECT_TRUE(client.all_ended());
    EXPECT_EQ(leftovers(cluster), "") << "cancelled after " << wait_ms << " ms";
  }
}

TEST_F(Simulation, LostRouterIsCancelledEverywhere) {
  ClusterOptions options;
  Cluster cluster(options);
  cluster.start("p0");
  cluster.start("d0");
  Oracle oracle(options);
  SimClient client(cluster, oracle, "router", {"d0"}, {"p0"});
  cluster.run_for(500);
  for (int i = 0; i < 10; ++i) {
    client.generate(random_prompt(cluster.random, 60), random_sampling(cluster.random, 60));
  }
  cluster.run_for(10);
  cluster.network.kill("router");
  cluster.run_for(1000);
  EXPECT_EQ(leftovers(cluster), "");
}

TEST_F(Simulation, FullWorkerRefusesAfterTheQueueTimeout) {
  ClusterOptions options;
  options.kv_blocks = 32;
  options.max_step_us = 100'000;  // so slow that the queue does not move in time
  Cluster cluster(options);
  cluster.start("d0");
  Oracle oracle(options);
  SimClient client(cluster, oracle, "router", {"d0"}, {});
  cluster.run_for(500);
  for (int i = 0; i < 12; ++i) {
    SamplingParams sampling;
    sampling.max_tokens = 100;
    sampling.ignore_eos = true;
    client.generate(std::vector<TokenId>(100, static_cast<TokenId>(10 + i)), sampling);
  }
  EXPECT_TRUE(cluster.run_for(100'000, [&] { return client.all_ended(); }));
  int refused = 0;
  for (const auto& [id, call] : client.calls()) refused += call.code == StatusCode::kResourceExhausted;
  EXPECT_GT(refused, 0);
  EXPECT_LT(refused, 12);
  client.check_answers();
  EXPECT_TRUE(client.errors().empty()) << fmt::format("{}", fmt::join(client.errors(), "\n"));
  EXPECT_EQ(leftovers(cluster), "");
}

/// Everything at once. Returns what went wrong, empty when nothing did.
std::string chaos(uint64_t seed) {
  Random random(seed);
  ClusterOptions options;
  options.seed = seed;
  options.runs_ahead = seed % 2 == 0;
  options.kv_blocks = 48 + static_cast<int64_t>(random.below(80));
  options.prefix_cache = random.chance(0.7);
  options.max_message_delay_us = 1 << random.below(16);
  options.max_frame_delay_us = 100 + static_cast<int64_t>(random.below(5000));
  options.max_step_us = static_cast<int64_t>(random.below(5000));
  options.reorder = random.chance(0.8);
  Cluster cluster(options);
  const std::vector<std::string> decode = {"d0", "d1"};
  // Decode workers prefill for each other, too: grants both ways at once.
  const std::vector<std::string> prefill =
      random.chance(0.5) ? std::vector<std::string>{"p0", "p1"} : std::vector<std::string>{"p0", "d0", "d1"};
  std::vector<std::string> names = decode;
  for (const auto& name : prefill) {
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  for (const auto& name : names) cluster.start(name);
  Oracle oracle(options);
  SimClient router_a(cluster, oracle, "router-a", decode, prefill);
  SimClient router_b(cluster, oracle, "router-b", decode, prefill);
  std::vector<SimClient*> routers = {&router_a, &router_b};
  cluster.run_for(100);

  std::map<std::string, int64_t> restart_ms, thaw_ms;
  std::map<std::pair<std::string, std::string>, int64_t> heal_ms;
  std::vector<std::pair<SimClient*, uint64_t>> sent;
  const bool faults = random.chance(0.9);
  const int turns = 40 + static_cast<int>(random.below(60));
  auto pick = [&] { return names[random.below(names.size())]; };
  for (int turn = 0; turn < turns; ++turn) {
    for (uint64_t i = random.below(3); i > 0; --i) {
      SimClient* router = routers[random.below(2)];
      int64_t timeout_ms = random.chance(0.1) ? 50 + static_cast<int64_t>(random.below(500)) : 0;
      sent.emplace_back(router, router->generate(random_prompt(random, 70), random_sampling(random, 30), timeout_ms));
    }
    if (!sent.empty() && random.chance(0.15)) {
      auto [router, id] = sent[random.below(sent.size())];
      router->cancel(id);
    }
    const int64_t now_ms = cluster.clock.now_ms();
    if (faults && random.chance(0.06)) {
      std::string name = pick();
      if (cluster.worker(name) != nullptr) {
        cluster.kill(name);
        thaw_ms.erase(name);
        restart_ms[name] = now_ms + 20 + static_cast<int64_t>(random.below(600));
      }
    }
    if (faults && random.chance(0.06)) {
      std::string name = pick();
      if (cluster.worker(name) != nullptr) {
        cluster.freeze(name);
        thaw_ms[name] = now_ms + 20 + static_cast<int64_t>(random.below(900));
      }
    }
    if (faults && random.chance(0.06)) {
      std::string a = pick(), b = random.chance(0.3) ? "router-a" : pick();
      if (a != b) {
        cluster.network.partition(a, b);
        heal_ms[{a, b}] = now_ms + 20 + static_cast<int64_t>(random.below(900));
      }
    }
    if (faults && random.chance(0.06)) cluster.network.break_channels(pick(), pick());
    auto due = [&](auto& schedule, auto&& act) {
      for (auto it = schedule.begin(); it != schedule.end();) {
        if (it->second > cluster.clock.now_ms()) {
          ++it;
          continue;
        }
        act(it->first);
        it = schedule.erase(it);
      }
    };
    cluster.run_for(5 + static_cast<int64_t>(random.below(40)));
    due(restart_ms, [&](const std::string& name) { cluster.start(name); });
    due(thaw_ms, [&](const std::string& name) { cluster.thaw(name); });
    due(heal_ms, [&](const auto& pair) { cluster.network.heal(pair.first, pair.second); });
  }
  for (const auto& [name, at] : restart_ms) cluster.start(name);
  for (const auto& [name, at] : thaw_ms) cluster.thaw(name);
  for (const auto& [pair, at] : heal_ms) cluster.network.heal(pair.first, pair.second);

  std::string errors;
  if (!cluster.run_for(60'000, [&] { return router_a.all_ended() && router_b.all_ended(); })) {
    for (SimClient* router : routers) {
      for (const auto& [id, call] : router->calls()) {
        if (!call.ended) errors += fmt::format("call {} hangs at '{}'\n", id, call.worker);
      }
    }
  }
  // What nobody waits for any more may take until the longest time-outs, but no longer.
  cluster.run_for(6000, [&] { return leftovers(cluster).empty(); });
  errors += leftovers(cluster);
  for (SimClient* router : routers) {
    router->check_answers();
    for (const auto& error : router->errors()) errors += error + "\n";
    for (const auto& [id, call] : router->calls()) {
      const bool excusable = call.code == StatusCode::kDeadlineExceeded || call.code == StatusCode::kResourceExhausted;
      if (call.finish == FinishReason::kError && !excusable) {
        errors += fmt::format("call {} failed with {}\n", id, status_code_name(call.code));
      }
    }
  }
  // Once the network is well again, every pair is, too.
  auto broken_pairs = [&] {
    std::string text;
    for (const auto& name : decode) {
      const protocol::Load* load = router_a.load(name);
      if (load->pairs_size() + 1 < static_cast<int>(prefill.size())) text += fmt::format("{} lacks peers\n", name);
      for (const auto& pair : load->pairs()) {
        if (!pair.ready()) text += fmt::format("{} can't use {}: {}\n", name, pair.address(), pair.why_not());
      }
    }
    return text;
  };
  cluster.run_for(6000, [&] { return broken_pairs().empty(); });
  errors += broken_pairs();
  return errors;
}

TEST_F(Simulation, Chaos) {
  if (const char* seed = std::getenv("BATON_SIM_SEED")) {
    EXPECT_EQ(chaos(std::strtoull(seed, nullptr, 10)), "");
    return;
  }
  const char* count = std::getenv("BATON_SIM_SEEDS");
  const uint64_t seeds = count != nullptr ? std::strtoull(count, nullptr, 10) : 200;
  for (uint64_t seed = 1; seed <= seeds; ++seed) {
    ASSERT_EQ(chaos(seed), "") << "BATON_SIM_SEED=" << seed;
  }
}

}  // namespace
}  // namespace baton::sim
