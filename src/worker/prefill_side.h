#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "worker/core_context.h"

namespace baton::worker {

/// Computes prompts for other workers and writes their KV into those workers' memory, layer by layer.
///
///   queued ─▶ computing ─▶ delivering ─▶ (Commit)
///      └──────────┴────────────┴───────▶ flushing ─▶ (Abort)
///
/// A handoff leaves only when none of its writes is under way: until then its own blocks must stay (they are being
/// read) and the receiver's must not be touched by others (they are being written). When a path broke off with
/// bytes on the way, no Abort is sent but the channel closed: the receiver then shuts this process out.
///
/// The Commit leaves from the callback of the last write, on whatever thread that runs: the engine's may be busy with
/// the next prompt by then. All else happens on the engine's.
class PrefillSide {
 public:
  explicit PrefillSide(CoreContext& context);

  // Channels of decode workers.
  void add_peer(std::shared_ptr<protocol::Channel> channel, const protocol::Hello& hello);
  bool has_peer(const protocol::Channel* channel) const { return peers_.contains(channel); }
  void on_closed(const protocol::Channel* channel);

  /// A failure is a broken protocol: the caller closes the channel.
  Status on_prefill(const std::shared_ptr<protocol::Channel>& channel, const protocol::Prefill& prefill);
  void on_cancel(const protocol::Channel* channel, uint64_t handoff);
  void on_write_done(const WriteDone& done);

  /// Tries to give the queued prefill to the engine; false: no room yet.
  bool try_start(uint64_t id);
  /// Inside Engine::step().
  void on_layer_ready(const LayerReady& ready);
  /// An output of the engine; false when it isn't one of ours.
  bool on_output(const TokenOutput& output);

  void tick();
  void abort_all(const Status& status);
  void drop_peers();
  /// Tells every decode worker how the path to it is and that we live.
  void send_load(const protocol::Load& load);

  size_t active() const { return handoffs_.size(); }
  size_t peers() const { return peers_.size(); }

 private:
  enum class State { kQueued, kComputing, kDelivering, kFlushing };

  struct Peer {
    std::shared_ptr<protocol::Channel> channel;
    std::string name;
    Epoch epoch{};
    std::string metadata;
    uint32_t pool = 0;
    std::unique_ptr<KvLink> link;
    bool bursts = false;         // of layers, over this link
    Status link_status;
    Status refused;              // the layouts differ
    int64_t next_link_try_ms = 0;
    uint64_t counted_bytes = 0;  // of link->stats(), already in the metrics
    double counted_busy_s = 0;
    std::unordered_map<uint64_t, uint64_t> ids;  // D's handoff → ours
    size_t handoffs = 0;
    bool closed = false;         // the channel is gone; kept until its handoffs are flushed
  };

  /// What the callbacks of a handoff's writes share with it.
  struct Delivery {
    std::mutex mutex;
    std::shared_ptr<protocol::Channel> channel;
    size_t pending = 0;          // writes that have not called back
    bool all_posted = false;     // the last layer of the last chunk is among them
    bool announced = false;      // a HeadsUp was sent
    bool spoiled = false;        // a write failed, or the handoff was aborted
    bool sent = false;
    bool sent_ok = false;
    int64_t computed_ns = 0;
    protocol::Frame commit;      // empty until everything is computed

    /// With `mutex` held: sends the Commit if it is ready to go.
    void try_commit(int64_t now_ns);
    /// With `mutex` held: the last layer is delivered, so its rest and the first token are all that is to come.
    void try_announce();
  };

  struct Handoff {
    uint64_t id = 0;             // of the engine's request, too
    uint64_t handoff = 0;        // D's
    std::shared_ptr<Peer> peer;
    State state = State::kQueued;
    Request request;             // until it is submitted
    bool submitted = false;
    int32_t tokens = 0;
    std::vector<uint32_t> blocks;  // D's, of token blocks [first_block, ...)
    int32_t first_block = 0;
    transfer::Tag tag{};
    Deadline deadline;
    std::shared_ptr<Delivery> delivery;
    std::vector<std::shared_ptr<KvWrite>> writes;
    size_t pending_writes = 0;   // whose WriteDone has not come
    uint64_t messages = 0, bytes = 0;
    int32_t computed_tokens = 0;
    int32_t unsent_layer = 0;    // of the step: the first one whose blocks are still to be sent
    int64_t written = 0;         // blocks times layers
    bool settled = true;
    Status failure;              // set by on_layer_ready; acted upon after the step
    Status abort_status;
    int64_t lease_ms = 0, next_progress_ms = 0;
    int64_t received_ms = 0, started_ms = 0;
  };

  void connect_link(Peer& peer);
  Status check(const Peer& peer, const protocol::Prefill& prefill) const;
  void send_abort(Peer& peer, uint64_t handoff, const Status& status);
  void send_progress(Handoff& handoff);
  void begin_abort(Handoff& handoff, Status status);
  /// Blocks times layers.
  int64_t expected_writes(const Handoff& handoff) const;
  void finish_if_quiet(Handoff& handoff);
  void prepare_commit(Handoff& handoff, const TokenOutput& first);
  void committed(Handoff& handoff);
  void end(Handoff& handoff);
  void count_transfers(Peer& peer);

  CoreContext& context_;
  std::map<const protocol::Channel*, std::shared_ptr<Peer>> peers_;
  std::map<uint64_t, Handoff> handoffs_;  // by id: in order of arrival
};

}  // namespace baton::worker
