#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "transfer/backend.h"
#include "transfer/fabric/forgotten_infos.h"
#include "transfer/fabric/handles.h"
#include "transfer/fabric/provider.h"

namespace baton::transfer::fabric {

/// Where the peers of some endpoints are entered.
class AddressVector {
 public:
  explicit AddressVector(AddressVectorHandle handle) : handle_(std::move(handle)) {}
  fid_av* get() const { return handle_.get(); }
  Result<fi_addr_t> add(std::string name);
  void remove(fi_addr_t address);

 private:
  AddressVectorHandle handle_;
};

/// An endpoint, and what it is bound to and has to outlive it.
struct Endpoint {
  std::shared_ptr<AddressVector> addresses;
  EndpointHandle handle;

  Endpoint() = default;
  Endpoint(Endpoint&&) = default;
  Endpoint& operator=(Endpoint&& other) noexcept {
    reset();
    addresses = std::move(other.addresses);
    handle = std::move(other.handle);
    return *this;
  }
  void reset() {
    handle.reset();
    addresses.reset();
  }
  fid_ep* get() const { return handle.get(); }
  explicit operator bool() const { return static_cast<bool>(handle); }
};

/// One network device (for tcp: one local address): a libfabric domain, its address vectors and completion queue. Shared with
/// the registered regions, which may outlive the backend.
class Rail {
 public:
  struct Config {
    std::string transport;
    std::string address;  ///< tcp: the local IP
    uint32_t index = 0;
    uint32_t max_inflight_messages = 256;
  };
  static Result<std::shared_ptr<Rail>> open(const Config& config);

  /// An enabled endpoint whose completions go to `queue`.
  Result<Endpoint> open_endpoint(fid_cq* queue);
  /// A queue that nobody sleeps on, for one endpoint's arrivals.
  Result<CompletionQueueHandle> open_queue();
  /// One that is empty and that nothing is bound to any more, for the next open_queue().
  void reuse_queue(CompletionQueueHandle queue);
  /// The endpoint's address, as libfabric has it.
  Result<std::string> endpoint_name(fid_ep* endpoint) const;
  /// Between two calls into the provider: gives back what it forgot.
  void tidy() { forgotten_.free_all(); }

  bool wants(uint64_t mr_mode_bit) const {
    return (static_cast<uint64_t>(provider_.info->domain_attr->mr_mode) & mr_mode_bit) != 0;
  }
  const Config& config() const { return config_; }
  const Provider& provider() const { return provider_; }
  fid_domain* domain() const { return domain_.get(); }
  fid_fabric* fabric() const { return fabric_.get(); }
  fid_cq* queue() const { return queue_.get(); }
  /// The endpoint that all peers share; null where each has its own.
  const Endpoint& shared_endpoint() const { return shared_endpoint_; }
  /// What to sleep on: a descriptor and the queue to try before; -1: has to be polled.
  int wait_fd() const { return wait_fd_; }
  fid_cq* waited_on() const { return waited_on_; }

 private:
  explicit Rail(Config config) : config_(std::move(config)) {}
  Status open();
  Status open_addresses();
  int make_queue(fi_wait_obj wait, CompletionQueueHandle& queue);

  const Config config_;
  Provider provider_;
  ForgottenInfos forgotten_;
  FabricHandle fabric_;
  DomainHandle domain_;
  std::shared_ptr<AddressVector> addresses_;  // of the endpoints that are opened now
  uint32_t endpoints_opened_ = 0;             // with these
  CompletionQueueHandle queue_;
  CompletionQueueHandle bell_;  // tcp: a queue that nothing is bound to, to wait on
  std::vector<CompletionQueueHandle> free_queues_;
  Endpoint shared_endpoint_;
  int wait_fd_ = -1;
  fid_cq* waited_on_ = nullptr;
};

/// Memory registered with every rail.
class FabricRegion final : public BackendRegion {
 public:
  struct OnRail {
    std::shared_ptr<Rail> rail;
    MemoryHandle memory;
    uint64_t remote_base = 0;
    uint64_t remote_key = 0;
    void* descriptor = nullptr;
  };
  static Result<std::unique_ptr<FabricRegion>> open(std::span<std::byte> memory,
                                                    const std::vector<std::shared_ptr<Rail>>& rails);
  std::vector<OnRail> rails;
};

/// A message that may have to be posted again, on another rail.
struct HeldMessage {
  static constexpr size_t kMaxSegments = 4;
  Segment segments[kMaxSegments];
  uint32_t segment_count = 0;
  uint64_t bytes = 0;
  const FabricRegion* local = nullptr;
  uint32_t remote_pool = 0;
  Tag tag = Tag::kNone;
  uint64_t cookie = 0;
  bool end_can_wait = false;
  /// Which counted message of its endpoint it is, from 0; kUncounted for one without a tag.
  static constexpr uint64_t kUncounted = ~uint64_t{0};
  uint64_t sequence = kUncounted;
};

class FabricLink;

/// One posted write. The provider keeps a pointer to it until its completion has been read.
struct Operation {
  fi_context2 context;  // first, so that the provider's pointer is ours
  FabricLink* link = nullptr;
  uint32_t rail = 0;
  bool in_use = false;
  bool greeting = false;  // no message of the agent's
  bool confirms = false;  // nor this: its end is that of all before it on its endpoint
  bool sent = false;      // its completion was read, and says nothing about delivery (message.end_can_wait)
  HeldMessage message;
};

}  // namespace baton::transfer::fabric
