#include "transfer/topology/topology.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "transfer/topology/sysfs.h"

namespace baton::transfer {
namespace {

constexpr size_t kMaxBridges = 32;

/// "pci0000:44" and the like; VMD and VMBus bring domains of more digits.
bool is_host_bridge(std::string_view component) {
  if (!component.starts_with("pci") || component.size() < 6 || component.size() > 16) return false;
  component.remove_prefix(3);
  return component.find(':') != std::string_view::npos &&
         component.find_first_not_of("0123456789abcdefABCDEF:") == std::string_view::npos;
}

Distance by_node(int a, int b) {
  if (a == kUnknownNode || b == kUnknownNode) return Distance::kUnknown;
  return a == b ? Distance::kSameNode : Distance::kOtherNode;
}

std::string node_text(int node) { return node == kUnknownNode ? "-" : std::to_string(node); }

}  // namespace

PciPath PciPath::parse(std::string_view link) {
  PciPath path;
  std::vector<PciAddress> chain;
  while (!link.empty()) {
    size_t slash = link.find('/');
    std::string_view component = link.substr(0, slash);
    link = slash == std::string_view::npos ? std::string_view() : link.substr(slash + 1);
    if (is_host_bridge(component)) {
      path.host_bridge = component;
      chain.clear();
    } else if (std::optional<PciAddress> address = PciAddress::parse(component)) {
      chain.push_back(*address);
    }
    if (chain.size() > kMaxBridges) return {};
  }
  if (chain.empty()) return {};
  path.device = chain.back();
  chain.pop_back();
  path.bridges = std::move(chain);
  return path;
}

std::string PciPath::uplink() const {
  return bridges.empty() ? host_bridge : host_bridge + "/" + bridges.front().to_string();
}

std::string Nic::address() const { return path.device ? path.device->to_string() : "-"; }

std::string_view distance_name(Distance distance) {
  switch (distance) {
    case Distance::kSameSwitch: return "PIX";
    case Distance::kSwitches: return "PXB";
    case Distance::kSameHostBridge: return "PHB";
    case Distance::kSameNode: return "NODE";
    case Distance::kOtherNode: return "SYS";
    case Distance::kUnknown: return "?";
  }
  return "?";
}

std::string_view distance_description(Distance distance) {
  switch (distance) {
    case Distance::kSameSwitch: return "same PCIe switch";
    case Distance::kSwitches: return "through PCIe switches";
    case Distance::kSameHostBridge: return "same PCIe host bridge";
    case Distance::kSameNode: return "same NUMA node";
    case Distance::kOtherNode: return "other NUMA node";
    case Distance::kUnknown: return "distance unknown";
  }
  return "distance unknown";
}

std::string_view nic_kind_name(NicKind kind) {
  switch (kind) {
    case NicKind::kEfa: return "efa";
    case NicKind::kVerbs: return "verbs";
    case NicKind::kEthernet: return "ethernet";
  }
  return "?";
}

std::string_view link_layer_name(LinkLayer layer) {
  switch (layer) {
    case LinkLayer::kInfiniband: return "InfiniBand";
    case LinkLayer::kEthernet: return "Ethernet";
    case LinkLayer::kUnknown: break;
  }
  return "unknown link layer";
}

Distance distance(const Gpu& gpu, const Nic& nic) {
  const PciPath &a = gpu.path, &b = nic.path;
  if (a.device && b.device && !a.host_bridge.empty() && a.host_bridge == b.host_bridge) {
    auto [from_a, from_b] = std::mismatch(a.bridges.begin(), a.bridges.end(), b.bridges.begin(), b.bridges.end());
    if (from_a == a.bridges.begin()) return Distance::kSameHostBridge;
    // Below the last common port, one more bridge is the switch's own downstream port; a second one
    // belongs to another switch.
    bool one_switch = a.bridges.end() - from_a <= 1 && b.bridges.end() - from_b <= 1;
    return one_switch ? Distance::kSameSwitch : Distance::kSwitches;
  }
  return by_node(gpu.numa_node, nic.numa_node);
}

Distance distance(int numa_node, const Nic& nic) { return by_node(numa_node, nic.numa_node); }

const Gpu* Topology::find_gpu(const PciAddress& address) const {
  for (const Gpu& gpu : gpus) {
    if (gpu.path.device == address) return &gpu;
  }
  return nullptr;
}

const Nic* Topology::find_nic(std::string_view name) const {
  if (name.empty()) return nullptr;
  for (const Nic& nic : nics) {
    if (nic.name == name) return &nic;
  }
  for (const Nic& nic : nics) {
    if (nic.interface == name) return &nic;
  }
  if (std::optional<PciAddress> address = PciAddress::parse(name)) {
    for (const Nic& nic : nics) {
      if (nic.path.device == address) return &nic;
    }
  }
  return nullptr;
}

const Nic* Topology::find_domain(std::string_view domain, const std::optional<PciAddress>& address) const {
  if (address) {
    // One PCI function may have an RDMA device and an interface; the domain's name tells which is meant.
    const Nic* first = nullptr;
    for (const Nic& nic : nics) {
      if (nic.path.device != address) continue;
      if (domain.starts_with(nic.name)) return &nic;
      if (first == nullptr) first = &nic;
    }
    if (first != nullptr) return first;
  }
  for (std::string_view ending : {"-rdm", "-dgrm"}) {
    if (domain.ends_with(ending)) domain.remove_suffix(ending.size());
  }
  for (const Nic& nic : nics) {
    if (nic.name == domain) return &nic;
  }
  return nullptr;
}

std::string format_speed(uint64_t bytes_per_s) {
  if (bytes_per_s == 0) return "?";
  return fmt::format("{:.4g} Gb/s", static_cast<double>(bytes_per_s) * 8e-9);
}

std::string Topology::describe() const {
  std::string out;
  for (const NumaNode& node : numa_nodes) {
    out += fmt::format("NUMA node {}: CPUs {}, {:.0f} GiB\n", node.id, node.cpus.empty() ? "?" : node.cpus,
                       static_cast<double>(node.memory_bytes) / (1u << 30));
  }
  for (const Gpu& gpu : gpus) {
    out += fmt::format("GPU {:<3} {}  10de:{:04x}  node {}{}\n", gpu.index, gpu.path.device->to_string(),
                       gpu.pci_device_id, node_text(gpu.numa_node), gpu.visible ? "" : "  (not in this container)");
  }
  size_t width = 4;
  for (const Nic& nic : nics) width = std::max(width, nic.name.size());
  out += fmt::format("{:<{}}  kind      PCI           node  speed      link", "NIC", width);
  for (const Gpu& gpu : gpus) out += fmt::format("  {:<4}", fmt::format("G{}", gpu.index));
  while (out.ends_with(' ')) out.pop_back();
  out += "\n";
  for (const Nic& nic : nics) {
    std::string_view link = nic.link == LinkState::kUp ? "up" : nic.link == LinkState::kDown ? "down" : "?";
    out += fmt::format("{:<{}}  {:<8}  {:<12}  {:<4}  {:<9}  {:<4}", nic.name, width, nic_kind_name(nic.kind),
                       nic.address(), node_text(nic.numa_node), format_speed(nic.speed_bytes_per_s), link);
    for (const Gpu& gpu : gpus) out += fmt::format("  {:<4}", distance_name(distance(gpu, nic)));
    while (out.ends_with(' ')) out.pop_back();
    if (!nic.accessible) out += "  (not in this container)";
    out += "\n";
  }
  if (nics.empty()) out += "(none)\n";
  for (const std::string& note : notes) out += "note: " + note + "\n";
  return out;
}

std::string Topology::picture() const {
  struct Group {
    int node = kUnknownNode;
    std::string host_bridge;
    std::vector<const Gpu*> gpus;
    std::vector<const Nic*> nics;
  };
  std::map<std::string, Group> groups;
  auto group_of = [&](const PciPath& path, int node) -> Group& {
    Group& group = groups[path.uplink()];
    group.host_bridge = path.host_bridge;
    if (group.node == kUnknownNode) group.node = node;
    return group;
  };
  for (const Gpu& gpu : gpus) group_of(gpu.path, gpu.numa_node).gpus.push_back(&gpu);
  for (const Nic& nic : nics) {
    if (nic.kind != NicKind::kEthernet) group_of(nic.path, nic.numa_node).nics.push_back(&nic);
  }
  std::vector<const Group*> ordered;
  for (const auto& [uplink, group] : groups) ordered.push_back(&group);
  std::stable_sort(ordered.begin(), ordered.end(), [](const Group* a, const Group* b) { return a->node < b->node; });
  std::string out;
  for (const Group* group : ordered) {
    out += fmt::format("node {}  {}  ", node_text(group->node), group->host_bridge.empty() ? "?" : group->host_bridge);
    for (const Gpu* gpu : group->gpus) {
      out += fmt::format("{}GPU {}", gpu == group->gpus.front() ? "" : ", ", gpu->index);
    }
    if (!group->gpus.empty() && !group->nics.empty()) out += "  --  ";
    if (!group->nics.empty()) {
      uint64_t speed = 0;
      for (const Nic* nic : group->nics) speed += nic->up() ? nic->speed_bytes_per_s : 0;
      out += fmt::format("{} x {}, {}: ", group->nics.size(), nic_kind_name(group->nics.front()->kind),
                         format_speed(speed));
    }
    for (const Nic* nic : group->nics) {
      out += fmt::format("{}{}{}", nic == group->nics.front() ? "" : ", ", nic->name, nic->up() ? "" : " (down)");
    }
    out += "\n";
  }
  return out;
}

}  // namespace baton::transfer
