#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/status.h"
#include "tensor/buffer.h"
#include "tensor/dtype.h"
#include "tensor/thread_pool.h"

namespace baton {

/// A tensor's values, row-major, aligned to its dtype (bf16, f16 or f32).
struct WeightView {
  const void* data = nullptr;
  DType dtype = DType::kBF16;
};

/// Values [begin, end) of a tensor, as bf16 (nearest even), to out[0, end - begin).
void to_bf16(const WeightView& view, int64_t begin, int64_t end, bf16* out);

/// What a generator should put where a checkpoint would have trained values.
struct WeightInit {
  float mean = 0.0f;
  float stddev = 0.0f;  ///< about; 0: every value is the mean
};

/// Where weights come from. One thread uses it.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  /// The view stays valid until release(). Errors name file and tensor.
  virtual Result<WeightView> fetch(const std::string& name, std::span<const int64_t> shape, WeightInit init) = 0;
  /// Everything fetched so far has been packed or copied.
  virtual void release() = 0;
  /// After the last fetch.
  virtual Status finish() = 0;
  /// Equal for equal weights (of checkpoints: names, dtypes, shapes and samples of every tensor).
  virtual uint64_t identity() const = 0;
};

/// Seeded random weights of the right scale, so that speed can be measured with only a config.json. Each
/// tensor is a function of seed and name alone. `threads` must outlive the source.
std::unique_ptr<WeightSource> make_dummy_weights(uint64_t seed, ThreadPool& threads);

}  // namespace baton
