#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "tensor/buffer.h"
#include "tensor/cpu_quota.h"
#include "tensor/dtype.h"
#include "tensor/thread_pool.h"

namespace baton {
namespace {

TEST(DType, NamesAndParsing) {
  EXPECT_EQ(parse_dtype("bfloat16"), DType::kBF16);
  EXPECT_EQ(parse_dtype("torch.bfloat16"), DType::kBF16);
  EXPECT_EQ(parse_dtype("BF16"), DType::kBF16);
  EXPECT_EQ(parse_dtype("float16"), DType::kF16);
  EXPECT_EQ(parse_dtype("F32"), DType::kF32);
  EXPECT_EQ(parse_dtype("fp8"), std::nullopt);
  EXPECT_EQ(parse_dtype(""), std::nullopt);
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kI32}) {
    EXPECT_EQ(parse_dtype(dtype_name(dtype)), dtype);
  }
}

TEST(DType, Bf16RoundsToNearestEven) {
  EXPECT_EQ(bf16(1.0f).bits, 0x3f80);
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f808000u)).bits, 0x3f80);  // a tie goes to the even neighbour
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f818000u)).bits, 0x3f82);
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f808001u)).bits, 0x3f81);
  EXPECT_EQ(bf16(-0.0f).bits, 0x8000);
  EXPECT_EQ(bf16(std::numeric_limits<float>::max()).bits, 0x7f80);  // rounds to infinity
  EXPECT_TRUE(std::isnan(static_cast<float>(bf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(DType, F16IsExact) {
  EXPECT_EQ(f16_to_float(0x3c00), 1.0f);
  EXPECT_EQ(f16_to_float(0xc000), -2.0f);
  EXPECT_EQ(f16_to_float(0x7bff), 65504.0f);
  EXPECT_EQ(f16_to_float(0x0001), 0x1p-24f);
  EXPECT_EQ(f16_to_float(0x03ff), 1023 * 0x1p-24f);
  EXPECT_EQ(f16_to_float(0x0400), 0x1p-14f);
  EXPECT_TRUE(std::signbit(f16_to_float(0x8000)));
  EXPECT_TRUE(std::isinf(f16_to_float(0x7c00)));
  EXPECT_TRUE(std::isnan(f16_to_float(0x7c01)));
}

TEST(Buffer, IsAlignedZeroedAndMovable) {
  auto allocated = Buffer::allocate(3'000'000);
  ASSERT_TRUE(allocated.ok()) << allocated.status().to_string();
  Buffer buffer = std::move(allocated).value();
  EXPECT_EQ(buffer.bytes(), 3'000'000u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % (2 << 20), 0u);
  for (std::byte value : buffer.span()) ASSERT_EQ(value, std::byte{0});
  buffer.data()[2'999'999] = std::byte{7};

  Buffer moved = std::move(buffer);
  EXPECT_EQ(moved.data()[2'999'999], std::byte{7});
  EXPECT_EQ(buffer.data(), nullptr);  // NOLINT: the moved-from state is specified
  EXPECT_EQ(buffer.bytes(), 0u);
  moved = Buffer();
}

TEST(Buffer, EmptyAndImpossible) {
  auto empty = Buffer::allocate(0);
  ASSERT_TRUE(empty.ok());
  EXPECT_EQ(empty->data(), nullptr);
  for (size_t bytes : {size_t{1} << 60, std::numeric_limits<size_t>::max()}) {
    auto impossible = Buffer::allocate(bytes);
    ASSERT_FALSE(impossible.ok());
    EXPECT_EQ(impossible.status().code(), StatusCode::kResourceExhausted);
    EXPECT_NE(impossible.status().message().find(std::to_string(bytes)), std::string::npos);
  }
}

TEST(ThreadPool, EveryThreadRunsOncePerJob) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.threads(), threads);
    std::vector<int> runs(static_cast<size_t>(threads));  // not atomic: each thread has its own, run() publishes
    for (int job = 0; job < 500; ++job) {
      pool.run([&](int thread, int count) {
        ASSERT_EQ(count, threads);
        ++runs[static_cast<size_t>(thread)];
      });
    }
    for (int count : runs) EXPECT_EQ(count, 500);
  }
}

TEST(ThreadPool, ParallelForCoversTheRangeOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int64_t count : {0, 1, 7, 64, 1000}) {
      for (int64_t grain : {0, 1, 3, 64, 5000}) {
        std::vector<int> seen(static_cast<size_t>(count));
        pool.parallel_for(count, grain, [&](int64_t begin, int64_t end, int thread) {
          ASSERT_LT(begin, end);
          ASSERT_LE(end - begin, std::max<int64_t>(1, grain));
          ASSERT_LT(thread, threads);
          for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
        });
        EXPECT_EQ(std::accumulate(seen.begin(), seen.end(), int64_t{0}), count);
        for (int times : seen) ASSERT_EQ(times, 1);
      }
    }
  }
}

TEST(ThreadPool, StreamForCoversTheRangeOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int64_t count : {0, 1, 2, 7, 64, 1000}) {
      for (int job = 0; job < 200; ++job) {
        std::vector<int> seen(static_cast<size_t>(count));
        pool.stream_for(count, [&](int64_t begin, int64_t end, int thread) {
          ASSERT_LT(begin, end);
          ASSERT_LT(thread, threads);
          for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
        });
        for (int times : seen) ASSERT_EQ(times, 1);
      }
    }
  }
}

TEST(ThreadPool, StreamForTakesOverWhatASlowThreadLeaves) {
  ThreadPool pool(3);
  std::atomic<int64_t> done{0};
  constexpr int64_t kCount = 999;
  std::vector<int> by(kCount, -1);
  pool.stream_for(kCount, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) by[static_cast<size_t>(i)] = thread;
    const int64_t all = done.fetch_add(end - begin) + end - begin;
    done.notify_all();
    // Thread 0's first piece, a quarter of its part, lasts until the others have done all the rest.
    if (begin == 0) {
      for (int64_t seen = all; seen < kCount; seen = done.load()) done.wait(seen);
    }
  });
  EXPECT_EQ(done.load(), kCount);
  EXPECT_EQ(by[0], 0);
  EXPECT_NE(by[kCount / 3 - 1], 0);
  EXPECT_EQ(std::count(by.begin(), by.end(), -1), 0);
}

TEST(ThreadPool, WakesAfterSleeping) {
  ThreadPool pool(4);
  std::atomic<int> total{0};
  // A job that one thread holds up until the others are done: they are past their spin budget by then.
  for (int job = 0; job < 20; ++job) {
    std::atomic<int> arrived{0};
    pool.run([&](int thread, int threads) {
      if (thread == 0) {
        for (int seen = arrived.load(); seen < threads - 1; seen = arrived.load()) arrived.wait(seen);
      } else {
        arrived.fetch_add(1);
        arrived.notify_all();
      }
      total.fetch_add(1);
    });
  }
  EXPECT_EQ(total.load(), 80);
}

TEST(UsableCpus, IsPositive) { EXPECT_GE(usable_cpus(), 1); }

class CgroupQuota : public testing::Test {
 protected:
  void SetUp() override {
    root_ = std::filesystem::path(testing::TempDir()) /
            ("baton_cgroup_" + std::to_string(reinterpret_cast<uintptr_t>(this)));
    std::filesystem::create_directories(root_);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  int cpus(const std::string& proc) { return cgroup_quota_cpus(proc, root_.string()); }
  std::filesystem::path root_;
};

TEST_F(CgroupQuota, Version2TakesTheTightestOfTheWayUp) {
  write("kubepods/cpu.max", "400000 100000\n");
  write("kubepods/pod1/cpu.max", "150000 100000\n");
  write("kubepods/pod1/main/cpu.max", "max 100000\n");
  EXPECT_EQ(cpus("0::/kubepods/pod1/main\n"), 2);
  EXPECT_EQ(cpus("0::/kubepods\n"), 4);
  EXPECT_EQ(cpus("0::/\n"), 0);
}

TEST_F(CgroupQuota, Version2InsideANamespaceReadsTheRoot) {
  write("cpu.max", "50000 100000\n");
  EXPECT_EQ(cpus("0::/\n"), 1);
  EXPECT_EQ(cpus("0::/../../not/visible\n"), 1);
}

TEST_F(CgroupQuota, Version1) {
  write("cpu,cpuacct/docker/1/cpu.cfs_quota_us", "250000\n");
  write("cpu,cpuacct/docker/1/cpu.cfs_period_us", "100000\n");
  write("cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
  write("cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(cpus("5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n"), 3);
  EXPECT_EQ(cpus("4:cpu,cpuacct:/\n"), 0);
}

TEST_F(CgroupQuota, NonsenseIsNoLimit) {
  write("a/cpu.max", "lots of time");
  EXPECT_EQ(cpus("0::/a\n"), 0);
  EXPECT_EQ(cpus(""), 0);
  EXPECT_EQ(cpus("garbage\n::\n"), 0);
}

}  // namespace
}  // namespace baton
