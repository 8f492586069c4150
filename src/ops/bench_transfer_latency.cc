#include "ops/bench_transfer_latency.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>

#include "base/clock.h"
#include "ops/bench_serve.h"

namespace baton::ops {

namespace {

using transfer::BlockWrite;
using transfer::PoolId;
using transfer::Tag;

constexpr uint64_t kSizes[] = {uint64_t{4} << 10, uint64_t{64} << 10};

int64_t now_ns() { return SteadyClock::instance().now_ns(); }

Result<BenchReply> receive(const LatencyBench& bench) {
  BATON_ASSIGN_OR_RETURN(std::string frame, bench.channel.receive(bench.options.timeout_ms));
  BATON_ASSIGN_OR_RETURN(BenchReply reply, parse_bench_reply(frame));
  if (!reply.status().ok()) return reply.status().with_context("the target");
  return reply;
}
Result<BenchReply> call(const LatencyBench& bench, const BenchRequest& request) {
  BATON_RETURN_IF_ERROR(bench.channel.send(encode(request)));
  return receive(bench);
}

uint64_t smallest_with_room(const BenchTransferOptions& options, uint64_t bytes) {
  uint64_t found = 0;
  for (uint64_t size : options.block_bytes) {
    if (size >= bytes && (found == 0 || size < found)) found = size;
  }
  return found;
}

BlockWrite first_block(PoolId pool, uint64_t bytes, Tag tag) {
  BlockWrite write;
  write.local_pool = pool;
  write.remote_pool = pool;
  write.blocks = {{0, 0}};
  write.length_bytes = bytes;
  write.tag = tag;
  return write;
}

Result<BenchNotification> measure_notification(const LatencyBench& bench, uint64_t block_bytes, uint64_t bytes) {
  transfer::Agent& agent = *bench.agent.agent;
  BATON_ASSIGN_OR_RETURN(Tag mine, agent.open_inbox());
  BenchRequest echo{.command = BenchCommand::kEcho};
  echo.tag = static_cast<uint32_t>(mine);
  echo.block_bytes = block_bytes;
  echo.bytes = bytes;
  BATON_ASSIGN_OR_RETURN(BenchReply started, call(bench, echo));
  BATON_ASSIGN_OR_RETURN(PoolId pool, bench.agent.pool_of(block_bytes));
  std::mutex mutex;
  std::condition_variable arrived;
  int64_t arrived_ns = 0;
  std::vector<double> latencies_us;
  const int32_t warmup = std::min(bench.options.pings, 50);
  Status status;
  for (int32_t i = 0; i < warmup + bench.options.pings && status.ok(); ++i) {
    arrived_ns = 0;
    status = agent.expect(mine, static_cast<uint64_t>(i) + 1, [&] {
      std::lock_guard lock(mutex);
      arrived_ns = now_ns();
      arrived.notify_one();
    });
    if (!status.ok()) break;
    int64_t begin_ns = now_ns();
    status = bench.peer.write(first_block(pool, bytes, static_cast<Tag>(started.tag))).status();
    std::unique_lock lock(mutex);
    if (status.ok() && !arrived.wait_for(lock, std::chrono::milliseconds(bench.options.timeout_ms), [&] { return arrived_ns != 0; })) {
      status = deadline_exceeded("no answer to a block of {} bytes within {} ms", bytes, bench.options.timeout_ms);
    }
    if (status.ok() && i >= warmup) latencies_us.push_back(static_cast<double>(arrived_ns - begin_ns) * 1e-3 / 2);
  }
  agent.close_inbox(mine);
  BATON_RETURN_IF_ERROR(status);
  BATON_RETURN_IF_ERROR(call(bench, {.command = BenchCommand::kEchoStop}).status());
  const Distribution distribution = describe(latencies_us);
  return BenchNotification{bytes, distribution.p50, distribution.p99, *std::min_element(latencies_us.begin(), latencies_us.end()), 0};
}

Status measure_socket_echo(const LatencyBench& bench, uint64_t bytes, BenchNotification& notification) {
  BenchRequest echo{.command = BenchCommand::kRawSocketEcho};
  echo.bytes = bytes;
  echo.count = static_cast<uint64_t>(bench.options.pings);
  BATON_RETURN_IF_ERROR(bench.channel.send(encode(echo)));
  std::vector<double> latencies_us;
  std::vector<std::byte> buffer(bytes);
  for (int32_t i = 0; i < bench.options.pings; ++i) {
    BATON_ASSIGN_OR_RETURN(double seconds, bench.socket->round_trip(buffer.data(), bytes));
    latencies_us.push_back(seconds * 1e6 / 2);
  }
  notification.socket_p50_us = describe(latencies_us).p50;
  return receive(bench).status();
}

/// Ours, `count` times; in microseconds.
Result<std::vector<double>> ping(const LatencyBench& bench, PoolId pool, uint64_t bytes, Tag theirs, Tag mine, uint64_t* arrived, int32_t count) {
  BenchRequest run{.command = BenchCommand::kPongRun};
  run.count = static_cast<uint64_t>(count);
  BATON_RETURN_IF_ERROR(bench.channel.send(encode(run)));
  std::vector<double> round_trips_us;
  round_trips_us.reserve(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) {
    const int64_t begin_ns = now_ns();
    BATON_RETURN_IF_ERROR(bench.peer.write(first_block(pool, bytes, theirs)).status());
    BATON_RETURN_IF_ERROR(bench.agent.agent->wait(mine, ++*arrived));
    round_trips_us.push_back(static_cast<double>(now_ns() - begin_ns) * 1e-3);
  }
  BATON_RETURN_IF_ERROR(receive(bench).status());
  return round_trips_us;
}

/// The same without us: empty where there is no baseline for this path.
Result<std::vector<double>> raw_ping(const LatencyBench& bench, uint64_t bytes, int32_t count) {
  const auto rounds = static_cast<uint64_t>(count);
  BenchRequest pong{.command = bench.memory != nullptr ? BenchCommand::kRawMemoryPong : BenchCommand::kRawFabricPong};
  pong.bytes = bytes;
  pong.count = rounds;
  BATON_RETURN_IF_ERROR(bench.channel.send(encode(pong)));
  Result<std::vector<double>> round_trips_us = bench.memory != nullptr
                                                   ? RawBounce(bench.memory->shared()).ping(bytes, rounds, bench.options.timeout_ms)
                                                   : bench.fabric->ping(bytes, rounds, bench.options.timeout_ms);
  BATON_RETURN_IF_ERROR(receive(bench).status());
  return round_trips_us;
}

/// The target has to know where this side is.
Status attach_fabric(const LatencyBench& bench) {
  BenchRequest attach{.command = BenchCommand::kRawFabricAttach};
  attach.metadata = bench.fabric->name();
  attach.bytes = bench.fabric->remote_base();
  attach.count = bench.fabric->remote_key();
  BATON_RETURN_IF_ERROR(bench.channel.send(encode(attach)));
  BATON_RETURN_IF_ERROR(bench.fabric->progress_until([&] { return bench.channel.readable(); }));
  return receive(bench).status();
}

Result<BenchRoundTrip> measure_round_trip(const LatencyBench& bench, uint64_t block_bytes, uint64_t bytes, const char* raw_name) {
  transfer::Agent& agent = *bench.agent.agent;
  BATON_ASSIGN_OR_RETURN(Tag mine, agent.open_inbox());
  BenchRequest open{.command = BenchCommand::kPongOpen};
  open.tag = static_cast<uint32_t>(mine);
  open.block_bytes = block_bytes;
  open.bytes = bytes;
  // Back it goes between two other blocks, where there are any: else each side would copy what the other one has just written.
  open.count = std::min<uint64_t>(1, bench.options.pool_bytes / block_bytes - 1);
  BATON_ASSIGN_OR_RETURN(BenchReply opened, call(bench, open));
  BATON_ASSIGN_OR_RETURN(PoolId pool, bench.agent.pool_of(block_bytes));
  uint64_t arrived = 0;
  BenchRoundTrip result;
  result.bytes = bytes;
  result.raw_name = raw_name;
  std::vector<double> medians, raw_medians, ratios, all;
  const PinnedThread pinned(0);
  Status status;
  for (int32_t run = 0; run <= bench.options.runs && status.ok(); ++run) {  // the first warms up
    Result<std::vector<double>> ours = ping(bench, pool, bytes, static_cast<Tag>(opened.tag), mine, &arrived, bench.options.pings);
    status = ours.status();
    Result<std::vector<double>> raw = std::vector<double>();
    if (status.ok() && !result.raw_name.empty()) {
      raw = raw_ping(bench, bytes, bench.options.pings);
      status = raw.status();
    }
    if (!status.ok() || run == 0) continue;
    medians.push_back(describe(*ours).p50);
    all.insert(all.end(), ours->begin(), ours->end());
    if (raw->empty()) continue;
    raw_medians.push_back(describe(*raw).p50);
    ratios.push_back(medians.back() / raw_medians.back());
  }
  agent.close_inbox(mine);
  BATON_RETURN_IF_ERROR(status);
  BATON_RETURN_IF_ERROR(call(bench, {.command = BenchCommand::kEchoStop}).status());
  result.us = spread_of(medians);
  result.raw_us = spread_of(raw_medians);
  result.ratio = describe(ratios).p50;
  result.best_us = *std::min_element(all.begin(), all.end());
  result.p99_us = describe(std::move(all)).p99;
  return result;
}

}  // namespace

Status measure_notifications(const LatencyBench& bench, BenchPath& path) {
  BenchRequest attach{.command = BenchCommand::kAttach};
  attach.metadata = bench.agent.agent->metadata();
  BATON_ASSIGN_OR_RETURN(BenchReply attached, call(bench, attach));
  if (attached.text != path.transport) {
    return internal_error("this side writes over {}, the target over {}", path.transport, attached.text);
  }
  if (bench.memory == nullptr && bench.fabric != nullptr) BATON_RETURN_IF_ERROR(attach_fabric(bench));
  const char* raw_name = bench.memory != nullptr ? "memcpy and a cache line" : bench.fabric != nullptr ? "libfabric" : "";
  for (uint64_t bytes : kSizes) {
    const uint64_t block_bytes = smallest_with_room(bench.options, bytes);
    if (block_bytes == 0) continue;
    BATON_ASSIGN_OR_RETURN(BenchRoundTrip round_trip, measure_round_trip(bench, block_bytes, bytes, raw_name));
    path.round_trips.push_back(std::move(round_trip));
    BATON_ASSIGN_OR_RETURN(BenchNotification notification, measure_notification(bench, block_bytes, bytes));
    if (bench.socket != nullptr) BATON_RETURN_IF_ERROR(measure_socket_echo(bench, bytes, notification));
    path.notifications.push_back(notification);
  }
  return {};
}

Status measure_read_latency(const LatencyBench& bench, const std::function<Result<int64_t>(uint64_t, uint64_t)>& read_one, BenchPath& path) {
  for (uint64_t bytes : kSizes) {
    const uint64_t block_bytes = smallest_with_room(bench.options, bytes);
    if (block_bytes == 0) continue;
    std::vector<double> latencies_us;
    const int32_t warmup = std::min(bench.options.pings, 50);
    for (int32_t i = 0; i < warmup + bench.options.pings; ++i) {
      BATON_ASSIGN_OR_RETURN(int64_t ns, read_one(block_bytes, bytes));
      if (i >= warmup) latencies_us.push_back(static_cast<double>(ns) * 1e-3);
    }
    const Distribution distribution = describe(latencies_us);
    path.notifications.push_back({bytes, distribution.p50, distribution.p99, *std::min_element(latencies_us.begin(), latencies_us.end()), 0});
  }
  return {};
}

}  // namespace baton::ops
