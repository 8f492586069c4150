#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "worker/core_context.h"

namespace baton::worker {

/// A prefill worker as the decode side sees it: one address, one life at a time.
///
///   backing off ─▶ connecting (Hello sent) ─▶ up ─▶ backing off, with its epoch being fenced
///
/// It can be used when it is up, its layout is ours, it has told us that its path to our memory stands, and it was
/// heard of within a lease.
struct PrefillPeer {
  std::string address;
  std::shared_ptr<protocol::Channel> channel;  ///< null while backing off
  bool up = false;                             ///< its Hello is here and was accepted
  Epoch epoch{};
  std::string name;
  Status refused;                              ///< why it can't be used although it is up, or isn't up
  bool path_ready = false;                     ///< as it says itself
  protocol::PairStatus path;
  int64_t last_heard_ms = 0;
  int64_t next_attempt_ms = 0;
  int64_t backoff_ms = 0;
  bool wanted = true;
};

/// Holds the connections to the prefill workers that the routers name, and shuts out those that are lost.
class PeerTable {
 public:
  PeerTable(CoreContext& context, protocol::Network& network, std::function<protocol::Hello()> make_hello);

  /// Peers named by one router (its whole list) or by one request (added).
  void set_wanted(const protocol::Channel* router, const std::vector<std::string>& addresses);
  void forget_router(const protocol::Channel* router) { wanted_by_.erase(router); }
  void want(const std::string& address);

  /// A peer that can be used now; null with the reason otherwise. epoch 0: any life.
  PrefillPeer* usable(const std::string& address, Epoch epoch, Status* why_not);
  PrefillPeer* by_channel(const protocol::Channel* channel);
  PrefillPeer* by_epoch(Epoch epoch);

  /// The first frame of a peer's channel. A failure closes the channel.
  Status on_hello(PrefillPeer& peer, const protocol::Hello& hello);
  void on_load(PrefillPeer& peer, const protocol::Load& load);
  /// The channel is gone. The epoch it had (kNone: it never was up) is being fenced from now on.
  Epoch on_closed(PrefillPeer& peer, const Status& status);
  /// True when that life can write no more: its blocks may be reused.
  bool on_fence_done(Epoch epoch, const Status& status);

  /// Reconnects and fences again. True when something about the pairs changed since the last call.
  bool tick();
  void close_all();

  void fill(protocol::Load* load) const;
  size_t fencing() const { return fences_.size(); }
  size_t size() const { return peers_.size(); }
  bool busy() const;  ///< something is on its way that a timer watches

 private:
  struct Fence {
    bool in_flight = false;
    int64_t next_try_ms = 0;
    int64_t backoff_ms = 0;
    int64_t since_ms = 0;
    std::string name;
  };

  void connect(PrefillPeer& peer);
  void back_off(PrefillPeer& peer);
  void start_fence(Epoch epoch, Fence& fence);
  Status readiness(const PrefillPeer& peer) const;

  CoreContext& context_;
  protocol::Network& network_;
  std::function<protocol::Hello()> make_hello_;
  Random jitter_;
  std::map<std::string, PrefillPeer> peers_;  // by address
  std::map<const protocol::Channel*, std::set<std::string>> wanted_by_;
  std::map<Epoch, Fence> fences_;
  std::map<std::string, bool> last_ready_;
};

}  // namespace baton::worker
