#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/status.h"
#include "worker/break_even.h"
#include "worker/core_context.h"
#include "worker/peers.h"

namespace baton::worker {

/// Owns the routers' requests from Generate to their last output.
///
///   Queued ─▶ Reserved ─▶ Prefilling ─▶ Committed ─▶ Decoding ─▶ Done          (prefilled by a peer)
///     │  ▲                    │             │
///     │  └── next candidate ──┴─────────────┘  the peer gave up, died, or its lease ran out
///     └────────────────────────────────────────▶ Decoding                     (prefilled here)
///
/// and from every state to Failed or Cancelled. Reserved lasts only inside try_start(). Each attempt has an id of its
/// own (the handoff's and the engine request's), so an old grant can never be mistaken for a new one.
///
/// Blocks of a grant whose peer may still write are in quarantine until it has answered (Abort; Commit and all its
/// messages) or was shut out (PeerTable's fence).
class DecodeSide {
 public:
  DecodeSide(CoreContext& context, PeerTable& peers);

  void add_router(std::shared_ptr<protocol::Channel> channel, const protocol::Hello& hello);
  bool has_router(const protocol::Channel* channel) const { return routers_.contains(channel); }
  void on_router_closed(const protocol::Channel* channel);

  // From a router. A failure is a broken protocol: the caller closes the channel.
  Status on_generate(const protocol::Channel* channel, const protocol::Generate& generate);
  void on_cancel(const protocol::Channel* channel, uint64_t request);

  // From a prefill worker, or about one.
  void on_progress(uint64_t handoff);
  Status on_commit(const PrefillPeer& peer, const protocol::Commit& commit);
  void on_abort(const PrefillPeer& peer, const protocol::Abort& abort);
  void on_inbox_complete(uint64_t handoff);
  void on_peer_lost(Epoch epoch);
  /// Nothing from that life can write any more.
  void on_peer_fenced(Epoch epoch);

  /// Tries to start the queued request; false: no room yet.
  bool try_start(uint64_t key);
  /// An output of the engine; false when it isn't one of ours.
  bool on_output(const TokenOutput& output);
  void tick();
  /// Sends what has gathered: one frame per router.
  void flush();
  void send_load(const protocol::Load& load);
  /// The time to finish is over: the routers' channels are closed, so that they go on elsewhere.
  void drop_routers();

  /// Prompts with fewer tokens to compute are not sent to a prefill worker.
  int32_t local_prefill_tokens() const { return break_even_.tokens(); }
  size_t requests() const { return requests_.size(); }
  size_t quarantined() const { return quarantine_.size(); }
  size_t routers() const { return routers_.size(); }

 private:
  enum class State { kQueued, kPrefilling, kCommitted, kDecoding };

  struct Router {
    std::shared_ptr<protocol::Channel> channel;
    std::string name;
    std::unordered_map<uint64_t, uint64_t> keys;  // its request ids → ours
    protocol::StepOutput outbox;
  };

  struct Candidate {
    std::string address;
    Epoch epoch{};
  };

  struct ClientRequest {
    uint64_t key = 0;              // also its arrival
    Router* router = nullptr;
    uint64_t router_request = 0;
    Request request;               // emptied once the engine has it for good
    int32_t tokens = 0;            // prompt + generated
    std::vector<Candidate> candidates;
    size_t next_candidate = 0;
    State state = State::kQueued;
    Deadline deadline, queue_deadline;
    int64_t queue_timeout_ms = 0;
    int64_t arrived_ms = 0;
    bool started = false;          // has left the queue once
    // The current attempt.
    uint64_t attempt = 0;          // engine request and handoff id; 0: none
    Epoch peer{};
    std::string peer_name;
    transfer::Tag tag{};
    int64_t sent_ms = 0;
    int64_t sent_ns = 0;           // of the same moment, for the break-even
    int64_t lease_end_ms = 0;
    uint64_t granted_bytes = 0;    // what the peer must have written
    protocol::Commit commit;
    std::string path;              // until it was told
    bool remote = false;
  };

  struct Quarantined {
    uint64_t handoff = 0;
    Epoch peer{};
    std::string peer_name;
    transfer::Tag tag{};
    int64_t since_ms = 0;
    bool told = false;             // its channel was closed for it
  };

  bool try_start_remote(ClientRequest& request, PrefillPeer& peer, bool* no_room);
  bool try_start_local(ClientRequest& request);
  void started(ClientRequest& request);
  void admit(ClientRequest& request);
  /// Ends the current attempt; `flushed`: the peer will not write any more.
  void end_attempt(ClientRequest& request, bool flushed);
  void retry(ClientRequest& request, bool flushed, const char* reason, const Status& status);
  void release_quarantine(std::map<uint64_t, Quarantined>::iterator it);
  void fail(ClientRequest& request, const Status& status);
  void emit_end(ClientRequest& request, FinishReason finish, const Status& status);
  /// Stops whatever runs for it, without an output.
  void stop_work(ClientRequest& request);
  void forget(ClientRequest& request);
  ClientRequest* by_attempt(uint64_t attempt);

  CoreContext& context_;
  PeerTable& peers_;
  BreakEven break_even_;
  std::map<const protocol::Channel*, std::unique_ptr<Router>> routers_;
  std::map<uint64_t, std::unique_ptr<ClientRequest>> requests_;  // by key
  std::unordered_map<uint64_t, uint64_t> attempts_;              // attempt → key
  std::map<uint64_t, Quarantined> quarantine_;                   // by handoff
};

}  // namespace baton::worker
