#include "transfer/topology/sysfs_tree.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>

#include "base/check.h"

namespace baton::transfer {
namespace {

namespace fs = std::filesystem;

std::string up(int levels) {
  std::string out;
  for (int i = 0; i < levels; ++i) out += "../";
  return out;
}

std::string last(const std::string& path) { return path.substr(path.rfind('/') + 1); }

}  // namespace

SysfsTree::SysfsTree() {
  // Some file systems take a second for the two thousand files of a machine.
  std::error_code error;
  bool in_memory = std::getenv("TMPDIR") == nullptr && fs::is_directory("/dev/shm", error) &&
                   ::access("/dev/shm", W_OK | X_OK) == 0;
  fs::path parent = in_memory ? fs::path("/dev/shm") : fs::temp_directory_path();
  std::string name = (parent / "baton-sysfs-XXXXXX").string();
  BATON_CHECK(::mkdtemp(name.data()) != nullptr) << name;
  root_ = name;
}

SysfsTree::~SysfsTree() {
  std::error_code error;
  fs::remove_all(root_, error);
}

void SysfsTree::load(const std::string& machine) {
  std::string path = std::string(BATON_SOURCE_DIR) + "/src/transfer/topology/testdata/" + machine + ".txt";
  std::ifstream file(path);
  BATON_CHECK(file.good()) << path;
  for (std::string line; std::getline(file, line);) add(line);
}

void SysfsTree::add(std::string_view line) {
  std::istringstream words{std::string(line)};
  std::string what, path;
  words >> what >> path;
  if (what.empty() || what[0] == '#') return;
  Fields fields;
  for (std::string word; words >> word;) {
    size_t equals = word.find('=');
    BATON_CHECK(equals != std::string::npos) << line;
    std::string value = word.substr(equals + 1);
    if (word.starts_with("rate=") || word.starts_with("state=")) std::replace(value.begin(), value.end(), '_', ' ');
    fields[word.substr(0, equals)] = value;
  }
  if (what == "node") {
    std::string base = "sys/devices/system/node/node" + path + "/";
    write(base + "cpulist", fields["cpus"]);
    long kib = std::stol(fields["gib"]) << 20;
    write(base + "meminfo", "Node " + path + " MemTotal:       " + std::to_string(kib) + " kB\nNode " + path +
                                " MemFree:        1024 kB");
  } else if (what == "gpu") {
    add_pci(path, "0x10de", fields["device"], "0x030200", fields["node"]);
  } else if (what == "rdma") {
    add_pci(path, fields["vendor"], fields["device"], "0x020000", fields["node"]);
    add_rdma(path, fields);
  } else if (what == "net") {
    if (!fs::exists(root_ + "/sys/devices/" + path + "/vendor")) {
      add_pci(path, "0x1d0f", "0xec20", "0x020000", fields["node"]);
    }
    add_interface(path, fields["name"], "1", fields["state"], fields["mbit"]);
    if (fields["route"] == "1") {
      write("proc/net/route", "Iface\tDestination\tGateway\tFlags\n" + fields["name"] + "\t00000000\t0101A8C0\t0003\n" +
                                  fields["name"] + "\t0001A8C0\t00000000\t0001");
    }
  } else {
    BATON_CHECK(false) << line;
  }
}

void SysfsTree::add_pci(const std::string& path, const std::string& vendor, const std::string& device,
                        const std::string& pci_class, const std::string& node) {
  auto put = [&](const std::string& at, const std::string& the_vendor, const std::string& the_device,
                 const std::string& the_class) {
    std::string base = "sys/devices/" + at + "/";
    if (fs::exists(root_ + "/" + base + "vendor")) return;
    write(base + "vendor", the_vendor);
    write(base + "class", the_class);
    if (!the_device.empty()) write(base + "device", the_device);
    if (!the_device.empty()) write(base + "numa_node", node);
    link("sys/bus/pci/devices/" + last(at), up(3) + "devices/" + at);
  };
  size_t first = path.find('/', path.find('/') + 1);
  for (size_t slash = first; slash != std::string::npos; slash = path.find('/', slash + 1)) {
    put(path.substr(0, slash), "0x1d0f", "", "0x060400");
  }
  put(path, vendor, device, pci_class);
}

void SysfsTree::add_interface(const std::string& path, const std::string& name, const std::string& type,
                              const std::string& state, const std::string& mbit) {
  std::string below = path + "/net/" + name, base = "sys/devices/" + below + "/";
  write(base + "type", type);
  write(base + "operstate", state);
  write(base + "speed", mbit);
  link(base + "device", up(3) + last(path));
  link("sys/class/net/" + name, up(2) + "devices/" + below);
}

void SysfsTree::add_rdma(const std::string& path, const Fields& fields) {
  const std::string& name = fields.at("name");
  std::string device = "sys/devices/" + path, below = path + "/infiniband/" + name, base = "sys/devices/" + below + "/";
  write(base + "ports/1/state", fields.at("state"));
  write(base + "ports/1/rate", fields.at("rate"));
  write(base + "ports/1/link_layer", fields.at("layer"));
  link(base + "device", up(3) + last(path));
  link("sys/class/infiniband/" + name, up(2) + "devices/" + below);
  link(device + "/driver", up(3) + "bus/pci/drivers/" + fields.at("driver"));
  std::string verbs = "uverbs" + fields.at("uverbs");
  write(device + "/infiniband_verbs/" + verbs + "/ibdev", name);
  link("sys/class/infiniband_verbs/" + verbs, up(2) + "devices/" + path + "/infiniband_verbs/" + verbs);
  write("dev/infiniband/" + verbs, "");
  if (auto net = fields.find("net"); net != fields.end() && !fs::exists(root_ + "/sys/class/net/" + net->second)) {
    bool infiniband = fields.at("layer") == "InfiniBand", active = fields.at("state").starts_with("4");
    add_interface(path, net->second, infiniband ? "32" : "1", active ? "up" : "down", active ? "100000" : "-1");
  }
}

void SysfsTree::make_directory(const std::string& path) {
  std::error_code error;
  fs::create_directories(root_ + "/" + path, error);
}

void SysfsTree::write(const std::string& path, const std::string& text) {
  std::error_code error;
  fs::create_directories(fs::path(root_ + "/" + path).parent_path(), error);
  std::ofstream(root_ + "/" + path, std::ios::binary) << text << "\n";
}

void SysfsTree::link(const std::string& path, const std::string& target) {
  std::error_code error;
  fs::create_directories(fs::path(root_ + "/" + path).parent_path(), error);
  fs::remove_all(root_ + "/" + path, error);
  fs::create_symlink(target, root_ + "/" + path, error);
}

void SysfsTree::remove(const std::string& path) {
  std::error_code error;
  fs::remove_all(root_ + "/" + path, error);
}

std::vector<std::string> SysfsTree::entries() const {
  std::vector<std::string> found;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(root_)) {
    found.push_back(entry.path().string().substr(root_.size() + 1));
  }
  std::sort(found.begin(), found.end());
  return found;
}

const Topology& machine(std::string_view name) {
  static auto* const read = new std::map<std::string, Topology, std::less<>>();
  auto found = read->find(name);
  if (found == read->end()) {
    SysfsTree tree;
    tree.load(std::string(name));
    found = read->emplace(name, Topology::read(tree.root())).first;
  }
  return found->second;
}

}  // namespace baton::transfer
