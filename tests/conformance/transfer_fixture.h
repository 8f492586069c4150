#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "base/log.h"
#include "base/random.h"
#include "transfer/cuda/testing/pool_memory.h"
#include "transfer/include/baton/transfer.h"
#include "transfer/sim/sim_fabric.h"

/// For what every transport promises, checked on every transport. A new backend is one line in networks().
namespace baton::transfer::conformance {

using ::testing::HasSubstr;

struct Network {
  std::string transport;
  SimOptions sim;
  std::string addresses = "127.0.0.1";
  bool integrity = false;
  /// Senders have host memory, the others GPU memory.
  bool mixed = false;
};

inline std::ostream& operator<<(std::ostream& out, const Network& network) { return out << network.transport; }

/// One agent with one pool of its own memory.
struct Node {
  testing::PoolMemory memory;
  uint64_t stride_bytes;
  std::unique_ptr<Agent> agent;
  PoolId pool{};

  std::byte* block(uint64_t index) { return memory.data() + index * stride_bytes; }
  void fill(uint64_t seed) {
    Random random(seed);
    for (std::byte& byte : memory) byte = static_cast<std::byte>(random());
  }
};

/// Waits until the inbox has `messages`; false after 20 s.
inline bool wait_for(Agent& agent, Tag tag, uint64_t messages) {
  auto arrived = std::make_shared<std::promise<void>>();
  std::future<void> future = arrived->get_future();
  Status status = agent.expect(tag, messages, [arrived] { arrived->set_value(); });
  EXPECT_TRUE(status.ok()) << status.to_string();
  return future.wait_for(std::chrono::seconds(20)) == std::future_status::ready;
}

/// Waits until `is_true` says so; false after 20 s.
inline bool wait_until(const std::function<bool()>& is_true) {
  auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!is_true()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

class TransferConformance : public ::testing::TestWithParam<Network> {
 protected:
  void SetUp() override {
    set_log_level(LogLevel::kError);
    if (GetParam().transport.starts_with("ucx")) {
      AgentConfig probe;
      probe.transport = "ucx:tcp";
      static const Status ucx = Agent::create(probe).status();
      if (!ucx.ok()) GTEST_SKIP() << ucx.to_string();
    }
    if (GetParam().transport.ends_with("sim")) fabric_ = std::make_unique<SimFabric>(GetParam().sim);
  }

  std::unique_ptr<Node> make_node(const std::string& name, uint64_t blocks, uint64_t stride_bytes,
                                  AgentConfig config = {}) {
    auto node = std::make_unique<Node>();
    const bool host = GetParam().mixed && (name.starts_with("sender") || name == "a");
    node->memory = testing::PoolMemory(blocks * stride_bytes, host ? "shm" : GetParam().transport);
    node->stride_bytes = stride_bytes;
    config.name = name;
    config.transport = GetParam().transport;
    config.bind_address = GetParam().addresses;
    config.cuda_library = testing::cuda_library();
    config.integrity = GetParam().integrity;
    Result<std::unique_ptr<Agent>> agent =
        fabric_ ? create_sim_agent(*fabric_, config) : Agent::create(config);
    EXPECT_TRUE(agent.ok()) << agent.status().to_string();
    node->agent = std::move(*agent);
    Result<MemoryRegion> region = node->agent->register_memory(node->memory, node->memory.kind());
    EXPECT_TRUE(region.ok()) << region.status().to_string();
    Result<PoolId> pool = node->agent->add_pool({*region, stride_bytes, blocks});
    EXPECT_TRUE(pool.ok()) << pool.status().to_string();
    node->pool = *pool;
    return node;
  }

  static Peer connect(Node& from, Node& to) {
    Result<Peer> peer = from.agent->connect(to.agent->metadata());
    EXPECT_TRUE(peer.ok()) << peer.status().to_string();
    return *peer;
  }

  static BlockWrite whole(Node& from, Node& to, std::vector<BlockPair> blocks, Tag tag = Tag::kNone) {
    BlockWrite write;
    write.local_pool = from.pool;
    write.remote_pool = to.pool;
    write.blocks = std::move(blocks);
    write.length_bytes = std::min(from.stride_bytes, to.stride_bytes);
    write.tag = tag;
    return write;
  }

  /// What a tagged transfer counts beside its data.
  static uint64_t extra_messages() { return GetParam().integrity ? 1 : 0; }

  std::unique_ptr<SimFabric> fabric_;
};

inline bool is_all(const std::byte* begin, size_t bytes, std::byte value) {
  return begin[0] == value && std::memcmp(begin, begin + 1, bytes - 1) == 0;
}

inline std::vector<BlockPair> scattered(uint64_t seed, uint32_t count, uint32_t local_blocks, uint32_t remote_blocks) {
  std::vector<uint32_t> local(local_blocks), remote(remote_blocks);
  std::iota(local.begin(), local.end(), 0u);
  std::iota(remote.begin(), remote.end(), 0u);
  Random random(seed);
  std::shuffle(local.begin(), local.end(), random);
  std::shuffle(remote.begin(), remote.end(), random);
  std::vector<BlockPair> pairs;
  for (uint32_t i = 0; i < count; ++i) pairs.push_back({local[i], remote[i]});
  return pairs;
}

inline SimOptions efa_like() {
  SimOptions options;
  options.seed = 7;
  options.min_delay_ns = 1'000;
  options.max_delay_ns = 200'000;
  options.again = 0.2;
  options.reorder = true;
  options.max_segments = 1;
  options.max_message_bytes = 256 << 10;
  return options;
}

inline std::vector<Network> networks() {
  return {Network{"sim", {}}, Network{"sim", efa_like()},
          Network{"shm", {}}, Network{"cuda_ipc", {}}, Network{"tcp", {}},
          Network{"staged:sim", {}}, Network{"staged:sim", efa_like()},
          Network{"staged:shm", {}}, Network{"staged:tcp", {}},
          Network{"staged:shm", {}, "127.0.0.1", false, true},
          Network{"staged:tcp", {}, "127.0.0.1", false, true},
          Network{"tcp", {}, "127.0.0.1,127.0.0.2,127.0.0.3"},
          Network{"ucx:tcp", {}}, Network{"sim", efa_like(), "127.0.0.1", true},
          Network{"shm", {}, "127.0.0.1", true}, Network{"cuda_ipc", {}, "127.0.0.1", true},
          Network{"staged:sim", efa_like(), "127.0.0.1", true},
          Network{"staged:tcp", {}, "127.0.0.1", true, true},
          Network{"tcp", {}, "127.0.0.1", true},
          Network{"tcp", {}, "127.0.0.1,127.0.0.2,127.0.0.3", true},
          Network{"ucx:tcp", {}, "127.0.0.1", true}};
}

inline std::string network_name(const ::testing::TestParamInfo<Network>& info) {
  std::string name = info.param.transport + (info.param.sim.reorder ? "_like_efa" : "");
  if (info.param.addresses.find(',') != std::string::npos) name += "_rails";
  if (info.param.integrity) name += "_integrity";
  if (info.param.mixed) name += "_mixed";
  std::replace(name.begin(), name.end(), ':', '_');
  return name;
}

}  // namespace baton::transfer::conformance
