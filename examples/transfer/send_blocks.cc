/// Moves blocks from a pool of one process into a pool of another, on one host or between two, and reads them back:
///
///   send_blocks receive 10.0.0.1 7000 [transport]      on the host 10.0.0.1; port 0: any, it is printed
///   send_blocks send    10.0.0.1 7000 [transport]      there or elsewhere
///
/// transport: auto (default), shm, tcp, efa, verbs.
#include <baton/transfer.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "socket_channel.h"

namespace {

using namespace baton::transfer;
using baton::Result;
using baton::Status;

constexpr uint64_t kStrideBytes = 64 << 10;
constexpr uint64_t kBlocks = 1024;  // 64 MiB on each side
constexpr int kRounds = 8;

/// An agent, memory, and the memory as a pool of blocks.
struct Node {
  std::vector<std::byte> memory = std::vector<std::byte>(kBlocks * kStrideBytes);
  std::unique_ptr<Agent> agent;  // after the memory: it goes first
  PoolId pool{};

  Status open(const std::string& name, const std::string& transport, const std::string& ip) {
    AgentConfig config;
    config.name = name;
    config.transport = transport;
    config.bind_address = ip;
    BATON_ASSIGN_OR_RETURN(agent, Agent::create(config));
    BATON_ASSIGN_OR_RETURN(MemoryRegion region, agent->register_memory(memory, MemoryKind::kHost));
    BATON_ASSIGN_OR_RETURN(pool, agent->add_pool({region, kStrideBytes, kBlocks}));
    return Status();
  }
};

std::byte pattern(uint32_t block, int round) { return static_cast<std::byte>(block * 31 + round); }
/// Where the sender's block goes: scattered, as KV blocks are.
uint32_t target_of(uint32_t block) { return (block * 7) % kBlocks; }

Status receive(const std::string& ip, uint16_t port, const std::string& transport) {
  Node node;
  BATON_RETURN_IF_ERROR(node.open("receiver", transport, ip));
  SocketChannel sender = SocketChannel::accept_on(ip, port);
  sender.send(node.agent->metadata());
  sender.send(std::to_string(static_cast<uint32_t>(node.pool)));

  for (int round = 0; round < kRounds; ++round) {
    // One inbox per request. The sender says how many messages it took; the count is complete when all their bytes are
    // in our memory, in whatever order they came.
    BATON_ASSIGN_OR_RETURN(Tag tag, node.agent->open_inbox());
    sender.send(std::to_string(static_cast<uint32_t>(tag)));
    uint64_t messages = std::stoull(sender.receive());
    std::promise<void> complete;
    BATON_RETURN_IF_ERROR(node.agent->expect(tag, messages, [&] { complete.set_value(); }));
    bool in_time = complete.get_future().wait_for(std::chrono::seconds(30)) == std::future_status::ready;
    node.agent->close_inbox(tag);  // after this the callback does not run
    if (!in_time) return baton::deadline_exceeded("not all of {} messages arrived", messages);

    for (uint32_t block = 0; block < kBlocks; ++block) {
      const std::byte* data = node.memory.data() + target_of(block) * kStrideBytes;
      if (data[0] != pattern(block, round) || std::memcmp(data, data + 1, kStrideBytes - 1) != 0) {
        return baton::data_loss("round {}: block {} is not what was sent", round, block);
      }
    }
    sender.send("verified");
  }
  // The sender reads now. Nothing is to be done here for that, but the agent has to live.
  if (sender.receive() != "read") return baton::data_loss("the sender could not read");
  std::printf("received %d x %llu blocks, all right\n", kRounds, static_cast<unsigned long long>(kBlocks));
  return Status();
}

/// Fetches the blocks of the last round from the receiver's pool.
Status read_back(Node& node, const Peer& peer, PoolId remote_pool) {
  std::fill(node.memory.begin(), node.memory.end(), std::byte{0});
  BlockRead read;
  read.local_pool = node.pool;
  read.remote_pool = remote_pool;
  for (uint32_t block = 0; block < kBlocks; ++block) read.blocks.push_back({block, target_of(block)});
  read.length_bytes = kStrideBytes;
  read.deadline = baton::Deadline::after_ms(baton::SteadyClock::instance(), 10'000);
  BATON_ASSIGN_OR_RETURN(Transfer transfer, peer.read(std::move(read)));
  if (Status status = transfer.wait(); !status.ok()) {
    // Not settled: the receiver has not said that it stopped writing into our memory. Shut it out before the memory is used again.
    if (!transfer.settled()) BATON_RETURN_IF_ERROR(node.agent->fence(peer.epoch()));
    return status;
  }
  for (uint32_t block = 0; block < kBlocks; ++block) {
    const std::byte* data = node.memory.data() + block * kStrideBytes;
    if (data[0] != pattern(block, kRounds - 1) || std::memcmp(data, data + 1, kStrideBytes - 1) != 0) {
      return baton::data_loss("block {} is not what the receiver has", block);
    }
  }
  return Status();
}

Status send(const std::string& ip, uint16_t port, const std::string& transport) {
  SocketChannel receiver = SocketChannel::connect_to(ip, port);
  Node node;
  BATON_RETURN_IF_ERROR(node.open("sender", transport, receiver.local_ip()));
  BATON_ASSIGN_OR_RETURN(Peer peer, node.agent->connect(receiver.receive()));
  auto remote_pool = static_cast<PoolId>(std::stoul(receiver.receive()));

  double seconds = 0;
  for (int round = 0; round < kRounds; ++round) {
    BlockWrite write;
    write.local_pool = node.pool;
    write.remote_pool = remote_pool;
    for (uint32_t block = 0; block < kBlocks; ++block) {
      std::memset(node.memory.data() + block * kStrideBytes, static_cast<int>(pattern(block, round)), kStrideBytes);
      write.blocks.push_back({block, target_of(block)});
    }
    write.length_bytes = kStrideBytes;
    write.tag = static_cast<Tag>(std::stoul(receiver.receive()));
    write.deadline = baton::Deadline::after_ms(baton::SteadyClock::instance(), 10'000);

    auto start = std::chrono::steady_clock::now();
    BATON_ASSIGN_OR_RETURN(Transfer transfer, peer.write(std::move(write)));
    receiver.send(std::to_string(transfer.messages()));
    BATON_RETURN_IF_ERROR(transfer.wait());
    if (round > 0) seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (receiver.receive() != "verified") return baton::data_loss("the receiver did not verify round {}", round);
  }
  BATON_RETURN_IF_ERROR(read_back(node, peer, remote_pool));
  receiver.send("read");
  PathInfo path = peer.path();
  double bytes = static_cast<double>((kRounds - 1) * kBlocks * kStrideBytes);
  std::printf("path %s (provider %s, %u rail%s): %s\n", path.transport.c_str(), path.provider.c_str(), path.rails,
              path.rails == 1 ? "" : "s", path.reason.c_str());
  std::printf("%d x %llu blocks of %llu KiB: %.2f GB/s\n", kRounds - 1, static_cast<unsigned long long>(kBlocks),
              static_cast<unsigned long long>(kStrideBytes >> 10), bytes / seconds * 1e-9);
  std::printf("and read back, all the same\n");
  return peer.close();
}

}  // namespace

int main(int argc, char** argv) {
  std::string role = argc > 1 ? argv[1] : "";
  if (argc < 4 || argc > 5 || (role != "receive" && role != "send")) {
    std::fprintf(stderr, "usage: %s receive|send <ip of the receiver> <port> [auto|shm|tcp|efa|verbs]\n", argv[0]);
    return 2;
  }
  std::string transport = argc > 4 ? argv[4] : "auto";
  auto port = static_cast<uint16_t>(std::atoi(argv[3]));
  Status status = role == "receive" ? receive(argv[2], port, transport) : send(argv[2], port, transport);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.to_string().c_str());
  return status.ok() ? 0 : 1;
}
