#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "transfer/fabric/handles.h"
#include "transfer/topology/place.h"
#include "transfer/topology/rail_memory.h"
#include "transfer/topology/topology.h"

namespace baton::transfer::fabric {

/// What we found for a transport, and what its provider wants from us.
struct Provider {
  InfoPointer info;
  std::string name;               ///< "net", "tcp", "efa", "verbs;ofi_rxm"
  bool delivery_complete = false; ///< a completion means: in the peer's memory
  /// Endpoints are cheap: one per peer and direction, so that closing one ends that peer and no other.
  bool endpoint_per_peer = false;
  uint32_t max_segments = 1;      ///< pieces that one write with CQ data may carry
};

/// For fault tests: sees what is opened before it is used, and may change it (function tables, limits). Set it while no
/// agent lives.
class OpenObserver {
 public:
  virtual ~OpenObserver() = default;
  virtual void on_provider(Provider& provider) = 0;
  virtual void on_fabric(fid_fabric* fabric) = 0;
  virtual void on_queue(fid_cq* queue) = 0;
  virtual void on_endpoint(fid_ep* endpoint) = 0;
};
inline OpenObserver* open_observer = nullptr;

/// Sets the variables of `environment(7)` that keep libfabric small (docs/transfer.md, "Variables of libfabric that matter"),
/// where they are not set. libfabric reads them once, in the process's first fi_getinfo(): call it before, on a thread that may
/// change the environment.
void set_library_defaults();

/// Asks libfabric for reliable datagram endpoints with remote writes. `address`: the local IP (tcp), else the name of the
/// device (empty: the first).
Result<Provider> find_provider(const std::string& transport, const std::string& address);

/// Is there a device at all? Cheap (sysfs), where fi_getinfo loads every provider's libraries.
bool has_rdma_device();

/// The devices (libfabric's domain names) that an agent opens for "efa" or "verbs": `rails` of them, or the near ones that the
/// topology suggests when that is 0; near to the NUMA node that this thread is bound to. The choice and what it will cost are
/// logged.
Result<std::vector<std::string>> choose_devices(const std::string& transport, uint32_t rails);
/// The same near `place` of the machine that `topology` describes, with `limits` to what may be spent.
Result<std::vector<std::string>> choose_devices(const std::string& transport, uint32_t rails, const Topology& topology,
                                                const Place& place, const MemoryLimits& limits);

/// The addresses of a list such as "10.0.0.1,10.0.1.1", one tcp rail each, or that of local_address() when it is empty.
Result<std::vector<std::string>> local_addresses(const std::string& wanted);

/// The IP that other hosts reach this one at: `wanted` if it is one, else the first address of an
/// interface that is up, IPv4 before IPv6, loopback last.
Result<std::string> local_address(const std::string& wanted);

}  // namespace baton::transfer::fabric
