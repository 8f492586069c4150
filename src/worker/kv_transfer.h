#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/random.h"
#include "base/status.h"
#include "transfer/include/baton/transfer.h"

namespace baton::worker {

/// One write of a link, under way or done.
class KvWrite {
 public:
  virtual ~KvWrite() = default;
  /// What the receiver's inbox will count, known at once.
  virtual uint64_t messages() const = 0;
  virtual uint64_t bytes() const = 0;
  virtual void cancel() = 0;
  /// Once done: nothing of it can still reach the peer's memory (see transfer::Transfer::settled).
  virtual bool settled() const = 0;
};

/// The way from this worker's KV pool into one peer's. Dropping it ends what is under way, in the background.
class KvLink {
 public:
  virtual ~KvLink() = default;
  /// `write.local_pool` and `remote_pool` are filled in. `on_done` runs once, on any thread, if ok was returned.
  virtual Result<std::shared_ptr<KvWrite>> write(transfer::BlockWrite write,
                                                 std::function<void(const Status&)> on_done) = 0;
  virtual bool alive() const = 0;
  virtual transfer::PathInfo path() const = 0;
  virtual transfer::PeerStats stats() const = 0;
};

/// What the handoff needs of the transfer agent, and no call of it blocks: the engine's thread makes them. The
/// worker puts the agent behind it, the simulation a model of a bad network. Callbacks may run on any thread, or
/// inside the call, and do nothing but post to the mailbox.
class KvTransfer {
 public:
  virtual ~KvTransfer() = default;

  /// The agent's; it is the worker's epoch, too.
  virtual Epoch epoch() const = 0;
  /// For Hello. Made anew for every Hello: a peer that was fenced needs a new one.
  virtual std::string metadata() const = 0;
  virtual uint32_t pool() const = 0;
  /// For people: "shm, tcp".
  virtual std::string describe() const = 0;
  /// As it was a little while ago.
  virtual transfer::AgentStats stats() = 0;

  /// unavailable while the last link to that peer is still being taken down: try again later.
  virtual Result<std::unique_ptr<KvLink>> connect(Epoch peer, const std::string& metadata, uint32_t remote_pool) = 0;

  virtual Result<transfer::Tag> open_inbox() = 0;
  virtual Status expect(transfer::Tag tag, uint64_t messages, std::function<void()> on_complete) = 0;
  virtual void close_inbox(transfer::Tag tag) = 0;

  /// Agent::fence in the background. `on_done(ok)`: nothing from that peer touches memory any more.
  virtual void fence(Epoch peer, std::function<void(const Status&)> on_done) = 0;
};

}  // namespace baton::worker
