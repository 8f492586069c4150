#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "worker/kv_transfer.h"

namespace baton::worker {

/// KvTransfer over a transfer agent. What may block (closing a peer, fencing one: a second at most) runs on a
/// thread of its own, in order.
class AgentTransfer final : public KvTransfer {
 public:
  /// `agent` must outlive this; `pool` is the KV pool there. `background` false: everything runs inside the call, for
  /// an agent without threads (simulation).
  AgentTransfer(transfer::Agent& agent, transfer::PoolId pool, bool background = true);
  ~AgentTransfer() override;

  Epoch epoch() const override { return agent_.epoch(); }
  std::string metadata() const override { return agent_.metadata(); }
  uint32_t pool() const override { return static_cast<uint32_t>(pool_); }
  std::string describe() const override { return agent_.describe(); }
  transfer::AgentStats stats() override;
  Result<std::unique_ptr<KvLink>> connect(Epoch peer, const std::string& metadata, uint32_t remote_pool) override;
  Result<transfer::Tag> open_inbox() override { return agent_.open_inbox(); }
  Status expect(transfer::Tag tag, uint64_t messages, std::function<void()> on_complete) override {
    return agent_.expect(tag, messages, std::move(on_complete));
  }
  void close_inbox(transfer::Tag tag) override { agent_.close_inbox(tag); }
  void fence(Epoch peer, std::function<void(const Status&)> on_done) override;

 private:
  class Link;

  /// Queues a job or runs it. Jobs are bounded by peers: one close per link, one fence per lost peer at a time.
  void run(std::function<void()> job);
  void close(Epoch epoch, transfer::Peer peer);
  void work();

  transfer::Agent& agent_;
  const transfer::PoolId pool_;
  const bool background_;
  std::mutex mutex_;
  std::condition_variable not_empty_;
  std::vector<std::function<void()>> jobs_;
  std::map<Epoch, int> closing_;  // links being closed, by peer
  transfer::AgentStats stats_;
  bool stats_wanted_ = false;  // a job will bring new ones
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace baton::worker
