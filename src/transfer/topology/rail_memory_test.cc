#include "transfer/topology/rail_memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "transfer/topology/sysfs_tree.h"

namespace baton::transfer {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kGiB = 1 << 30;

RailChoice choose(const std::string& name, const std::string& transport, uint32_t max_rails = 0) {
  const Topology& topology = machine(name);
  RailOptions options;
  options.transport = transport;
  options.max_rails = max_rails;
  Result<RailChoice> choice = choose_rails(topology, Place::gpu(*topology.gpus[0].path.device), options);
  EXPECT_TRUE(choice.ok()) << choice.status().to_string();
  return *choice;
}

TEST(RailMemory, P5InOneLine) {
  RailMemory memory = predict_rail_memory("efa", choose("p5_48xlarge", "efa"));
  EXPECT_EQ(memory.describe(), "opens 4 of 32 NICs (near GPU 0 at 0000:53:00.0): predicted 572 MiB, 436 MiB of it "
                               "pinned; all 32 would take 4.5 GiB");
  EXPECT_EQ(memory.bytes, 572 * kMiB);
  EXPECT_EQ(memory.locked_bytes, 436 * kMiB);
}

TEST(RailMemory, TcpIsCheapAndPinsNothing) {
  RailMemory memory = predict_rail_memory("net", choose("p4d_24xlarge", "tcp"), {.registered_host_bytes = kGiB});
  EXPECT_EQ(memory.describe(), "opens 1 of 4 NICs (near GPU 0 at 0000:10:1c.0): predicted 6.0 MiB; all 4 would take "
                               "24 MiB");
  EXPECT_EQ(memory.locked_bytes, 0u);
}

TEST(RailMemory, RegisteredMemoryCountsOncePerRail) {
  RailWindows windows;
  windows.registered_host_bytes = 10 * kGiB;
  windows.staging_bytes = kMiB;
  RailMemory memory = predict_rail_memory("efa", choose("p5_48xlarge", "efa"), windows);
  EXPECT_EQ(memory.bytes, 4 * 144 * kMiB);
  EXPECT_EQ(memory.locked_bytes, 4 * (110 * kMiB + 10 * kGiB));
}

TEST(RailMemory, Saturates) {
  RailWindows windows;
  windows.endpoints_per_rail = std::numeric_limits<uint32_t>::max();
  windows.registered_host_bytes = std::numeric_limits<uint64_t>::max();
  RailMemory memory = predict_rail_memory("efa", choose("p5_48xlarge", "efa"), windows);
  EXPECT_EQ(memory.locked_bytes, std::numeric_limits<uint64_t>::max());
}

TEST(RailMemory, TooLittleLockableMemoryIsSaidBefore) {
  RailMemory memory = predict_rail_memory("efa", choose("p5_48xlarge", "efa"));
  MemoryLimits limits;
  limits.memlock_bytes = 8 * kMiB;
  MemoryVerdict verdict = check_rail_memory(memory, limits);
  EXPECT_EQ(verdict.status.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(verdict.status.message(), HasSubstr("4 rails lock 436 MiB of memory, but this process may lock 8.0 MiB"));
  EXPECT_THAT(verdict.status.message(), HasSubstr("IPC_LOCK"));
  limits.memlock_bytes = kGiB;
  EXPECT_TRUE(check_rail_memory(memory, limits).status.ok());
  limits.memlock_used_bytes = 700 * kMiB;
  EXPECT_FALSE(check_rail_memory(memory, limits).status.ok());
  EXPECT_TRUE(check_rail_memory(predict_rail_memory("tcp", choose("p5_48xlarge", "tcp")), limits).status.ok());
}

TEST(RailMemory, AContainerThatWouldBeKilledIsToldBefore) {
  RailMemory memory = predict_rail_memory("efa", choose("p5_48xlarge", "efa", 32));
  EXPECT_TRUE(check_rail_memory(memory, {}).status.ok());
  MemoryLimits limits;
  limits.cgroup_bytes = 64 * kGiB;
  limits.cgroup_used_bytes = 62 * kGiB;
  EXPECT_EQ(check_rail_memory(memory, limits).status.message(),
            "32 rails take 4.5 GiB of memory, but this container has 2.0 GiB left of 64.0 GiB: raise its memory limit "
            "or open fewer NICs (--rails)");
  limits.cgroup_used_bytes = 58 * kGiB;
  MemoryVerdict verdict = check_rail_memory(memory, limits);
  EXPECT_TRUE(verdict.status.ok());
  EXPECT_EQ(verdict.warning, "32 rails take 4.5 GiB of the 6.0 GiB that this container has left (limit 64.0 GiB)");
  limits.cgroup_used_bytes = 0;
  EXPECT_EQ(check_rail_memory(memory, limits).warning, "");
}

TEST(MemoryLimits, TheTightestGroupAboveCounts) {
  SysfsTree tree;
  tree.write("proc/self/cgroup", "0::/kubepods/pod1/worker");
  tree.write("sys/fs/cgroup/kubepods/pod1/worker/memory.max", "max");
  tree.write("sys/fs/cgroup/kubepods/pod1/memory.max", std::to_string(8 * kGiB));
  tree.write("sys/fs/cgroup/kubepods/pod1/memory.current", std::to_string(3 * kGiB));
  tree.write("sys/fs/cgroup/kubepods/memory.max", std::to_string(100 * kGiB));
  tree.write("sys/fs/cgroup/kubepods/memory.current", std::to_string(90 * kGiB));
  MemoryLimits limits = MemoryLimits::read(tree.root());
  EXPECT_EQ(limits.cgroup_bytes, 8 * kGiB);
  EXPECT_EQ(limits.cgroup_used_bytes, 3 * kGiB);
}

TEST(MemoryLimits, VersionOneAndInsideAContainer) {
  SysfsTree tree;
  tree.write("proc/self/cgroup", "12:cpuset:/\n4:memory:/docker/abc\n0::/");
  tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(2 * kGiB));
  tree.write("sys/fs/cgroup/memory/memory.usage_in_bytes", std::to_string(kGiB));
  MemoryLimits limits = MemoryLimits::read(tree.root());
  EXPECT_EQ(limits.cgroup_bytes, 2 * kGiB);
  tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");
  EXPECT_FALSE(MemoryLimits::read(tree.root()).cgroup_bytes);
}

TEST(MemoryLimits, IpcLockLiftsTheLimit) {
  SysfsTree tree;
  tree.write("proc/self/status", "Name:\ttest\nVmPin:\t      12 kB\nCapEff:\t0000000000004000");
  EXPECT_FALSE(MemoryLimits::read(tree.root()).memlock_bytes);
  tree.write("proc/self/status", "Name:\ttest\nVmPin:\t      12 kB\nCapEff:\t0000000000000000");
  MemoryLimits limits = MemoryLimits::read(tree.root());
  if (limits.memlock_bytes) {
    EXPECT_EQ(limits.memlock_used_bytes, 12u * 1024);
  }
}

TEST(MemoryLimits, GarbageIsNoLimit) {
  SysfsTree tree;
  for (const char* groups : {"", "\n\n\n", ":", "0:", "0::", "0::../../../etc", "::::::", "4:memory:"}) {
    tree.write("proc/self/cgroup", groups);
    tree.write("sys/fs/cgroup/memory.max", "lots");
    EXPECT_FALSE(MemoryLimits::read(tree.root()).cgroup_bytes) << groups;
  }
  MemoryLimits::read();  // this machine's own
}

}  // namespace
}  // namespace baton::transfer
