#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "transfer/backend.h"
#include "transfer/control.h"
#include "transfer/ucx/messages.h"
#include "transfer/ucx/worker.h"

namespace baton::transfer::ucx {

class UcxLink;

/// What a link needs of its backend.
class LinkHost {
 public:
  virtual ~LinkHost() = default;
  /// That worker has to be driven.
  virtual void wake(Worker& worker) = 0;
  /// That worker is about to go.
  virtual void forget(Worker& worker) = 0;
  virtual void on_message_done(UcxLink& link, uint64_t cookie, const Status& status) = 0;
  virtual void on_link_dead(UcxLink& link, const Status& status) = 0;
  virtual void on_link_gone(UcxLink& link) = 0;
  virtual ControlPlane& control() = 0;
  virtual const std::string& transport_name() const = 0;
};

/// The outgoing half of a pair: one ucp_ep. How the bytes go is the derived class's.
class UcxLink : public Link {
 public:
  UcxLink(LinkHost& host, ControlPlane::Id id, std::string peer_name)
      : host_(host), id_(id), peer_name_(std::move(peer_name)) {}
  ~UcxLink() override;

  /// Connects to the worker that the peer opened. `own`: this link's alone; else `shared` serves it.
  Status open(const Welcome& welcome, std::unique_ptr<Worker> own, Worker* shared);
  /// Nothing may be posted any more.
  void mark_dead() { dead_ = true; }
  /// Goes on with what UCX has ended. Returns how much there was.
  virtual size_t advance() = 0;
  virtual bool has_work() const = 0;
  /// The owner has put messages `first`, `first` + 1, ... into its memory.
  virtual void on_placed(uint32_t first, uint32_t count) = 0;

  bool ready() const override { return endpoint_ != nullptr && !dead_; }
  bool late_writes_possible() const override { return true; }
  bool closable() const override;
  CheckChannel::Connection connection() const override { return id_; }

  ControlPlane::Id id() const { return id_; }

 protected:
  virtual Status on_opened(const Welcome&) { return Status(); }
  virtual bool idle() const = 0;
  /// UCX's handshake is over, as far as it can be known.
  virtual bool connected() const { return true; }
  /// For derived destructors, which own what UCX's requests point at: nothing of this link is under way afterwards.
  void shut();
  void abort();
  void fail(const Status& status);
  const Library& library() const { return worker_->context().library(); }
  std::string text(ucs_status_t status) const { return worker_->context().text(status); }

  LinkHost& host_;
  const ControlPlane::Id id_;
  const std::string peer_name_;
  std::unique_ptr<Worker> own_worker_;
  Worker* worker_ = nullptr;
  ucp_ep_h endpoint_ = nullptr;
  bool dead_ = false;

 private:
  static void on_endpoint_failed(void* link, ucp_ep_h endpoint, ucs_status_t status);
  std::string describe_lanes() const;
};

/// ucp_put for every piece, a flush of the endpoint behind them, and when that has ended (so all is in the peer's
/// memory, on whatever lanes and in whatever order it went) an active message that says how much there is.
class PutLink final : public UcxLink {
 public:
  using UcxLink::UcxLink;
  ~PutLink() override;

  static constexpr BackendLimits limits() {
    BackendLimits limits;
    limits.plan = {.max_message_bytes = 4u << 20, .max_segments = 64, .max_packed_segment_bytes = 64u << 10};
    return limits;
  }
  Result<PostResult> post(const BackendMessage& message) override;
  void flush() override;
  size_t advance() override;
  bool has_work() const override { return !ended_.empty(); }
  void on_placed(uint32_t, uint32_t) override {}

 private:
  /// Messages that were posted together: they are flushed together, and their peer is told once.
  struct Batch {
    enum class Phase : uint8_t { kOpen, kFlushing, kTelling };
    PutLink* link = nullptr;
    Phase phase = Phase::kOpen;
    uint32_t pending = 0;  // requests of UCX that have not ended
    ucs_status_t status = UCS_OK;
    std::vector<uint64_t> cookies;
    std::vector<Arrival> arrivals;
    std::string notice;  // read by UCX until its request has ended
  };
  struct RemotePool {
    uint64_t base = 0;
    ucp_rkey_h key = nullptr;
  };

  Status on_opened(const Welcome& welcome) override;
  bool idle() const override { return outstanding_ == 0; }
  static void on_request_done(void* request, ucs_status_t status, void* batch);
  void track(Batch& batch, ucs_status_ptr_t request);
  void submit_flush(Batch& batch);
  void tell(Batch& batch);
  void finish(Batch& batch);
  Batch& open_batch();

  std::unordered_map<uint32_t, RemotePool> pools_;
  std::deque<Batch> batches_;  // stable addresses: UCX's requests point at them
  std::vector<Batch*> free_;
  Batch* open_ = nullptr;
  std::vector<Batch*> ended_;  // no request of theirs is left in this phase
  size_t outstanding_ = 0;     // batches that are not finished
};

/// An active message with every piece, which the owner of the memory puts where it belongs and confirms over the
/// control connection. What UCX makes of it (fragments, copies, several lanes) does not matter to what is promised.
///
/// Two things are as they are because UCX 1.13 aborts otherwise. Always eager, never a rendezvous: while one is under
/// way the owner's worker cannot be destroyed. And nothing is written before a first message was confirmed: a worker
/// that has not finished connecting cannot be destroyed either (see Inbound).
class MessageLink final : public UcxLink {
 public:
  using UcxLink::UcxLink;
  ~MessageLink() override { shut(); }

  static constexpr BackendLimits limits() {
    BackendLimits limits;
    limits.plan = {.max_message_bytes = kMaxWriteBytes, .max_segments = 1, .max_packed_segment_bytes = 0};
    return limits;
  }
  Result<PostResult> post(const BackendMessage& message) override;
  bool ready() const override { return UcxLink::ready() && connected_; }
  size_t advance() override;
  bool has_work() const override { return !ended_.empty(); }
  void on_placed(uint32_t first, uint32_t count) override;

 private:
  struct Message {
    MessageLink* link = nullptr;
    uint64_t cookie = 0;
    uint32_t id = 0;
    bool in_use = false;
    bool sent = false;    // UCX does not read local memory for it any more
    bool placed = false;  // the owner says so
    ucs_status_t status = UCS_OK;
    std::string header;  // read by UCX until its request has ended
  };

  Status on_opened(const Welcome& welcome) override;
  bool idle() const override { return outstanding_ == 0; }
  bool connected() const override { return connected_; }
  static void on_request_done(void* request, ucs_status_t status, void* message);
  void settle(Message& message);

  bool connected_ = false;
  std::deque<Message> messages_;  // stable addresses; the index is the id
  std::vector<Message*> free_;
  std::vector<Message*> ended_;
  size_t outstanding_ = 0;
};

}  // namespace baton::transfer::ucx
