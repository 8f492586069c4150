#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/random.h"
#include "tests/support/child_process.h"
#include "transfer/cuda/testing/pool_memory.h"
#include "transfer/include/baton/transfer.h"

/// kill -9 and SIGSTOP of a peer at random moments, between real processes, from a seed:
///
///   transfer_kill_test shm|tcp|shm+integrity|tcp+integrity|cuda_ipc|staged:shm [--seeds N] [--first-seed S] [--slack SECONDS]
///
/// The survivor (this process) has two peers. It writes to both and both write to it, or it reads from the victim; the victim is
/// killed or stopped at a moment that the seed says: before it was connected, while connecting, with the first bytes, in the middle.
/// Then:
///   - every write to the victim and every read from it ends, with an error once it is dead, by its deadline while it is stopped;
///   - the other peer's writes all go on and succeed;
///   - after settled() or fence() memory stays as its owner left it (it is filled with a pattern that nobody writes);
///   - nothing is left in /dev/shm, no file stays open.
/// It stops at the first thing that is not so, and says the seed.
namespace baton::transfer {
namespace {

using baton::testing::from_hex;
using baton::testing::open_files;
using baton::testing::shared_memory_files;
using baton::testing::to_hex;

constexpr uint32_t kBlocks = 64;  // one half for each peer
constexpr uint32_t kHalf = kBlocks / 2;
constexpr uint64_t kStride = 512 << 10;  // 16 MiB a half: more than a connection's buffers hold
constexpr std::byte kPoison{0xee};
constexpr std::byte kFromParent{0x11};
constexpr std::byte kFromChild{0x22};
/// What is demanded is 1 s; the rest is for a machine that is busy with other things. --slack 0 on one that is not.
double slack_s = 60;

double now_s() { return static_cast<double>(SteadyClock::instance().now_ns()) * 1e-9; }

/// "shm", or "shm+integrity".
std::string transport_of(const std::string& spec) { return spec.substr(0, spec.find('+')); }

struct Node {
  transfer::testing::PoolMemory memory;  // of the stand-in for a GPU where the transport moves GPU memory
  std::unique_ptr<Agent> agent;

  Node(const std::string& name, const std::string& spec) : memory(kBlocks * kStride, transport_of(spec)) {
    AgentConfig config;
    config.name = name;
    config.transport = transport_of(spec);
    config.integrity = config.transport != spec;
    config.bind_address = "127.0.0.1";
    config.cuda_library = transfer::testing::cuda_library();
    Result<std::unique_ptr<Agent>> made = Agent::create(config);
    BATON_CHECK(made.ok()) << made.status().to_string();
    agent = std::move(*made);
    Result<MemoryRegion> region = agent->register_memory(memory, memory.kind());
    BATON_CHECK(region.ok()) << region.status().to_string();
    BATON_CHECK(agent->add_pool({*region, kStride, kBlocks}).ok());
  }
  void fill(uint32_t first, std::byte value) {
    std::memset(memory.data() + first * kStride, static_cast<int>(value), kHalf * kStride);
    (void)agent->stats();  // takes the agent's lock: the thread sanitizer sees no order between processes otherwise
  }
  bool has(uint32_t first, std::byte value) const {
    (void)agent->stats();
    return std::memchr(memory.data() + first * kStride, static_cast<int>(value), kHalf * kStride) != nullptr;
  }
  bool is_all(uint32_t first, std::byte value) const {
    (void)agent->stats();
    const std::byte* data = memory.data() + first * kStride;
    return data[0] == value && std::memcmp(data, data + 1, kHalf * kStride - 1) == 0;
  }
  /// A half of this memory into a half of a peer's, block by block and not in order.
  static BlockWrite half(uint32_t local, uint32_t remote, int64_t timeout_ms) {
    BlockWrite write;
    write.local_pool = write.remote_pool = static_cast<PoolId>(0);
    for (uint32_t i = 0; i < kHalf; ++i) write.blocks.push_back({local + i, remote + (i * 7) % kHalf});
    write.length_bytes = kStride;
    write.deadline = Deadline::after_ms(SteadyClock::instance(), timeout_ms);
    return write;
  }
  static BlockRead half_back(uint32_t local, uint32_t remote, int64_t timeout_ms) {
    BlockWrite same = half(local, remote, timeout_ms);
    BlockRead read;
    read.local_pool = read.remote_pool = same.local_pool;
    read.blocks = std::move(same.blocks);
    read.length_bytes = same.length_bytes;
    read.deadline = same.deadline;
    return read;
  }
};

/// The other process: a line in, a line out.
int child_main(const std::string& name, const std::string& transport) {
  baton::testing::die_with_parent();
  set_log_level(LogLevel::kError);
  Node node(name, transport);
  std::cout << to_hex(node.agent->metadata()) << std::endl;
  std::atomic<bool> stop{false};
  std::thread writer;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream in(line);
    std::string command;
    in >> command;
    if (command == "write") {  // <metadata> <first remote block>, until it is refused
      std::string metadata;
      uint32_t first = 0;
      in >> metadata >> first;
      node.fill(kHalf, kFromChild);
      Result<Peer> peer = node.agent->connect(from_hex(metadata));
      BATON_CHECK(peer.ok()) << peer.status().to_string();
      writer = std::thread([peer = *peer, first, &stop] {
        while (!stop) {
          Result<Transfer> one = peer.write(Node::half(kHalf, first, 20'000));
          Result<Transfer> two = peer.write(Node::half(kHalf, first, 20'000));
          if (!one.ok() || !two.ok() || !one->wait().ok() || !two->wait().ok()) return;
        }
      });
    } else if (command == "fence") {
      uint64_t epoch = 0;
      in >> epoch;
      Status status = node.agent->fence(static_cast<Epoch>(epoch));
      if (!status.ok()) {
        std::cout << status.to_string() << std::endl;
        continue;
      }
    } else if (command == "poison") {
      node.fill(0, kPoison);
    } else if (command == "clean?") {
      if (!node.is_all(0, kPoison)) {
        std::cout << "no" << std::endl;
        continue;
      }
    } else if (command == "unpoisoned?") {
      if (node.has(0, kPoison)) {
        std::cout << "no" << std::endl;
        continue;
      }
    } else if (command == "exit") {
      break;
    }
    std::cout << "ok" << std::endl;
  }
  stop = true;
  if (writer.joinable()) writer.join();
  return 0;
}

class Child : public baton::testing::ChildProcess {
 public:
  Child(const std::string& name, const std::string& transport) : ChildProcess({name, transport}), metadata(from_hex(read_line())) {}

  const std::string metadata;
};

class Survivor {
 public:
  explicit Survivor(const std::string& spec)
      : spec_(spec), transport_(transport_of(spec)), node_("survivor", spec), other_("other", spec) {
    node_.fill(0, kFromParent);
    node_.fill(kHalf, kFromChild);  // what the other writes there: a source that changes would be found by integrity mode
    BATON_CHECK(other_.ask(fmt::format("write {} {}", to_hex(node_.agent->metadata()), kHalf)) == "ok");
    Result<Peer> peer = node_.agent->connect(other_.metadata);
    BATON_CHECK(peer.ok()) << peer.status().to_string();
    bystander_ = std::thread([this, peer = *peer] {
      while (!stop_) {
        Result<Transfer> transfer = peer.write(Node::half(kHalf, 0, 60'000));
        BATON_CHECK(transfer.ok()) << transfer.status().to_string();
        Status status = transfer->wait();
        BATON_CHECK(status.ok()) << "a write to the other peer: " << status.to_string();
        ++bystander_writes_;
      }
    });
    for (uint64_t seen = bystander_writes_ + 1; bystander_writes_ < seen;) std::this_thread::yield();
  }
  ~Survivor() {
    stop_ = true;
    bystander_.join();
  }

  /// One life of a victim.
  void run(uint64_t seed) {
    Random random(mix_bits(seed, transport_ == "tcp"));
    bool kill = random.chance(0.5);
    bool we_read = random.chance(0.4);
    bool it_writes = !we_read && random.chance(0.7);  // the victim into us
    bool we_write = (!it_writes && !we_read) || random.chance(0.7);
    uint64_t moment = random.below(4);  // 0: before we connect; 1: at once; 2: after some µs; 3: after some messages
    size_t files = open_files();
    AgentStats before = node_.agent->stats();

    Child victim("victim", spec_);
    node_.fill(0, kFromParent);
    node_.agent->stats();
    if (it_writes) BATON_CHECK(victim.ask(fmt::format("write {} {}", to_hex(node_.agent->metadata()), 0)) == "ok");
    auto strike = [&] { kill ? victim.kill() : victim.stop(); };
    if (moment == 0) strike();
    Result<Peer> peer = node_.agent->connect(victim.metadata);
    std::vector<Transfer> transfers;
    // Its blocks in our memory are the same that we write from, unless only one of us writes.
    uint32_t from = it_writes || we_read ? kHalf : 0;
    int64_t timeout_ms = kill ? 30'000 : 200 + static_cast<int64_t>(random.below(300));
    if (peer.ok() && we_write) {
      for (int i = 0; i < 5; ++i) {
        Result<Transfer> transfer = peer->write(Node::half(from, 0, timeout_ms));
        if (transfer.ok()) transfers.push_back(*transfer);
      }
    }
    std::vector<Transfer> reads;
    for (int i = 0; peer.ok() && we_read && i < 5; ++i) {
      Result<Transfer> transfer = peer->read(Node::half_back(0, kHalf, timeout_ms));
      if (transfer.ok()) reads.push_back(*transfer);
    }
    if (moment == 2) {
      double until = now_s() + static_cast<double>(random.below(20'000)) * 1e-6;
      while (now_s() < until) std::this_thread::yield();
    }
    if (moment == 3) {
      uint64_t some = random.below(5 * kHalf / 4);
      auto progressed = [&] {
        if (we_write && peer.ok()) {
          return peer->stats().messages >= some || std::all_of(transfers.begin(), transfers.end(), [](const Transfer& t) { return t.done(); });
        }
        if (we_read) {
          return !peer.ok() || peer->stats().read_bytes > 0 ||
                 std::all_of(reads.begin(), reads.end(), [](const Transfer& t) { return t.done(); });
        }
        return node_.has(0, kFromChild);
      };
      while (!progressed()) std::this_thread::yield();
    }
    if (moment != 0) strike();
    double struck = now_s();
    uint64_t others = bystander_writes_;

    // Every write ends.
    bool settled = true, failed = false;
    for (const Transfer& transfer : transfers) {
      Status status = transfer.wait();
      settled = settled && transfer.settled();
      failed = failed || !status.ok();
    }
    bool reads_settled = true;
    for (const Transfer& transfer : reads) {
      const Status status = transfer.wait();
      reads_settled = reads_settled && transfer.settled();
      failed = failed || !status.ok();
    }
    double took = now_s() - struck;
    longest_s_ = std::max(longest_s_, took);
    double allowed = (kill ? 1.0 : static_cast<double>(timeout_ms) * 1e-3 + 1.0) + slack_s;
    BATON_CHECK(took < allowed) << "the writes and reads took " << took << " s";
    if (kill) ++killed_; else ++stopped_;

    // What it wrote into us, or writes for reads of ours that ended without its word: shut it out, then the memory is ours.
    if (we_read) ++read_;
    if (it_writes || !reads_settled) {
      Epoch epoch = peer.ok() ? peer->epoch() : Epoch::kNone;
      BATON_CHECK(peer.ok() || kill) << "a stopped peer can be connected to: " << peer.status().to_string();
      if (epoch != Epoch::kNone) {
        Status fenced = node_.agent->fence(epoch);
        if (!fenced.ok()) {
          // Allowed only of a writer that is stopped in the middle of a copy into our memory.
          BATON_CHECK(!kill && transport_ != "tcp") << fenced.to_string();
          victim.resume();
          double patience = now_s() + 1 + slack_s;
          while (!fenced.ok() && now_s() < patience) fenced = node_.agent->fence(epoch);
          BATON_CHECK(fenced.ok()) << fenced.to_string();
        }
      } else {
        // Killed before we knew it. Its socket is closed, so it is gone as soon as we have seen that.
        double patience = now_s() + 1 + slack_s;
        while (node_.agent->stats().inbound_peers > before.inbound_peers && now_s() < patience) std::this_thread::yield();
      }
      node_.fill(0, kPoison);
    }
    if (we_read) node_.fill(0, kPoison);
    // Our own memory is not read any more: what it holds now never shows up anywhere.
    if (we_write && !it_writes && !we_read) node_.fill(0, kPoison);

    if (!kill) {
      // Back to life. What had to be broken off may still be in its buffers, unless it shuts us out.
      victim.resume();
      std::string epoch = std::to_string(static_cast<uint64_t>(node_.agent->epoch()));
      bool must_fence = !settled;
      if (must_fence) BATON_CHECK(victim.ask("fence " + epoch) == "ok");
      if (we_write && !it_writes && !we_read) BATON_CHECK(victim.ask("unpoisoned?") == "ok") << "bytes from after the end came through";
      BATON_CHECK(victim.ask("poison") == "ok");
      if (must_fence) ++fenced_;
      BATON_CHECK(victim.ask("ping") == "ok" && victim.ask("clean?") == "ok")
          << "the victim's memory was written after " << (must_fence ? "fence()" : "settled()");
    }

    // The other peer never noticed; and while it is at work late bytes have every chance.
    double patience = now_s() + 1 + slack_s;
    while (bystander_writes_ < others + 3 && now_s() < patience) std::this_thread::yield();
    BATON_CHECK(bystander_writes_ >= others + 3) << "the other peer's writes stand still";
    if (it_writes) BATON_CHECK(node_.is_all(0, kPoison)) << "written after fence()";
    if (we_read) BATON_CHECK(node_.is_all(0, kPoison)) << "written after " << (reads_settled ? "settled()" : "fence()");
    if (peer.ok()) {
      Status closed = peer->close();
      BATON_CHECK(closed.ok()) << closed.to_string();
      BATON_CHECK(!peer->alive() && !peer->write(Node::half(0, 0, 1000)).ok());
    }
    victim.kill();
    double gone = now_s() + 1 + slack_s;
    auto settled_down = [&] {
      AgentStats stats = node_.agent->stats();
      return stats.peers == before.peers && stats.inbound_peers == before.inbound_peers && open_files() <= files + 2;
    };
    while (!settled_down() && now_s() < gone) std::this_thread::yield();
    AgentStats after = node_.agent->stats();
    BATON_CHECK(settled_down()) << after.peers << " peers, " << after.inbound_peers << " inbound, " << open_files()
                                << " files; before: " << before.peers << ", " << before.inbound_peers << ", " << files;
    failures_ += failed;
  }

  std::string summary() const {
    return fmt::format("{} killed, {} stopped ({} had to be fenced), read from in {}, writes or reads failed in {}; longest wait for the end of the "
                       "writes {:.2f} s; {} writes to the other peer",
                       killed_, stopped_, fenced_, read_, failures_, longest_s_, bystander_writes_.load());
  }

 private:
  const std::string spec_, transport_;
  Node node_;
  Child other_;
  std::thread bystander_;
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> bystander_writes_{0};
  int killed_ = 0, stopped_ = 0, fenced_ = 0, read_ = 0, failures_ = 0;
  double longest_s_ = 0;
};

int parent_main(const std::string& transport, uint64_t first_seed, uint64_t seeds) {
  set_log_level(LogLevel::kError);
  ::signal(SIGPIPE, SIG_IGN);
  std::set<std::string> segments = shared_memory_files();
  {
    Survivor survivor(transport);
    for (uint64_t seed = first_seed; seed < first_seed + seeds; ++seed) {
      std::fprintf(stderr, "\r%s seed %llu ", transport.c_str(), static_cast<unsigned long long>(seed));
      survivor.run(seed);
    }
    std::fprintf(stderr, "\n%s\n", survivor.summary().c_str());
  }
  BATON_CHECK(shared_memory_files() == segments) << "something was left in /dev/shm";
  return 0;
}

}  // namespace
}  // namespace baton::transfer

int main(int argc, char** argv) {
  if (argc == 4 && std::strcmp(argv[1], "--child") == 0) return baton::transfer::child_main(argv[2], argv[3]);
  uint64_t seeds = 10, first = 1;
  for (int i = 2; i + 1 < argc; i += 2) {
    std::string name = argv[i];
    if (name == "--seeds") seeds = std::strtoull(argv[i + 1], nullptr, 10);
    else if (name == "--first-seed") first = std::strtoull(argv[i + 1], nullptr, 10);
    else if (name == "--slack") baton::transfer::slack_s = std::strtod(argv[i + 1], nullptr);
    else argc = 0;
  }
  if (argc < 2 || argc % 2 != 0) {
    std::fprintf(stderr, "usage: %s shm|tcp|shm+integrity|tcp+integrity|cuda_ipc|staged:shm [--seeds N] [--first-seed S] [--slack SECONDS]\n", argv[0]);
    return 2;
  }
  return baton::transfer::parent_main(argv[1], first, seeds);
}
