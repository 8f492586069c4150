#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "transfer/backend.h"
#include "transfer/control.h"
#include "transfer/fabric/fabric_link.h"
#include "transfer/fabric/rail.h"
#include "transfer/inbox.h"

namespace baton::transfer::fabric {

/// All rails of one libfabric transport. Under the agent's lock.
class FabricBackend final : public Backend, private ControlPlane::Delegate {
 public:
  FabricBackend(std::shared_ptr<BackendContext> context, std::string transport);
  ~FabricBackend() override;
  Status open(bool open_now);

  const std::string& transport() const override { return transport_; }
  const std::string& provider() const override { return provider_name_; }
  uint32_t rails() const override { return static_cast<uint32_t>(addresses_.size()); }
  const BackendLimits& limits() const override { return limits_; }
  BackendLimits limits_for(const std::string& address) const override;
  std::string describe() const override;
  Result<std::unique_ptr<BackendRegion>> register_memory(std::span<std::byte> memory, MemoryKind kind) override;
  std::string address() const override { return control_->address(); }
  Result<std::unique_ptr<Link>> open_link(const Metadata& peer, const Metadata::Offer& offer) override;
  Status fence(Epoch peer, uint64_t serial) override { return control_->fence(peer, serial); }
  Status shut_out() override { return control_->fence_all(); }
  size_t progress(BackendEvents& events) override;
  int64_t prepare_wait(std::vector<pollfd>& fds) override;
  /// A socket takes it at once; with several rails the choice between them is the thread's.
  void hurry() override { confirm(0); }
  void confirm(int64_t age_ns) {
    std::erase_if(unconfirmed_, [&](FabricLink* link) { return !link->confirm(age_ns); });
  }
  bool posts_at_once() const override { return transport_ == "tcp" && addresses_.size() == 1; }
  uint64_t inbound_peers() const override { return control_->inbound(); }
  CheckChannel& checks() override { return *control_; }
  ReadChannel& reads() override { return *control_; }

 private:
  friend class FabricLink;

  /// One rail of a writer: where its messages come in. With several rails each has a queue of its own, so that it is known
  /// how many came over which.
  struct InboundRail {
    CompletionQueueHandle queue;  // null: the rail's
    Endpoint endpoint;            // null: the rail's shared one
    uint32_t index = 0;  // of the rail
    uint64_t arrived = 0;
    uint32_t greeting_tag = 0;
    bool greeted = false;
    // When it is to be closed ungreeted:
    std::shared_ptr<FileDescriptor> peer;  // the control connection, to see when its other end closes
    int64_t close_at_ns = INT64_MAX;
  };
  struct Inbound {
    std::string name;
    std::vector<InboundRail> rails;
  };
  struct Done {
    FabricLink* link;
    uint64_t cookie;
    Status status;
  };

  Status ensure_open();
  Status check_room() const;
  Status open_inbound_rail(uint32_t index, InboundRail* inbound, std::string* address);
  /// Now, if the writer has greeted; else when it does, or some time after its end of `peer` has closed.
  void close_inbound_rail(InboundRail inbound, std::shared_ptr<FileDescriptor> peer);
  void close_doomed();
  void release_inbound_rail(InboundRail& inbound);
  void on_greeting(uint32_t tag);
  bool drain(fid_cq* queue, uint64_t* arrived);
  bool drain_all();
  int64_t longest_wait_ns(std::vector<pollfd>& fds);
  void complete(Operation* operation, const Status& status);
  void read_error(fid_cq* queue);
  void recycle_orphans(size_t count);

  // ControlPlane::Delegate
  Result<Welcome> on_inbound(ControlPlane::Id id, const Hello& hello) override;
  void on_inbound_closed(ControlPlane::Id id, int socket) override;
  void on_inbound_arrived(ControlPlane::Id, const Arrival&) override {}
  void on_inbound_rail(ControlPlane::Id id, const RailNote& note) override;
  void on_outbound_rail(ControlPlane::Id id, const RailNote& note) override;
  void on_welcome(ControlPlane::Id id, Welcome welcome) override;
  void on_outbound_closed(ControlPlane::Id id, const Status& why) override;

  // For FabricLink.
  Operation* take_operation();
  void release(Operation* operation);
  void orphan(Operation* operation);
  void add_greeting(FabricLink& link) {
    if (std::find(greeting_.begin(), greeting_.end(), &link) == greeting_.end()) greeting_.push_back(&link);
  }
  const FabricRegion& greeting_region() const { return *greeting_region_; }
  /// One rail, whose endpoints deliver in order and say when they have.
  bool confirms_later() const {
    return transport_ == "tcp" && rails_.size() == 1 && rails_.front()->provider().endpoint_per_peer && rails_.front()->provider().delivery_complete;
  }
  void add_unconfirmed(FabricLink& link) {
    if (std::find(unconfirmed_.begin(), unconfirmed_.end(), &link) == unconfirmed_.end()) unconfirmed_.push_back(&link);
  }
  /// A rail can be used from now on: the agent has to look whether something waits for it.
  void count_opened_rail() { ++opened_rails_; }
  void report(FabricLink& link, uint64_t cookie, const Status& status) { done_.push_back({&link, cookie, status}); }
  void report_failure(FabricLink& link, const Status& status);
  void forget(FabricLink& link);
  bool send_note(ControlPlane::Id id, const RailNote& note) { return control_->send_rail_note(id, note); }
  void count_rail_failure() { ++rail_failures_; }
  RailWindow rail_window() const { return {context_->config.max_inflight_per_rail, kRailBytes}; }
  int64_t now_ns() const { return context_->clock->now_ns(); }
  const std::string& agent_name() const { return context_->agent_name; }

  static constexpr uint64_t kRailBytes = 32u << 20;

  std::shared_ptr<BackendContext> context_;
  const std::string transport_;
  std::string provider_name_;
  std::vector<std::string> addresses_;  // of the rails: IPs (tcp) or domain names
  BackendLimits limits_;
  std::unique_ptr<ControlPlane> control_;
  std::vector<std::shared_ptr<Rail>> rails_;  // empty until something needs them
  alignas(64) std::byte greeting_memory_[64] = {};  // what greetings are read from and written to
  std::unique_ptr<FabricRegion> greeting_region_;
  uint32_t next_greeting_ = 0;
  std::unordered_map<uint32_t, ControlPlane::Id> ungreeted_;  // by tag; of inbound_, or gone
  std::deque<InboundRail> doomed_;  // to be closed when they are greeted
  std::unordered_map<ControlPlane::Id, Inbound> inbound_;
  std::unordered_map<ControlPlane::Id, FabricLink*> links_;
  std::vector<FabricLink*> greeting_;  // with greetings to be posted
  std::vector<FabricLink*> unconfirmed_;  // with messages whose end could wait
  size_t opened_rails_ = 0;            // since the last progress()
  std::deque<Operation> operations_;
  std::vector<Operation*> free_operations_;
  std::vector<Operation*> orphans_;  // of endpoints that were closed before their completions were read
  std::vector<uint32_t> arrivals_;
  std::vector<Done> done_;
  std::vector<std::pair<FabricLink*, Status>> failed_;
  bool queue_empty_ = true;
  int64_t last_event_ns_ = 0;
  int64_t control_seen_ns_ = 0;
  bool slept_ = false;
  uint64_t rail_failures_ = 0;
};

}  // namespace baton::transfer::fabric
