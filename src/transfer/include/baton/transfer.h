#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/random.h"
#include "base/status.h"

/// Baton's KV transfer library: moves blocks from a pool of this process into a pool of another one,
/// one-sided, over the best path the two have, and tells the receiver when everything is there. And the
/// other way: Peer::read().
///
/// The unit is "the same byte range of many blocks". A receiver *opens an inbox* (a 32-bit tag of its
/// own choosing space) and hands tag and block ids to the sender out of band; the sender writes with that
/// tag and reports, out of band again, how many messages it took (Transfer::messages). The receiver waits
/// until that many have arrived. Nothing relies on order: EFA delivers out of order, several rails never
/// keep it.
///
///   receiver                                   sender
///   tag = agent.open_inbox()      --(oob)-->   transfer = peer.write({..., .tag = tag})
///   agent.expect(tag, n, done)   <--(oob)--    n = transfer.messages()
///
/// Threads: every function may be called from any thread. Callbacks run on the agent's progress thread:
/// they must be short and must not call back into the agent except where said otherwise.
namespace baton::transfer {

enum class MemoryKind : uint8_t { kHost = 0, kCuda = 1 };

struct AgentConfig {
  /// Shown in logs and errors: "prefill-0".
  std::string name = "agent";
  /// "auto" or one of: shm, tcp, efa, verbs, cuda_ipc, sim, and for GPU memory through pinned host memory staged:shm,
  /// staged:tcp, staged:efa, staged:verbs. A path that is not possible is an error, never replaced.
  std::string transport = "auto";
  /// Host part of the address that tcp rails bind to and advertise. Empty: decided by the provider.
  std::string bind_address = {};
  /// "auto" may fall to TCP between hosts only when this is set or the machine has no RDMA device.
  bool allow_tcp = true;
  /// NICs to use; 0: what the topology suggests (1 where nothing is known).
  uint32_t rails = 0;
  /// Bounds: posted and unfinished messages per rail, queued transfers per agent, peers' metadata size.
  uint32_t max_inflight_per_rail = 256;
  uint32_t max_queued_transfers = 65536;
  uint32_t max_metadata_bytes = 1u << 20;
  /// Pieces of reads (up to 4096 blocks each) that this agent serves for all its peers at once; one peer has at most 16 under
  /// way. More are refused with resource_exhausted; 0: all are.
  uint32_t max_served_reads = 1024;
  /// Bound for a transfer that names no deadline.
  int64_t default_timeout_ms = 30'000;
  /// A transfer that is over its deadline (or cancelled) while some of it is under way waits for that to
  /// end. When nothing at all has come back from the peer for this long, the path to it is broken off.
  int64_t stall_timeout_ms = 1'000;
  /// How long a thread inside Transfer::wait() or Agent::wait() looks by itself, and moves things along, before it sleeps. Longer gives
  /// less latency for CPU time; 0: it sleeps at once. An agent that nobody waits at sleeps, whatever this says.
  int64_t poll_us = 100;
  /// Thread blocks that a copy between GPUs may take; 0: as many as make it fast. 16 leave the GPU to computing and are
  /// nearly as fast.
  uint32_t cuda_max_ctas = 0;
  /// CUDA's driver library; empty: libcuda.so.1. Opened when the first GPU memory is registered.
  std::string cuda_library = {};
  /// For tests and diagnosis: what this agent writes is hashed before it goes out, and compared in the peer's memory when it
  /// is delivered, block by block. A tagged transfer then counts one message more, which comes only when all its blocks
  /// are right; one with a wrong block ends with kDataLoss and its inbox never gets full. Until then the blocks must not
  /// change on either side, nor be written by anybody else. The peer needs no setting. Costs: docs/performance.md.
  bool integrity = false;
  /// No thread: the owner calls progress(). For simulations and tests.
  bool manual_progress = false;

  Status validate() const;
};

/// One registration of memory, undone when the last copy goes away (after what is in flight has ended).
/// The memory itself belongs to the caller and must outlive it.
class MemoryRegion {
 public:
  MemoryRegion() = default;
  explicit operator bool() const { return impl_ != nullptr; }
  std::byte* data() const;
  size_t bytes() const;

  class Impl;
  explicit MemoryRegion(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
  const std::shared_ptr<Impl>& impl() const { return impl_; }

 private:
  std::shared_ptr<Impl> impl_;
};

/// `count` blocks of `stride` bytes each from the start of `region`. Block b is at b * stride.
struct PoolConfig {
  MemoryRegion region;
  uint64_t stride_bytes = 0;
  uint64_t count = 0;
};

/// Names a pool of this agent; peers learn of it through metadata().
enum class PoolId : uint32_t {};

/// A receiver's tag: carried by every message of a transfer (it fits EFA's 4 bytes of CQ data).
enum class Tag : uint32_t { kNone = 0 };

struct BlockPair {
  uint32_t local_block = 0;
  uint32_t remote_block = 0;
};

struct BlockWrite {
  PoolId local_pool{};
  PoolId remote_pool{};
  std::vector<BlockPair> blocks;
  /// The byte range inside each block; both must lie inside the stride of both pools.
  uint64_t offset_bytes = 0;
  uint64_t length_bytes = 0;
  /// The receiver's inbox that counts the messages; kNone: not counted (a plain write).
  Tag tag = Tag::kNone;
  /// A CUevent (cudaEvent_t) of the local pool's GPU, recorded before write(): nothing is read before it is reached, and
  /// later writes to the same peer wait behind it. It must exist, and not be recorded again, until the transfer is
  /// done. Only with GPU memory. nullptr: the data is there.
  void* after = nullptr;
  /// When it must be done; never() means the agent's default timeout.
  Deadline deadline = {};
};

/// The same from a remote pool into a local one.
struct BlockRead {
  PoolId local_pool{};
  PoolId remote_pool{};
  std::vector<BlockPair> blocks;
  /// As with a write.
  uint64_t offset_bytes = 0;
  uint64_t length_bytes = 0;
  Deadline deadline = {};
};

/// One write or read under way. Cheap to copy; dropping it does not cancel.
class Transfer {
 public:
  Transfer() = default;
  explicit operator bool() const { return impl_ != nullptr; }

  bool done() const;
  /// ok once every byte is delivered to the peer's memory (and found right there, with AgentConfig::integrity), or, of a
  /// read, is in local memory; a failure names peer, rail, provider, operation.
  /// Must be done().
  Status status() const;
  /// How many counted messages reach the receiver's inbox for this transfer. Known from the moment
  /// write() returns. 0 for a read.
  uint64_t messages() const;
  uint64_t bytes() const;
  /// Blocks until done; moves things along itself for AgentConfig::poll_us. Not from a callback.
  Status wait() const;
  /// Asks for an early end with kCancelled. After done() turns true the local memory is not read and the
  /// remote memory not written any more on behalf of this transfer.
  void cancel() const;
  /// True when nothing of this transfer can still reach the peer's memory. Always so after success, and
  /// after a failure unless the path had to be broken off with bytes on the way (kUnavailable or
  /// kDeadlineExceeded): then the owner of that memory must fence() this agent before it reuses the blocks.
  /// Of a read: true when nothing of it can still reach local memory. False after a failure in which the peer has not said
  /// that it stopped: then fence() the peer before the local blocks are reused.
  /// Must be done().
  bool settled() const;

  class Impl;
  explicit Transfer(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

 private:
  std::shared_ptr<Impl> impl_;
};

/// What a path between two agents is, for logs, metrics and /health.
struct PathInfo {
  std::string transport;   ///< "shm", "tcp", "efa", "staged:tcp", ...
  std::string provider;    ///< what the library calls it: "tcp;ofi_rxm", "net", "cma"; "staged over net"
  uint32_t rails = 0;
  std::string reason;      ///< why this path: "same host", "--transport tcp", ...
  double bandwidth_bytes_per_s = 0;  ///< measured over what was transferred so far; 0: nothing yet
};

struct PeerStats {
  uint64_t writes = 0, messages = 0, bytes = 0, failures = 0, cancelled = 0;
  double busy_s = 0;  ///< time with at least one transfer under way
  uint64_t reads = 0, read_bytes = 0;  ///< beside the writes; failures and cancelled count both
};

/// A connected remote agent. Cheap to copy. Stays valid (and fails every write) after the peer is gone. Pools of GPU and
/// of host memory have a path each; connect() opens one for every kind that both sides have then, and between kinds
/// where this side has pools of the one and the peer of the other.
class Peer {
 public:
  Peer() = default;
  explicit operator bool() const { return impl_ != nullptr; }

  Epoch epoch() const;
  const std::string& name() const;
  /// The path between pools of these kinds; an empty transport when there is none, and the reason why.
  PathInfo path(MemoryKind from, MemoryKind to) const;
  PathInfo path(MemoryKind kind) const { return path(kind, kind); }
  /// That of GPU memory if there is one, else that of host memory.
  PathInfo path() const;
  PeerStats stats() const;  ///< of all its paths
  /// Checks bounds, queues and returns at once. `on_done` (optional) runs once, on the progress thread.
  /// Errors: invalid_argument (pool, block or range out of bounds), unavailable (peer is down),
  /// resource_exhausted (queue full).
  Result<Transfer> write(BlockWrite write, std::function<void(const Status&)> on_done = {}) const;
  /// Fetches blocks from the peer's pool; done() means that every byte is in local memory. The errors of write(), at once or
  /// as its status. The peer's agent writes the blocks over its own path into this process, for which it connects back the
  /// first time (so it has to reach this agent's addresses, and counts among inbound_peers); over shm they are copied from
  /// its memory without it. Nobody keeps the peer from changing the blocks meanwhile: that is to be agreed upon out of band.
  Result<Transfer> read(BlockRead read, std::function<void(const Status&)> on_done = {}) const;
  /// False after a fatal completion error of one of its paths, or close().
  bool alive() const;
  /// Fails what is queued or in flight and frees the peer's resources, then does Agent::fence() with its
  /// epoch. After the returned Status is ok nothing from or to this peer touches memory any more. Blocks
  /// for at most a second; not from a callback.
  Status close() const;

  class Impl;
  explicit Peer(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

 private:
  std::shared_ptr<Impl> impl_;
};

struct AgentStats {
  uint64_t peers = 0, regions = 0, registered_bytes = 0;
  uint64_t messages_sent = 0, bytes_sent = 0, messages_received = 0;
  uint64_t stray_messages = 0;  ///< arrived for a tag that is not open (a late write after close_inbox)
  uint64_t retries = 0;         ///< EAGAIN answers that were tried again
  uint64_t failed_transfers = 0;
  uint64_t inbound_peers = 0;   ///< agents that can write into this one now
  uint64_t fences = 0;
  uint64_t checked_blocks = 0;  ///< blocks of this agent that a writer in integrity mode had checked
  uint64_t corrupt_blocks = 0;  ///< those of them that did not hold what was sent
  uint64_t served_reads = 0;    ///< pieces of reads that this agent has served; what it wrote for them counts as sent
  uint64_t refused_reads = 0;   ///< those it did not serve: a bound, or a request that was wrong
};

/// Owns rails, endpoints, completion queues and one progress thread per rail group.
class Agent {
 public:
  /// Opens only what the configuration needs and logs what it opens and what it costs. With tcp, efa or verbs (or auto) it sets
  /// FI_TCP_MAX_RX_SIZE in the environment where that is not set (docs/transfer.md): see setenv(3) about other threads.
  static Result<std::unique_ptr<Agent>> create(AgentConfig config,
                                               const Clock& clock = SteadyClock::instance());
  /// Ends every transfer and shuts all writers out, for which it may wait a second: afterwards nothing from a peer that is
  /// alive touches registered memory (what a stopped one may still do is logged).
  virtual ~Agent() = default;

  virtual Epoch epoch() const = 0;
  /// kCuda: memory of cuMemAlloc or cudaMalloc of any one GPU. unimplemented: this build has no CUDA kernels.
  virtual Result<MemoryRegion> register_memory(std::span<std::byte> memory, MemoryKind kind) = 0;
  /// Makes a pool known to peers that get metadata() afterwards.
  virtual Result<PoolId> add_pool(PoolConfig config) = 0;

  /// What a peer needs to reach this agent and its pools: addresses, keys, epoch, layout version.
  virtual std::string metadata() const = 0;
  /// Parses and checks a peer's metadata (input from outside), picks the path, prepares it. Returns soon;
  /// the first write may still have to wait for the connection, inside its deadline.
  virtual Result<Peer> connect(std::string_view metadata) = 0;

  /// A fresh tag, unique among open inboxes and not reused for 2^31 inboxes.
  virtual Result<Tag> open_inbox() = 0;
  /// Calls `on_complete` once, when `messages` in all have arrived (at once if they have). Replaces an
  /// earlier expectation of the same tag. `on_complete` runs on the progress thread or inside this call.
  virtual Status expect(Tag tag, uint64_t messages, std::function<void()> on_complete) = 0;
  virtual uint64_t arrived(Tag tag) const = 0;
  /// Blocks until `messages` in all have arrived, as expect() would say it; beside that, or instead. With AgentConfig::poll_us this
  /// thread looks for them itself first, which is the quickest way to learn of them. deadline_exceeded (never(): the agent's default
  /// timeout), not_found: the tag is not open, or was closed meanwhile. Not from a callback.
  virtual Status wait(Tag tag, uint64_t messages, Deadline deadline = {}) = 0;
  /// Forgets the tag. Its callback does not run after this returns. Later messages count as stray.
  virtual void close_inbox(Tag tag) = 0;

  /// Shuts the agent with that epoch out: whatever it has under way towards this process's memory ends, and
  /// what it tries later with metadata that it has now is refused (metadata() made after this lets it in
  /// again; so does a read() of this agent's own). Its reads of this agent's memory end as well. ok: nothing from it
  /// touches memory any more, its blocks may be reused. unavailable: it may
  /// still write (it is stopped, or out of reach): keep the blocks in quarantine and call again. An epoch
  /// that was never seen is fenced, too: what is on its way is refused when it arrives.
  /// Blocks for at most a second; not from a callback.
  virtual Status fence(Epoch peer) = 0;

  /// One turn of the work that the progress thread does; returns how much happened. Only with
  /// manual_progress. Runs callbacks.
  virtual size_t progress() = 0;

  virtual AgentStats stats() const = 0;
  /// The transport this agent offers, for the log and /health.
  virtual std::string describe() const = 0;
};

}  // namespace baton::transfer
