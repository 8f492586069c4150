// How fast the transfer agent moves scattered blocks from one GPU's memory into another process's, beside what the copy
// engines and the copy kernel do with nothing around them, in the same run. Every figure's blocks are checked at the
// receiver.
//
//   cuda_transfer_bench [--from 0] [--to 1] [--pool-mib 1024] [--rounds 5] [--cuda-library libcuda.so.1]
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "bench/cuda_bench_common.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/random.h"
#include "transfer/cuda/copy_engine.h"
#include "transfer/cuda/device.h"
#include "transfer/cuda/staging.h"
#include "transfer/include/baton/transfer.h"

namespace {

using namespace baton;
using namespace baton::bench;

struct Options {
  int from = 0, to = 1;
  size_t pool_bytes = size_t{1} << 30;
  int rounds = 5;
  std::string library;
};

constexpr uint64_t kStrides[] = {16u << 10, 64u << 10, 2u << 20};
constexpr int kStrideCount = 3;
constexpr uint32_t kCounts[] = {4096, 2048, 256};

/// What both processes see.
struct Shared {
  std::atomic<int64_t> arrived_ns;
  std::atomic<uint64_t> arrivals;
};

AgentConfig agent_config(const Options& options, const std::string& name, uint32_t max_ctas = 0) {
  AgentConfig config;
  config.name = name;
  config.transport = "cuda_ipc";
  config.cuda_library = options.library;
  config.cuda_max_ctas = max_ctas;
  return config;
}

/// The receiving process: pools of every stride on its own GPU, then on the sender's.
void serve(const Options& options, Wire wire, Shared* shared) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  BenchGpu gpus[] = {{options.library, options.to, options.pool_bytes}, {options.library, options.from, options.pool_bytes}};
  auto agent = Agent::create(agent_config(options, "receiver")).value();
  for (BenchGpu& gpu : gpus) {
    auto region = agent->register_memory(gpu.memory.span(), MemoryKind::kCuda).value();
    for (uint64_t stride : kStrides) (void)agent->add_pool({region, stride, options.pool_bytes / stride}).value();
  }
  Tag tag = agent->open_inbox().value();
  uint64_t expected = 0;
  std::function<void()> next = [&] {
    shared->arrived_ns.store(now_ns());
    shared->arrivals.store(expected);
    (void)agent->expect(tag, ++expected, next);
  };
  (void)agent->expect(tag, ++expected, next);
  wire.put(agent->metadata());
  wire.put(std::to_string(static_cast<uint32_t>(tag)));
  while (true) {
    std::string command = wire.get();
    unsigned gpu = 0, stride = 0, count = 0, seed = 0;
    if (command == "end") break;
    if (std::sscanf(command.c_str(), "clear %u", &gpu) == 1) {
      gpus[gpu].clear();
      wire.put("ok");
    } else if (std::sscanf(command.c_str(), "check %u %u %u %u", &gpu, &stride, &count, &seed) == 4) {
      wire.put(std::to_string(gpus[gpu].wrong_blocks(scattered(count, options.pool_bytes / stride, seed), stride)));
    }
  }
  agent.reset();
}

struct Sender {
  std::unique_ptr<Agent> agent;
  Peer peer;
  PoolId pools[kStrideCount];

  Sender(const Options& options, BenchGpu& gpu, const std::string& metadata, uint32_t max_ctas) {
    agent = Agent::create(agent_config(options, fmt::format("sender-{}", max_ctas), max_ctas)).value();
    auto region = agent->register_memory(gpu.memory.span(), MemoryKind::kCuda).value();
    for (int i = 0; i < kStrideCount; ++i) {
      pools[i] = agent->add_pool({region, kStrides[i], options.pool_bytes / kStrides[i]}).value();
    }
    auto connected = agent->connect(metadata);
    BATON_CHECK(connected.ok()) << connected.status().to_string();
    peer = *connected;
  }
  BlockWrite make(int stride, int gpu, const std::vector<BlockPair>& pairs) const {
    BlockWrite write;
    write.local_pool = pools[stride];
    write.remote_pool = static_cast<PoolId>(gpu * kStrideCount + stride);
    write.blocks = pairs;
    write.length_bytes = kStrides[stride];
    write.tag = static_cast<Tag>(1);  // nobody's: counted as stray, notified all the same
    return write;
  }
  void must(const Transfer& transfer) const {
    while (!transfer.done()) {
    }
    Status status = transfer.wait();
    BATON_CHECK(status.ok()) << status.to_string();
  }
  /// `writes` in all, `depth` of them under way.
  double seconds(int stride, int gpu, const std::vector<BlockPair>& pairs, int writes, int depth) const {
    BlockWrite write = make(stride, gpu, pairs);
    // Wakes the progress thread: what that takes is measured below.
    must(peer.write(make(stride, gpu, {pairs.front()})).value());
    std::vector<Transfer> under_way;
    int64_t start = now_ns();
    for (int i = 0; i < writes; ++i) {
      if (i >= depth) must(under_way[static_cast<size_t>(i - depth)]);
      under_way.push_back(peer.write(write).value());
    }
    for (const Transfer& transfer : under_way) must(transfer);
    return static_cast<double>(now_ns() - start) * 1e-9;
  }
};

/// Bulk copies, by the copy engines.
double bulk_gbps(const BenchGpu& from, const BenchGpu& to, int rounds) {
  CurrentDevice current(*from.device);
  const Driver& cu = *from.driver;
  if (from.device->uuid() != to.device->uuid()) (void)cu.context_enable_peer_access(to.device->context(), 0);
  CUstream stream = nullptr;
  BATON_CHECK(cu.stream_create(&stream, kStreamNonBlocking, 0) == kSuccess);
  std::vector<double> rates;
  for (int round = 0; round <= rounds; ++round) {
    int64_t start = now_ns();
    for (int i = 0; i < 4; ++i) {
      BATON_CHECK(cu.copy_async(to.memory.address(), from.memory.address(), from.memory.bytes(), stream) == kSuccess);
    }
    BATON_CHECK(cu.stream_synchronize(stream) == kSuccess);
    if (round > 0) rates.push_back(4.0 * static_cast<double>(from.memory.bytes()) / static_cast<double>(now_ns() - start));
  }
  (void)cu.stream_destroy(stream);
  return median(rates);
}

/// The copy kernel with nothing around it.
double engine_gbps(const BenchGpu& from, const BenchGpu& to, int stride, const std::vector<BlockPair>& pairs, uint32_t max_ctas,
                   int rounds) {
  auto engine = CopyEngine::create(from.device, {.max_ctas = max_ctas}).value();
  const BlockRange range{kStrides[stride], kStrides[stride], 0, kStrides[stride]};
  // As the agent cuts it.
  size_t step = std::min<size_t>(pairs.size(), (64u << 20) / kStrides[stride]);
  const bool listed = kStrides[stride] <= CopyEngine::kMaxPieceBytes, within_device = from.device->uuid() == to.device->uuid();
  std::vector<Segment> pieces;
  for (const BlockPair& pair : pairs) {
    pieces.push_back({pair.local_block * kStrides[stride], pair.remote_block * kStrides[stride], kStrides[stride]});
  }
  std::vector<double> rates;
  for (int round = 0; round <= rounds; ++round) {
    int64_t start = now_ns();
    for (int repeat = 0; repeat < 16; ++repeat) {
      for (size_t first = 0; first < pairs.size(); first += step) {
        const size_t count = std::min(step, pairs.size() - first);
        auto start_part = [&] {
          return listed ? engine->start_blocks(from.memory.address(), to.memory.address(),
                                               std::span(pairs).subspan(first, count), range, within_device)
                        : engine->start(from.memory.address(), to.memory.address(), std::span(pieces).subspan(first, count),
                                        within_device);
        };
        while (!start_part().value()) {
        }
      }
    }
    BATON_CHECK(engine->drain().ok());
    if (round > 0) {
      rates.push_back(16.0 * static_cast<double>(pairs.size() * kStrides[stride]) / static_cast<double>(now_ns() - start));
    }
  }
  return median(rates);
}

/// The pieces of one staged copy each, again and again.
struct StagedWork {
  std::vector<Segment> pieces;
  size_t step, next = 0, end;
  StagedWork(int stride, const std::vector<BlockPair>& pairs, int repeats)
      : step(std::max<size_t>(1, Stager::Options().copy_bytes / kStrides[stride])),
        end(pairs.size() * static_cast<size_t>(repeats)) {
    for (const BlockPair& pair : pairs) {
      pieces.push_back({pair.local_block * kStrides[stride], pair.remote_block * kStrides[stride], kStrides[stride]});
    }
  }
  std::span<const Segment> part() const {
    size_t first = next % pieces.size();
    return std::span(pieces).subspan(first, std::min(step, pieces.size() - first));
  }
};

/// Through pinned host memory, with a network in between that costs nothing: the receiver reads the sender's slots.
/// Without `to` the way out of the GPU alone, without `from` the way in.
double staged_gbps(const BenchGpu* from, const BenchGpu* to, int stride, const std::vector<BlockPair>& pairs, int rounds) {
  constexpr int kRepeats = 4;
  constexpr uint32_t kSlots = 16;
  const BenchGpu& any = from != nullptr ? *from : *to;
  auto out = Stager::create(any.device, {}).value();
  auto in = Stager::create(to != nullptr ? to->device : any.device, {}).value();
  const uint64_t slot_bytes = out->options().copy_bytes;
  auto host = PinnedMemory::allocate(any.device, kSlots * slot_bytes).value();
  struct Moving {
    uint32_t slot;
    std::span<const Segment> pieces;
    std::optional<uint32_t> gathered, scattered;
    bool arrived;
  };
  std::vector<double> rates;
  for (int round = 0; round <= rounds; ++round) {
    StagedWork work(stride, pairs, kRepeats);
    std::vector<Moving> moving;
    std::vector<uint32_t> free(kSlots);
    std::iota(free.begin(), free.end(), 0u);
    int64_t start = now_ns();
    while (work.next < work.end || !moving.empty()) {
      if (work.next < work.end && !free.empty()) {
        Moving one{free.back(), work.part(), {}, {}, from == nullptr};
        if (from != nullptr) {
          one.gathered = out->gather(from->memory.address(), one.pieces, host.address() + one.slot * slot_bytes).value();
        }
        if (from == nullptr || one.gathered) {
          free.pop_back();
          work.next += one.pieces.size();
          moving.push_back(one);
        }
      }
      std::erase_if(moving, [&](Moving& one) {
        if (!one.arrived && out->ended(*one.gathered)) {
          out->release(*one.gathered);
          one.arrived = true;
        }
        bool over = one.arrived && to == nullptr;
        if (one.arrived && to != nullptr && !one.scattered) {
          one.scattered = in->scatter(host.address() + one.slot * slot_bytes, to->memory.address(), one.pieces).value();
        } else if (one.scattered && in->ended(*one.scattered)) {
          in->release(*one.scattered);
          over = true;
        }
        if (over) free.push_back(one.slot);
        return over;
      });
    }
    if (round > 0) {
      rates.push_back(kRepeats * static_cast<double>(pairs.size() * kStrides[stride]) /
                      static_cast<double>(now_ns() - start));
    }
  }
  return median(rates);
}

/// What the copy engines do between pinned host memory and the GPUs: out of one, into the other, and both at once.
void print_host_limits(const BenchGpu& out_of, const BenchGpu& into) {
  const Driver& cu = *out_of.driver;
  constexpr size_t kBytes = 256u << 20;
  struct End {
    const BenchGpu& gpu;
    PinnedMemory host;
    CUstream stream = nullptr;
  };
  End ends[] = {{out_of, PinnedMemory::allocate(out_of.device, kBytes).value()},
                {into, PinnedMemory::allocate(into.device, kBytes).value()}};
  for (End& end : ends) {
    CurrentDevice current(*end.gpu.device);
    BATON_CHECK(cu.stream_create(&end.stream, kStreamNonBlocking, 0) == kSuccess);
  }
  for (const char* what : {"from a GPU", "into a GPU", "both at once, each"}) {
    std::vector<double> rates;
    for (int round = 0; round < 6; ++round) {
      bool first = what[0] != 'i', second = what[0] != 'f';
      int64_t start = now_ns();
      for (int i = 0; i < 4; ++i) {
        if (first) {
          CurrentDevice current(*ends[0].gpu.device);
          BATON_CHECK(cu.copy_async(ends[0].host.address(), out_of.memory.address(), kBytes, ends[0].stream) == kSuccess);
        }
        if (second) {
          CurrentDevice current(*ends[1].gpu.device);
          BATON_CHECK(cu.copy_async(into.memory.address(), ends[1].host.address(), kBytes, ends[1].stream) == kSuccess);
        }
      }
      for (End& end : ends) {
        CurrentDevice current(*end.gpu.device);
        BATON_CHECK(cu.stream_synchronize(end.stream) == kSuccess);
      }
      if (round > 0) rates.push_back(4.0 * kBytes / static_cast<double>(now_ns() - start));
    }
    std::printf("%s%s %.1f", what[0] == 'f' ? "\nbulk copies between pinned host memory and GPUs (GB/s): " : ", ", what,
                median(rates));
  }
  for (End& end : ends) {
    CurrentDevice current(*end.gpu.device);
    (void)cu.stream_destroy(end.stream);
  }
}

void measure_latency(const Sender& sender, Shared* shared, Tag tag, int gpu, const char* what) {
  for (bool idle : {false, true}) {
    std::vector<double> notified, done;
    for (int i = 0; i < (idle ? 60 : 600); ++i) {
      BlockWrite write = sender.make(1, gpu, {{static_cast<uint32_t>(i % 64), static_cast<uint32_t>(i % 32)}});
      write.tag = tag;
      if (idle) std::this_thread::sleep_for(std::chrono::milliseconds(3));
      uint64_t before = shared->arrivals.load();
      int64_t start = now_ns();
      Transfer transfer = sender.peer.write(std::move(write)).value();
      while (!transfer.done()) {
      }
      int64_t ended = now_ns();
      while (shared->arrivals.load() == before) {
      }
      if (i < 20) continue;
      notified.push_back(static_cast<double>(shared->arrived_ns.load() - start) * 1e-3);
      done.push_back(static_cast<double>(ended - start) * 1e-3);
    }
    std::sort(notified.begin(), notified.end());
    std::printf("one block of 64 KiB, %s, %s: notified after %.1f us (p10 %.1f, p90 %.1f), done after %.1f us\n", what,
                idle ? "after 3 ms of nothing" : "one after the other", median(notified),
                notified[notified.size() / 10], notified[notified.size() * 9 / 10], median(done));
  }
}

void measure(const Options& options, Wire& wire, Shared* shared) {
  BenchGpu from(options.library, options.from, options.pool_bytes), local_to(options.library, options.to, options.pool_bytes),
      local_same(options.library, options.from, options.pool_bytes);
  std::vector<uint64_t> words(options.pool_bytes / 8);
  for (size_t i = 0; i < words.size(); ++i) words[i] = pattern(i);
  from.upload(words);
  std::string metadata = wire.get();
  auto tag = static_cast<Tag>(std::stoul(wire.get()));
  Sender full(options, from, metadata, 0), few(options, from, metadata, 16);
  std::printf("%s -> %s; path: %s\n", from.device->name().c_str(), local_to.device->name().c_str(),
              full.peer.path().reason.c_str());
  size_t all_wrong = 0;
  for (int gpu : {0, 1}) {
    BenchGpu& local = gpu == 0 ? local_to : local_same;
    double bulk = bulk_gbps(from, local, options.rounds);
    std::printf("\n%s: bulk copy %.1f GB/s\n", gpu == 0 ? "GPU to GPU" : "same GPU, two processes", bulk);
    std::printf("%8s x %5s | %11s | %8s %5s %8s | %9s %9s | %s\n", "block", "count", "kernel only", "agent", "ratio",
                "one", "kernel 16", "agent 16", "wrong blocks");
    for (int stride = 0; stride < kStrideCount; ++stride) {
      std::vector<BlockPair> pairs = scattered(kCounts[stride], options.pool_bytes / kStrides[stride], 7);
      double bytes = static_cast<double>(pairs.size() * kStrides[stride]);
      double engine = engine_gbps(from, local, stride, pairs, 0, options.rounds);
      double engine16 = engine_gbps(from, local, stride, pairs, 16, options.rounds);
      wire.put(fmt::format("clear {}", gpu));
      (void)wire.get();
      std::vector<double> streamed, single, streamed16;
      (void)full.seconds(stride, gpu, pairs, 4, 4);
      (void)few.seconds(stride, gpu, pairs, 4, 4);
      for (int round = 0; round < options.rounds; ++round) {
        streamed.push_back(32 * bytes / full.seconds(stride, gpu, pairs, 32, 6) * 1e-9);
        for (int i = 0; i < 5; ++i) single.push_back(bytes / full.seconds(stride, gpu, pairs, 1, 1) * 1e-9);
        streamed16.push_back(32 * bytes / few.seconds(stride, gpu, pairs, 32, 6) * 1e-9);
      }
      wire.put(fmt::format("check {} {} {} 7", gpu, kStrides[stride], pairs.size()));
      std::string wrong = wire.get();
      all_wrong += std::stoul(wrong);
      std::printf("%6zu K x %5zu | %11.1f | %8.1f %5.2f %8.1f | %9.1f %9.1f | %s\n",
                  static_cast<size_t>(kStrides[stride] >> 10), pairs.size(), engine, median(streamed),
                  median(streamed) / bulk, median(single), engine16, median(streamed16), wrong.c_str());
      std::fflush(stdout);
    }
  }
  print_host_limits(from, local_to);
  std::printf("\nstaged (GB/s): block | gather | scatter | GPU to host to GPU | wrong blocks\n");
  for (int stride = 0; stride < kStrideCount; ++stride) {
    std::vector<BlockPair> pairs = scattered(kCounts[stride], options.pool_bytes / kStrides[stride], 8);
    double gathered = staged_gbps(&from, nullptr, stride, pairs, options.rounds);
    double spread = staged_gbps(nullptr, &local_to, stride, pairs, options.rounds);
    local_to.clear();
    double rate = staged_gbps(&from, &local_to, stride, pairs, options.rounds);
    size_t wrong = local_to.wrong_blocks(pairs, kStrides[stride]);
    all_wrong += wrong;
    std::printf("%18zu K | %6.1f | %7.1f | %18.1f | %zu\n", static_cast<size_t>(kStrides[stride] >> 10), gathered, spread,
                rate, wrong);
  }
  std::printf("\n");
  measure_latency(full, shared, tag, 0, "GPU to GPU");
  measure_latency(full, shared, tag, 1, "same GPU");
  BATON_CHECK(all_wrong == 0) << all_wrong << " blocks are wrong";
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    std::string name = argv[i];
    if (name == "--from") options.from = std::stoi(argv[i + 1]);
    if (name == "--to") options.to = std::stoi(argv[i + 1]);
    if (name == "--pool-mib") options.pool_bytes = std::stoul(argv[i + 1]) << 20;
    if (name == "--rounds") options.rounds = std::max(1, std::stoi(argv[i + 1]));
    if (name == "--cuda-library") options.library = argv[i + 1];
  }
  set_log_level(LogLevel::kWarning);
  auto* shared = static_cast<Shared*>(
      ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  int there[2], back[2];
  BATON_CHECK(shared != MAP_FAILED && ::pipe(there) == 0 && ::pipe(back) == 0);
  // Before anything of CUDA: a forked process cannot use its parent's.
  pid_t child = ::fork();
  if (child == 0) {
    ::close(there[1]);
    ::close(back[0]);
    serve(options, Wire(there[0], back[1]), shared);
    std::fflush(stdout);
    ::_exit(0);
  }
  ::close(there[0]);
  ::close(back[1]);
  {
    Wire wire(back[0], there[1]);
    measure(options, wire, shared);
    wire.put("end");
  }
  ::waitpid(child, nullptr, 0);
  return 0;
}
