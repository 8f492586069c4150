#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <tuple>
#include <set>

#include "transfer/topology/sysfs.h"
#include "transfer/topology/topology.h"

namespace baton::transfer {
namespace {

constexpr size_t kMaxPciDevices = 16384;
constexpr size_t kMaxGpus = 256;
constexpr size_t kMaxNics = 1024;
constexpr size_t kMaxInterfaces = 4096;
constexpr size_t kMaxPorts = 16;
constexpr size_t kMaxNodes = 1024;
constexpr size_t kMaxNotes = 32;
constexpr int64_t kMaxSpeedMbit = 10'000'000;  // 10 Tb/s: what is above is garbage

constexpr int64_t kVendorNvidia = 0x10de;
constexpr int64_t kVendorAmazon = 0x1d0f;

/// EFA's device ids so far are 0xefa0 to 0xefa4; AWS keeps the family.
bool is_efa_id(int64_t vendor, int64_t device) { return vendor == kVendorAmazon && (device & ~0xfll) == 0xefa0; }

class Reader {
 public:
  explicit Reader(const std::string& root) : sysfs_(root) {}

  Topology read() {
    read_nodes();
    read_device_files();
    read_rdma_devices();
    read_interfaces();
    read_pci();
    auto order = [](const auto& a, const auto& b) {
      return std::tie(a.path.device, a.name) < std::tie(b.path.device, b.name);
    };
    std::sort(rdma_.begin(), rdma_.end(), order);
    std::sort(interfaces_.begin(), interfaces_.end(), order);
    topology_.nics = std::move(rdma_);
    topology_.nics.insert(topology_.nics.end(), interfaces_.begin(), interfaces_.end());
    return std::move(topology_);
  }

 private:
  void note(std::string text) {
    if (topology_.notes.size() < kMaxNotes) topology_.notes.push_back(std::move(text));
  }

  std::vector<std::string> list(const std::string& path, size_t max_entries) {
    bool truncated = false;
    std::vector<std::string> names = sysfs_.list(path, max_entries, &truncated);
    if (truncated) note(fmt::format("/{} has more than {} entries; the rest is not looked at", path, max_entries));
    return names;
  }

  void read_nodes() {
    for (const std::string& name : list("sys/devices/system/node", kMaxNodes)) {
      if (!name.starts_with("node")) continue;
      std::optional<int64_t> id = parse_number(std::string_view(name).substr(4));
      if (!id || *id < 0 || *id >= static_cast<int64_t>(kMaxNodes)) continue;
      std::string base = "sys/devices/system/node/" + name + "/";
      NumaNode node;
      node.id = static_cast<int>(*id);
      node.cpus = sysfs_.text(base + "cpulist").value_or("");
      // "Node 0 MemTotal:  1073701 kB"
      std::string meminfo = sysfs_.text(base + "meminfo").value_or("");
      size_t at = meminfo.find("MemTotal:");
      if (at != std::string::npos) {
        std::string_view rest = std::string_view(meminfo).substr(at + 9);
        std::optional<int64_t> kib = parse_number(rest.substr(0, rest.find("kB")));
        if (kib && *kib > 0 && *kib < (int64_t{1} << 50)) node.memory_bytes = static_cast<uint64_t>(*kib) << 10;
      }
      topology_.numa_nodes.push_back(std::move(node));
    }
    std::sort(topology_.numa_nodes.begin(), topology_.numa_nodes.end(),
              [](const NumaNode& a, const NumaNode& b) { return a.id < b.id; });
  }

  /// -1 is the firmware's word for "one node", and for "I don't know" where there are several.
  int numa_node(const std::string& device) {
    std::optional<int64_t> id = sysfs_.number(device + "/numa_node");
    if (id && *id >= 0 && *id < static_cast<int64_t>(kMaxNodes)) return static_cast<int>(*id);
    return topology_.numa_nodes.size() == 1 ? topology_.numa_nodes[0].id : kUnknownNode;
  }

  /// What a container may use of what sysfs shows.
  void read_device_files() {
    for (const std::string& name : list("sys/class/infiniband_verbs", kMaxNics)) {
      std::optional<std::string> device = sysfs_.text("sys/class/infiniband_verbs/" + name + "/ibdev");
      if (device) verbs_file_[*device] = name;
    }
    for (const std::string& name : list("proc/driver/nvidia/gpus", kMaxGpus)) {
      if (std::optional<PciAddress> address = PciAddress::parse(name)) visible_gpus_.insert(*address);
    }
  }

  /// "../../devices/pci0000:44/.../0000:4f:00.0/infiniband/rdmap79s0". Where the class entry is no link, the
  /// device's own entry on the PCI bus knows the way.
  PciPath device_path(const std::string& class_entry) {
    PciPath path;
    if (std::optional<std::string> link = sysfs_.link(class_entry)) path = PciPath::parse(*link);
    if (!path.device) {
      if (std::optional<std::string> link = sysfs_.link(class_entry + "/device")) path = PciPath::parse(*link);
    }
    if (path.device && path.host_bridge.empty()) {
      std::optional<std::string> link = sysfs_.link("sys/bus/pci/devices/" + path.device->to_string());
      PciPath whole = link ? PciPath::parse(*link) : PciPath();
      if (whole.device == path.device) path = std::move(whole);
    }
    return path;
  }

  void read_rdma_devices() {
    for (const std::string& name : list("sys/class/infiniband", kMaxNics)) {
      std::string base = "sys/class/infiniband/" + name;
      std::string device = base + "/device";
      Nic nic;
      nic.name = name;
      nic.path = device_path(base);
      nic.numa_node = numa_node(device);
      std::string_view driver;
      std::optional<std::string> driver_link = sysfs_.link(device + "/driver");
      if (driver_link) driver = last_component(*driver_link);
      bool efa = driver == "efa" || is_efa_id(sysfs_.number(device + "/vendor").value_or(0),
                                              sysfs_.number(device + "/device").value_or(0));
      nic.kind = efa ? NicKind::kEfa : NicKind::kVerbs;
      std::vector<std::string> interfaces = sysfs_.list(device + "/net", kMaxPorts);
      if (!interfaces.empty()) nic.interface = interfaces.front();
      if (auto file = verbs_file_.find(name); file != verbs_file_.end()) {
        nic.accessible = sysfs_.exists("dev/infiniband/" + file->second);
      }
      read_ports(base + "/ports", &nic);
      rdma_.push_back(std::move(nic));
    }
  }

  /// A device with several ports counts as its best one.
  void read_ports(const std::string& path, Nic* nic) {
    for (const std::string& port : sysfs_.list(path, kMaxPorts)) {
      std::string base = path + "/" + port + "/";
      std::string state = sysfs_.text(base + "state", 64).value_or("");  // "4: ACTIVE"
      LinkState link = state.empty() ? LinkState::kUnknown
                       : state.starts_with("4:") ? LinkState::kUp : LinkState::kDown;
      uint64_t speed = parse_rate(sysfs_.text(base + "rate", 64).value_or(""));
      if (std::tie(link, speed) < std::tie(nic->link, nic->speed_bytes_per_s)) continue;
      nic->link = link;
      nic->speed_bytes_per_s = speed;
      std::string layer = sysfs_.text(base + "link_layer", 64).value_or("");
      nic->layer = layer == "InfiniBand" ? LinkLayer::kInfiniband
                   : layer == "Ethernet" ? LinkLayer::kEthernet : LinkLayer::kUnknown;
    }
  }

  /// "100 Gb/sec (4X EDR)", "2.5 Gb/sec (1X SDR)"
  static uint64_t parse_rate(const std::string& text) {
    size_t unit = text.find(" Gb/sec");
    if (unit == std::string::npos || unit == 0 || unit > 10) return 0;
    if (text.find_first_not_of("0123456789.") != unit) return 0;
    double gbit = std::strtod(text.c_str(), nullptr);
    if (!(gbit > 0) || gbit * 1000 > static_cast<double>(kMaxSpeedMbit)) return 0;
    return static_cast<uint64_t>(std::llround(gbit * 1e9 / 8));
  }

  void read_interfaces() {
    std::set<std::string> default_routes = read_default_routes();
    std::vector<Nic> virtual_ones;
    for (const std::string& name : list("sys/class/net", kMaxInterfaces)) {
      std::string base = "sys/class/net/" + name;
      std::optional<std::string> link = sysfs_.link(base);
      constexpr int64_t kLoopback = 772;  // ARPHRD_LOOPBACK
      if (name == "lo" || sysfs_.number(base + "/type") == kLoopback) continue;
      Nic nic;
      nic.name = name;
      nic.kind = NicKind::kEthernet;
      nic.layer = LinkLayer::kEthernet;
      nic.path = device_path(base);
      nic.numa_node = numa_node(base + "/device");
      nic.default_route = default_routes.contains(name);
      std::string state = sysfs_.text(base + "/operstate", 64).value_or("");
      nic.link = state == "up" ? LinkState::kUp
                 : state.empty() || state == "unknown" ? LinkState::kUnknown : LinkState::kDown;
      int64_t mbit = sysfs_.number(base + "/speed").value_or(0);
      if (mbit > 0 && mbit <= kMaxSpeedMbit) nic.speed_bytes_per_s = static_cast<uint64_t>(mbit) * 125'000;
      if (std::optional<std::string> master = sysfs_.link(base + "/master")) {
        std::string_view owner = last_component(*master);
        if (sysfs_.exists("sys/class/net/" + std::string(owner) + "/bonding")) nic.bonded_in = owner;
      }
      bool is_virtual = !nic.path.device && link && link->find("/virtual/") != std::string::npos;
      if (is_virtual && !sysfs_.exists(base + "/bonding")) {
        virtual_ones.push_back(std::move(nic));
      } else if (interfaces_.size() < kMaxNics) {
        interfaces_.push_back(std::move(nic));
      }
    }
    // A container has nothing but one end of a veth; a host has hundreds of the other ends.
    constexpr size_t kMaxVirtual = 16;
    if (!interfaces_.empty()) return;
    std::erase_if(virtual_ones, [](const Nic& nic) { return !nic.up(); });
    if (virtual_ones.size() > kMaxVirtual) virtual_ones.resize(kMaxVirtual);
    interfaces_ = std::move(virtual_ones);
  }

  std::set<std::string> read_default_routes() {
    std::set<std::string> names;
    std::string table = sysfs_.text("proc/net/route", 64 << 10).value_or("");
    std::string_view rest = table;
    while (!rest.empty()) {
      size_t end = rest.find('\n');
      std::string_view line = rest.substr(0, end);
      rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
      // interface, destination, ...: a destination of zero is the default route
      size_t name_end = line.find_first_of(" \t");
      if (name_end == std::string_view::npos) continue;
      if (trim(line.substr(name_end)).starts_with("00000000")) names.emplace(line.substr(0, name_end));
    }
    return names;
  }

  void read_pci() {
    std::set<std::optional<PciAddress>> with_rdma;
    for (const Nic& nic : rdma_) with_rdma.insert(nic.path.device);
    size_t efa_without_rdma = 0;
    std::vector<std::string> devices = list("sys/bus/pci/devices", kMaxPciDevices);
    for (const std::string& name : devices) {
      std::optional<PciAddress> address = PciAddress::parse(name);
      std::string base = "sys/bus/pci/devices/" + name;
      if (!address) continue;
      int64_t vendor = sysfs_.number(base + "/vendor").value_or(0);
      if (vendor != kVendorNvidia && vendor != kVendorAmazon) continue;
      int64_t device = sysfs_.number(base + "/device").value_or(0);
      if (is_efa_id(vendor, device) && !with_rdma.contains(*address)) ++efa_without_rdma;
      // Display controllers: VGA (0x0300) and 3D (0x0302); NVSwitches are bridges (0x0680).
      int64_t pci_class = sysfs_.number(base + "/class").value_or(0) >> 8;
      if (vendor != kVendorNvidia || (pci_class != 0x0300 && pci_class != 0x0302)) continue;
      if (topology_.gpus.size() == kMaxGpus) {
        note(fmt::format("more than {} GPUs; the rest is not looked at", kMaxGpus));
        break;
      }
      Gpu gpu;
      std::optional<std::string> link = sysfs_.link(base);
      if (link) gpu.path = PciPath::parse(*link);
      if (gpu.path.device != address) gpu.path = PciPath{"", {}, *address};
      gpu.pci_device_id = static_cast<uint16_t>(device & 0xffff);
      gpu.numa_node = numa_node(base);
      gpu.visible = visible_gpus_.empty() || visible_gpus_.contains(*address);
      topology_.gpus.push_back(std::move(gpu));
    }
    std::sort(topology_.gpus.begin(), topology_.gpus.end(),
              [](const Gpu& a, const Gpu& b) { return a.path.device < b.path.device; });
    auto same = [](const Gpu& a, const Gpu& b) { return a.path.device == b.path.device; };
    topology_.gpus.erase(std::unique(topology_.gpus.begin(), topology_.gpus.end(), same), topology_.gpus.end());
    for (size_t i = 0; i < topology_.gpus.size(); ++i) topology_.gpus[i].index = static_cast<uint32_t>(i);
    if (devices.empty()) note("no PCI device in /sys/bus/pci/devices: GPUs and distances are unknown");
    if (efa_without_rdma > 0) {
      note(fmt::format("{} EFA device{} on PCI without an RDMA device: the efa driver is not loaded, or "
                       "/sys/class/infiniband is hidden from this container",
                       efa_without_rdma, efa_without_rdma == 1 ? "" : "s"));
    }
    size_t closed = static_cast<size_t>(
        std::count_if(rdma_.begin(), rdma_.end(), [](const Nic& nic) { return !nic.accessible; }));
    if (closed > 0) {
      note(fmt::format("{} of {} RDMA devices have no device file in /dev/infiniband here: this container was "
                       "given the others only", closed, rdma_.size()));
    }
  }

  SysfsReader sysfs_;
  Topology topology_;
  std::vector<Nic> rdma_, interfaces_;
  std::map<std::string, std::string> verbs_file_;  // RDMA device → "uverbs3"
  std::set<PciAddress> visible_gpus_;
};

}  // namespace

Topology Topology::read(const std::string& root) { return Reader(root).read(); }

}  // namespace baton::transfer
