#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/unique_handle.h"
#include "transfer/backend.h"
#include "transfer/inbox.h"
#include "transfer/include/baton/transfer.h"
#include "transfer/metadata.h"
#include "transfer/plan.h"

/// The layer above the backends: queues, windows, deadlines, cancel, retries, counting, statistics.
///
/// Locks, in the order in which they are taken:
///   AgentCore::mutex_           backends, links, peers' active transfers; held for one turn of progress
///   PeerCore::queue_mutex       what write() has handed over and progress has not seen
///   AgentCore::handover_mutex_  pools, and which peers have something new
///   InboxTable's own
/// Callbacks run with none of them held.
namespace baton::transfer {

class AgentCore;
class PeerCore;

/// What integrity mode keeps of one transfer, on the writer's side.
struct OutgoingCheck {
  explicit OutgoingCheck(uint64_t bytes) : block_bytes(bytes), hasher(bytes) {}
  const uint64_t block_bytes;
  uint64_t remote_stride_bytes = 0;
  uint64_t block_count = 0;
  BlockHasher hasher;
  uint32_t hashed_messages = 0;
  std::vector<CheckedBlock> blocks;  // in the order of the plan
  size_t next_block = 0;             // the first that no Check has named
  // A Check is under way like a message: it has a slot, and counts as one in flight.
  bool unsent = false;  // in PeerCore::unsent_checks
  uint64_t id = 0;      // of the Check that has no answer yet; 0: none
  uint32_t slot = 0;
  uint64_t bad_blocks = 0;
  CheckResult first_bad;
};

/// A read that the peer is asked for, on the reader's side.
struct OutgoingRead {
  BlockRead what;
  size_t next_block = 0;       // the first that no request has named
  std::vector<uint32_t> tags;  // of the requests that have not brought all they will
  bool asked_for_all() const { return next_block == what.blocks.size(); }
};

/// Of a write that is done for a reader: whom to tell.
struct ServedFor {
  Backend* backend = nullptr;
  ReadChannel::Connection connection = 0;
};

}  // namespace baton::transfer

class baton::transfer::MemoryRegion::Impl {
 public:
  Impl(std::span<std::byte> memory, MemoryKind kind) : memory_(memory), kind_(kind) {}
  std::span<std::byte> memory() const { return memory_; }
  MemoryKind kind() const { return kind_; }
  /// Registers with `backend` the first time. Under the agent's lock.
  Result<const BackendRegion*> with(Backend& backend);

 private:
  const std::span<std::byte> memory_;
  const MemoryKind kind_;
  std::vector<std::pair<const Backend*, std::unique_ptr<BackendRegion>>> registrations_;
};

class baton::transfer::Transfer::Impl {
 public:
  enum class State : uint32_t { kPending, kDone };

  // Written by write(), then constant.
  std::weak_ptr<AgentCore> agent;
  std::shared_ptr<PeerCore> peer;
  WritePlan plan;  // emptied when done
  uint64_t message_count = 0;
  uint64_t block_count = 0;
  uint64_t remote_end = 0;
  bool counted_check = false;
  uint64_t byte_count = 0;
  MemoryRegion local_region;
  uint32_t remote_pool = 0;
  Tag tag = Tag::kNone;
  void* after = nullptr;
  int64_t deadline_ns = 0;
  bool is_read = false;
  std::unique_ptr<OutgoingRead> read;  // not with a direct one: that has a plan, as a write does
  ServedFor served;
  bool end_can_wait = false;

  bool wants_more() const { return read != nullptr ? !read->asked_for_all() : next_message < message_count; }
  std::string path() const;  // "write to 'decode-0' over tcp (net)"

  // Owned by progress, under the agent's lock.
  const BackendRegion* local = nullptr;
  uint32_t next_message = 0;
  uint32_t inflight = 0;
  bool stopped = false;  // nothing more is posted; `outcome` says why
  Status outcome;
  bool unsettled = false;
  std::unique_ptr<OutgoingCheck> check;  // integrity mode
  std::function<void(const Status&)> on_done;

  // The way out: written once before `state` turns.
  Status status;
  bool settled = true;
  std::atomic<State> state{State::kPending};
};

namespace baton::transfer {

using TransferPointer = std::shared_ptr<Transfer::Impl>;

/// One remote agent, in one of its lives, over one backend, from one kind of memory to one.
class PeerCore {
 public:
  enum class State { kOpen, kClosing, kClosed };  // closing: waits for what a shared endpoint still does

  // Constant after connect().
  std::weak_ptr<AgentCore> agent;
  Metadata metadata;
  MemoryKind from = MemoryKind::kHost;
  MemoryKind to = MemoryKind::kHost;
  Backend* backend = nullptr;  // valid while the agent lives
  std::string transport;
  std::string provider;
  uint32_t rails = 1;
  bool posts_at_once = false;
  std::string reason;
  BackendLimits limits;

  std::mutex queue_mutex;
  std::deque<TransferPointer> incoming;
  Status down;  // why writes are refused
  std::atomic<bool> alive{true};

  // Under the agent's lock.
  State state = State::kOpen;
  std::unique_ptr<Link> link;
  std::deque<TransferPointer> to_post;  // in order; those that stopped are skipped at the front
  struct InFlight {
    enum class Kind : uint8_t { kMessage, kCheck, kRead };
    TransferPointer transfer;
    uint64_t bytes = 0;
    Kind kind = Kind::kMessage;
  };
  std::vector<InFlight> inflight;
  std::vector<uint32_t> free_slots;
  size_t inflight_count = 0;
  uint64_t inflight_bytes = 0;
  std::deque<TransferPointer> unsent_checks;
  uint32_t open_checks = 0;  // without an answer
  std::deque<TransferPointer> unsent_reads;
  uint32_t open_reads = 0;  // without an Ended
  std::pair<uint64_t, size_t> introduced{0, 0};  // by which metadata: serial, number of pools; 0: not yet
  bool wanted = false;   // by connect(); a path that was opened for readers only goes when they go
  size_t readers = 0;
  int64_t last_progress_ns = 0;
  int64_t busy_since_ns = 0;
  Status failure;  // set by an event; acted on at the end of the turn
  bool busy = false;   // in AgentCore::busy_
  bool again = false;  // the backend said "not now" last time
  int64_t again_sleep_ns = 0;  // after which it is asked again if nothing else happens

  std::atomic<uint64_t> writes{0}, messages{0}, bytes{0}, failures{0}, cancelled{0}, reads{0}, read_bytes{0};
  std::atomic<int64_t> busy_ns{0};
};

/// The paths to one remote agent, by kinds of memory. Constant after connect(); at least one is there.
struct PeerPaths {
  static constexpr size_t kPaths = 4;
  std::array<std::shared_ptr<PeerCore>, kPaths> cores;
  std::array<Status, kPaths> missing;  // why there is none

  static size_t index(MemoryKind from, MemoryKind to) { return 2 * static_cast<size_t>(from) + static_cast<size_t>(to); }
  const std::shared_ptr<PeerCore>& of(MemoryKind from, MemoryKind to) const { return cores[index(from, to)]; }
  /// That between GPU memories if there is one, else that between host memories.
  const PeerCore& main() const {
    for (size_t i : {3, 0, 2}) {
      if (cores[i] != nullptr) return *cores[i];
    }
    return *cores[1];
  }
};

class AgentCore final : public BackendEvents, public std::enable_shared_from_this<AgentCore> {
 public:
  AgentCore(AgentConfig config, const Clock& clock);
  ~AgentCore() override;

  struct Context;
  using BackendFactory =
      std::function<Result<std::unique_ptr<Backend>>(std::shared_ptr<BackendContext>)>;
  /// Opens the backends (by config.transport, or the one that `factory` makes) and starts the thread.
  Status start(const BackendFactory& factory);
  void stop();

  Epoch epoch() const { return epoch_; }
  Result<MemoryRegion> register_memory(std::span<std::byte> memory, MemoryKind kind);
  Result<PoolId> add_pool(PoolConfig config);
  std::string metadata() const;
  Result<PeerPaths> connect(std::string_view metadata);
  Result<TransferPointer> write(const PeerPaths& paths, BlockWrite write, std::function<void(const Status&)> on_done,
                                bool integrity, bool at_once = false);
  Result<TransferPointer> read(const PeerPaths& paths, BlockRead read, std::function<void(const Status&)> on_done);
  void cancel(const TransferPointer& transfer);
  Status close_peer(const PeerPaths& paths);
  Status fence(Epoch peer);
  size_t progress();
  AgentStats stats() const;
  std::string describe() const;
  InboxTable& inboxes() { return inboxes_; }
  void close_inbox(Tag tag);
  Status wait(const Transfer::Impl& transfer);
  Status wait(Tag tag, uint64_t messages, Deadline deadline);
  const AgentConfig& config() const { return config_; }
  void wake();

 private:
  friend struct Context;

  // BackendEvents
  void on_posted_done(Link& link, uint64_t cookie, const Status& status) override;
  void on_link_failed(Link& link, const Status& status) override;
  void on_arrived(uint32_t tag, uint64_t count) override {
    inboxes_.add(tag, count);
    if (!open_reads_.empty()) on_read_arrived(tag, count);
  }

  struct PathChoice {
    Backend* backend = nullptr;
    std::unique_ptr<Link> link;
    BackendLimits limits;
    std::string reason;
  };
  Result<PathChoice> choose_path(const Metadata& peer, MemoryKind from, MemoryKind to);
  Result<std::shared_ptr<PeerCore>> open_path(const Metadata& peer, MemoryKind from, MemoryKind to);
  struct Ends {
    LocalPool local;
    Metadata::Pool remote;
    uint64_t last_remote_block = 0;
  };
  /// What the two ends of an operation are, when all its blocks lie inside.
  Result<Ends> check_ends(const Metadata& peer, PoolId local, PoolId remote, std::span<const BlockPair> blocks,
                          uint64_t offset_bytes, uint64_t length_bytes, const char* arrow) const;
  /// `at_once`: by a thread that holds no lock of the agent's.
  Status enqueue(const TransferPointer& transfer, bool at_once);
  int64_t deadline_ns(Deadline deadline) const;
  std::string metadata_now() const;  // under the lock
  Status open_backends(const BackendFactory& factory);
  Status need_cuda_backend();

  // agent_polling.cc
  void run();
  bool attended();
  void ring();
  void park(int64_t ns);
  void sleep();
  void end_sleep();
  bool rest();
  void poll_turn();
  template <typename Over>
  bool poll_until(int64_t longest_ns, const Over& over);
  void hurry(const Transfer::Impl& transfer);
  bool post_at_once(const TransferPointer& transfer);

  size_t turn();
  size_t locked_turn();
  void make_busy(const std::shared_ptr<PeerCore>& peer);
  void take_incoming();
  std::vector<TransferPointer> take_cancels();
  void cancel_now(const TransferPointer& transfer, int64_t now_ns);
  size_t post(PeerCore& peer, int64_t now_ns);
  void check_time(int64_t now_ns);
  void expire(const TransferPointer& transfer, int64_t now_ns);
  void fail_transfer(const TransferPointer& transfer, const Status& why);
  static uint32_t free_slot(PeerCore& peer);
  static void take_slot(PeerCore& peer, uint32_t slot, PeerCore::InFlight entry, int64_t now_ns);
  void release_slot(PeerCore& peer, uint64_t slot);
  void end_if_ended(const TransferPointer& transfer);
  void finish(const TransferPointer& transfer);
  void fail_peer(PeerCore& peer, const Status& why);
  void close_link(PeerCore& peer);
  int64_t next_time_ns() const;
  void run_callbacks();
  // Integrity mode (agent_integrity.cc).
  struct IncomingCheck {
    Backend* backend = nullptr;
    CheckChannel::Received received;
    BlockHasher hasher;
    LocalPool pool;
    const BackendRegion* region = nullptr;
    size_t next_block = 0;
    CheckResult result;
  };
  Status hash_next_message(Transfer::Impl& transfer);
  Status hash_memory(Backend& backend, const MemoryRegion& region, const BackendRegion* registered, uint64_t offset,
                     uint64_t bytes, BlockHasher& hasher);
  void start_check(const TransferPointer& transfer);
  size_t send_checks(PeerCore& peer);
  void give_up_check(const TransferPointer& transfer);
  size_t take_check_results();
  void on_check_result(Backend& backend, const CheckChannel::Answer& answer);
  size_t serve_checks();
  void accept_check(Backend& backend, CheckChannel::Received received);
  bool hash_incoming(IncomingCheck& check, uint64_t* budget_bytes);
  void conclude(IncomingCheck& check);
  void answer_check(Backend& backend, CheckChannel::Connection connection, CheckResult result);

  // Reads (agent_reads.cc).
  struct OpenRead {
    std::shared_ptr<PeerCore> peer;
    TransferPointer transfer;  // null: it has all it wanted
    uint32_t slot = 0;
    uint64_t bytes = 0;
    uint64_t messages = 0;  // 0: not said yet
    uint64_t arrived = 0;
    bool ended = false;     // its Ended was here, and was ok
  };
  using OpenReads = std::unordered_map<uint32_t, OpenRead>;
  struct Reader {
    Epoch epoch = Epoch::kNone;
    Status refused;  // why its metadata is no good
    Metadata metadata;
    PeerPaths paths;
    std::vector<std::shared_ptr<PeerCore>> retired;  // of earlier metadata, while something is served over them
    std::unordered_map<uint32_t, TransferPointer> serving;
  };
  using ReaderKey = std::pair<Backend*, ReadChannel::Connection>;
  size_t send_reads(PeerCore& peer);
  bool send_next_read(PeerCore& peer, const TransferPointer& transfer);
  void give_up_read(const TransferPointer& transfer);
  void on_read_arrived(uint32_t tag, uint64_t count);
  void complete_read(OpenReads::iterator it);
  void let_go_of_read(OpenReads::iterator it);
  void on_read_answer(Backend& backend, const ReadChannel::Answer& answer);
  void close_reads(PeerCore& peer);
  void take_read_answers();
  size_t progress_reads();
  void accept_read(Backend& backend, ReadChannel::Received received);
  void introduce(Backend& backend, ReadChannel::Received& received);
  Result<TransferPointer> serve_read(Reader& reader, const ReadRequest& request);
  void end_served_read(const TransferPointer& transfer);
  void answer_read(Backend& backend, ReadChannel::Connection connection, ReadAnswer answer);
  void forget_reader(std::map<ReaderKey, Reader>::iterator it);
  void release_paths(std::vector<std::shared_ptr<PeerCore>> cores);

  /// Waits (without the lock) for something to happen, until `deadline_ns`; false when that is past.
  bool wait_for_turn(std::unique_lock<std::mutex>& lock, int64_t deadline_ns);

  const AgentConfig config_;
  const Clock& clock_;
  const Epoch epoch_;
  const std::string host_id_;
  InboxTable inboxes_;

  mutable std::mutex mutex_;
  std::condition_variable turned_;  // after every turn in which something happened
  uint64_t turns_ = 0;
  std::shared_ptr<Context> context_;
  std::vector<std::unique_ptr<Backend>> backends_;  // in the order of preference
  uint64_t serial_ = 1;
  std::vector<std::shared_ptr<PeerCore>> peers_;  // those with a link
  bool peer_closed_ = false;                      // one of them has none any more
  std::vector<std::shared_ptr<PeerCore>> busy_;   // those with transfers
  std::vector<PeerCore*> failed_;                 // by events of this turn
  std::set<std::pair<int64_t, TransferPointer>> deadlines_;
  std::vector<TransferPointer> done_;  // their callbacks are due
  size_t finished_ = 0;                // since the last turn
  uint64_t retries_ = 0, failed_transfers_ = 0, fences_ = 0;
  std::unordered_map<uint64_t, TransferPointer> open_checks_;  // by id
  uint64_t next_check_id_ = 1;
  std::deque<IncomingCheck> incoming_checks_;
  std::atomic<size_t> incoming_check_count_{0};
  struct CheckAnswer {
    Backend* backend;
    CheckChannel::Connection connection;
    CheckResult result;
  };
  std::deque<CheckAnswer> unsent_answers_;
  uint64_t checked_blocks_ = 0, corrupt_blocks_ = 0;
  OpenReads open_reads_;  // by tag
  std::map<ReaderKey, Reader> readers_;
  struct UnsentAnswer {
    Backend* backend;
    ReadChannel::Connection connection;
    ReadAnswer answer;
  };
  std::vector<std::pair<Backend*, ReadChannel::Answer>> read_answers_;  // of this turn
  std::deque<UnsentAnswer> unsent_read_answers_;
  std::vector<std::shared_ptr<PeerCore>> unused_paths_;  // that a reader had; closed between other things
  uint64_t open_served_reads_ = 0, served_reads_ = 0, refused_reads_ = 0;

  // What other threads hand over to progress.
  mutable std::mutex handover_mutex_;
  std::vector<LocalPool> pools_;  // only grows
  bool has_cuda_memory_ = false;
  uint64_t registered_regions_ = 0, registered_bytes_ = 0;
  std::vector<std::shared_ptr<PeerCore>> fresh_;
  std::vector<TransferPointer> cancels_;

  std::atomic<uint64_t> queued_{0};  // transfers that are not done
  std::atomic<uint64_t> messages_sent_{0}, bytes_sent_{0};
  std::atomic<bool> work_{false};
  std::atomic<bool> sleeping_{false};
  std::atomic<bool> parked_{false};
  std::atomic<int64_t> sleeps_until_ns_{0};     // on its descriptors; 0: it does not
  std::atomic<bool> callbacks_due_{false};      // left by whoever polls to the thread
  std::atomic<uint32_t> polling_{0};            // threads that wait and look
  std::atomic<int64_t> attended_until_ns_{0};
  std::atomic<int64_t> polled_until_ns_{0};
  std::atomic<int64_t> answered_ns_{0};         // when a wait for an inbox ended
  std::atomic<bool> stopping_{false};
  FileDescriptor doorbell_;
  std::vector<pollfd> poll_fds_;
  std::thread thread_;
};

/// Makes an agent whose only backend is the one that `factory` makes (sim).
Result<std::unique_ptr<Agent>> create_agent_with(AgentConfig config, const Clock& clock,
                                                 const AgentCore::BackendFactory& factory);

}  // namespace baton::transfer
