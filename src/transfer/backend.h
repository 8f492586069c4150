#pragma once

#include <poll.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/random.h"
#include "base/status.h"
#include "transfer/include/baton/transfer.h"
#include "transfer/integrity.h"
#include "transfer/metadata.h"
#include "transfer/plan.h"
#include "transfer/reads.h"

/// What a transport has to do. Everything else (windows, deadlines, retries, cancel, counting, path
/// choice, statistics) lives once, above this line.
///
/// Threads: all calls are made under the agent's lock, one at a time, except BackendRegion's destructor,
/// which may run anywhere. No call blocks on a peer.
namespace baton::transfer {

/// One registration of memory with one backend; closing it is its destructor's job.
class BackendRegion {
 public:
  virtual ~BackendRegion() = default;
  /// What a peer adds offsets to, and the key it shows.
  uint64_t remote_base = 0;
  uint64_t remote_key = 0;
  /// What the backend wants with a local buffer (libfabric's descriptor).
  void* local_descriptor = nullptr;
  std::byte* data = nullptr;
};

/// A pool of this agent, as backends see it.
struct LocalPool {
  uint32_t id = 0;
  MemoryRegion region;
  uint64_t stride_bytes = 0;
  uint64_t count = 0;
};

struct BackendMessage {
  std::span<const Segment> segments;
  /// Instead of segments, where PlanLimits::min_listed_bytes asks for it: `range` of these.
  std::span<const BlockPair> blocks;
  BlockRange range;
  uint64_t remote_end = 0;  ///< with `blocks`: where the last of them ends in the remote pool
  uint64_t bytes = 0;
  const BackendRegion* local = nullptr;  ///< the region of the local pool
  uint32_t remote_pool = 0;
  Tag tag = Tag::kNone;
  void* after = nullptr;  ///< BlockWrite::after
  uint64_t cookie = 0;    ///< comes back with the completion
  /// Nobody asks for its end soon, and progress() is called all the time: it may be confirmed together with others.
  bool end_can_wait = false;
  bool read = false;      ///< the other way, from the remote pool into the local one (Backend::reads_directly)
};

enum class PostResult : uint8_t {
  kPosted,  ///< a completion will follow, unless the link is closed first
  kAgain,   ///< not now; try after progress()
  kFull,    ///< a window of the link's own is full; a completion will open it
};

/// The outgoing half of a pair: writes into one peer. Its destructor closes it for certain: afterwards
/// the backend does not read local memory on its behalf, and no completion is reported for it.
class Link {
 public:
  virtual ~Link() = default;
  /// A failure is final for the link.
  virtual Result<PostResult> post(const BackendMessage& message) = 0;
  /// Ends a batch of posts.
  virtual void flush() {}
  virtual bool ready() const = 0;
  /// True when an operation that was posted and not completed may still write to the peer after this
  /// side has closed the link. (TCP: bytes are in the kernel's buffers. Not so with synchronous copies.)
  virtual bool late_writes_possible() const = 0;
  /// False while the destructor could not keep its promise: wait until what is posted has ended.
  virtual bool closable() const { return true; }
  /// The peer's pool in this process's memory, where it is mapped; empty: it is not. Good while the link is, once ready().
  virtual std::span<std::byte> mapped_pool(uint32_t pool) const {
    (void)pool;
    return {};
  }
  /// Its name in Backend::checks() and Backend::reads().
  virtual CheckChannel::Connection connection() const = 0;

  void* owner = nullptr;
};

/// Called from Backend::progress(), with the agent's lock held.
class BackendEvents {
 public:
  virtual ~BackendEvents() = default;
  virtual void on_posted_done(Link& link, uint64_t cookie, const Status& status) = 0;
  virtual void on_link_failed(Link& link, const Status& status) = 0;
  /// `count` messages for `tag` arrived and all their bytes are visible.
  virtual void on_arrived(uint32_t tag, uint64_t count) = 0;
};

struct BackendLimits {
  PlanLimits plan;
  uint32_t max_inflight_messages = 256;
  uint64_t max_inflight_bytes = 32u << 20;
  /// So many messages may be under way whatever their size.
  uint32_t min_inflight_messages = 1;
  /// How much one peer may post before the others have their turn.
  uint64_t max_burst_bytes = 8u << 20;
};

/// What every backend gets to know of its agent.
struct BackendContext {
  std::string agent_name;
  Epoch epoch = Epoch::kNone;
  const Clock* clock = nullptr;
  AgentConfig config;
  /// The pools that exist now; registered with the backend when they are asked for.
  virtual ~BackendContext() = default;
  virtual std::vector<LocalPool> pools() const = 0;
  virtual Result<const BackendRegion*> backend_region(const LocalPool& pool, class Backend& backend) = 0;
  /// The serial number that metadata() gives out now.
  virtual uint64_t serial() const = 0;
  /// True when something was handed over that this turn of progress has not seen.
  virtual bool has_news() const { return false; }
  /// Ends the progress thread's sleep; from any thread.
  virtual void wake() = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const std::string& transport() const = 0;
  virtual const std::string& provider() const = 0;
  virtual uint32_t rails() const { return 1; }
  virtual const BackendLimits& limits() const = 0;
  /// The same for a peer with this address, where that makes a difference.
  virtual BackendLimits limits_for(const std::string& address) const {
    (void)address;
    return limits();
  }
  /// Between pools of which kinds of memory it moves blocks.
  virtual bool moves(MemoryKind from, MemoryKind to) const {
    return from == MemoryKind::kHost && to == MemoryKind::kHost;
  }
  /// One line for the log and /health.
  virtual std::string describe() const = 0;

  virtual Result<std::unique_ptr<BackendRegion>> register_memory(std::span<std::byte> memory,
                                                                 MemoryKind kind) = 0;
  /// What peers need to know to connect (Metadata::Offer::address).
  virtual std::string address() const = 0;
  /// Starts connecting; the link becomes ready() during progress(), or fails. An error here means that
  /// this path cannot be: the caller may look at the next one.
  virtual Result<std::unique_ptr<Link>> open_link(const Metadata& peer,
                                                  const Metadata::Offer& offer) = 0;
  /// Ends what comes in from agent `peer`, and refuses what it opens with metadata up to `serial`.
  /// ok: nothing from it touches memory any more. unavailable: not certain yet, call again.
  virtual Status fence(Epoch peer, uint64_t serial) = 0;
  /// The agent closes: the same for everybody, and nobody is let in any more.
  virtual Status shut_out() = 0;

  /// Moves things along without blocking; returns how many things happened.
  virtual size_t progress(BackendEvents& events) = 0;
  /// Adds what to wait on. Returns how long the thread may sleep at most, in ns; 0: do not sleep.
  virtual int64_t prepare_wait(std::vector<pollfd>& fds) = 0;
  /// Nobody looks until one of these is readable or progress() is called. False: something has come in meanwhile, do not sleep.
  virtual bool rest() { return true; }
  /// Somebody waits for the end of a message whose end could wait.
  virtual void hurry() {}
  /// True where posting a small message takes no longer than waking a thread would.
  virtual bool posts_at_once() const { return false; }
  /// The part of progress() that ends what was posted just now, where that needs nobody else.
  virtual size_t finish_posted(BackendEvents& events) {
    (void)events;
    return 0;
  }
  virtual uint64_t inbound_peers() const = 0;

  virtual CheckChannel& checks() = 0;
  virtual ReadChannel& reads() = 0;
  /// True where a link takes a message that reads: the peer has no part in it. Nothing of it may reach local memory once its link
  /// is closed.
  virtual bool reads_directly() const { return false; }
  /// Held while a check reads: in a simulation other agents' threads write this memory.
  virtual std::unique_lock<std::mutex> hold_writes() { return {}; }
  /// Memory that the CPU cannot read, for checks: some of the `bytes` at `offset` of `region`, at least one. Good until the
  /// next call.
  virtual Result<std::span<const std::byte>> read_back(const BackendRegion& region, uint64_t offset, uint64_t bytes) {
    (void)region, (void)offset, (void)bytes;
    return unimplemented("{} has no way to read this memory back", transport());
  }
};

}  // namespace baton::transfer
