#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "base/random.h"
#include "transfer/cuda/device.h"
#include "transfer/include/baton/transfer.h"

/// What the benchmarks of GPU memory share: a GPU with a pool on it, checked block by block, and a pipe between two processes.
namespace baton::bench {

using namespace baton::transfer;
using namespace baton::transfer::cuda;

inline int64_t now_ns() { return SteadyClock::instance().now_ns(); }
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

class Wire {
 public:
  Wire(int in, int out) : in_(::fdopen(in, "rb")), out_(::fdopen(out, "wb")) {}
  void put(const std::string& bytes) {
    auto size = static_cast<uint32_t>(bytes.size());
    std::fwrite(&size, sizeof(size), 1, out_);
    std::fwrite(bytes.data(), 1, bytes.size(), out_);
    std::fflush(out_);
  }
  std::string get() {
    uint32_t size = 0;
    if (std::fread(&size, sizeof(size), 1, in_) != 1) ::_exit(1);
    std::string bytes(size, '\0');
    if (size > 0 && std::fread(bytes.data(), 1, size, in_) != size) ::_exit(1);
    return bytes;
  }

 private:
  FILE* in_;
  FILE* out_;
};

inline uint64_t pattern(uint64_t word) { return (word + 1) * 0x9e3779b97f4a7c15ull; }

inline std::vector<BlockPair> scattered(uint32_t count, uint64_t blocks, uint64_t seed) {
  std::vector<uint32_t> from(blocks), to(blocks);
  std::iota(from.begin(), from.end(), 0u);
  std::iota(to.begin(), to.end(), 0u);
  Random random(seed);
  std::shuffle(from.begin(), from.end(), random);
  std::shuffle(to.begin(), to.end(), random);
  std::vector<BlockPair> pairs;
  for (uint32_t i = 0; i < count; ++i) pairs.push_back({from[i], to[i]});
  return pairs;
}

/// Blocks with wrong bytes, and blocks that were touched and should not have been.
inline size_t wrong_blocks(const std::vector<uint64_t>& words, const std::vector<BlockPair>& pairs, uint64_t stride) {
  std::vector<bool> expected(words.size() * 8 / stride);
  size_t wrong = 0, each = stride / 8;
  for (const BlockPair& pair : pairs) {
    expected[pair.remote_block] = true;
    bool good = true;
    for (size_t i = 0; i < each; ++i) {
      good = good && words[pair.remote_block * each + i] == pattern(pair.local_block * each + i);
    }
    wrong += good ? 0 : 1;
  }
  for (size_t block = 0; block < expected.size(); ++block) {
    if (!expected[block] && words[block * each] != 0) ++wrong;
  }
  return wrong;
}

struct BenchGpu {
  std::shared_ptr<const Driver> driver;
  std::shared_ptr<const Device> device;
  DeviceMemory memory;

  BenchGpu(const std::string& library, int ordinal, size_t pool_bytes) {
    driver = Driver::load(library).value();
    device = Device::open(driver, ordinal % driver->devices).value();
    memory = DeviceMemory::allocate(device, pool_bytes).value();
    clear();
  }
  void clear() {
    CurrentDevice current(*device);
    BATON_CHECK(driver->memory_set(memory.address(), 0, memory.bytes()) == kSuccess);
  }
  std::vector<uint64_t> download() const {
    std::vector<uint64_t> words(memory.bytes() / 8);
    CurrentDevice current(*device);
    BATON_CHECK(driver->copy_to_host(words.data(), memory.address(), memory.bytes()) == kSuccess);
    return words;
  }
  void upload(const std::vector<uint64_t>& words) {
    CurrentDevice current(*device);
    BATON_CHECK(driver->copy_to_device(memory.address(), words.data(), words.size() * 8) == kSuccess);
  }
  size_t wrong_blocks(const std::vector<BlockPair>& pairs, uint64_t stride) const {
    return bench::wrong_blocks(download(), pairs, stride);
  }
};

}  // namespace baton::bench
