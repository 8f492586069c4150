#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/status.h"

namespace baton::ops {

/// What `baton bench transfer` measures: the transfer library between two real processes, this one (the initiator, which
/// writes or reads) and a target on this or another host, beside the same copies with nothing of ours around them.
struct BenchTransferOptions {
  std::vector<std::string> transports = {"auto"};
  std::string operation = "write";   ///< write: from here into the target's memory; read: the other way
  std::vector<uint64_t> block_bytes = {4u << 10, 16u << 10, 64u << 10, 256u << 10, 1u << 20, 4u << 20, 16u << 20};
  /// Blocks of one transfer; empty: as many as come to 32 MiB (of GPU memory 256 MiB), one at least.
  std::vector<uint64_t> blocks;
  std::string order = "scattered";   ///< scattered (a random permutation), contiguous or both
  std::string memory = "shared";     ///< the target's pool: shared (a memfd, peers may map it) or private; cuda: GPU memory on both sides
  int32_t device = 0;                ///< the initiator's GPU
  int32_t peer_device = -1;          ///< the target's; negative: the one behind `device`, or the same when there is only one
  std::string cuda_library;          ///< empty: libcuda.so.1
  uint64_t pool_bytes = 512u << 20;  ///< on each side; blocks are drawn anew from all of it for each run
  int32_t runs = 7;
  int32_t pings = 500;               ///< for the latencies, in each run; 0: leave them out
  bool verify = false;               ///< every block is compared (XXH3) after each of our transfers
  bool integrity = false;            ///< the library's integrity mode; without notification latency, which would count the check
  bool baseline = true;
  std::string connect;               ///< HOST:PORT of a target; empty: one is started here
  int64_t timeout_ms = 60'000;       ///< of one transfer, and of one answer of the target
  uint64_t seed = 1;
  bool progress = true;              ///< a line on stderr per row

  Status validate() const;
};

/// `baton bench transfer --listen`, and the process that the initiator starts.
struct BenchTransferTargetOptions {
  std::string listen;                   ///< HOST:PORT, one initiator is served; or
  int fd = -1;                          ///< a connected socket
  uint64_t max_pool_bytes = 64ull << 30;
  int64_t timeout_ms = 60'000;
  std::string cuda_library;             ///< empty: libcuda.so.1
};

struct Spread {
  double median = 0, min = 0, max = 0;
};
Spread spread_of(std::vector<double> values);

/// One way to move the same blocks without the agent.
struct BenchBaseline {
  std::string name;
  Spread bytes_per_s;
  double ratio = 0;         ///< ours to it: median of the ratios run by run
  double cpu_s_per_gb = 0;  ///< both sides
};

struct BenchTransferRow {
  std::string transport;  ///< the one that was taken
  std::string order;
  uint64_t block_bytes = 0, blocks = 0;
  Spread bytes_per_s;
  double ms = 0;          ///< one transfer, median: from write() until it is known to be delivered; from read() until it is here
  double initiator_cpu_s_per_gb = 0, target_cpu_s_per_gb = 0;
  uint64_t retries = 0;   ///< "not now" answers of the transport, all runs
  std::vector<BenchBaseline> baselines;
};

struct BenchNotification {
  uint64_t bytes = 0;
  /// Writes: half of: written, counted there, answered the same way, counted here. Reads: from read() until done.
  double p50_us = 0, p99_us = 0, min_us = 0;
  double socket_p50_us = 0;                   ///< the same with a plain socket; 0: not measured
};

/// One block there, and when it has come one back: written and waited for by one thread on each side (Agent::wait()).
struct BenchRoundTrip {
  uint64_t bytes = 0;
  Spread us;                  ///< medians of the runs
  double best_us = 0, p99_us = 0;
  std::string raw_name;       ///< empty: nothing stands beside it
  Spread raw_us;
  double ratio = 0;           ///< ours to it: median of the ratios run by run
};

/// What a transport costs before the first transfer.
struct BenchPath {
  std::string asked, transport, provider, reason;
  double agent_ms = 0;           ///< opening the agent
  double connect_ms = 0;         ///< from connect() to the first block delivered (or read)
  double first_pass_bytes_per_s = 0;  ///< the whole pool once: registers, maps and touches whatever it has to
  uint64_t initiator_bytes = 0;  ///< resident memory that agent, connection and one write added
  uint64_t target_bytes = 0;
  uint64_t initiator_resident_bytes = 0, target_resident_bytes = 0;  ///< whole processes at the end, pools included
  std::vector<BenchNotification> notifications;
  std::vector<BenchRoundTrip> round_trips;  ///< of writes
};

struct BenchTransferResult {
  BenchTransferOptions options;
  std::string target;  ///< "a process on this host", "10.0.0.2:7000 (another host)"
  std::string device, target_device;  ///< GPUs, with --memory cuda
  std::vector<BenchPath> paths;
  std::vector<BenchTransferRow> rows;
  uint64_t verified_blocks = 0;
};

/// How many blocks of `block_bytes` each transfer has, by options.blocks.
std::vector<uint64_t> block_counts(const BenchTransferOptions& options, uint64_t block_bytes);

/// data_loss when a block was not what it should be.
Result<BenchTransferResult> run_bench_transfer(const BenchTransferOptions& options);
/// Serves one initiator; ok when it has said goodbye. `on_listening` gets the port.
Status run_bench_transfer_target(const BenchTransferTargetOptions& options, const std::function<void(uint16_t)>& on_listening);

std::string bench_transfer_table(const BenchTransferResult& result);
std::string bench_transfer_json(const BenchTransferResult& result);
/// A page of its own, with pictures (SVG) and no outside reference.
std::string bench_transfer_html(const BenchTransferResult& result);

/// "16 KiB", "3 MiB", "1000 B".
std::string format_bytes(uint64_t bytes);

}  // namespace baton::ops
