#include "model/weight_source.h"

#include <cstring>

namespace baton {

void to_bf16(const WeightView& view, int64_t begin, int64_t end, bf16* out) {
  if (view.dtype == DType::kBF16) {
    std::memcpy(out, static_cast<const bf16*>(view.data) + begin, static_cast<size_t>(end - begin) * sizeof(bf16));
  } else if (view.dtype == DType::kF16) {
    const auto* halves = static_cast<const uint16_t*>(view.data);
    for (int64_t i = begin; i < end; i++) out[i - begin] = bf16(f16_to_float(halves[i]));
  } else {
    const auto* floats = static_cast<const float*>(view.data);
    for (int64_t i = begin; i < end; i++) out[i - begin] = bf16(floats[i]);
  }
}

}  // namespace baton
