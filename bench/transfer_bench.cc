// How fast the transfer agent moves scattered blocks into another process, beside what the machine can do
// with nothing of ours around it, in the same run: memcpy, process_vm_writev, a bare libfabric loop.
//
//   transfer_bench [--pool-mib 256] [--rounds 5]
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/random.h"
#include "transfer/fabric/provider.h"
#include "transfer/include/baton/transfer.h"

namespace {

using namespace baton;
using namespace baton::transfer;
using namespace baton::transfer::fabric;

struct Memory {
  explicit Memory(size_t bytes) : bytes(bytes) {
    data = static_cast<std::byte*>(
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    BATON_CHECK(data != MAP_FAILED);
    (void)::madvise(data, bytes, MADV_HUGEPAGE);
    std::memset(data, 1, bytes);
  }
  ~Memory() { ::munmap(data, bytes); }
  std::byte* data;
  size_t bytes;
};

double now_s() { return static_cast<double>(SteadyClock::instance().now_ns()) * 1e-9; }
long resident_kib() {
  std::ifstream file("/proc/self/statm");
  long total = 0, resident = 0;
  file >> total >> resident;
  return resident * (::sysconf(_SC_PAGESIZE) / 1024);
}

/// Lines over a pair of pipes to the other process.
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
    if (std::fread(&size, sizeof(size), 1, in_) != 1) ::_exit(0);
    std::string bytes(size, '\0');
    if (size > 0 && std::fread(bytes.data(), 1, size, in_) != size) ::_exit(0);
    return bytes;
  }

 private:
  FILE* in_;
  FILE* out_;
};

/// libfabric with nothing around it: one endpoint, one queue, polled.
struct RawFabric {
  Provider provider;
  FabricHandle fabric;
  DomainHandle domain;
  AddressVectorHandle addresses;
  CompletionQueueHandle queue;
  MemoryHandle memory;
  EndpointHandle endpoint;

  explicit RawFabric(Memory& pool) {
    auto found = find_provider("tcp", "127.0.0.1");
    BATON_CHECK(found.ok()) << found.status().to_string();
    provider = std::move(*found);
    fi_info* info = provider.info.get();
    fid_fabric* fabric_fid;
    fid_domain* domain_fid;
    fid_av* av;
    fid_cq* cq;
    fid_mr* mr;
    fid_ep* ep;
    BATON_CHECK(fi_fabric(info->fabric_attr, &fabric_fid, nullptr) == 0);
    fabric.reset(fabric_fid);
    BATON_CHECK(fi_domain(fabric_fid, info, &domain_fid, nullptr) == 0);
    domain.reset(domain_fid);
    fi_av_attr av_attr{};
    BATON_CHECK(fi_av_open(domain_fid, &av_attr, &av, nullptr) == 0);
    addresses.reset(av);
    fi_cq_attr cq_attr{};
    cq_attr.format = FI_CQ_FORMAT_DATA;
    cq_attr.size = 1024;
    BATON_CHECK(fi_cq_open(domain_fid, &cq_attr, &cq, nullptr) == 0);
    queue.reset(cq);
    BATON_CHECK(fi_mr_reg(domain_fid, pool.data, pool.bytes, FI_WRITE | FI_REMOTE_WRITE, 0, 77, 0, &mr, nullptr) == 0);
    memory.reset(mr);
    BATON_CHECK(fi_endpoint(domain_fid, info, &ep, nullptr) == 0);
    endpoint.reset(ep);
    BATON_CHECK(fi_ep_bind(ep, &av->fid, 0) == 0 && fi_ep_bind(ep, &cq->fid, FI_TRANSMIT | FI_RECV) == 0);
    BATON_CHECK(fi_enable(ep) == 0);
  }
  uint64_t base(const Memory& pool) const {
    return (provider.info->domain_attr->mr_mode & FI_MR_VIRT_ADDR) != 0 ? reinterpret_cast<uint64_t>(pool.data) : 0;
  }
};

/// The other process. Commands: "agent <transport>", "raw_fabric", "address", "end".
void serve(Wire wire, size_t pool_bytes) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  Memory pool(pool_bytes);
  std::map<std::string, std::unique_ptr<Agent>> agents;
  std::vector<std::vector<std::byte>> keep;
  while (true) {
    std::string command = wire.get();
    if (command.starts_with("agent ")) {
      // "agent <transport> <stride>"
      size_t space = command.rfind(' ');
      uint64_t stride = std::stoull(command.substr(space + 1));
      AgentConfig config;
      config.name = "receiver";
      config.transport = command.substr(6, space - 6);
      config.bind_address = "127.0.0.1";
      auto agent = Agent::create(config);
      BATON_CHECK(agent.ok()) << agent.status().to_string();
      auto region = (*agent)->register_memory({pool.data, pool.bytes}, MemoryKind::kHost);
      BATON_CHECK((*agent)->add_pool({*region, stride, pool.bytes / stride}).ok());
      wire.put((*agent)->metadata());
      agents[command] = std::move(*agent);
    } else if (command == "address") {
      wire.put(std::to_string(reinterpret_cast<uint64_t>(pool.data)));
    } else if (command == "raw_fabric") {
      RawFabric raw(pool);
      char name[256];
      size_t size = sizeof(name);
      BATON_CHECK(fi_getname(&raw.endpoint->fid, name, &size) == 0);
      wire.put(std::string(name, size));
      wire.put(std::to_string(raw.base(pool)));
      wire.put(std::to_string(fi_mr_key(raw.memory.get())));
      // Polls until the sender says (with CQ data 2) that it is over.
      while (true) {
        fi_cq_data_entry entries[64];
        ssize_t n = fi_cq_read(raw.queue.get(), entries, 64);
        if (n > 0 && std::any_of(entries, entries + n, [](const auto& e) {
              return (e.flags & FI_REMOTE_CQ_DATA) != 0 && e.data == 2;
            })) {
          // Its acknowledgement still has to leave.
          for (int i = 0; i < 1000; ++i) (void)fi_cq_read(raw.queue.get(), entries, 64);
          break;
        }
        if (n == -FI_EAVAIL) break;
      }
      wire.put("done");
    } else {
      return;
    }
  }
}

struct Case {
  uint64_t block_bytes;
  std::vector<BlockPair> pairs;
};

std::vector<BlockPair> permutation(uint64_t blocks, uint64_t seed) {
  std::vector<uint32_t> to(blocks);
  std::iota(to.begin(), to.end(), 0u);
  Random random(seed);
  std::shuffle(to.begin(), to.end(), random);
  std::vector<BlockPair> pairs;
  for (uint32_t i = 0; i < blocks; ++i) pairs.push_back({static_cast<uint32_t>((i * 7919ull) % blocks), to[i]});
  return pairs;
}

double raw_fabric_s(Wire& wire, Memory& pool, const Case& one) {
  wire.put("raw_fabric");
  std::string name = wire.get();
  uint64_t remote = std::stoull(wire.get());
  uint64_t key = std::stoull(wire.get());
  double best = 0;
  {
    RawFabric raw(pool);
    fi_addr_t address;
    BATON_CHECK(fi_av_insert(raw.addresses.get(), name.data(), 1, &address, 0, nullptr) == 1);
    size_t outstanding = 0;
    auto reap = [&] {
      fi_cq_data_entry entries[64];
      ssize_t n = fi_cq_read(raw.queue.get(), entries, 64);
      BATON_CHECK(n > 0 || n == -FI_EAGAIN) << "completion error";
      if (n > 0) outstanding -= static_cast<size_t>(n);
    };
    auto write = [&](const std::byte* from, uint64_t to, uint64_t bytes, uint64_t data) {
      iovec local{const_cast<std::byte*>(from), bytes};
      fi_rma_iov rma{remote + to, bytes, key};
      fi_msg_rma message{};
      message.msg_iov = &local;
      message.iov_count = 1;
      message.addr = address;
      message.rma_iov = &rma;
      message.rma_iov_count = 1;
      message.data = data;
      while (outstanding >= 256) reap();
      while (true) {
        ssize_t ret = fi_writemsg(raw.endpoint.get(), &message, FI_COMPLETION | FI_DELIVERY_COMPLETE | FI_REMOTE_CQ_DATA);
        if (ret == 0) break;
        BATON_CHECK(ret == -FI_EAGAIN) << fi_strerror(static_cast<int>(-ret));
        reap();
      }
      ++outstanding;
    };
    write(pool.data, 0, 8, 1);  // connects
    while (outstanding > 0) reap();
    double start = now_s();
    for (const BlockPair& pair : one.pairs) {
      write(pool.data + pair.local_block * one.block_bytes, pair.remote_block * one.block_bytes, one.block_bytes, 1);
    }
    while (outstanding > 0) reap();
    best = now_s() - start;
    write(pool.data, 0, 8, 2);
    while (outstanding > 0) reap();
  }
  BATON_CHECK(wire.get() == "done");
  return best;
}

double raw_cma_s(int pid, uint64_t remote, Memory& pool, const Case& one) {
  double start = now_s();
  for (size_t first = 0; first < one.pairs.size();) {
    iovec local[512], there[512];
    size_t count = 0, bytes = 0;
    for (; first + count < one.pairs.size() && count < 512 && bytes < (2u << 20); ++count) {
      const BlockPair& pair = one.pairs[first + count];
      local[count] = {pool.data + pair.local_block * one.block_bytes, one.block_bytes};
      there[count] = {reinterpret_cast<void*>(remote + pair.remote_block * one.block_bytes), one.block_bytes};
      bytes += one.block_bytes;
    }
    BATON_CHECK(::process_vm_writev(pid, local, count, there, count, 0) == static_cast<ssize_t>(bytes));
    first += count;
  }
  return now_s() - start;
}

double memcpy_s(Memory& from, Memory& to, const Case& one) {
  double start = now_s();
  for (const BlockPair& pair : one.pairs) {
    std::memcpy(to.data + pair.remote_block * one.block_bytes, from.data + pair.local_block * one.block_bytes,
                one.block_bytes);
  }
  return now_s() - start;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  size_t pool_mib = 256;
  int rounds = 5;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--pool-mib") == 0) pool_mib = std::stoul(argv[i + 1]);
    if (std::strcmp(argv[i], "--rounds") == 0) rounds = std::max(1, std::stoi(argv[i + 1]));
  }
  set_log_level(LogLevel::kWarning);
  size_t pool_bytes = pool_mib << 20;
  int there[2], back[2];
  BATON_CHECK(::pipe(there) == 0 && ::pipe(back) == 0);
  pid_t child = ::fork();
  if (child == 0) {
    ::close(there[1]);
    ::close(back[0]);
    serve(Wire(there[0], back[1]), pool_bytes);
    ::_exit(0);
  }
  ::close(there[0]);
  ::close(back[1]);
  Wire wire(back[0], there[1]);

  // What an agent costs, before anything else is in memory.
  for (const char* transport : {"auto", "shm", "tcp"}) {
    long before_kib = resident_kib();
    double start = now_s();
    AgentConfig config;
    config.transport = transport;
    config.bind_address = "127.0.0.1";
    auto agent = Agent::create(config);
    BATON_CHECK(agent.ok()) << agent.status().to_string();
    std::printf("agent %-4s  created in %5.1f ms, %6ld KiB resident\n", transport, (now_s() - start) * 1e3,
                resident_kib() - before_kib);
  }

  Memory pool(pool_bytes), copy(pool_bytes);
  wire.put("address");
  uint64_t remote = std::stoull(wire.get());
  std::printf("\nGB/s, %zu MiB of scattered blocks into another process, medians of %d\n", pool_mib, rounds);
  std::printf("%8s | %8s | %8s %8s %6s | %8s %8s %6s\n", "block", "memcpy", "raw cma", "shm", "ratio", "raw fab", "tcp",
              "ratio");
  for (uint64_t block_bytes : {uint64_t{16} << 10, uint64_t{64} << 10, uint64_t{2} << 20}) {
    Case one{block_bytes, permutation(pool_bytes / block_bytes, block_bytes)};
    auto make = [&](const std::string& transport, Peer* peer, PoolId* id) {
      AgentConfig config;
      config.transport = transport;
      config.name = "sender";
      config.bind_address = "127.0.0.1";
      auto agent = std::move(*Agent::create(config));
      auto region = *agent->register_memory({pool.data, pool.bytes}, MemoryKind::kHost);
      *id = *agent->add_pool({region, block_bytes, pool.bytes / block_bytes});
      wire.put(fmt::format("agent {} {}", transport, block_bytes));
      auto connected = agent->connect(wire.get());
      BATON_CHECK(connected.ok()) << connected.status().to_string();
      *peer = *connected;
      return agent;
    };
    Peer shm_peer, tcp_peer;
    PoolId shm_pool, tcp_pool;
    auto shm = make("shm", &shm_peer, &shm_pool);
    auto tcp = make("tcp", &tcp_peer, &tcp_pool);
    auto agent_s = [&](Peer& peer, PoolId id) {
      BlockWrite write;
      write.local_pool = id;
      write.blocks = one.pairs;
      write.length_bytes = block_bytes;
      write.tag = static_cast<Tag>(12345);
      double start = now_s();
      auto transfer = peer.write(std::move(write));
      BATON_CHECK(transfer.ok());
      Status status = transfer->wait();
      BATON_CHECK(status.ok()) << status.to_string();
      return now_s() - start;
    };
    (void)agent_s(shm_peer, shm_pool);
    (void)agent_s(tcp_peer, tcp_pool);
    std::map<std::string, std::vector<double>> seconds;
    for (int round = 0; round < rounds; ++round) {  // interleaved: a noisy neighbour hits all alike
      seconds["memcpy"].push_back(memcpy_s(pool, copy, one));
      seconds["cma"].push_back(raw_cma_s(child, remote, pool, one));
      seconds["shm"].push_back(agent_s(shm_peer, shm_pool));
      seconds["fabric"].push_back(raw_fabric_s(wire, pool, one));
      seconds["tcp"].push_back(agent_s(tcp_peer, tcp_pool));
    }
    auto rate = [&](const char* what) { return static_cast<double>(pool_bytes) * 1e-9 / median(seconds[what]); };
    std::printf("%6zu K | %8.2f | %8.2f %8.2f %6.2f | %8.2f %8.2f %6.2f\n", static_cast<size_t>(block_bytes >> 10),
                rate("memcpy"), rate("cma"), rate("shm"), rate("shm") / rate("cma"), rate("fabric"), rate("tcp"),
                rate("tcp") / rate("fabric"));
    std::fflush(stdout);

    if (block_bytes == (uint64_t{16} << 10)) {
      for (auto& [name, peer, id] : {std::tuple("shm", &shm_peer, shm_pool), std::tuple("tcp", &tcp_peer, tcp_pool)}) {
        std::vector<double> latencies;
        for (int i = 0; i < 500; ++i) {
          BlockWrite write;
          write.local_pool = id;
          write.blocks = {{0, 0}};
          write.length_bytes = 4096;
          double start = now_s();
          (void)peer->write(std::move(write))->wait();
          latencies.push_back(now_s() - start);
        }
        std::printf("         | 4 KiB write to completion over %s: %.0f us median\n", name, median(latencies) * 1e6);
      }
    }
  }
  wire.put("end");
  ::waitpid(child, nullptr, 0);
  return 0;
}
