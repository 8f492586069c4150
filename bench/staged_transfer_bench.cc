// GPU memory through pinned host memory, agent to agent, between two processes of one host: correct, and how fast. One GPU
// is enough. Every block of every row is compared at the receiver.
//
//   staged_transfer_bench [--from 0] [--to 0] [--pool-mib 512] [--rounds 5] [--transports staged:shm,staged:tcp]
//                         [--cuda-library libcuda.so.1]
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>

#include "base/log.h"
#include "bench/cuda_bench_common.h"

namespace {

using namespace baton;
using namespace baton::bench;

struct Options {
  int from = 0, to = 0;
  size_t pool_bytes = size_t{512} << 20;
  int rounds = 5;
  std::string transports = "staged:shm,staged:tcp";
  std::string library;
};

constexpr uint64_t kStrides[] = {4u << 10, 16u << 10, 64u << 10, 1u << 20};
constexpr uint32_t kCounts[] = {8192, 4096, 2048, 256};
constexpr int kStrideCount = 4;

/// One process's agent: a GPU pool and a host pool for every stride.
struct Side {
  BenchGpu gpu;
  std::vector<uint64_t> host;
  std::unique_ptr<Agent> agent;
  PoolId pools[2][kStrideCount];

  Side(const Options& options, int ordinal, const std::string& name, const std::string& transport)
      : gpu(options.library, ordinal, options.pool_bytes), host(options.pool_bytes / 8) {
    AgentConfig config;
    config.name = name;
    config.transport = transport;
    config.bind_address = "127.0.0.1";
    config.cuda_library = options.library;
    agent = Agent::create(config).value();
    auto on_gpu = agent->register_memory(gpu.memory.span(), MemoryKind::kCuda).value();
    auto on_host = agent->register_memory(std::as_writable_bytes(std::span(host)), MemoryKind::kHost).value();
    for (int i = 0; i < kStrideCount; ++i) {
      pools[0][i] = agent->add_pool({on_gpu, kStrides[i], options.pool_bytes / kStrides[i]}).value();
      pools[1][i] = agent->add_pool({on_host, kStrides[i], options.pool_bytes / kStrides[i]}).value();
    }
  }
};

void serve(const Options& options, const std::string& transport, Wire wire) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (wire.get() != "start") return;
  Side side(options, options.to, "receiver", transport);
  Tag tag = side.agent->open_inbox().value();
  wire.put(side.agent->metadata());
  wire.put(std::to_string(static_cast<uint32_t>(tag)));
  uint64_t expected = 0;
  while (true) {
    const std::string command = wire.get();
    unsigned host = 0, stride = 0, count = 0;
    unsigned long long messages = 0;
    if (command == "end") break;
    if (command == "clear") {
      side.gpu.clear();
      std::fill(side.host.begin(), side.host.end(), 0);
      wire.put("ok");
    } else if (command == "describe") {
      wire.put(side.agent->describe());
    } else if (std::sscanf(command.c_str(), "check %u %u %u %llu", &host, &stride, &count, &messages) == 4) {
      // As a consumer of the data: the count first, then the bytes.
      expected += messages;
      while (side.agent->arrived(tag) < expected) {
      }
      const auto pairs = scattered(count, options.pool_bytes / stride, 7);
      wire.put(std::to_string(host != 0 ? wrong_blocks(side.host, pairs, stride) : side.gpu.wrong_blocks(pairs, stride)));
    }
  }
}

double seconds(const Peer& peer, const BlockWrite& write, int writes, int depth, uint64_t* messages) {
  std::vector<Transfer> under_way;
  auto must = [](const Transfer& transfer) {
    while (!transfer.done()) {  // a sleeper would measure how fast a virtual machine wakes it
    }
    const Status status = transfer.wait();
    if (status.ok()) return;
    std::printf("a write failed: %s\n", status.to_string().c_str());
    std::exit(1);
  };
  const int64_t start = now_ns();
  for (int i = 0; i < writes; ++i) {
    if (i >= depth) must(under_way[static_cast<size_t>(i - depth)]);
    under_way.push_back(peer.write(write).value());
    *messages += under_way.back().messages();
  }
  for (const Transfer& transfer : under_way) must(transfer);
  return static_cast<double>(now_ns() - start) * 1e-9;
}

size_t measure(const Options& options, const std::string& transport, Wire& wire) {
  wire.put("start");
  Side side(options, options.from, "sender", transport);
  for (size_t i = 0; i < side.host.size(); ++i) side.host[i] = pattern(i);
  side.gpu.upload(side.host);
  const std::string metadata = wire.get();
  const Tag tag = static_cast<Tag>(std::stoul(wire.get()));
  auto connected = side.agent->connect(metadata);
  if (!connected.ok()) {
    std::printf("\n%s: %s\n", transport.c_str(), connected.status().to_string().c_str());
    wire.put("end");
    return 1;
  }
  const Peer peer = *connected;
  std::printf("\n%s on %s: %s (%s)\n%11s | %8s x %5s | %8s %8s | %9s | %s\n", transport.c_str(),
              side.gpu.device->name().c_str(), peer.path().provider.c_str(), peer.path().reason.c_str(), "", "block", "count",
              "GB/s", "one", "us a MiB", "wrong blocks");
  size_t all_wrong = 0;
  for (auto [from, to, name] : {std::tuple(0, 0, "GPU to GPU"), {0, 1, "GPU to host"}, {1, 0, "host to GPU"}}) {
    for (int stride = 0; stride < kStrideCount; ++stride) {
      BlockWrite write;
      write.local_pool = side.pools[from][stride];
      write.remote_pool = side.pools[to][stride];
      const uint64_t blocks = options.pool_bytes / kStrides[stride];
      write.blocks = scattered(static_cast<uint32_t>(std::min<uint64_t>(kCounts[stride], blocks)), blocks, 7);
      write.length_bytes = kStrides[stride];
      write.tag = tag;
      const double bytes = static_cast<double>(write.blocks.size() * kStrides[stride]);
      wire.put("clear");
      (void)wire.get();
      uint64_t messages = 0;
      (void)seconds(peer, write, 2, 2, &messages);
      std::vector<double> streamed, single;
      for (int round = 0; round < options.rounds; ++round) {
        streamed.push_back(8 * bytes / seconds(peer, write, 8, 4, &messages) * 1e-9);
        single.push_back(bytes / seconds(peer, write, 1, 1, &messages) * 1e-9);
      }
      wire.put(fmt::format("check {} {} {} {}", to, kStrides[stride], write.blocks.size(), messages));
      const std::string wrong = wire.get();
      all_wrong += std::stoul(wrong);
      std::printf("%11s | %6zu K x %5zu | %8.2f %8.2f | %9.1f | %s\n", name, static_cast<size_t>(kStrides[stride] >> 10),
                  write.blocks.size(), median(streamed), median(single), 1048.576 / median(streamed), wrong.c_str());
      std::fflush(stdout);
    }
  }
  for (int pause_ms : {0, 3}) {
    std::vector<double> done;
    BlockWrite write;
    write.local_pool = side.pools[0][2];
    write.remote_pool = side.pools[0][2];
    write.length_bytes = kStrides[2];
    for (uint32_t i = 0; i < (pause_ms == 0 ? 500u : 50u); ++i) {
      if (pause_ms > 0) ::usleep(static_cast<useconds_t>(pause_ms) * 1000);
      write.blocks = {{i % 64, i % 32}};
      uint64_t none = 0;
      done.push_back(seconds(peer, write, 1, 1, &none) * 1e6);
    }
    std::sort(done.begin(), done.end());
    std::printf("one block of 64 KiB, %s: done after %.1f us (p10 %.1f, p90 %.1f)\n",
                pause_ms == 0 ? "one after the other" : "after 3 ms of nothing", median(done), done[done.size() / 10],
                done[done.size() * 9 / 10]);
  }
  wire.put("describe");
  std::printf("sender: %s\nreceiver: %s\n", side.agent->describe().c_str(), wire.get().c_str());
  std::fflush(stdout);
  wire.put("end");
  return all_wrong;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--from") options.from = std::stoi(argv[i + 1]);
    if (name == "--to") options.to = std::stoi(argv[i + 1]);
    if (name == "--pool-mib") options.pool_bytes = std::stoul(argv[i + 1]) << 20;
    if (name == "--rounds") options.rounds = std::max(1, std::stoi(argv[i + 1]));
    if (name == "--transports") options.transports = argv[i + 1];
    if (name == "--cuda-library") options.library = argv[i + 1];
  }
  set_log_level(LogLevel::kError);  // between host pools there is no path here, and connect() says so
  struct Receiver {
    std::string transport;
    std::unique_ptr<Wire> wire;
    pid_t pid;
  };
  std::vector<Receiver> receivers;
  for (size_t at = 0; at < options.transports.size();) {
    const size_t end = std::min(options.transports.find(',', at), options.transports.size());
    const std::string transport = options.transports.substr(at, end - at);
    at = end + 1;
    int there[2], back[2];
    BATON_CHECK(::pipe2(there, O_CLOEXEC) == 0 && ::pipe2(back, O_CLOEXEC) == 0);
    // Before anything of CUDA: a forked process cannot use its parent's.
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::close(there[1]);
      ::close(back[0]);
      serve(options, transport, Wire(there[0], back[1]));
      std::fflush(stdout);
      ::_exit(0);
    }
    ::close(there[0]);
    ::close(back[1]);
    receivers.push_back({transport, std::make_unique<Wire>(back[0], there[1]), pid});
  }
  size_t wrong = 0;
  for (Receiver& receiver : receivers) {
    wrong += measure(options, receiver.transport, *receiver.wire);
    ::waitpid(receiver.pid, nullptr, 0);
  }
  std::printf("\n%s\n", wrong == 0 ? "every block is right" : fmt::format("{} blocks are wrong, or paths missing", wrong).c_str());
  return wrong == 0 ? 0 : 1;
}
