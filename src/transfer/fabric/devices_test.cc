#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "transfer/fabric/provider.h"
#include "transfer/topology/rails.h"
#include "transfer/topology/sysfs_tree.h"

namespace baton::transfer::fabric {
namespace {

using ::testing::ElementsAre;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::SizeIs;

const MemoryLimits kNoLimits;

TEST(ChooseDevices, AnAgentOpensTheNearNicsOfP5Only) {
  const Topology& topology = machine("p5_48xlarge");
  ASSERT_THAT(topology.nics, SizeIs(Ge(32)));
  const Place gpu = Place::gpu(*topology.gpus[0].path.device);
  EXPECT_THAT(*choose_devices("efa", 0, topology, gpu, kNoLimits),
              ElementsAre("rdmap79s0-rdm", "rdmap80s0-rdm", "rdmap81s0-rdm", "rdmap82s0-rdm"));
  // Host memory of a node: NICs of that node, each behind another switch.
  Result<std::vector<std::string>> first = choose_devices("efa", 0, topology, Place::node(0), kNoLimits);
  Result<std::vector<std::string>> second = choose_devices("efa", 0, topology, Place::node(1), kNoLimits);
  EXPECT_THAT(*first, ElementsAre("rdmap79s0-rdm", "rdmap96s0-rdm", "rdmap113s0-rdm", "rdmap130s0-rdm"));
  EXPECT_THAT(*second, ElementsAre("rdmap147s0-rdm", "rdmap164s0-rdm", "rdmap181s0-rdm", "rdmap198s0-rdm"));
  // A process that may run on either.
  EXPECT_THAT(*choose_devices("efa", 0, topology, Place::unknown(), kNoLimits), SizeIs(kDefaultHostRails));
}

TEST(ChooseDevices, MoreWhenToldTo) {
  const Topology& topology = machine("p5_48xlarge");
  EXPECT_THAT(*choose_devices("efa", 1, topology, Place::node(1), kNoLimits), ElementsAre("rdmap147s0-rdm"));
  EXPECT_THAT(*choose_devices("efa", 32, topology, Place::node(1), kNoLimits), SizeIs(32));
}

TEST(ChooseDevices, NothingIsOpenedThatDoesNotFit) {
  const Topology& topology = machine("p5_48xlarge");
  MemoryLimits limits;
  limits.cgroup_bytes = 2ull << 30;
  EXPECT_TRUE(choose_devices("efa", 0, topology, Place::node(0), limits).ok());
  Result<std::vector<std::string>> all = choose_devices("efa", 32, topology, Place::node(0), limits);
  ASSERT_FALSE(all.ok());
  EXPECT_EQ(all.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(all.status().message(), HasSubstr("GiB"));
}

TEST(LibraryDefaults, LeaveWhatTheUserHasSet) {
  ASSERT_EQ(::setenv("FI_TCP_MAX_RX_SIZE", "4096", 1), 0);
  set_library_defaults();
  EXPECT_STREQ(std::getenv("FI_TCP_MAX_RX_SIZE"), "4096");
  ASSERT_EQ(::unsetenv("FI_TCP_MAX_RX_SIZE"), 0);
  set_library_defaults();
  EXPECT_EQ(std::getenv("FI_TCP_MAX_RX_SIZE") != nullptr, FI_VERSION_GE(fi_version(), FI_VERSION(1, 19)));
}

}  // namespace
}  // namespace baton::transfer::fabric
