#include <cstring>

#include "model/transformer.h"

namespace baton {
namespace {

/// Matrices packed for the CPU's kernels.
class CpuStore {
 public:
  using Vector = std::vector<float>;
  using Matrix = std::unique_ptr<PackedMatrix>;
  using Table = Buffer;

  explicit CpuStore(Kernels& kernels) : kernels_(kernels) {}

  Result<Vector> vector(std::span<const float> values) {
    held_bytes_ += static_cast<int64_t>(values.size_bytes());
    return Vector(values.begin(), values.end());
  }

  Result<Matrix> matrix(std::span<const Kernels::MatrixPart> parts, int64_t in_features) {
    BATON_ASSIGN_OR_RETURN(Matrix packed, kernels_.pack(parts, in_features));
    held_bytes_ += static_cast<int64_t>(packed->bytes());
    return packed;
  }

  Result<Table> table(const WeightView& view, int64_t rows, int64_t width) {
    BATON_ASSIGN_OR_RETURN(Buffer buffer, Buffer::allocate(static_cast<size_t>(rows * width) * sizeof(bf16)));
    auto* table = buffer.as<bf16>();
    kernels_.threads().parallel_for(rows, 256, [&](int64_t begin, int64_t end, int) {
      to_bf16(view, begin * width, end * width, table + begin * width);
    });
    held_bytes_ += static_cast<int64_t>(buffer.bytes());
    return buffer;
  }

  int64_t held_bytes() const { return held_bytes_; }

 private:
  Kernels& kernels_;
  int64_t held_bytes_ = 0;
};

}  // namespace

Result<TransformerWeights> load_transformer_weights(
    const ModelConfig& config, const TensorNames& names, WeightSource& source, Kernels& kernels,
    const std::function<void(int64_t done_bytes, int64_t total_bytes)>& progress) {
  CpuStore store(kernels);
  return WeightsLoader<CpuStore>(config, names, source, store, progress).load();
}

}  // namespace baton
