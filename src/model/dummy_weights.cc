#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/random.h"
#include "model/weight_source.h"
#include "xxhash.h"

namespace baton {
namespace {

/// Four bf16 values per 64 random bits: sign, the exponent's lowest bit and the mantissa are random, so that
/// magnitudes lie in [2^e, 2^(e+2)). One AND and one ADD per four weights: as fast as memory.
void fill_random(uint16_t* values, int64_t begin, int64_t end, uint64_t key, uint16_t exponent_base) {
  constexpr uint64_t kRandomBits = 0x80ff80ff80ff80ffull;
  const uint64_t base = exponent_base * 0x0001000100010001ull;
  for (int64_t word = begin; word < end; word++) {
    const uint64_t bits = (mix_bits(key + static_cast<uint64_t>(word)) & kRandomBits) + base;
    __builtin_memcpy(values + 4 * word, &bits, sizeof(bits));
  }
}

/// The exponent field (already shifted, its lowest bit 0) that brings the rms of the values next to `stddev`.
uint16_t exponent_for(float stddev) {
  // Half of the magnitudes are uniform in [1, 2), half in [2, 4): mean square (7/3 + 28/3) / 2.
  constexpr double kRms = 2.415;
  const int exponent = static_cast<int>(std::lround(std::log2(stddev / kRms)));
  return static_cast<uint16_t>(((exponent + 127) & 0xff) << 7);
}

class DummyWeights final : public WeightSource {
 public:
  DummyWeights(uint64_t seed, ThreadPool& threads) : seed_(seed), threads_(threads) {}

  Result<WeightView> fetch(const std::string& name, std::span<const int64_t> shape, WeightInit init) override {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    const int64_t words = (count + 3) / 4;
    if (used_ == scratch_.size()) scratch_.emplace_back();
    Buffer& buffer = scratch_[used_++];
    const auto bytes = static_cast<size_t>(words) * sizeof(uint64_t);
    if (buffer.bytes() < bytes) {
      buffer = Buffer();  // first give back, then ask
      BATON_ASSIGN_OR_RETURN(buffer, Buffer::allocate(bytes));
    }
    auto* values = buffer.as<uint16_t>();
    const uint64_t key = mix_bits(seed_, XXH3_64bits(name.data(), name.size()));
    const uint16_t constant = bf16(init.mean).bits;
    const uint16_t exponent = init.stddev > 0 ? exponent_for(init.stddev) : uint16_t{0};
    threads_.parallel_for(words, int64_t{1} << 16, [&](int64_t begin, int64_t end, int) {
      if (init.stddev > 0) {
        fill_random(values, begin, end, key, exponent);
      } else {
        std::fill(values + 4 * begin, values + 4 * end, constant);
      }
    });
    return WeightView{values, DType::kBF16};
  }

  void release() override { used_ = 0; }
  Status finish() override { return {}; }
  uint64_t identity() const override { return mix_bits(seed_); }

 private:
  uint64_t seed_;
  ThreadPool& threads_;
  std::vector<Buffer> scratch_;  // reused from one fetch to the next
  size_t used_ = 0;
};

}  // namespace

std::unique_ptr<WeightSource> make_dummy_weights(uint64_t seed, ThreadPool& threads) {
  return std::make_unique<DummyWeights>(seed, threads);
}

}  // namespace baton
