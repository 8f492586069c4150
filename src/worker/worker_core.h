#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "protocol/channel.h"
#include "worker/core_context.h"
#include "worker/decode_side.h"
#include "worker/peers.h"
#include "worker/prefill_side.h"

namespace baton::worker {

/// What /health and the log want to know; a copy.
struct CoreHealth {
  std::string name;
  Epoch epoch{};
  bool draining = false;
  EngineStats engine;
  int64_t requests = 0, queued = 0, active_prefills = 0, quarantined_handoffs = 0;
  int64_t routers = 0, decode_peers = 0;
  protocol::Load load;  ///< with pairs, without metrics
};

/// All logic of a worker, single-threaded and deterministic: events in, calls of channels, engine and transfer out.
/// The Worker gives it a thread, the simulation a clock.
class WorkerCore {
 public:
  /// Everything passed must outlive the core. `transfer` names the epoch.
  WorkerCore(CoreConfig config, Engine& engine, KvTransfer& transfer, protocol::Network& network,
             std::shared_ptr<Mailbox> mailbox, WorkerMetrics& metrics, const Clock& clock);
  ~WorkerCore();

  /// For Network::listen().
  protocol::ChannelHandler handler() const { return Mailbox::handler(context_.mailbox); }

  /// Handles the events, then what time has brought, then runs at most one engine step and sends its outputs.
  void run_once(std::vector<Event> events);
  /// How long nothing needs to be done unless an event comes; 0: call run_once() again at once.
  int64_t idle_ns() const;
  /// That time is all that a device needs to be nearly done.
  bool device_busy() const { return context_.engine.has_work(); }

  /// Refuses new work from now on.
  void begin_drain();
  /// Nothing of anybody is left here.
  bool drained() const;
  /// Gives up what is left: routers go on elsewhere, decode workers are told, after the flush.
  void drop_all();
  /// Closes every channel, after what was sent on it.
  void disconnect();

  CoreHealth health() const;
  /// Not ok: the device is lost. There is nothing left to do but disconnect(): peers and routers go on elsewhere.
  const Status& device() const { return device_; }

 private:
  /// What an accepted channel turned out to be; connected ones are in the PeerTable.
  enum class Kind { kRouter, kDecodeWorker };

  void handle(FrameArrived& event);
  void handle(ChannelClosed& event);
  void handle(WriteDone& event);
  void handle(InboxComplete& event);
  void handle(FenceDone& event);
  Status handle_peer_frame(PrefillPeer& peer, const protocol::Frame& frame);
  Status handle_stranger(const std::shared_ptr<protocol::Channel>& channel, const protocol::Frame& frame);
  Status handle_router_frame(const protocol::Channel* channel, const protocol::Frame& frame);
  Status handle_decode_frame(const std::shared_ptr<protocol::Channel>& channel, const protocol::Frame& frame);
  void start_queued();
  void step();
  void tick();
  void report_load();
  protocol::Hello make_hello() const;
  protocol::Load make_load() const;

  CoreContext context_;
  PeerTable peers_;
  DecodeSide decode_;
  PrefillSide prefill_;
  std::map<const protocol::Channel*, Kind> accepted_;
  int64_t last_tick_ms_ = -1;
  int64_t last_load_ms_ = 0;
  int64_t last_metrics_ms_ = 0;
  bool load_urgent_ = true;
  Status device_;
  uint64_t last_load_key_ = 0;
};

}  // namespace baton::worker
