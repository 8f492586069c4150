#include "tensor/dtype.h"

#include <array>

namespace baton {
namespace {

struct Name {
  std::string_view text;
  DType dtype;
};
// The spellings of config.json ("bfloat16"), safetensors ("BF16") and our own command line ("bf16").
constexpr std::array kNames = {
    Name{"float32", DType::kF32}, Name{"f32", DType::kF32},       Name{"F32", DType::kF32},
    Name{"float", DType::kF32},   Name{"bfloat16", DType::kBF16}, Name{"bf16", DType::kBF16},
    Name{"BF16", DType::kBF16},   Name{"float16", DType::kF16},   Name{"f16", DType::kF16},
    Name{"F16", DType::kF16},     Name{"half", DType::kF16},      Name{"int32", DType::kI32},
    Name{"i32", DType::kI32},     Name{"I32", DType::kI32},
};

}  // namespace

std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "float32";
    case DType::kBF16: return "bfloat16";
    case DType::kF16: return "float16";
    case DType::kI32: return "int32";
  }
  return "unknown";
}

std::optional<DType> parse_dtype(std::string_view name) {
  if (name.starts_with("torch.")) name.remove_prefix(6);
  for (const Name& known : kNames) {
    if (known.text == name) return known.dtype;
  }
  return std::nullopt;
}

float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0x1f) {  // infinity or NaN: the payload moves up
    return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  }
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in binary32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

}  // namespace baton
