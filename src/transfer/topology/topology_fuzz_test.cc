// Trees that no kernel would make: whatever lies there, reading and choosing end, and nothing crashes.

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdio>
#include <iterator>
#include <string>
#include <vector>

#include "base/random.h"
#include "transfer/topology/rail_memory.h"
#include "transfer/topology/rails.h"
#include "transfer/topology/sysfs_tree.h"

namespace baton::transfer {
namespace {

void use(const std::string& root) {
  Topology topology = Topology::read(root);
  EXPECT_FALSE(topology.describe().empty());
  topology.picture();
  std::vector<Place> places = {Place::unknown(), Place::node(0), Place::node(1'000'000)};
  for (size_t i = 0; i < topology.gpus.size() && i < 4; ++i) {
    places.push_back(Place::gpu(*topology.gpus[i].path.device));
  }
  for (const Place& place : places) {
    for (const char* transport : {"efa", "verbs", "tcp"}) {
      RailOptions options;
      options.transport = transport;
      Result<RailChoice> choice = choose_rails(topology, place, options);
      if (!choice.ok()) {
        EXPECT_FALSE(choice.status().message().empty());
        continue;
      }
      EXPECT_FALSE(choice->chosen.empty());
      EXPECT_LE(choice->chosen.size(), kDefaultGpuRails);
      EXPECT_FALSE(choice->describe().empty());
      EXPECT_FALSE(predict_rail_memory(transport, *choice).describe().empty());
    }
  }
  MemoryLimits::read(root);
}

std::string garbage(Random& random) {
  static const char* const kTexts[] = {
      "", "-1", "999999999999999999999999", "0xffffffffffffffff", "-9223372036854775808", "9223372036854775807",
      "4:", "nan", "1e308 Gb/sec", "0x10de", "0x1d0f", "0xefa1", "0x030200", "%s%n", "..", "/", "\xff\xfe\x01"};
  switch (random.below(4)) {
    case 0: return kTexts[random.below(std::size(kTexts))];
    case 1: return std::string(random.below(20'000), static_cast<char>('0' + random.below(10)));
    default: {
      std::string bytes(random.below(300), '\0');
      for (char& byte : bytes) byte = static_cast<char>(random.below(256));
      return bytes;
    }
  }
}

void break_one(SysfsTree& tree, const std::vector<std::string>& entries, Random& random) {
  const std::string& path = entries[random.below(entries.size())];
  if (path == "sys" || path == "dev" || path == "proc") return;
  switch (random.below(8)) {
    case 0: tree.remove(path); break;
    case 1: tree.link(path, path.substr(path.rfind('/') + 1)); break;  // to itself
    case 2: tree.link(path, tree.root() + "/" + entries[random.below(entries.size())]); break;
    case 3: {
      std::string deep;
      for (int i = 0; i < 100; ++i) deep += "0000:" + std::to_string(10 + i % 90) + ":00.0/";
      tree.link(path, deep);
      break;
    }
    case 4:
      tree.remove(path);
      tree.make_directory(path + "/" + path.substr(path.rfind('/') + 1));
      break;
    case 5:
      tree.remove(path);
      ::mkfifo((tree.root() + "/" + path).c_str(), 0600);
      break;
    default:
      tree.remove(path);
      tree.write(path, garbage(random));
  }
}

TEST(TopologyFuzz, BrokenTreesNeverCrashOrHang) {
  for (const char* machine : {"p5_48xlarge", "p5en_48xlarge", "p4d_24xlarge", "dgx_h100"}) {
    for (uint64_t seed = 1; seed <= 4; ++seed) {
      Random random(seed);
      SysfsTree tree;
      tree.load(machine);
      tree.write("proc/self/cgroup", "0::/a/b");
      tree.write("proc/self/status", "CapEff:\t0");
      tree.write("sys/fs/cgroup/a/b/memory.max", "1000");
      const std::vector<std::string> entries = tree.entries();
      for (int round = 0; round < 25; ++round) {
        for (uint64_t i = 0; i <= random.below(8); ++i) break_one(tree, entries, random);
        SCOPED_TRACE(std::string(machine) + " seed " + std::to_string(seed) + " round " + std::to_string(round));
        use(tree.root());
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST(TopologyFuzz, OneFileBrokenAtATimeLeavesTheRest) {
  SysfsTree tree;
  tree.load("p4d_24xlarge");
  const std::string device = "sys/devices/pci0000:10/0000:10:1b.0/";
  for (const char* file : {"vendor", "device", "class", "numa_node"}) {
    tree.remove(device + file);
    Topology topology = Topology::read(tree.root());
    EXPECT_EQ(topology.gpus.size(), 8u);
    const Nic* nic = topology.find_nic("rdmap16s27");
    ASSERT_NE(nic, nullptr);
    EXPECT_EQ(nic->kind, NicKind::kEfa) << "its driver says so";
  }
}

TEST(TopologyFuzz, ThousandsOfDevicesAreBounded) {
  SysfsTree tree;
  tree.add("node 0 cpus=0 gib=1");
  for (int i = 0; i < 1200; ++i) {
    std::string id = std::to_string(i), bus = std::to_string(10 + i % 90);
    tree.write("sys/class/infiniband/mlx5_" + id + "/ports/1/state", "4: ACTIVE");
    tree.link("sys/class/net/eth" + id, "../../devices/pci0000:00/0000:" + bus + ":00.0/net/eth" + id);
  }
  for (int i = 0; i < 300; ++i) {
    char name[32];
    std::snprintf(name, sizeof(name), "%04x:%02x:00.0", i / 256, i % 256);
    std::string base = std::string("sys/bus/pci/devices/") + name;
    tree.write(base + "/vendor", "0x10de");
    tree.write(base + "/class", "0x030200");
  }
  Topology topology = Topology::read(tree.root());
  EXPECT_EQ(topology.gpus.size(), 256u);
  EXPECT_EQ(topology.nics.size(), 2048u);
  EXPECT_EQ(topology.notes.size(), 2u);
  use(tree.root());
}

TEST(TopologyFuzz, NamesThatAreNoNamesAreLeftOut) {
  SysfsTree tree;
  tree.write("sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE");
  tree.write("sys/class/infiniband/two words/ports/1/state", "4: ACTIVE");
  tree.write("sys/class/infiniband/line\nbreak/ports/1/state", "4: ACTIVE");
  tree.write("sys/class/infiniband/" + std::string(200, 'x') + "/ports/1/state", "4: ACTIVE");
  tree.write("sys/class/infiniband/\x1b[31m/ports/1/state", "4: ACTIVE");
  Topology topology = Topology::read(tree.root());
  ASSERT_EQ(topology.nics.size(), 1u);
  EXPECT_EQ(topology.nics[0].name, "mlx5_0");
}

}  // namespace
}  // namespace baton::transfer
