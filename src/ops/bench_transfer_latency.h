#pragma once

#include <functional>

#include "base/status.h"
#include "ops/bench_transfer.h"
#include "ops/bench_transfer_common.h"
#include "ops/bench_transfer_wire.h"
#include "ops/raw_fabric.h"
#include "ops/raw_memory.h"
#include "ops/raw_socket.h"

/// How long one small block takes: by callbacks, by waiting, and read.
namespace baton::ops {

/// What the initiator has opened. The baselines that there are (null: it is not); agents and the target attached to each other.
struct LatencyBench {
  const BenchTransferOptions& options;
  const BenchAgent& agent;
  const transfer::Peer& peer;
  const BenchChannel& channel;
  RawSharedCopy* memory = nullptr;
  RawFabric* fabric = nullptr;
  RawSocketInitiator* socket = nullptr;
};

/// Fills path.notifications and path.round_trips.
Status measure_notifications(const LatencyBench& bench, BenchPath& path);
/// The same for --operation read; `read_one` gives the nanoseconds of one block.
Status measure_read_latency(const LatencyBench& bench, const std::function<Result<int64_t>(uint64_t block_bytes, uint64_t bytes)>& read_one,
                            BenchPath& path);

}  // namespace baton::ops
