#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <variant>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "protocol/baton.pb.h"
#include "protocol/channel.h"

namespace baton::worker {

struct FrameArrived {
  std::shared_ptr<protocol::Channel> channel;
  protocol::Frame frame;
};
struct ChannelClosed {
  std::shared_ptr<protocol::Channel> channel;
  Status status;
};
/// One of a prefill handoff's writes has ended.
struct WriteDone {
  uint64_t prefill_id = 0;  ///< PrefillSide's
  uint32_t write = 0;       ///< index of the write in its handoff
  Status status;
};
/// All messages of one of our grants have arrived.
struct InboxComplete {
  uint64_t handoff = 0;
};
struct FenceDone {
  Epoch peer{};
  Status status;
};
using Event = std::variant<FrameArrived, ChannelClosed, WriteDone, InboxComplete, FenceDone>;

/// Everything that other threads tell the engine's thread. Frames are bounded by bytes; the other events are as many
/// as there are writes, grants and channels, which have bounds of their own, and are never lost.
class Mailbox {
 public:
  explicit Mailbox(size_t max_frame_bytes) : max_frame_bytes_(max_frame_bytes) {}

  /// What comes after a HeadsUp finds the taker awake, and the network's thread too, if it comes within `awake_ms`:
  /// they poll until the next frame. 0, the default: they sleep as always. Before anything is posted.
  void set_awake_ms(int64_t awake_ms) { awake_ms_ = awake_ms; }

  /// False when too many bytes wait: the sender floods us and its channel should be closed.
  [[nodiscard]] bool post_frame(std::shared_ptr<protocol::Channel> channel, protocol::Frame frame);
  void post(Event event);
  /// Takes everything, in order; waits up to `timeout_ns` (0: not at all) when there is nothing. The last `awake_ns` of
  /// that it polls: who sleeps wakes up late.
  std::vector<Event> take(int64_t timeout_ns, int64_t awake_ns = 0);
  /// Ends one wait.
  void wake();
  /// Nobody takes any more: drops what there is and all that comes.
  void close();

  /// What a channel's owner passes to listen() and connect(): everything goes into `mailbox`.
  static protocol::ChannelHandler handler(std::shared_ptr<Mailbox> mailbox);

 private:
  void note(const protocol::Frame& frame);

  const size_t max_frame_bytes_;
  int64_t awake_ms_ = 0;
  std::atomic<int64_t> awake_until_ns_{0};
  std::atomic<bool> ready_{false};  // something was posted, or wake() was called
  std::mutex mutex_;
  std::condition_variable not_empty_;
  std::vector<Event> events_;
  size_t frame_bytes_ = 0;
  bool closed_ = false;
};

}  // namespace baton::worker
