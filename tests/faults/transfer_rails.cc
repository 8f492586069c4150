// Transfers over several rails, for bench/netns_rails.sh: one side receives, the other sends the same pool again and again,
// every block of every transfer is checked by the receiver, and each transfer's rate is printed with what every rail does.
//
//   bench/netns_rails.sh --rates 1000,1000,1000,1000 --cut 3:2:5 --
//     'transfer_rails receive $LOCAL_IPS $SHARED_DIR 100' -- 'transfer_rails send $LOCAL_IPS $SHARED_DIR 100'
//
// The two meet through files in SHARED_DIR, so that nothing but the library's own traffic is on the rails.

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <future>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "transfer/include/baton/transfer.h"

namespace {

using namespace baton;
using namespace baton::transfer;

constexpr uint64_t kStride = 1u << 20;
constexpr uint64_t kBlocks = 64;

struct Side {
  std::vector<std::byte> memory = std::vector<std::byte>(kStride * kBlocks);
  std::unique_ptr<Agent> agent;
  PoolId pool{};
};

std::unique_ptr<Side> open(const std::string& name, const std::string& ips) {
  auto side = std::make_unique<Side>();
  AgentConfig config;
  config.name = name;
  config.transport = "tcp";
  config.bind_address = ips;
  auto agent = Agent::create(config);
  BATON_CHECK(agent.ok()) << agent.status().to_string();
  side->agent = std::move(*agent);
  auto region = side->agent->register_memory(side->memory, MemoryKind::kHost);
  BATON_CHECK(region.ok()) << region.status().to_string();
  side->pool = *side->agent->add_pool({*region, kStride, kBlocks});
  return side;
}

void put(const std::string& path, const std::string& bytes) {
  std::ofstream(path + ".new", std::ios::binary) << bytes;
  BATON_CHECK(::rename((path + ".new").c_str(), path.c_str()) == 0);
}

/// Waits for the file; empty after `timeout_s`.
std::string get(const std::string& path, int timeout_s = 60) {
  auto end = std::chrono::steady_clock::now() + std::chrono::seconds(timeout_s);
  while (std::chrono::steady_clock::now() < end) {
    std::ifstream file(path, std::ios::binary);
    if (file) {
      std::ostringstream bytes;
      bytes << file.rdbuf();
      return bytes.str();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return {};
}

/// The first 8 bytes of every 64 KiB: which transfer, which place.
void mark(std::vector<std::byte>& memory, uint64_t round) {
  for (uint64_t at = 0; at < memory.size(); at += 64 << 10) {
    uint64_t value = round * 1'000'003 + at;
    std::memcpy(memory.data() + at, &value, 8);
    std::memcpy(memory.data() + at + (64 << 10) - 8, &value, 8);
  }
}
uint64_t count_wrong(const std::vector<std::byte>& memory, uint64_t round) {
  uint64_t wrong = 0;
  for (uint64_t at = 0; at < memory.size(); at += 64 << 10) {
    uint64_t value = round * 1'000'003 + at;
    wrong += std::memcmp(memory.data() + at, &value, 8) != 0 ? 1 : 0;
    wrong += std::memcmp(memory.data() + at + (64 << 10) - 8, &value, 8) != 0 ? 1 : 0;
  }
  return wrong;
}

int receive(const std::string& ips, const std::string& dir, uint64_t rounds) {
  auto side = open("receiver", ips);
  for (uint64_t round = 0; round < rounds; ++round) {
    Tag tag = *side->agent->open_inbox();
    put(fmt::format("{}/tag{}", dir, round), fmt::format("{} {}", static_cast<uint32_t>(tag), round == 0 ? 1 : 0));
    if (round == 0) put(dir + "/metadata", side->agent->metadata());
    std::string messages = get(fmt::format("{}/messages{}", dir, round));
    BATON_CHECK(!messages.empty()) << "the sender is gone";
    std::promise<void> all;
    BATON_CHECK(side->agent->expect(tag, std::stoull(messages), [&] { all.set_value(); }).ok());
    if (all.get_future().wait_for(std::chrono::seconds(60)) != std::future_status::ready) {
      fmt::print("transfer {}: only {} of {} messages came\n", round, side->agent->arrived(tag), messages);
      return 1;
    }
    uint64_t wrong = count_wrong(side->memory, round);
    uint64_t counted = side->agent->arrived(tag);
    side->agent->close_inbox(tag);
    put(fmt::format("{}/seen{}", dir, round), fmt::format("{} {}", wrong, counted));
    if (wrong > 0) return 1;
  }
  (void)get(dir + "/end");
  return 0;
}

int send(const std::string& ips, const std::string& dir, uint64_t rounds) {
  auto side = open("sender", ips);
  Peer peer = *side->agent->connect(get(dir + "/metadata"));
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t round = 0; round < rounds; ++round) {
    mark(side->memory, round);
    uint64_t tag = std::stoull(get(fmt::format("{}/tag{}", dir, round)));
    BlockWrite write;
    write.local_pool = side->pool;
    write.length_bytes = kStride;
    for (uint32_t i = 0; i < kBlocks; ++i) write.blocks.push_back({i, i});
    write.tag = static_cast<Tag>(tag);
    auto begin = std::chrono::steady_clock::now();
    Result<Transfer> transfer = peer.write(write);
    BATON_CHECK(transfer.ok()) << transfer.status().to_string();
    put(fmt::format("{}/messages{}", dir, round), std::to_string(transfer->messages()));
    Status status = transfer->wait();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    const std::chrono::duration<double> at = begin - start;
    std::string seen = status.ok() ? get(fmt::format("{}/seen{}", dir, round)) : std::string();
    fmt::print("{:6.2f} s  transfer {:3}  {:7.0f} Mbit/s  {}  (wrong, counted: {}; {} sent)\n    {}\n", at.count(), round,
               static_cast<double>(kStride * kBlocks) * 8e-6 / took.count(), status.to_string(), seen, transfer->messages(),
               side->agent->describe());
    std::fflush(stdout);
    if (!status.ok() || seen != fmt::format("0 {}", transfer->messages())) return 1;
  }
  put(dir + "/end", "");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    fmt::print(stderr, "usage: {} receive|send LOCAL_IPS SHARED_DIR TRANSFERS\n", argv[0]);
    return 2;
  }
  baton::set_log_level(baton::LogLevel::kWarning);
  const std::string role = argv[1];
  const uint64_t rounds = std::stoull(argv[4]);
  return role == "receive" ? receive(argv[2], argv[3], rounds) : send(argv[2], argv[3], rounds);
}
