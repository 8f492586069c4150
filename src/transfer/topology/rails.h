#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "transfer/topology/place.h"
#include "transfer/topology/topology.h"

/// Which NICs an agent opens. Every NIC that is opened costs memory (EFA: 143 MiB), so the default is the
/// near ones only, and a part of them where several GPUs are equally near.
namespace baton::transfer {

struct RailOptions {
  std::string transport;  ///< "efa", "verbs" or "tcp"
  /// 0: what is near (see choose_rails). Otherwise that many, taking farther ones when it must.
  uint32_t max_rails = 0;
  /// These and no others, in this order: RDMA device, interface or PCI address.
  std::vector<std::string> names;
  /// Never these. Names that this machine lacks are fine: one list serves a whole fleet.
  std::vector<std::string> excluded;
};

/// Bounds of the default; max_rails and names go beyond them. No machine that we know has more than eight NICs
/// for one GPU, and four of 100 Gb/s carry 50 GB/s, more than a process copies in host memory.
constexpr uint32_t kDefaultGpuRails = 8;
constexpr uint32_t kDefaultHostRails = 4;

struct RailDecision {
  Nic nic;
  Distance distance = Distance::kUnknown;
  std::string reason;  ///< "PIX, same PCIe switch" or "link is down"
};

struct RailChoice {
  std::string transport;
  std::string place;                  ///< "near GPU 0 at 0000:53:00.0", "near NUMA node 1", "by name"
  std::vector<RailDecision> chosen;   ///< best first; never empty
  std::vector<RailDecision> refused;  ///< the other NICs, in the order in which they would come next
  uint32_t candidates = 0;            ///< NICs of this transport on the machine

  std::vector<std::string> names() const;
  uint64_t speed_bytes_per_s() const;
  /// "4 of 32 efa NICs (near GPU 0 ...): rdmap79s0, ...", then one line per NIC with its reason.
  std::string describe() const;
};

/// A pure function: the same topology and options give the same answer in every process of a machine.
///
/// By default: the NICs of the transport that are up, may be opened and are nearest. Where several GPUs have
/// the same nearest NICs, these are dealt out among them in PCI order, so that each GPU has its own share
/// (p5en: two of four; p4d: one for two GPUs). Memory of a NUMA node takes NICs of that node, one per PCIe
/// root port first, for these share no link into the CPU. tcp takes one interface (the one of the default
/// route where that is known), because every further one needs its own address and route.
/// NICs of another link layer than the first, and those that are clearly slower (storage, management), are not
/// mixed in unasked.
///
/// Errors: invalid_argument (transport unknown; a name that does not exist, is of another kind or excluded;
/// the message lists what exists), unavailable (none is left; the message says why not each).
Result<RailChoice> choose_rails(const Topology& topology, const Place& place, const RailOptions& options);

}  // namespace baton::transfer
