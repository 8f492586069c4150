#include "transfer/topology/place.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "transfer/topology/sysfs_tree.h"

namespace baton::transfer {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(Place, ReadsWhatAPersonOrCudaWrites) {
  EXPECT_EQ(*Place::parse(""), Place::unknown());
  EXPECT_EQ(*Place::parse("gpu:0000:53:00.0"), Place::gpu({0, 0x53, 0, 0}));
  EXPECT_EQ(*Place::parse("gpu:00000000:CA:00.0"), Place::gpu({0, 0xca, 0, 0}));
  EXPECT_EQ(*Place::parse("node:1"), Place::node(1));
  for (const char* text : {"gpu", "gpu:", "gpu:0", "node:", "node:-1", "node:x", "node:1x", "node:99999999999", "1"}) {
    EXPECT_EQ(Place::parse(text).status().code(), StatusCode::kInvalidArgument) << text;
  }
}

TEST(Place, CpuListsAreReadOrRefusedWhole) {
  EXPECT_THAT(parse_cpu_list("0-3,8,10-11"), ElementsAre(0, 1, 2, 3, 8, 10, 11));
  EXPECT_THAT(parse_cpu_list("5,1,5"), ElementsAre(1, 5));
  for (const char* text : {"", ",", "3-1", "-1", "0-4294967295", "0-65535,0-65535", "a", "1;2"}) {
    EXPECT_THAT(parse_cpu_list(text), IsEmpty()) << text;
  }
}

TEST(Place, AThreadBoundToOneNodeIsThere) {
  const Topology& topology = machine("p4d_24xlarge");  // 0-23,48-71 and 24-47,72-95
  EXPECT_EQ(node_of_cpus(topology, {0, 5, 71}), 0);
  EXPECT_EQ(node_of_cpus(topology, {24, 95}), 1);
  EXPECT_EQ(node_of_cpus(topology, {23, 24}), kUnknownNode);
  EXPECT_EQ(node_of_cpus(topology, {96}), kUnknownNode);
  EXPECT_EQ(node_of_cpus(topology, {}), kUnknownNode);
  EXPECT_EQ(node_of_cpus(Topology(), {0}), kUnknownNode);
}

TEST(Place, ThisThreadIsSomewhereOrNowhere) {
  Topology topology = Topology::read();
  Place place = Place::of_this_thread(topology);
  EXPECT_EQ(place.kind == Place::Kind::kNode, place.numa_node >= 0);
  EXPECT_EQ(Place::of_this_thread(Topology()), Place::unknown());
}

}  // namespace
}  // namespace baton::transfer
