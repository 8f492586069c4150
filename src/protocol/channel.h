#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/status.h"

namespace baton::protocol {

class Frame;  // baton.pb.h

constexpr uint32_t kProtocolVersion = 2;

/// Bounds of every channel; the same on both ends.
struct ChannelLimits {
  size_t max_frame_bytes = 64u << 20;
  /// Frames queued for sending; beyond it send() fails and the channel should be closed by its owner: the
  /// peer does not read.
  size_t max_queued_bytes = 256u << 20;
};

/// One ordered, bidirectional stream of frames to another process. send() may be called from any thread.
class Channel {
 public:
  virtual ~Channel() = default;
  /// Queues a frame and returns at once. unavailable: closed; resource_exhausted: the queue is full.
  virtual Status send(const Frame& frame) = 0;
  /// Ends the stream; on_closed follows on both ends. Idempotent.
  virtual void close() = 0;
  /// The address as given to connect(), or something that tells accepted channels apart.
  virtual const std::string& address() const = 0;
};

/// Callbacks of one channel. Calls for one channel never overlap; on_closed is the last one and comes exactly once.
/// They run on the network's threads (or inside pump() of the in-memory network) and must not block.
struct ChannelHandler {
  std::function<void(std::shared_ptr<Channel>, Frame&&)> on_frame;
  std::function<void(std::shared_ptr<Channel>, Status)> on_closed;
  /// If set: until this time of the SteadyClock, looked at after every on_frame, the network's thread polls without
  /// going to sleep. That costs a core and saves the time it takes to wake up.
  std::shared_ptr<const std::atomic<int64_t>> awake_until_ns = {};
};

/// Stops accepting and closes all accepted channels when destroyed.
class Listener {
 public:
  virtual ~Listener() = default;
  /// With the port that was really bound.
  virtual const std::string& address() const = 0;
};

/// Makes channels: over gRPC (make_grpc_network) or inside one process (InMemoryNetwork, for tests and simulation).
class Network {
 public:
  virtual ~Network() = default;
  /// Addresses: "host:port" (port 0: any free one) or "unix:/path". `handler` serves every accepted channel.
  virtual Result<std::unique_ptr<Listener>> listen(const std::string& address, ChannelHandler handler) = 0;
  /// Returns at once; frames sent before the connection stands are queued. If it cannot be made in
  /// `connect_timeout_ms`, on_closed(unavailable) follows. A peer process that dies closes its channels within
  /// 1 s (socket closed) or within the keep-alive time (host gone).
  virtual std::shared_ptr<Channel> connect(const std::string& address, ChannelHandler handler,
                                           int64_t connect_timeout_ms = 5000) = 0;
};

std::unique_ptr<Network> make_grpc_network(ChannelLimits limits = {});

}  // namespace baton::protocol
