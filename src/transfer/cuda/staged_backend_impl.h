#pragma once

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "transfer/backend.h"
#include "transfer/control.h"
#include "transfer/cuda/staged_backend.h"
#include "transfer/cuda/staged_inbound.h"
#include "transfer/cuda/staged_link.h"
#include "transfer/cuda/staged_memory.h"

namespace baton::transfer::staged {

class StagedBackend final : public Backend, private ControlPlane::Delegate, private BackendEvents {
 public:
  StagedBackend(std::shared_ptr<BackendContext> context, std::string transport);
  ~StagedBackend() override;
  Status open(const HostBackendFactory& open_host, std::shared_ptr<UnusedSockets> unused);

  const std::string& transport() const override { return transport_; }
  const std::string& provider() const override { return provider_; }
  uint32_t rails() const override { return inner_->rails(); }
  const BackendLimits& limits() const override { return limits_; }
  BackendLimits limits_for(const std::string& address) const override;
  bool moves(MemoryKind from, MemoryKind to) const override {
    return from == MemoryKind::kCuda || to == MemoryKind::kCuda;
  }
  std::string describe() const override;
  Result<std::unique_ptr<BackendRegion>> register_memory(std::span<std::byte> memory, MemoryKind kind) override;
  std::string address() const override;
  Result<std::unique_ptr<Link>> open_link(const Metadata& peer, const Metadata::Offer& offer) override;
  Status fence(Epoch peer, uint64_t serial) override;
  Status shut_out() override;
  size_t progress(BackendEvents& events) override;
  int64_t prepare_wait(std::vector<pollfd>& fds) override;
  bool rest() override { return inner_->rest(); }
  uint64_t inbound_peers() const override { return control_.inbound(); }
  CheckChannel& checks() override { return control_; }
  ReadChannel& reads() override { return control_; }
  Result<std::span<const std::byte>> read_back(const BackendRegion& region, uint64_t offset, uint64_t bytes) override;

  // For StagedLink.
  int64_t now_ns() const { return context_->clock->now_ns(); }
  /// The slots of our own; made when the first message needs them.
  Status open_out();
  SlotMemory& out() { return *out_; }
  Result<const BackendRegion*> out_region() { return out_->region().impl()->with(*inner_); }
  DescriptorMemory& descriptors() { return descriptors_; }
  Result<const BackendRegion*> descriptor_region() { return descriptors_.region().impl()->with(*inner_); }
  size_t free_slots() const { return free_.size(); }
  uint32_t take_slot();
  void release_slot(uint32_t slot) { free_.push_back(slot); }
  /// Whether a caller's event is reached; with none it is.
  Result<bool> event_reached(const StagedDevice& device, void* event);
  bool send_note(ControlPlane::Id id, const Arrival& note) { return control_.send_arrivals(id, std::span(&note, 1)); }
  void report_done(StagedLink& link, uint64_t cookie) { done_.emplace_back(&link, cookie); }
  void report_failure(StagedLink& link, const Status& why) { failed_.emplace_back(&link, why); }
  void count_sent(uint64_t bytes, bool straight) {
    sent_bytes_ += bytes;
    if (straight) straight_bytes_ += bytes;
  }
  void forget(StagedLink& link);

 private:
  class SlotContext;

  Result<StagedDevice*> open_device(int ordinal);
  // Of the host backend.
  void on_posted_done(Link& link, uint64_t cookie, const Status& status) override;
  void on_link_failed(Link& link, const Status& status) override;
  void on_arrived(uint32_t tag, uint64_t count) override { inbound_.on_message(tag, count); }

  // ControlPlane::Delegate
  Result<Welcome> on_inbound(ControlPlane::Id id, const Hello& hello) override {
    used_ = true;
    return inbound_.add_writer(id, hello);
  }
  void on_inbound_closed(ControlPlane::Id id, int) override { inbound_.remove_writer(id); }
  void on_inbound_arrived(ControlPlane::Id id, const Arrival& arrival) override { inbound_.on_note(id, arrival); }
  void on_outbound_arrived(ControlPlane::Id id, const Arrival& arrival) override;
  void on_welcome(ControlPlane::Id id, Welcome welcome) override;
  void on_outbound_closed(ControlPlane::Id id, const Status& why) override;

  const std::shared_ptr<BackendContext> context_;
  const std::string transport_;
  std::string provider_;
  BackendLimits limits_;
  std::shared_ptr<const cuda::Driver> driver_;
  ControlPlane control_;
  std::unique_ptr<SlotMemory> out_;
  DescriptorMemory descriptors_;
  std::vector<uint32_t> free_;  // slots of out_, and of descriptors_
  StagedInbound inbound_;
  std::map<int, std::unique_ptr<StagedDevice>> devices_;  // by ordinal; gone before the slots that they copy
  std::unordered_map<ControlPlane::Id, StagedLink*> links_;
  std::vector<std::pair<StagedLink*, uint64_t>> done_;
  std::vector<std::pair<StagedLink*, Status>> failed_;
  uint64_t sent_bytes_ = 0, straight_bytes_ = 0;
  int64_t last_event_ns_ = 0;
  int64_t seen_ns_ = 0;
  bool used_ = false;  // somebody has come, or gone to somebody
  bool slept_ = false;
  bool waits_for_event_ = false;
  std::shared_ptr<UnusedSockets> unused_;
  std::shared_ptr<SlotContext> slot_context_;
  std::unique_ptr<Backend> inner_;  // goes first: then nobody writes into the slots any more
};

}  // namespace baton::transfer::staged
