#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "transfer/topology/pci_address.h"

/// What is near what: GPUs, NICs and NUMA nodes of this machine, read from sysfs. All of it is values; any
/// thread may read them. Reading takes a few milliseconds, so it is done once per agent.
namespace baton::transfer {

constexpr int kUnknownNode = -1;

/// The way from a host bridge to a device.
struct PciPath {
  std::string host_bridge;           ///< "pci0000:44"; empty: sysfs does not tell
  std::vector<PciAddress> bridges;   ///< from the root port down to the port that the device hangs on
  std::optional<PciAddress> device;  ///< nothing: no PCI device (a bond, a virtual interface)

  /// Reads the target of a symbolic link of sysfs, e.g. of /sys/bus/pci/devices/0000:4f:00.0.
  static PciPath parse(std::string_view link);
  /// Devices of one group share a link into the CPU: their root port, or none but the host bridge.
  std::string uplink() const;
};

struct NumaNode {
  int id = 0;
  std::string cpus;  ///< "0-47,96-143"
  uint64_t memory_bytes = 0;
};

struct Gpu {
  uint32_t index = 0;  ///< by PCI address, over all that sysfs shows (not CUDA's index: see `visible`)
  PciPath path;
  uint16_t pci_device_id = 0;  ///< 0x2330: H100 SXM
  int numa_node = kUnknownNode;
  /// False when the container was not given it (the driver's /proc/driver/nvidia/gpus lists others only).
  bool visible = true;
};

enum class NicKind : uint8_t { kEfa, kVerbs, kEthernet };
enum class LinkState : uint8_t { kUnknown, kDown, kUp };
enum class LinkLayer : uint8_t { kUnknown, kInfiniband, kEthernet };

struct Nic {
  /// What libfabric and UCX call it: the RDMA device ("rdmap79s0", "mlx5_3") or the interface ("eth0").
  std::string name;
  NicKind kind = NicKind::kEthernet;
  PciPath path;
  int numa_node = kUnknownNode;
  uint64_t speed_bytes_per_s = 0;  ///< 0: unknown. EFA of older kernels always says 100 Gb/s
  LinkState link = LinkState::kUnknown;
  LinkLayer layer = LinkLayer::kUnknown;
  std::string interface;       ///< the network interface of an RDMA device, if it has one
  std::string bonded_in;       ///< "bond0" when this interface belongs to it
  bool default_route = false;  ///< the IPv4 default route leaves here
  /// False when /dev/infiniband lacks its device file: a container sees all NICs in sysfs and may open those
  /// only that it was given.
  bool accessible = true;

  bool up() const { return link != LinkState::kDown; }
  /// PCI address, or "-".
  std::string address() const;
};

/// How far apart two things are, nearest first; the names that `nvidia-smi topo` uses stand beside.
enum class Distance : uint8_t {
  kSameSwitch = 0,      ///< PIX: at most one PCIe switch between
  kSwitches = 1,        ///< PXB: several switches, but not the CPU's host bridge
  kSameHostBridge = 2,  ///< PHB: through one host bridge (root complex)
  kSameNode = 3,        ///< NODE: through two host bridges of one NUMA node
  kOtherNode = 4,       ///< SYS: through the link between NUMA nodes
  kUnknown = 5,         ///< "?": sysfs does not tell
};

std::string_view distance_name(Distance distance);        ///< "PIX"
std::string_view distance_description(Distance distance); ///< "same PCIe switch"
std::string_view nic_kind_name(NicKind kind);             ///< "efa"
std::string_view link_layer_name(LinkLayer layer);        ///< "InfiniBand"

Distance distance(const Gpu& gpu, const Nic& nic);
/// From memory of a NUMA node: kSameNode, kOtherNode or kUnknown.
Distance distance(int numa_node, const Nic& nic);

struct Topology {
  std::vector<NumaNode> numa_nodes;  ///< by id
  std::vector<Gpu> gpus;             ///< by PCI address
  std::vector<Nic> nics;             ///< RDMA devices by PCI address, then interfaces by PCI address and name
  /// What was missing or odd, for the doctor: "4 EFA devices on PCI, but no RDMA device ...". At most 32.
  std::vector<std::string> notes;

  /// Reads `root`/sys, and of /proc and /dev what says what this container may use. Never fails: what cannot
  /// be read is left out. Takes what is there at the moment; links may go up and down later.
  static Topology read(const std::string& root = "/");

  const Gpu* find_gpu(const PciAddress& address) const;
  /// By name, by the name of its interface, or by PCI address; RDMA devices before interfaces.
  const Nic* find_nic(std::string_view name) const;
  /// The NIC behind one of libfabric's domains: by PCI address where fi_info has one (fi_info::nic), else by
  /// the domain's name ("rdmap79s0-rdm", "mlx5_0", "eth0"). nullptr: none of ours.
  const Nic* find_domain(std::string_view domain, const std::optional<PciAddress>& address) const;

  /// A table for people: nodes, then one line per NIC with its distance to every GPU.
  std::string describe() const;
  /// A small picture: one line per PCIe root port with the GPUs and RDMA NICs behind it.
  ///   node 0  pci0000:44  GPU 0, GPU 1  --  4 x efa, 800 Gb/s: rdmap85s0, rdmap86s0, rdmap87s0, rdmap88s0
  std::string picture() const;
};

/// "100 Gb/s", "2.5 Gb/s", "?"
std::string format_speed(uint64_t bytes_per_s);

}  // namespace baton::transfer
