#include "transfer/topology/rails.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "transfer/topology/sysfs_tree.h"

namespace baton::transfer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

Place at_gpu(const Topology& topology, size_t gpu) { return Place::gpu(*topology.gpus[gpu].path.device); }

RailOptions options(const std::string& transport, uint32_t max_rails = 0) {
  RailOptions options;
  options.transport = transport;
  options.max_rails = max_rails;
  return options;
}

std::vector<std::string> names(const Topology& topology, const Place& place, const RailOptions& options) {
  Result<RailChoice> choice = choose_rails(topology, place, options);
  EXPECT_TRUE(choice.ok()) << choice.status().to_string();
  return choice.ok() ? choice->names() : std::vector<std::string>();
}

std::string reason(const RailChoice& choice, const std::string& name) {
  for (const std::vector<RailDecision>* list : {&choice.chosen, &choice.refused}) {
    for (const RailDecision& decision : *list) {
      if (decision.nic.name == name) return decision.reason;
    }
  }
  return "not there";
}

void set_state(SysfsTree& tree, const std::string& nic, const std::string& state) {
  tree.write("sys/class/infiniband/" + nic + "/ports/1/state", state);
}

TEST(ChooseRails, EveryGpuOfP5HasItsOwnFour) {
  const Topology& topology = machine("p5_48xlarge");
  EXPECT_THAT(names(topology, at_gpu(topology, 0), options("efa")),
              ElementsAre("rdmap79s0", "rdmap80s0", "rdmap81s0", "rdmap82s0"));
  std::set<std::string> all;
  for (size_t gpu = 0; gpu < 8; ++gpu) {
    for (const std::string& name : names(topology, at_gpu(topology, gpu), options("efa"))) {
      EXPECT_TRUE(all.insert(name).second) << name << " serves two GPUs";
    }
  }
  EXPECT_EQ(all.size(), 32u);
}

TEST(ChooseRails, TwoGpusOfP5enShareFourNics) {
  const Topology& topology = machine("p5en_48xlarge");
  EXPECT_THAT(names(topology, at_gpu(topology, 0), options("efa")), ElementsAre("rdmap85s0", "rdmap86s0"));
  EXPECT_THAT(names(topology, at_gpu(topology, 1), options("efa")), ElementsAre("rdmap87s0", "rdmap88s0"));
  // Asked for more, the neighbour's come before those of other switches.
  EXPECT_THAT(names(topology, at_gpu(topology, 1), options("efa", 5)),
              ElementsAre("rdmap87s0", "rdmap88s0", "rdmap85s0", "rdmap86s0", "rdmap110s0"));
  EXPECT_THAT(names(topology, at_gpu(topology, 1), options("efa", 1)), ElementsAre("rdmap87s0"));
  EXPECT_THAT(names(topology, at_gpu(topology, 1), options("efa", 99)), SizeIs(16));
}

TEST(ChooseRails, TwoGpusOfP4dUseOneNic) {
  const Topology& topology = machine("p4d_24xlarge");
  EXPECT_THAT(names(topology, at_gpu(topology, 2), options("efa")), ElementsAre("rdmap32s27"));
  EXPECT_THAT(names(topology, at_gpu(topology, 3), options("efa")), ElementsAre("rdmap32s27"));
  Result<RailChoice> choice = choose_rails(topology, at_gpu(topology, 3), options("efa"));
  EXPECT_EQ(reason(*choice, "rdmap32s27"), "PHB, same PCIe host bridge, shared out among 2 GPUs");
  EXPECT_EQ(reason(*choice, "rdmap16s27"), "farther away: NODE, same NUMA node");
  EXPECT_EQ(reason(*choice, "rdmap144s27"), "farther away: SYS, other NUMA node");
}

TEST(ChooseRails, DgxTakesTheComputeNicAndNoStorageNic) {
  const Topology& topology = machine("dgx_h100");
  const char* own[] = {"mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11"};
  for (size_t gpu = 0; gpu < 8; ++gpu) {
    EXPECT_THAT(names(topology, at_gpu(topology, gpu), options("verbs")), ElementsAre(own[gpu]));
  }
  Result<RailChoice> choice = choose_rails(topology, Place::node(1), options("verbs"));
  ASSERT_TRUE(choice.ok());
  EXPECT_THAT(choice->names(), ElementsAre("mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11"));
  EXPECT_EQ(choice->speed_bytes_per_s(), 200'000'000'000u);
  EXPECT_EQ(choice->candidates, 13u);
  EXPECT_EQ(choice->place, "near NUMA node 1");
  EXPECT_EQ(reason(*choice, "mlx5_8"), "Ethernet, the others are InfiniBand: name it to use it");
  EXPECT_EQ(reason(*choice, "mlx5_7"), "200 Gb/s, while others have 400 Gb/s");
  EXPECT_EQ(reason(*choice, "mlx5_2"), "link is down");
}

TEST(ChooseRails, HostMemoryTakesOneNicPerRootPort) {
  const Topology& topology = machine("p5_48xlarge");
  EXPECT_THAT(names(topology, Place::node(0), options("efa")),
              ElementsAre("rdmap79s0", "rdmap96s0", "rdmap113s0", "rdmap130s0"));
  EXPECT_THAT(names(topology, Place::node(1), options("efa", 5)),
              ElementsAre("rdmap147s0", "rdmap164s0", "rdmap181s0", "rdmap198s0", "rdmap148s0"));
  EXPECT_THAT(names(topology, Place::unknown(), options("efa")), SizeIs(kDefaultHostRails));
  Result<RailChoice> choice = choose_rails(topology, Place::node(0), options("efa"));
  EXPECT_EQ(reason(*choice, "rdmap80s0"), "enough with 4 (--rails takes more)");
}

TEST(ChooseRails, NamesAreTakenInTheirOrderAndOnlyThey) {
  const Topology& topology = machine("p5_48xlarge");
  RailOptions named = options("efa");
  named.names = {"rdmap201s0", "0000:4f:00.0", "rdmap201s0"};
  Result<RailChoice> choice = choose_rails(topology, at_gpu(topology, 0), named);
  ASSERT_TRUE(choice.ok());
  EXPECT_THAT(choice->names(), ElementsAre("rdmap201s0", "rdmap79s0"));
  EXPECT_EQ(choice->place, "by name");
  EXPECT_EQ(choice->chosen[0].distance, Distance::kOtherNode);
  EXPECT_EQ(reason(*choice, "rdmap80s0"), "not named in the configuration");
  EXPECT_EQ(choice->refused.size(), 30u);
  named.max_rails = 1;
  EXPECT_THAT(names(topology, at_gpu(topology, 0), named), ElementsAre("rdmap201s0"));
}

TEST(ChooseRails, WrongNamesAreErrorsThatListTheRightOnes) {
  const Topology& topology = machine("p4d_24xlarge");
  RailOptions named = options("efa");
  named.names = {"rdmap16s27", "mlx5_0"};
  Result<RailChoice> choice = choose_rails(topology, Place::unknown(), named);
  EXPECT_EQ(choice.status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(choice.status().message(), "NIC 'mlx5_0' does not exist; this machine has for transport efa: rdmap16s27, "
                                       "rdmap32s27, rdmap144s27, rdmap160s27");
  named.names = {"ens32"};
  choice = choose_rails(topology, Place::unknown(), named);
  EXPECT_THAT(choice.status().message(), HasSubstr("NIC 'ens32' is ethernet, not for transport efa; those are: rdmap"));
  named.names = {"rdmap16s27"};
  named.excluded = {"rdmap16s27"};
  EXPECT_EQ(choose_rails(topology, Place::unknown(), named).status().message(),
            "NIC 'rdmap16s27' is both named and excluded");
  EXPECT_EQ(choose_rails(topology, Place::unknown(), options("carrier-pigeon")).status().code(),
            StatusCode::kInvalidArgument);
}

TEST(ChooseRails, DownLinksAreRefusedAndTheShareIsDealtAgain) {
  SysfsTree tree;
  tree.load("p5en_48xlarge");
  set_state(tree, "rdmap85s0", "1: DOWN");
  set_state(tree, "rdmap86s0", "2: INIT");
  Topology topology = Topology::read(tree.root());
  Result<RailChoice> choice = choose_rails(topology, at_gpu(topology, 0), options("efa"));
  ASSERT_TRUE(choice.ok());
  EXPECT_THAT(choice->names(), ElementsAre("rdmap87s0"));
  EXPECT_EQ(reason(*choice, "rdmap85s0"), "link is down");
  EXPECT_EQ(reason(*choice, "rdmap86s0"), "link is down");
  EXPECT_EQ(reason(*choice, "rdmap88s0"), "near, but another GPU's share");
  EXPECT_THAT(names(topology, at_gpu(topology, 1), options("efa")), ElementsAre("rdmap88s0"));
}

TEST(ChooseRails, TheNextNearestServesWhenTheOwnAreDown) {
  SysfsTree tree;
  tree.load("dgx_h100");
  set_state(tree, "mlx5_0", "1: DOWN");
  Topology topology = Topology::read(tree.root());
  Result<RailChoice> choice = choose_rails(topology, at_gpu(topology, 0), options("verbs"));
  ASSERT_TRUE(choice.ok());
  // All of the node are equally far then; storage is still not among them.
  EXPECT_THAT(choice->names(), ElementsAre("mlx5_3", "mlx5_4", "mlx5_5"));
  EXPECT_EQ(choice->chosen.front().distance, Distance::kSameNode);
  EXPECT_THAT(names(topology, at_gpu(topology, 1), options("verbs")), ElementsAre("mlx5_3"));
}

TEST(ChooseRails, NothingLeftIsAnErrorThatSaysWhy) {
  SysfsTree tree;
  tree.load("p4d_24xlarge");
  for (const char* nic : {"rdmap16s27", "rdmap32s27", "rdmap144s27"}) set_state(tree, nic, "1: DOWN");
  Topology topology = Topology::read(tree.root());
  RailOptions some = options("efa");
  some.excluded = {"rdmap160s27", "mlx5_99"};
  Result<RailChoice> choice = choose_rails(topology, Place::unknown(), some);
  EXPECT_EQ(choice.status().code(), StatusCode::kUnavailable);
  EXPECT_THAT(choice.status().message(), HasSubstr("none of 4 NICs can be used for transport efa"));
  EXPECT_THAT(choice.status().message(), HasSubstr("rdmap16s27: link is down"));
  EXPECT_THAT(choice.status().message(), HasSubstr("rdmap160s27: excluded by the configuration"));
  some.names = {"rdmap16s27"};
  EXPECT_EQ(choose_rails(topology, Place::unknown(), some).status().code(), StatusCode::kUnavailable);
  EXPECT_THAT(choose_rails(topology, Place::unknown(), options("verbs")).status().message(),
              HasSubstr("sysfs shows no NIC for transport verbs"));
}

TEST(ChooseRails, AContainerWithSomeNicsSharesThemWithNobody) {
  SysfsTree tree;
  tree.load("p5en_48xlarge");
  for (int i = 0; i < 16; ++i) {
    if (i != 2 && i != 3) tree.remove("dev/infiniband/uverbs" + std::to_string(i));
  }
  tree.write("proc/driver/nvidia/gpus/0000:59:00.0/information", "");
  Topology topology = Topology::read(tree.root());
  // Given GPU 0 and the third and fourth NIC of its switch.
  EXPECT_THAT(names(topology, at_gpu(topology, 0), options("efa")), ElementsAre("rdmap87s0", "rdmap88s0"));
  Result<RailChoice> choice = choose_rails(topology, at_gpu(topology, 0), options("efa"));
  EXPECT_THAT(reason(*choice, "rdmap85s0"), HasSubstr("not given to this container"));
}

TEST(ChooseRails, AnUnknownGpuIsSaidAndBounded) {
  const Topology& topology = machine("p5_48xlarge");
  Result<RailChoice> choice = choose_rails(topology, Place::gpu(PciAddress{9, 9, 9, 0}), options("efa"));
  ASSERT_TRUE(choice.ok());
  EXPECT_THAT(choice->chosen, SizeIs(kDefaultHostRails));
  EXPECT_THAT(choice->place, HasSubstr("GPU 0009:09:09.0 is not in sysfs"));
  EXPECT_EQ(choice->chosen[0].distance, Distance::kUnknown);
}

TEST(ChooseRails, TcpTakesTheInterfaceOfTheDefaultRoute) {
  const Topology& topology = machine("p5en_48xlarge");
  Result<RailChoice> choice = choose_rails(topology, at_gpu(topology, 7), options("tcp"));
  ASSERT_TRUE(choice.ok());
  EXPECT_THAT(choice->names(), ElementsAre("enp71s0"));
  EXPECT_THAT(reason(*choice, "enp71s0"), HasSubstr("default route"));
  EXPECT_THAT(names(topology, at_gpu(topology, 7), options("tcp", 3)),
              ElementsAre("enp71s0", "enp146s0", "enp147s0"));
}

TEST(ChooseRails, BondsStandForTheirInterfaces) {
  SysfsTree tree;
  tree.add("net pci0000:00/0000:00:03.0 name=eth0 node=0 state=up mbit=25000");
  tree.write("sys/devices/virtual/net/bond0/operstate", "up");
  tree.make_directory("sys/devices/virtual/net/bond0/bonding");
  tree.link("sys/class/net/bond0", "../../devices/virtual/net/bond0");
  tree.link("sys/devices/pci0000:00/0000:00:03.0/net/eth0/master", "../../../../virtual/net/bond0");
  Topology topology = Topology::read(tree.root());
  Result<RailChoice> choice = choose_rails(topology, Place::unknown(), options("tcp"));
  ASSERT_TRUE(choice.ok());
  EXPECT_THAT(choice->names(), ElementsAre("bond0"));
  EXPECT_EQ(reason(*choice, "eth0"), "belongs to bond0");
}

// A slow NIC that happens to be as near as the fast ones would only slow the stripes down.
TEST(ChooseRails, SlowerOnesAreNotMixedInUnasked) {
  SysfsTree tree;
  tree.load("p5_48xlarge");
  tree.write("sys/class/infiniband/rdmap80s0/ports/1/rate", "25 Gb/sec (1X EDR)");
  Topology topology = Topology::read(tree.root());
  EXPECT_THAT(names(topology, at_gpu(topology, 0), options("efa")),
              ElementsAre("rdmap79s0", "rdmap81s0", "rdmap82s0"));
  EXPECT_THAT(names(topology, at_gpu(topology, 0), options("efa", 4)),
              ElementsAre("rdmap79s0", "rdmap81s0", "rdmap82s0", "rdmap80s0"));
}

// Some clouds give every device a host bridge of its own: NUMA is all there is, and PCI order pairs them.
TEST(ChooseRails, WithoutSwitchesTheNodeIsDealtOut) {
  SysfsTree tree;
  tree.add("node 0 cpus=0-3 gib=1");
  tree.add("node 1 cpus=4-7 gib=1");
  for (int i = 0; i < 8; ++i) {
    std::string id = std::to_string(i), node = std::to_string(i / 4);
    tree.add("gpu pci000" + id + ":00/000" + id + ":00:00.0 device=0x2330 node=" + node);
    tree.add("rdma pci010" + id + ":00/010" + id + ":00:00.0 name=mlx5_" + id + " vendor=0x15b3 device=0x101e " +
             "driver=mlx5_core node=" + node + " state=4:_ACTIVE rate=400_Gb/sec layer=InfiniBand uverbs=" + id);
  }
  Topology topology = Topology::read(tree.root());
  for (size_t gpu = 0; gpu < 8; ++gpu) {
    EXPECT_THAT(names(topology, at_gpu(topology, gpu), options("verbs")), ElementsAre("mlx5_" + std::to_string(gpu)));
  }
}

TEST(ChooseRails, EveryNicIsDecidedOnceAndTheSameWayEachTime) {
  for (const char* name : {"p5_48xlarge", "p5en_48xlarge", "p4d_24xlarge", "dgx_h100"}) {
    SysfsTree tree;
    tree.load(name);
    const Topology &topology = machine(name), again = Topology::read(tree.root());
    for (const char* transport : {"efa", "verbs", "tcp"}) {
      for (uint32_t rails : {0u, 1u, 3u, 1000u}) {
        for (size_t gpu = 0; gpu <= topology.gpus.size(); ++gpu) {
          Place place = gpu < topology.gpus.size() ? at_gpu(topology, gpu) : Place::node(1);
          Result<RailChoice> choice = choose_rails(topology, place, options(transport, rails));
          if (!choice.ok()) continue;
          std::set<std::string> seen;
          for (const RailDecision& decision : choice->chosen) seen.insert(decision.nic.name);
          for (const RailDecision& decision : choice->refused) seen.insert(decision.nic.name);
          EXPECT_EQ(seen.size(), choice->candidates);
          EXPECT_EQ(choice->chosen.size() + choice->refused.size(), choice->candidates);
          EXPECT_LE(choice->chosen.size(), rails == 0 ? kDefaultGpuRails : rails);
          for (const RailDecision& decision : choice->refused) EXPECT_THAT(decision.reason, ::testing::Not(IsEmpty()));
          EXPECT_EQ(choice->describe(), choose_rails(again, place, options(transport, rails))->describe());
        }
      }
    }
  }
}

TEST(ChooseRails, DescribesItself) {
  const Topology& topology = machine("p4d_24xlarge");
  EXPECT_EQ(choose_rails(topology, at_gpu(topology, 0), options("efa"))->describe(),
            "1 of 4 efa NICs (near GPU 0 at 0000:10:1c.0): rdmap16s27\n"
            "  + rdmap16s27     0000:10:1b.0  100 Gb/s   PHB, same PCIe host bridge, shared out among 2 GPUs\n"
            "  - rdmap32s27     0000:20:1b.0  100 Gb/s   farther away: NODE, same NUMA node\n"
            "  - rdmap144s27    0000:90:1b.0  100 Gb/s   farther away: SYS, other NUMA node\n"
            "  - rdmap160s27    0000:a0:1b.0  100 Gb/s   farther away: SYS, other NUMA node\n");
}

}  // namespace
}  // namespace baton::transfer
