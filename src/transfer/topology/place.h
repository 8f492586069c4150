#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "transfer/topology/topology.h"

namespace baton::transfer {

/// Where the memory lies that will be sent and received.
struct Place {
  enum class Kind : uint8_t { kUnknown, kGpu, kNode };
  Kind kind = Kind::kUnknown;
  PciAddress gpu_address;  ///< kGpu: of the device, not CUDA's index (CUDA_VISIBLE_DEVICES renumbers those)
  int numa_node = kUnknownNode;

  bool operator==(const Place&) const = default;

  static Place unknown() { return {}; }
  static Place gpu(PciAddress address) { return {Kind::kGpu, address, kUnknownNode}; }
  static Place node(int id) { return {id < 0 ? Kind::kUnknown : Kind::kNode, {}, id < 0 ? kUnknownNode : id}; }
  /// "gpu:0000:53:00.0" (as cuDeviceGetPCIBusId and nvidia-smi write it), "node:1", or "" for unknown.
  static Result<Place> parse(std::string_view text);
  /// The NUMA node that this thread is bound to; unknown when it may run on several (or there is but one
  /// and sysfs hides it). Memory that is first touched by such a thread lies there.
  static Place of_this_thread(const Topology& topology);
};

/// The node that holds all of `cpus`; kUnknownNode when none or several do. Sorted, without doubles.
int node_of_cpus(const Topology& topology, const std::vector<uint32_t>& cpus);

/// "0-3,8,10-11" as numbers; empty when it is none or names a CPU beyond 65,535.
std::vector<uint32_t> parse_cpu_list(std::string_view text);

}  // namespace baton::transfer
