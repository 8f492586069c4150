#include "worker/agent_transfer.h"

#include <pthread.h>

#include <utility>

#include "base/log.h"

namespace baton::worker {

namespace {

class AgentWrite final : public KvWrite {
 public:
  explicit AgentWrite(transfer::Transfer transfer) : transfer_(std::move(transfer)) {}
  uint64_t messages() const override { return transfer_.messages(); }
  uint64_t bytes() const override { return transfer_.bytes(); }
  void cancel() override { transfer_.cancel(); }
  bool settled() const override { return transfer_.settled(); }

 private:
  transfer::Transfer transfer_;
};

}  // namespace

class AgentTransfer::Link final : public KvLink {
 public:
  Link(AgentTransfer& owner, transfer::Peer peer, Epoch epoch, uint32_t remote_pool)
      : owner_(owner), peer_(std::move(peer)), epoch_(epoch), remote_pool_(remote_pool) {}
  ~Link() override { owner_.close(epoch_, std::move(peer_)); }

  Result<std::shared_ptr<KvWrite>> write(transfer::BlockWrite write,
                                         std::function<void(const Status&)> on_done) override {
    write.local_pool = owner_.pool_;
    write.remote_pool = transfer::PoolId{remote_pool_};
    BATON_ASSIGN_OR_RETURN(transfer::Transfer transfer, peer_.write(std::move(write), std::move(on_done)));
    return std::shared_ptr<KvWrite>(std::make_shared<AgentWrite>(std::move(transfer)));
  }
  bool alive() const override { return peer_.alive(); }
  transfer::PathInfo path() const override { return peer_.path(); }
  transfer::PeerStats stats() const override { return peer_.stats(); }

 private:
  AgentTransfer& owner_;
  transfer::Peer peer_;
  const Epoch epoch_;
  const uint32_t remote_pool_;
};

AgentTransfer::AgentTransfer(transfer::Agent& agent, transfer::PoolId pool, bool background)
    : agent_(agent), pool_(pool), background_(background) {
  if (background_) thread_ = std::thread([this] { work(); });
}

AgentTransfer::~AgentTransfer() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  not_empty_.notify_all();
  if (thread_.joinable()) thread_.join();
}

Result<std::unique_ptr<KvLink>> AgentTransfer::connect(Epoch peer, const std::string& metadata,
                                                       uint32_t remote_pool) {
  {
    std::lock_guard lock(mutex_);
    if (closing_.contains(peer)) return unavailable("the last path to this peer is still being closed");
  }
  BATON_ASSIGN_OR_RETURN(transfer::Peer connected, agent_.connect(metadata));
  if (connected.epoch() != peer) {
    run([connected] { ignore_status(connected.close()); });
    return failed_precondition("its transfer metadata is of epoch {:x}, its Hello of {:x}",
                               static_cast<uint64_t>(connected.epoch()), static_cast<uint64_t>(peer));
  }
  return std::unique_ptr<KvLink>(std::make_unique<Link>(*this, std::move(connected), peer, remote_pool));
}

/// The agent's own takes its lock, which its progress holds while it copies: too long for the engine's thread.
transfer::AgentStats AgentTransfer::stats() {
  bool ask = false;
  {
    std::lock_guard lock(mutex_);
    ask = !std::exchange(stats_wanted_, true);
  }
  if (ask) {
    run([this] {
      const transfer::AgentStats now = agent_.stats();
      std::lock_guard lock(mutex_);
      stats_ = now;
      stats_wanted_ = false;
    });
  }
  std::lock_guard lock(mutex_);
  return stats_;
}

void AgentTransfer::fence(Epoch peer, std::function<void(const Status&)> on_done) {
  run([this, peer, on_done = std::move(on_done)] { on_done(agent_.fence(peer)); });
}

void AgentTransfer::close(Epoch epoch, transfer::Peer peer) {
  {
    std::lock_guard lock(mutex_);
    ++closing_[epoch];
  }
  run([this, epoch, peer = std::move(peer)] {
    Status status = peer.close();
    if (!status.ok()) log_debug("closing the path to {}: {}", peer.name(), status.to_string());
    std::lock_guard lock(mutex_);
    if (--closing_[epoch] == 0) closing_.erase(epoch);
  });
}

void AgentTransfer::run(std::function<void()> job) {
  if (!background_) {
    job();
    return;
  }
  {
    std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  not_empty_.notify_one();
}

void AgentTransfer::work() {
  pthread_setname_np(pthread_self(), "baton-janitor");
  std::unique_lock lock(mutex_);
  for (;;) {
    not_empty_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    auto jobs = std::exchange(jobs_, {});
    if (jobs.empty()) return;  // stopping, and everything is done
    lock.unlock();
    for (auto& job : jobs) job();
    jobs.clear();
    lock.lock();
  }
}

}  // namespace baton::worker
