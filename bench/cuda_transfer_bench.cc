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
using namespace baton::transfer;
using namespace baton::transfer::cuda;

struct Options {
  int from = 0, to = 1;
  size_t pool_bytes = size_t{1} << 30;
  int rounds = 5;
  std::string library;
};

constexpr uint64_t kStrides[] = {16u << 10, 64u << 10, 2u << 20};
constexpr int kStrideCount = 3;
constexpr uint32_t kCounts[] = {4096, 2048, 256};

int64_t now_ns() { return SteadyClock::instance().now_ns(); }
double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// What both processes see.
struct Shared {
  std::atomic<int64_t> arrived_ns;
  std::atomic<uint64_t> arrivals;
};

class Wire {
 public:
  Wire(int in, int out) : in_(::fdopen(in, "rb")), out_(::fdopen(out, "wb")) {}
  void put(const std::string& bytes) {
    auto size = static_cast<uint32_t>(bytes.size());
    std::fwrite(&size, sizeof(size), 1, out_);
    std::fwrite(bytes.data(), 1, bytes.size(), out_);
    std::fflush(out_);
  }
  std::string get() {
    uint32_t size = 0;
    if (std::fread(&size, sizeof(size), 1, in_) != 1) ::_exit(1);
    std::string bytes(size, '\0');
    if (size > 0 && std::fread(bytes.data(), 1, size, in_) != size) ::_exit(1);
    return bytes;
  }

 private:
  FILE* in_;
  FILE* out_;
};

uint64_t pattern(uint64_t word) { return (word + 1) * 0x9e3779b97f4a7c15ull; }

std::vector<BlockPair> scattered(uint32_t count, uint64_t blocks, uint64_t seed) {
  std::vector<uint32_t> from(blocks), to(blocks);
  std::iota(from.begin(), from.end(), 0u);
  std::iota(to.begin(), to.end(), 0u);
  Random random(seed);
  std::shuffle(from.begin(), from.end(), random);
  std::shuffle(to.begin(), to.end(), random);
  std::vector<BlockPair> pairs;
  for (uint32_t i = 0; i < count; ++i) pairs.push_back({from[i], to[i]});
  return pairs;
}

struct Gpu {
  std::shared_ptr<const Driver> driver;
  std::shared_ptr<const Device> device;
  DeviceMemory memory;

  Gpu(const Options& options, int ordinal) {
    driver = Driver::load(options.library).value();
    device = Device::open(driver, ordinal % driver->devices).value();
    memory = DeviceMemory::allocate(device, options.pool_bytes).value();
    clear();
  }
  void clear() {
    CurrentDevice current(*device);
    BATON_CHECK(driver->memory_set(memory.address(), 0, memory.bytes()) == kSuccess);
  }
  std::vector<uint64_t> download() const {
    std::vector<uint64_t> words(memory.bytes() / 8);
    CurrentDevice current(*device);
    BATON_CHECK(driver->copy_to_host(words.data(), memory.address(), memory.bytes()) == kSuccess);
    return words;
  }
  void upload(const std::vector<uint64_t>& words) {
    CurrentDevice current(*device);
    BATON_CHECK(driver->copy_to_device(memory.address(), words.data(), words.size() * 8) == kSuccess);
  }
  /// Blocks with wrong bytes, and blocks that were touched and should not have been.
  size_t wrong_blocks(const std::vector<BlockPair>& pairs, uint64_t stride) const {
    std::vector<uint64_t> words = download();
    std::vector<bool> expected(memory.bytes() / stride);
    size_t wrong = 0, each = stride / 8;
    for (const BlockPair& pair : pairs) {
      expected[pair.remote_block] = true;
      bool good = true;
      for (size_t i = 0; i < each; ++i) {
        good = good && words[pair.remote_block * each + i] == pattern(pair.local_block * each + i);
      }
      wrong += good ? 0 : 1;
    }
    for (size_t block = 0; block < expected.size(); ++block) {
      if (!expected[block] && words[block * each] != 0) ++wrong;
    }
    return wrong;
  }
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
  Gpu gpus[] = {Gpu(options, options.to), Gpu(options, options.from)};
  auto agent = Agent::create(agent_config(options, "receiver")).value();
  for (Gpu& gpu : gpus) {
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

  Sender(const Options& options, Gpu& gpu, const std::string& metadata, uint32_t max_ctas) {
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
    Status status = transfer.wait();
    BATON_CHECK(status.ok()) << status.to_string();
  }
  /// `writes` in all, `depth` of them under way.
  double seconds(int stride, int gpu, const std::vector<BlockPair>& pairs, int writes, int depth) const {
    BlockWrite write = make(stride, gpu, pairs);
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
double bulk_gbps(const Gpu& from, const Gpu& to, int rounds) {
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
double engine_gbps(const Gpu& from, const Gpu& to, int stride, const std::vector<BlockPair>& pairs, uint32_t max_ctas,
                   int rounds) {
  auto engine = CopyEngine::create(from.device, {.max_ctas = max_ctas}).value();
  std::vector<Segment> pieces;
  for (const BlockPair& pair : pairs) {
    pieces.push_back({pair.local_block * kStrides[stride], pair.remote_block * kStrides[stride], kStrides[stride]});
  }
  // As the agent cuts it.
  size_t step = std::min<size_t>(pieces.size(), (64u << 20) / kStrides[stride]);
  std::vector<double> rates;
  for (int round = 0; round <= rounds; ++round) {
    int64_t start = now_ns();
    for (int repeat = 0; repeat < 16; ++repeat) {
      for (size_t first = 0; first < pieces.size(); first += step) {
        auto part = std::span(pieces).subspan(first, std::min(step, pieces.size() - first));
        while (!engine->start(from.memory.address(), to.memory.address(), part,
                              from.device->uuid() == to.device->uuid())
                    .value()) {
        }
      }
    }
    BATON_CHECK(engine->drain().ok());
    if (round > 0) {
      rates.push_back(16.0 * static_cast<double>(pieces.size() * kStrides[stride]) / static_cast<double>(now_ns() - start));
    }
  }
  return median(rates);
}

/// Through pinned host memory, with a network in between that costs nothing: the receiver's ring reads the sender's slots.
double staged_gbps(const Gpu& from, const Gpu& to, int stride, const std::vector<BlockPair>& pairs, int rounds) {
  auto out = StagingRing::create(from.device, {}).value();
  auto in = StagingRing::create(to.device, {}).value();
  size_t step = std::max<size_t>(1, out->options().slot_bytes / kStrides[stride]);
  std::vector<Segment> pieces;
  for (const BlockPair& pair : pairs) {
    pieces.push_back({pair.local_block * kStrides[stride], pair.remote_block * kStrides[stride], kStrides[stride]});
  }
  std::vector<double> rates;
  constexpr int kRepeats = 4;
  for (int round = 0; round <= rounds; ++round) {
    struct Moving {
      uint32_t slot;
      std::span<const Segment> pieces;
      std::optional<uint32_t> arriving;
    };
    std::vector<Moving> moving;
    size_t next = 0, end = pieces.size() * kRepeats;
    int64_t start = now_ns();
    while (next < end || !moving.empty()) {
      if (next < end) {
        size_t first = next % pieces.size();
        auto part = std::span<const Segment>(pieces).subspan(first, std::min(step, pieces.size() - first));
        if (auto slot = out->gather(from.memory.address(), part).value()) {
          moving.push_back({*slot, part, {}});
          next += part.size();
        }
      }
      for (Moving& one : moving) {
        if (one.arriving || !out->ended(one.slot)) continue;
        std::optional<uint32_t> slot = in->acquire();
        if (!slot) break;
        if (in->scatter_from(*out, one.slot, *slot, to.memory.address(), one.pieces).value()) {
          one.arriving = slot;
        } else {
          in->release(*slot);
        }
      }
      std::erase_if(moving, [&](const Moving& one) {
        if (!one.arriving || !in->ended(*one.arriving)) return false;
        in->release(*one.arriving);
        out->release(one.slot);
        return true;
      });
    }
    if (round > 0) {
      rates.push_back(kRepeats * static_cast<double>(pairs.size() * kStrides[stride]) /
                      static_cast<double>(now_ns() - start));
    }
  }
  return median(rates);
}

/// One direction of the staging ring alone.
double half_staged_gbps(const Gpu& gpu, int stride, const std::vector<BlockPair>& pairs, bool gathers, int rounds) {
  auto ring = StagingRing::create(gpu.device, {}).value();
  size_t step = std::max<size_t>(1, ring->options().slot_bytes / kStrides[stride]);
  std::vector<Segment> pieces;
  for (const BlockPair& pair : pairs) {
    pieces.push_back({pair.local_block * kStrides[stride], pair.remote_block * kStrides[stride], kStrides[stride]});
  }
  std::vector<double> rates;
  constexpr int kRepeats = 4;
  for (int round = 0; round <= rounds; ++round) {
    std::vector<uint32_t> moving;
    size_t next = 0, end = pieces.size() * kRepeats;
    int64_t start = now_ns();
    while (next < end || !moving.empty()) {
      if (next < end) {
        size_t first = next % pieces.size();
        auto part = std::span<const Segment>(pieces).subspan(first, std::min(step, pieces.size() - first));
        std::optional<uint32_t> slot;
        if (gathers) {
          slot = ring->gather(gpu.memory.address(), part).value();
        } else if ((slot = ring->acquire()) && !ring->scatter(*slot, gpu.memory.address(), part).value()) {
          ring->release(*slot);
          slot.reset();
        }
        if (slot) {
          moving.push_back(*slot);
          next += part.size();
        }
      }
      std::erase_if(moving, [&](uint32_t slot) {
        if (!ring->ended(slot)) return false;
        ring->release(slot);
        return true;
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
void print_host_limits(const Gpu& out_of, const Gpu& into) {
  const Driver& cu = *out_of.driver;
  constexpr size_t kBytes = 256u << 20;
  struct End {
    const Gpu& gpu;
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
  Gpu from(options, options.from), local_to(options, options.to), local_same(options, options.from);
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
    Gpu& local = gpu == 0 ? local_to : local_same;
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
    double gathered = half_staged_gbps(from, stride, pairs, true, options.rounds);
    double spread = half_staged_gbps(local_to, stride, pairs, false, options.rounds);
    local_to.clear();
    double rate = staged_gbps(from, local_to, stride, pairs, options.rounds);
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
