#include "transfer/topology/topology.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "transfer/topology/sysfs_tree.h"

namespace baton::transfer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

size_t count(const Topology& topology, NicKind kind) {
  return static_cast<size_t>(std::count_if(topology.nics.begin(), topology.nics.end(),
                                           [kind](const Nic& nic) { return nic.kind == kind; }));
}

std::vector<std::string> at_distance(const Topology& topology, size_t gpu, Distance wanted) {
  std::vector<std::string> names;
  for (const Nic& nic : topology.nics) {
    if (nic.kind != NicKind::kEthernet && distance(topology.gpus[gpu], nic) == wanted) names.push_back(nic.name);
  }
  return names;
}

TEST(PciAddress, ReadsWhatSysfsLspciCudaAndNvmlWrite) {
  PciAddress address{0, 0x4f, 0, 0};
  EXPECT_EQ(PciAddress::parse("0000:4f:00.0"), address);
  EXPECT_EQ(PciAddress::parse("4f:00.0"), address);
  EXPECT_EQ(PciAddress::parse("00000000:4F:00.0"), address);
  EXPECT_EQ(PciAddress::parse("10000:e1:1f.7"), (PciAddress{0x10000, 0xe1, 0x1f, 7}));
  EXPECT_EQ(address.to_string(), "0000:4f:00.0");
}

TEST(PciAddress, RefusesWhatIsNone) {
  for (const char* text : {"", ".", ":", ":.", "0000:4f:00", "0000:4f:00.8", "0000:4f:20.0", "0000:4ff:00.0", "4f:00.",
                           "0000:4f:00.00", "g000:4f:00.0", "123456789:4f:00.0", ":4f:00.0", "a:b:c:d.0",
                           "0000: 4f:00.0", "-1:00.0", "0x1:00.0"}) {
    EXPECT_FALSE(PciAddress::parse(text)) << text;
  }
}

TEST(PciPath, ComesFromTheLinkAlone) {
  PciPath path = PciPath::parse(
      "../../devices/pci0000:44/0000:44:00.0/0000:45:00.0/0000:46:01.0/0000:4f:00.0/infiniband/rdmap79s0");
  EXPECT_EQ(path.host_bridge, "pci0000:44");
  ASSERT_EQ(path.bridges.size(), 3u);
  EXPECT_EQ(path.bridges[2].to_string(), "0000:46:01.0");
  EXPECT_EQ(path.device->to_string(), "0000:4f:00.0");
  EXPECT_EQ(path.uplink(), "pci0000:44/0000:44:00.0");
}

TEST(PciPath, AnInnerHostBridgeCounts) {
  PciPath path = PciPath::parse("../../../devices/pci0000:e0/0000:e0:05.5/pci10000:e0/10000:e0:06.0/10000:e1:00.0");
  EXPECT_EQ(path.host_bridge, "pci10000:e0");
  EXPECT_EQ(path.bridges.size(), 1u);
}

TEST(Topology, P5Has32EfaInGroupsOfFour) {
  const Topology& topology = machine("p5_48xlarge");
  EXPECT_THAT(topology.notes, IsEmpty());
  ASSERT_EQ(topology.gpus.size(), 8u);
  ASSERT_EQ(count(topology, NicKind::kEfa), 32u);
  ASSERT_EQ(topology.numa_nodes.size(), 2u);
  EXPECT_EQ(topology.numa_nodes[1].cpus, "48-95,144-191");
  EXPECT_EQ(topology.numa_nodes[0].memory_bytes, uint64_t{1000} << 30);
  EXPECT_EQ(topology.gpus[1].path.device->to_string(), "0000:64:00.0");
  EXPECT_EQ(topology.gpus[1].pci_device_id, 0x2330);
  const Nic* nic = topology.find_nic("rdmap79s0");
  ASSERT_NE(nic, nullptr);
  EXPECT_EQ(nic->speed_bytes_per_s, 12'500'000'000u);
  EXPECT_EQ(nic->link, LinkState::kUp);
  EXPECT_EQ(nic->address(), "0000:4f:00.0");
  EXPECT_EQ(nic->numa_node, 0);
  EXPECT_THAT(at_distance(topology, 0, Distance::kSameSwitch),
              ElementsAre("rdmap79s0", "rdmap80s0", "rdmap81s0", "rdmap82s0"));
  for (size_t gpu = 0; gpu < 8; ++gpu) {
    EXPECT_EQ(at_distance(topology, gpu, Distance::kSameSwitch).size(), 4u) << gpu;
    EXPECT_EQ(at_distance(topology, gpu, Distance::kSameNode).size(), 12u) << gpu;
    EXPECT_EQ(at_distance(topology, gpu, Distance::kOtherNode).size(), 16u) << gpu;
  }
}

TEST(Topology, P5enHasTwoGpusAndFourEfaOnASwitch) {
  const Topology& topology = machine("p5en_48xlarge");
  ASSERT_EQ(topology.gpus.size(), 8u);
  ASSERT_EQ(count(topology, NicKind::kEfa), 16u);
  EXPECT_EQ(count(topology, NicKind::kEthernet), 16u);
  for (size_t gpu : {0, 1}) {
    EXPECT_THAT(at_distance(topology, gpu, Distance::kSameSwitch),
                ElementsAre("rdmap85s0", "rdmap86s0", "rdmap87s0", "rdmap88s0"));
  }
  EXPECT_EQ(topology.find_nic("rdmap85s0")->speed_bytes_per_s, 25'000'000'000u);
  EXPECT_TRUE(topology.find_nic("enp71s0")->default_route);
  EXPECT_FALSE(topology.find_nic("enp72s0")->default_route);
}

TEST(Topology, P4dShowsNoSwitchesOnlyHostBridges) {
  const Topology& topology = machine("p4d_24xlarge");
  ASSERT_EQ(topology.gpus.size(), 8u);
  EXPECT_THAT(at_distance(topology, 0, Distance::kSameSwitch), IsEmpty());
  EXPECT_THAT(at_distance(topology, 0, Distance::kSameHostBridge), ElementsAre("rdmap16s27"));
  EXPECT_THAT(at_distance(topology, 1, Distance::kSameHostBridge), ElementsAre("rdmap16s27"));
  EXPECT_THAT(at_distance(topology, 0, Distance::kSameNode), ElementsAre("rdmap32s27"));
  EXPECT_THAT(at_distance(topology, 7, Distance::kSameHostBridge), ElementsAre("rdmap160s27"));
}

// The matrix that nvidia-smi prints for this machine.
TEST(Topology, DgxH100MatchesNvidiaSmi) {
  const Topology& topology = machine("dgx_h100");
  ASSERT_EQ(topology.gpus.size(), 8u);
  ASSERT_EQ(count(topology, NicKind::kVerbs), 13u);
  const char* own[] = {"mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11"};
  for (size_t gpu = 0; gpu < 8; ++gpu) {
    EXPECT_THAT(at_distance(topology, gpu, Distance::kSwitches), ElementsAre(own[gpu]));
    EXPECT_THAT(at_distance(topology, gpu, Distance::kSameSwitch), IsEmpty());
    EXPECT_EQ(at_distance(topology, gpu, Distance::kSameNode).size(), gpu < 4 ? 5u : 6u);
  }
  EXPECT_EQ(topology.find_nic("mlx5_0")->speed_bytes_per_s, 50'000'000'000u);
  EXPECT_EQ(topology.find_nic("mlx5_0")->layer, LinkLayer::kInfiniband);
  EXPECT_EQ(topology.find_nic("mlx5_0")->interface, "ibp24s0");
  EXPECT_EQ(topology.find_nic("mlx5_2")->link, LinkState::kDown);
  EXPECT_EQ(topology.find_nic("mlx5_2")->layer, LinkLayer::kEthernet);
  EXPECT_EQ(distance(0, *topology.find_nic("mlx5_0")), Distance::kSameNode);
  EXPECT_EQ(distance(1, *topology.find_nic("mlx5_0")), Distance::kOtherNode);
  EXPECT_EQ(distance(kUnknownNode, *topology.find_nic("mlx5_0")), Distance::kUnknown);
}

TEST(Topology, FindsTheNicBehindADomainOfLibfabric) {
  const Topology& topology = machine("p5_48xlarge");
  EXPECT_EQ(topology.find_domain("rdmap79s0-rdm", std::nullopt)->name, "rdmap79s0");
  EXPECT_EQ(topology.find_domain("efa_0-rdm", PciAddress{0, 0x4f, 0, 0})->name, "rdmap79s0");
  EXPECT_EQ(topology.find_domain("nothing", std::nullopt), nullptr);
  const Topology& dgx = machine("dgx_h100");
  EXPECT_EQ(dgx.find_domain("mlx5_10", std::nullopt)->name, "mlx5_10");
  EXPECT_EQ(dgx.find_domain("ens6f0", PciAddress{0, 0x82, 0, 0})->name, "ens6f0");
  EXPECT_EQ(dgx.find_domain("irdma0", PciAddress{0, 0x82, 0, 0})->name, "irdma0");
}

TEST(Topology, FindsNicsByInterfaceAndAddress) {
  const Topology& topology = machine("dgx_h100");
  EXPECT_EQ(topology.find_nic("0000:18:00.0")->name, "mlx5_0");
  EXPECT_EQ(topology.find_nic("18:00.0")->name, "mlx5_0");
  EXPECT_EQ(topology.find_nic("ibp24s0")->name, "ibp24s0");
  EXPECT_EQ(topology.find_nic(""), nullptr);
}

TEST(Topology, AnEmptyRootIsAnEmptyTopology) {
  SysfsTree tree;
  Topology topology = Topology::read(tree.root());
  EXPECT_TRUE(topology.nics.empty());
  EXPECT_TRUE(topology.gpus.empty());
  ASSERT_EQ(topology.notes.size(), 1u);
  EXPECT_THAT(topology.describe(), HasSubstr("(none)"));
  EXPECT_TRUE(Topology::read(tree.root() + "/nowhere").nics.empty());
}

TEST(Topology, ThisMachineCanBeRead) {
  Topology topology = Topology::read();
  EXPECT_FALSE(topology.describe().empty());
}

TEST(Topology, KnowsWhatThisContainerWasGiven) {
  SysfsTree tree;
  tree.load("p5_48xlarge");
  for (int i = 4; i < 32; ++i) tree.remove("dev/infiniband/uverbs" + std::to_string(i));
  tree.write("proc/driver/nvidia/gpus/0000:53:00.0/information", "Model: H100");
  Topology topology = Topology::read(tree.root());
  EXPECT_TRUE(topology.find_nic("rdmap79s0")->accessible);
  EXPECT_FALSE(topology.find_nic("rdmap96s0")->accessible);
  EXPECT_TRUE(topology.gpus[0].visible);
  EXPECT_FALSE(topology.gpus[1].visible);
  ASSERT_EQ(topology.notes.size(), 1u);
  EXPECT_THAT(topology.notes[0], HasSubstr("28 of 32 RDMA devices have no device file"));
}

TEST(Topology, TellsOfEfaDevicesWithoutADriver) {
  SysfsTree tree;
  tree.load("p4d_24xlarge");
  tree.remove("sys/class/infiniband");
  Topology topology = Topology::read(tree.root());
  EXPECT_EQ(count(topology, NicKind::kEfa), 0u);
  ASSERT_EQ(topology.notes.size(), 1u);
  EXPECT_THAT(topology.notes[0], HasSubstr("4 EFA devices on PCI without an RDMA device"));
}

TEST(Topology, OneNodeOwnsWhatFirmwareDidNotAssign) {
  SysfsTree tree;
  tree.add("node 0 cpus=0-3 gib=16");
  tree.add("net pci0000:00/0000:00:03.0 name=eth0 node=-1 state=up mbit=10000");
  EXPECT_EQ(Topology::read(tree.root()).find_nic("eth0")->numa_node, 0);
  tree.add("node 1 cpus=4-7 gib=16");
  EXPECT_EQ(Topology::read(tree.root()).find_nic("eth0")->numa_node, kUnknownNode);
}

TEST(Topology, InterfacesOfABondNameIt) {
  SysfsTree tree;
  tree.add("net pci0000:00/0000:00:03.0 name=eth0 node=0 state=up mbit=25000");
  tree.write("sys/devices/virtual/net/bond0/operstate", "up");
  tree.write("sys/devices/virtual/net/bond0/speed", "50000");
  tree.make_directory("sys/devices/virtual/net/bond0/bonding");
  tree.link("sys/class/net/bond0", "../../devices/virtual/net/bond0");
  tree.link("sys/devices/pci0000:00/0000:00:03.0/net/eth0/master", "../../../../virtual/net/bond0");
  tree.write("sys/devices/virtual/net/veth1/operstate", "up");
  tree.link("sys/class/net/veth1", "../../devices/virtual/net/veth1");
  tree.write("sys/devices/virtual/net/lo/type", "772");
  tree.link("sys/class/net/lo", "../../devices/virtual/net/lo");
  Topology topology = Topology::read(tree.root());
  EXPECT_EQ(topology.find_nic("eth0")->bonded_in, "bond0");
  EXPECT_EQ(topology.find_nic("bond0")->speed_bytes_per_s, 6'250'000'000u);
  EXPECT_EQ(topology.find_nic("veth1"), nullptr);
  EXPECT_EQ(topology.find_nic("lo"), nullptr);
}

TEST(Topology, AContainerWithAVethHasThatOne) {
  SysfsTree tree;
  tree.write("sys/devices/virtual/net/eth0/operstate", "up");
  tree.write("sys/devices/virtual/net/eth0/speed", "10000");
  tree.link("sys/class/net/eth0", "../../devices/virtual/net/eth0");
  Topology topology = Topology::read(tree.root());
  ASSERT_EQ(topology.nics.size(), 1u);
  EXPECT_EQ(topology.nics[0].address(), "-");
}

TEST(Topology, OddRatesAreUnknownNotWrong) {
  SysfsTree tree;
  tree.load("dgx_h100");
  const std::string rate = "sys/class/infiniband/mlx5_0/ports/1/rate";
  auto read_rate = [&](const std::string& text) {
    tree.write(rate, text);
    return Topology::read(tree.root()).find_nic("mlx5_0")->speed_bytes_per_s;
  };
  EXPECT_EQ(read_rate("2.5 Gb/sec (1X SDR)"), 312'500'000u);
  for (const char* text : {"", "fast", "-5 Gb/sec", "1e99 Gb/sec", "99999999999 Gb/sec", "nan Gb/sec", " Gb/sec",
                           "0 Gb/sec", "1.2.3.4.5.6.7 Gb/sec (4X)"}) {
    EXPECT_EQ(read_rate(text), 0u) << text;
  }
}

TEST(Topology, DrawsALinePerRootPort) {
  EXPECT_EQ(machine("p5en_48xlarge").picture(),
            "node 0  pci0000:44  GPU 0, GPU 1  --  4 x efa, 800 Gb/s: rdmap85s0, rdmap86s0, rdmap87s0, rdmap88s0\n"
            "node 0  pci0000:5d  GPU 2, GPU 3  --  4 x efa, 800 Gb/s: rdmap110s0, rdmap111s0, rdmap112s0, rdmap113s0\n"
            "node 1  pci0000:76  GPU 4, GPU 5  --  4 x efa, 800 Gb/s: rdmap135s0, rdmap136s0, rdmap137s0, rdmap138s0\n"
            "node 1  pci0000:8f  GPU 6, GPU 7  --  4 x efa, 800 Gb/s: rdmap160s0, rdmap161s0, rdmap162s0, rdmap163s0\n");
  EXPECT_THAT(machine("dgx_h100").picture(),
              HasSubstr("node 0  pci0000:28  2 x verbs, 200 Gb/s: mlx5_1, mlx5_2 (down)\n"));
  EXPECT_THAT(machine("p4d_24xlarge").picture(),
              HasSubstr("node 0  pci0000:10  GPU 0, GPU 1  --  1 x efa, 100 Gb/s: rdmap16s27\n"));
}

TEST(Topology, DescribesItselfAsATable) {
  std::string text = machine("p4d_24xlarge").describe();
  EXPECT_THAT(text, HasSubstr("NUMA node 1: CPUs 24-47,72-95, 560 GiB\n"));
  EXPECT_THAT(text, HasSubstr("GPU 7   0000:a0:1d.0  10de:20b0  node 1\n"));
  EXPECT_THAT(text, HasSubstr("rdmap16s27   efa       0000:10:1b.0  0     100 Gb/s   up    PHB   PHB   NODE  NODE  "
                              "SYS   SYS   SYS   SYS\n"));
}

}  // namespace
}  // namespace baton::transfer
