// What a long life does to an agent: a million un-notified writes, ten thousand connects and disconnects, a thousand peers
// at once. Prints rates at the beginning and at the end, and the memory before and after. Exits with 1 when something grew.
//
//   transfer_endurance [--writes N] [--connects N] [--peers N] [--rails N] [--only writes|connects|peers|rails] [--transport T]

#include <malloc.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "base/log.h"
#include "transfer/include/baton/transfer.h"
#include "transfer/sim/sim_fabric.h"

namespace baton::transfer {
namespace {

constexpr uint64_t kStride = 4096;
constexpr uint32_t kBlocks = 64;

double now_s() { return static_cast<double>(SteadyClock::instance().now_ns()) * 1e-9; }

/// Of all threads of this process. Where neighbours take the processor, the clock says little about a slowdown and this much.
double cpu_s() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  auto seconds = [](const timeval& time) { return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

/// What ten equal parts of the work took.
struct Tenths {
  std::vector<double> per_s, cpu_us;

  template <typename Work>
  static Tenths measure(uint64_t count, Work&& work) {
    Tenths tenths;
    for (int tenth = 0; tenth < 10; ++tenth) {
      double start = now_s(), cpu = cpu_s();
      work(count / 10);
      tenths.per_s.push_back(static_cast<double>(count / 10) / (now_s() - start));
      tenths.cpu_us.push_back((cpu_s() - cpu) * 1e6 / static_cast<double>(count / 10));
    }
    return tenths;
  }
  void print() const {
    std::printf("    per second, by tenths:");
    for (double rate : per_s) std::printf(" %.0f", rate);
    std::printf("\n    CPU us each:");
    for (double us : cpu_us) std::printf(" %.2f", us);
    std::printf("\n");
  }
  /// The best of three on either side: noise hits some, a slowdown all of the later ones. (A neighbour on the same core
  /// raises CPU time, too, by half at most.)
  bool keeps_up(double factor = 1.8) const {
    return *std::min_element(cpu_us.end() - 3, cpu_us.end()) < factor * *std::min_element(cpu_us.begin(), cpu_us.begin() + 3);
  }
};

/// Resident memory, after the allocator has given back what it keeps.
double rss_kib() {
  ::malloc_trim(0);
  std::ifstream file("/proc/self/statm");
  uint64_t total = 0, resident = 0;
  file >> total >> resident;
  return static_cast<double>(resident * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE))) / 1024;
}

/// Bytes that the program has allocated and not freed: does not see what the allocator keeps, so that small leaks show.
double heap_kib() {
  struct mallinfo2 info = ::mallinfo2();
  return static_cast<double>(info.uordblks + info.hblkhd) / 1024;
}

size_t open_files() {
  size_t count = 0;
  for (int fd = 0; fd < 20000; ++fd) count += ::lseek(fd, 0, SEEK_CUR) >= 0 || errno != EBADF;
  return count;
}

struct Node {
  std::vector<std::byte> memory;
  std::unique_ptr<Agent> agent;
  PoolId pool{};

  Node(const std::string& name, const std::string& transport, SimFabric* fabric, const std::string& bind_address = "127.0.0.1")
      : memory(kBlocks * kStride) {
    AgentConfig config;
    config.name = name;
    config.transport = transport;
    config.bind_address = bind_address;
    Result<std::unique_ptr<Agent>> made =
        transport == "sim" ? create_sim_agent(*fabric, config) : Agent::create(config);
    BATON_CHECK(made.ok()) << made.status().to_string();
    agent = std::move(*made);
    Result<MemoryRegion> region = agent->register_memory(memory, MemoryKind::kHost);
    BATON_CHECK(region.ok()) << region.status().to_string();
    Result<PoolId> added = agent->add_pool({*region, kStride, kBlocks});
    BATON_CHECK(added.ok()) << added.status().to_string();
    pool = *added;
  }
  BlockWrite block(uint32_t index, Tag tag = Tag::kNone) const {
    BlockWrite write;
    write.local_pool = pool;
    write.remote_pool = static_cast<PoolId>(0);
    write.blocks = {{index % kBlocks, (index * 7) % kBlocks}};
    write.length_bytes = kStride;
    write.tag = tag;
    return write;
  }
};

bool say(bool good, const char* what) {
  std::printf("    %s %s\n", good ? "ok  " : "BAD ", what);
  std::fflush(stdout);
  return good;
}

/// Writes that nobody is told of, up to 256 under way.
bool writes(const std::string& transport, uint64_t count) {
  SimFabric fabric({});
  Node receiver("receiver", transport, &fabric), sender("sender", transport, &fabric);
  Result<Peer> peer = sender.agent->connect(receiver.agent->metadata());
  BATON_CHECK(peer.ok()) << peer.status().to_string();
  std::deque<Transfer> under_way;
  auto drive = [&](uint64_t n) {
    for (uint64_t i = 0; i < n; ++i) {
      if (under_way.size() == 256) {
        BATON_CHECK(under_way.front().wait().ok()) << under_way.front().status().to_string();
        under_way.pop_front();
      }
      Result<Transfer> transfer = peer->write(sender.block(static_cast<uint32_t>(i)));
      BATON_CHECK(transfer.ok()) << transfer.status().to_string();
      under_way.push_back(std::move(*transfer));
    }
  };
  drive(5000);  // what is allocated once, and connecting
  double rss = rss_kib(), heap = heap_kib();
  Tenths tenths = Tenths::measure(count, drive);
  double rss_after = rss_kib(), heap_after = heap_kib();
  std::printf("%s: %llu writes of 4 KiB without a tag\n", transport.c_str(), static_cast<unsigned long long>(count));
  tenths.print();
  std::printf("    rss %.0f -> %.0f KiB, heap %.0f -> %.0f KiB\n", rss, rss_after, heap, heap_after);
  bool good = say(tenths.keeps_up(), "the last cost no more than the first");
  good &= say(heap_after - heap < 256 && rss_after - rss < 2048, "memory is flat");
  return good;
}

/// A new peer each time: connect, one write, close. And the other way of ending: the peer goes.
bool connects(const std::string& transport, uint64_t count) {
  SimFabric fabric({});
  Node receiver("receiver", transport, &fabric);
  auto sender = std::make_unique<Node>("sender", transport, &fabric);
  auto drive = [&](uint64_t n) {
    for (uint64_t i = 0; i < n; ++i) {
      Result<Peer> peer = sender->agent->connect(receiver.agent->metadata());
      BATON_CHECK(peer.ok()) << peer.status().to_string();
      Status status = peer->write(sender->block(static_cast<uint32_t>(i)))->wait();
      BATON_CHECK(status.ok()) << i << ": " << status.to_string();
      status = peer->close();
      BATON_CHECK(status.ok()) << i << ": " << status.to_string();
    }
  };
  drive(2000);
  double rss = rss_kib(), heap = heap_kib();
  size_t files = open_files();
  Tenths tenths = Tenths::measure(count, drive);
  // The receiver hears of the last ones a moment later.
  while (receiver.agent->stats().inbound_peers > 0) ::usleep(1000);
  double rss_after = rss_kib(), heap_after = heap_kib();
  double each = (heap_after - heap) * 1024 / static_cast<double>(count);
  std::printf("%s: %llu times connect, write, close\n", transport.c_str(), static_cast<unsigned long long>(count));
  tenths.print();
  std::printf("    rss %.0f -> %.0f KiB, heap %.0f -> %.0f KiB (%.0f bytes each), files %zu -> %zu\n", rss, rss_after,
              heap, heap_after, each, files, open_files());
  bool good = say(tenths.keeps_up(), "the last cost no more than the first");
  good &= say(open_files() <= files, "no file stays open");
  // Of what libfabric keeps by the thousand one may be full now and was empty then.
  good &= say(heap_after - heap < 512 && rss_after - rss < 2048, "memory is flat");
  return good;
}

/// A process with many agents, which does what the parent says: one byte, and answers with one when it is done.
class Crowd {
 public:
  Crowd(std::string transport, uint64_t count) : count_(count) {
    int ends[2];
    BATON_CHECK(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    pid_ = ::fork();
    BATON_CHECK(pid_ >= 0);
    fd_ = ends[pid_ == 0 ? 1 : 0];
    ::close(ends[pid_ == 0 ? 0 : 1]);
    if (pid_ == 0) {
      live(transport);
      ::_exit(0);
    }
  }
  ~Crowd() {
    ::shutdown(fd_, SHUT_RDWR);  // closing is not enough: later ones have it, too
    ::close(fd_);
    ::waitpid(pid_, nullptr, 0);
  }
  Crowd(const Crowd&) = delete;
  Crowd& operator=(const Crowd&) = delete;

  uint64_t count() const { return count_; }
  std::vector<std::string> make() {
    send("m");
    std::vector<std::string> metadata(count_);
    for (std::string& one : metadata) one = receive();
    return metadata;
  }
  void connect(const std::string& hub) {
    send("c");
    send(hub);
    receive();
  }
  void start_writes() { send("w"); }
  void wait_for_writes() { receive(); }
  /// Half of them close properly, half just go.
  void go() {
    send("g");
    receive();
  }

 private:
  void live(const std::string& transport) {
    std::vector<std::unique_ptr<Node>> nodes;
    std::vector<Peer> peers;
    for (std::string order = receive(); !order.empty(); order = receive()) {
      if (order == "m") {
        for (uint64_t i = 0; i < count_; ++i) {
          nodes.push_back(std::make_unique<Node>("node-" + std::to_string(i), transport, nullptr));
          send(nodes.back()->agent->metadata());
        }
        continue;
      }
      if (order == "c") {
        const std::string hub = receive();
        for (const auto& node : nodes) peers.push_back(*node->agent->connect(hub));
      } else if (order == "w") {
        std::vector<Transfer> transfers;
        for (uint64_t i = 0; i < count_; ++i) transfers.push_back(*peers[i].write(nodes[i]->block(static_cast<uint32_t>(i))));
        for (const Transfer& transfer : transfers) {
          Status status = transfer.wait();
          BATON_CHECK(status.ok()) << status.to_string();
        }
      } else {
        for (uint64_t i = 0; i < count_; i += 2) {
          Status status = peers[i].close();
          BATON_CHECK(status.ok()) << status.to_string();
        }
        peers.clear();
        nodes.clear();
      }
      send("done");
    }
  }
  void send(const std::string& text) {
    const uint64_t size = text.size();
    BATON_CHECK(::send(fd_, &size, sizeof(size), MSG_NOSIGNAL) == sizeof(size));
    BATON_CHECK(::send(fd_, text.data(), size, MSG_NOSIGNAL) == static_cast<ssize_t>(size));
  }
  /// Empty: the other end has gone.
  std::string receive() {
    uint64_t size = 0;
    if (::recv(fd_, &size, sizeof(size), MSG_WAITALL) != sizeof(size)) return {};
    std::string text(size, '\0');
    BATON_CHECK(::recv(fd_, text.data(), size, MSG_WAITALL) == static_cast<ssize_t>(size));
    return text;
  }

  const uint64_t count_;
  pid_t pid_ = -1;
  int fd_ = -1;
};

/// What a single write and its end take, and what it costs this process.
struct Single {
  double us = 0, cpu_us = 0;
  static Single measure(Peer& peer, const Node& node) {
    std::vector<double> times;
    const double cpu = cpu_s();
    constexpr int kCount = 2000;
    for (int i = 0; i < kCount; ++i) {
      const double start = now_s();
      Status status = peer.write(node.block(static_cast<uint32_t>(i)))->wait();
      BATON_CHECK(status.ok()) << status.to_string();
      times.push_back(now_s() - start);
    }
    const double spent = cpu_s() - cpu;
    std::nth_element(times.begin(), times.begin() + kCount / 2, times.end());
    return {times[kCount / 2] * 1e6, spent / kCount * 1e6};
  }
};

/// Everybody writes to one, who is connected to everybody. The others live in processes of their own.
bool peers(const std::string& transport, uint64_t count) {
  std::vector<std::unique_ptr<Crowd>> crowds;
  constexpr uint64_t kPerProcess = 500;
  for (uint64_t left = count; left > 0; left -= std::min(left, kPerProcess)) {
    crowds.push_back(std::make_unique<Crowd>(transport, std::min(left, kPerProcess)));
  }
  const double rss_at_start = rss_kib();
  // Two pairs: one of them has all the others beside it.
  Node hub("hub", transport, nullptr), friendly("friend", transport, nullptr);
  Node lonely("lonely", transport, nullptr), only_friend("friend", transport, nullptr);
  Peer beside_others = *hub.agent->connect(friendly.agent->metadata());
  Peer alone = *lonely.agent->connect(only_friend.agent->metadata());
  Single::measure(beside_others, hub);  // what is allocated once
  Single::measure(alone, lonely);
  double rss = 0, heap = 0, peak = 0;
  bool good = true;
  // The first turn allocates what is allocated once; the second must not need more.
  for (int turn = 0; turn < 3; ++turn) {
    const double start = now_s();
    std::vector<Peer> out;
    for (auto& crowd : crowds) {
      for (const std::string& metadata : crowd->make()) out.push_back(*hub.agent->connect(metadata));
    }
    for (auto& crowd : crowds) crowd->connect(hub.agent->metadata());
    const double made = now_s();
    for (int round = 0; round < 3; ++round) {
      for (auto& crowd : crowds) crowd->start_writes();
      std::vector<Transfer> transfers;
      for (uint64_t i = 0; i < count; ++i) transfers.push_back(*out[i].write(hub.block(static_cast<uint32_t>(i))));
      for (const Transfer& transfer : transfers) {
        Status status = transfer.wait();
        BATON_CHECK(status.ok()) << status.to_string();
      }
      for (auto& crowd : crowds) crowd->wait_for_writes();
    }
    const double written = now_s();
    peak = std::max(peak, rss_kib());
    if (turn == 2) {
      const AgentStats stats = hub.agent->stats();
      std::printf("%s: %llu peers at once, both directions: made in %.2f s, 6 writes each in %.2f s; %zu files\n",
                  transport.c_str(), static_cast<unsigned long long>(count), made - start, written - made, open_files());
      good &= say(stats.peers == count + 1 && stats.inbound_peers == count, "all are connected at once");
      ::usleep(100'000);
      const double cpu = cpu_s();
      ::usleep(500'000);
      const double idle = (cpu_s() - cpu) / 0.5;
      // In turn, because there are neighbours, and the best of each.
      Single one{1e9, 1e9}, other = one;
      const auto better = [](Single& best, const Single& now) { best = now.us < best.us ? now : best; };
      for (int i = 0; i < 7; ++i) {
        better(one, Single::measure(alone, lonely));
        better(other, Single::measure(beside_others, hub));
      }
      std::printf("    a write and its end: %.1f us (%.1f of CPU) with one peer, %.1f us (%.1f) with %llu idle ones beside it; all "
                  "idle: %.1f %% of a core\n", one.us, one.cpu_us, other.us, other.cpu_us,
                  static_cast<unsigned long long>(count), idle * 100);
      good &= say(other.us < 1.2 * one.us, "idle peers cost a write nothing");
      good &= say(idle < 0.02, "idle peers cost nothing");
    }
    for (uint64_t i = 0; i < count; i += 2) {
      Status status = out[i].close();
      BATON_CHECK(status.ok()) << status.to_string();
    }
    out.clear();
    for (auto& crowd : crowds) crowd->go();
    const double patience = now_s() + 10;
    while ((hub.agent->stats().inbound_peers > 0 || hub.agent->stats().peers > 1) && now_s() < patience) ::usleep(1000);
    if (turn == 1) {
      rss = rss_kib();
      heap = heap_kib();
    }
  }
  const double rss_after = rss_kib(), heap_after = heap_kib();
  std::printf("    rss: %.0f KiB at the start, at most %.0f (%.1f a peer), when all had gone %.0f -> %.0f; heap %.0f -> %.0f KiB\n",
              rss_at_start, peak, (peak - rss_at_start) / static_cast<double>(count), rss, rss_after, heap, heap_after);
  good &= say(hub.agent->stats().peers == 1 && hub.agent->stats().inbound_peers == 0, "all are gone");
  // What stays are the fences' epochs, up to 65,536 of them, and how full the current address vector of libfabric is.
  good &= say(heap_after - heap < 200 + 0.1 * static_cast<double>(count), "memory is flat");
  return good;
}

/// An agent with many rails and a peer that is connected over all of them. Both are in this process: each has half of it.
bool rails(uint64_t count) {
  std::string addresses;
  for (uint64_t i = 1; i <= count; ++i) addresses += (i > 1 ? ",127.0.0." : "127.0.0.") + std::to_string(i);
  { Node first("first", "tcp", nullptr); }  // loads libfabric's providers
  const double rss = rss_kib(), start = now_s();
  Node agent("agent", "tcp", nullptr, addresses);
  const double opened = now_s(), rss_opened = rss_kib();
  Node peer("peer", "tcp", nullptr, addresses);
  const double connecting = now_s();
  Result<Peer> connected = peer.agent->connect(agent.agent->metadata());
  BATON_CHECK(connected.ok()) << connected.status().to_string();
  auto write = [&](uint64_t n) {
    std::vector<Transfer> transfers;
    for (uint64_t i = 0; i < n; ++i) transfers.push_back(*connected->write(peer.block(static_cast<uint32_t>(i))));
    for (const Transfer& transfer : transfers) {
      Status status = transfer.wait();
      BATON_CHECK(status.ok()) << status.to_string();
    }
  };
  write(1);
  const double first = now_s();
  for (int round = 0; round < 20; ++round) write(8 * count);
  const double rss_after = rss_kib();
  std::printf("tcp, %llu rails: opened in %.0f ms, %.1f MiB; a peer on all of them: first write after %.1f ms; %.1f MiB for both "
              "when all rails were used\n", static_cast<unsigned long long>(count), (opened - start) * 1e3,
              (rss_opened - rss) / 1024, (first - connecting) * 1e3, (rss_after - rss) / 1024);
  bool good = say(opened - start < 1, "opened in less than a second");
  good &= say((rss_after - rss) / 2 / 1024 < 64, "less than 64 MiB an agent");
  return good;
}

int run(int argc, char** argv) {
  uint64_t write_count = 1'000'000, connect_count = 10'000, peer_count = 1'000, rail_count = 32;
  std::string only, only_transport;
  for (int i = 1; i < argc; i += 2) {
    std::string name = argv[i];
    if (i + 1 >= argc) name.clear();
    if (name == "--writes") write_count = std::strtoull(argv[i + 1], nullptr, 10);
    else if (name == "--connects") connect_count = std::strtoull(argv[i + 1], nullptr, 10);
    else if (name == "--peers") peer_count = std::strtoull(argv[i + 1], nullptr, 10);
    else if (name == "--rails") rail_count = std::strtoull(argv[i + 1], nullptr, 10);
    else if (name == "--only") only = argv[i + 1];
    else if (name == "--transport") only_transport = argv[i + 1];
    else {
      std::fprintf(stderr, "usage: %s [--writes N] [--connects N] [--peers N] [--rails N] [--only writes|connects|peers|rails] "
                           "[--transport sim|shm|tcp]\n", argv[0]);
      return 2;
    }
  }
  set_log_level(LogLevel::kError);
  rlimit files{};
  ::getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &files);
  bool good = true;
  for (std::string transport : {"sim", "shm", "tcp"}) {
    if (!only_transport.empty() && transport != only_transport) continue;
    if (only.empty() || only == "writes") good &= writes(transport, write_count);
    if (only.empty() || only == "connects") good &= connects(transport, connect_count);
    if ((only.empty() || only == "peers") && transport != "sim") good &= peers(transport, peer_count);
  }
  if (only == "rails" || (only.empty() && (only_transport.empty() || only_transport == "tcp"))) good &= rails(rail_count);
  return good ? 0 : 1;
}

}  // namespace
}  // namespace baton::transfer

int main(int argc, char** argv) { return baton::transfer::run(argc, argv); }
