#pragma once

#include <cstdint>
#include <deque>
#include <memory>

#include "transfer/control.h"

namespace baton::transfer {

/// Control connections that are over for this side, but hold words that the other side has not taken: it is stopped, or slow. They are
/// kept until it has, so that it knows that this writer went in order; for a bounded time, and a bounded number of them. What comes in
/// is not looked at. Under the agent's lock.
class LingeringSockets {
 public:
  static constexpr size_t kMost = 64;
  static constexpr size_t kMostBytes = 16u << 20;
  static constexpr int64_t kLongestNs = 30'000'000'000;

  /// The socket is watched as `id` already, for room as well.
  void add(uint64_t id, std::unique_ptr<FrameSocket> socket, int64_t now_ns);
  /// Something happened to it. False: it is none of these.
  bool handle(uint64_t id);
  void expire(int64_t now_ns);
  size_t size() const { return sockets_.size(); }

 private:
  struct Socket {
    uint64_t id;
    std::unique_ptr<FrameSocket> socket;
    int64_t until_ns;
  };
  size_t bytes() const;
  std::deque<Socket> sockets_;  // the oldest first
};

}  // namespace baton::transfer
