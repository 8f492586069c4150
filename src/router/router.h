#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "protocol/baton.pb.h"
#include "protocol/channel.h"
#include "router/policy.h"
#include "router/registry.h"

namespace baton {

struct RouterConfig {
  std::string name = "router";
  /// Every worker's address; its role comes from its Hello.
  std::vector<std::string> workers;
  /// The model that is served; workers that serve another one are refused. Empty: the first worker's.
  std::string served_model_name;
  PolicyKind policy = PolicyKind::kLeastLoaded;
  /// Requests in the router at once, queued ones included; more are refused with resource_exhausted.
  int32_t max_requests = 4096;
  /// Of a whole request; 0: none.
  int64_t request_timeout_ms = 600'000;
  /// How long a request may wait for a worker: none alive, or all of them full.
  int64_t queue_timeout_ms = 30'000;
  /// How often a request is started again after a worker's death before it fails. Bounds the harm of a
  /// request that kills whoever serves it.
  int32_t max_attempts = 4;
  /// How long a start waits for workers that have not been heard of before it may call itself ready.
  int64_t startup_grace_ms = 10'000;
  /// A worker that says nothing for so long is given up (its Load comes every second).
  int64_t worker_silence_ms = 60'000;
  int64_t reconnect_min_ms = 50;
  int64_t reconnect_max_ms = 2'000;

  Status validate() const;
};

struct RouterRequest {
  std::vector<int32_t> prompt;
  protocol::Sampling sampling;
  int64_t timeout_ms = 0;  ///< 0: the router's
};

/// What happened to a request since the last event. After the one with `finished` no other follows.
struct RouterEvent {
  uint64_t request = 0;
  std::vector<protocol::TokenOutput> tokens;
  bool finished = false;
  Status status;  ///< of a finished request; ok for stop and length
};
/// Runs on the router's thread; must be quick, must not block, may call Router::cancel.
using RouterEventSink = std::function<void(RouterEvent&&)>;

/// One worker as /health shows it.
struct WorkerView {
  std::string address, name, role, state, why_not, transport;
  uint64_t epoch = 0;
  protocol::Load load;
};

struct RouterHealth {
  /// A request can be served end to end now. Becomes true only once prefill and decode (if both exist)
  /// are paired; later a lost prefill worker only degrades.
  bool ready = false;
  bool degraded = false;
  std::string why_not;
  std::string model;
  int32_t max_model_len = 0, vocab_size = 0;
  int64_t requests = 0;
  std::vector<WorkerView> workers;
};

struct RouterStats {
  uint64_t accepted = 0, refused = 0, finished = 0, failed = 0, cancelled = 0;
  uint64_t replays = 0;          ///< requests started again after a worker's death
  uint64_t worker_losses = 0;    ///< channels to ready workers that closed
};

/// The router's whole logic, single-threaded and without a clock of its own, so that the simulation can run
/// it. The caller delivers channel events and calls tick() at least at next_tick_ns().
class RouterCore {
 public:
  RouterCore(RouterConfig config, const Clock& clock, protocol::Network& network,
             protocol::ChannelHandler handler);
  ~RouterCore();

  void start();
  /// Refuses with resource_exhausted (too many requests) or unavailable. On success exactly one finished
  /// event will follow, unless the request is cancelled.
  Status submit(uint64_t request, RouterRequest body, RouterEventSink sink);
  /// No event follows. Unknown ids are ignored.
  void cancel(uint64_t request);

  void on_frame(const std::shared_ptr<protocol::Channel>& channel, protocol::Frame&& frame);
  void on_closed(const std::shared_ptr<protocol::Channel>& channel, const Status& status);
  void tick();
  int64_t next_tick_ns() const;

  RouterHealth health() const;
  RouterStats stats() const { return stats_; }
  const WorkerRegistry& registry() const { return registry_; }
  /// Ends every request with unavailable and closes all channels.
  void shutdown();

 private:
  struct RequestState;

  /// Whom a request's events are for. Outlives the request, since events are delivered after the books are in order.
  struct Client {
    RouterEventSink sink;
    bool cancelled = false;  ///< nothing more is delivered
  };
  struct Delivery {
    std::shared_ptr<Client> client;
    RouterEvent event;
  };

  /// True when the request is taken care of: sent to a worker, or ended (and gone) because no worker may be sent it.
  bool dispatch(RequestState& request);
  bool send_generate(RequestState& request, WorkerEntry& worker);
  void detach(RequestState& request);
  void start_again(RequestState& request, const Status& why);
  void end(RequestState& request, Status status, std::vector<protocol::TokenOutput> tokens = {});
  void on_hello(WorkerEntry& worker, protocol::Hello&& hello);
  void on_token(WorkerEntry& worker, protocol::TokenOutput&& output);
  void on_worker_error(RequestState& request, const Status& status);
  void lose_worker(WorkerEntry& worker, WorkerState state, const Status& why);
  void connect(WorkerEntry& worker);
  void send_peers();
  void dispatch_waiting();
  void deliver();
  std::string no_worker_reason() const;

  RouterConfig config_;
  const Clock& clock_;
  protocol::Network& network_;
  protocol::ChannelHandler handler_;
  uint64_t epoch_;
  WorkerRegistry registry_;
  Policy policy_;
  std::unordered_map<uint64_t, std::unique_ptr<RequestState>> requests_;
  std::deque<uint64_t> waiting_;  // without a worker, in order of arrival; may name ended requests
  std::vector<Delivery> deliveries_;
  RouterStats stats_;
  int64_t started_ns_ = 0;
  int64_t silence_ns_ = 0;
  mutable bool was_ready_ = false;
  bool shut_down_ = false;
};

/// RouterCore on a thread of its own behind a bounded mailbox. All functions may be called from any thread.
class Router {
 public:
  static Result<std::unique_ptr<Router>> start(RouterConfig config, protocol::Network& network);
  ~Router();

  /// Errors as RouterCore::submit; resource_exhausted at once when max_requests are inside.
  Result<uint64_t> submit(RouterRequest request, RouterEventSink sink);
  void cancel(uint64_t request);
  RouterHealth health() const;
  /// The smallest context length of the ready workers; 0 while there is none. Costs nothing.
  int32_t max_model_len() const;
  RouterStats stats() const;
  /// Each ready worker's name and what it last sent of its metrics (see protocol/metrics_codec.h).
  std::vector<std::pair<std::string, std::string>> worker_metrics() const;
  /// Waits until a request can be served end to end; false when stopped before or after `timeout_ms`.
  bool wait_ready(int64_t timeout_ms) const;
  /// Waits until no request is inside, at most `timeout_ms`.
  void wait_idle(int64_t timeout_ms) const;
  void stop();

 private:
  struct Impl;
  explicit Router(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace baton
