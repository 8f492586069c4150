// Element-wise kernels, written once over a vector type V and compiled per instruction set. Included by isa_*.cc
// only, hence the unnamed namespace (see isa.h). V provides:
//   kWidth; load, store, load_part, store_part (count <= kWidth, lanes beyond are zero / untouched), set,
//   add, sub, mul, fma (a * b + c), max, reduce_add, reduce_max (fixed trees), load_bf16, store_bf16 (+ _part),
//   power_of_two (2^n of a V of whole numbers n in [-127, 127], 0 for -127), round, div.
// Every loop has one order that depends on the length alone, so a row never depends on its neighbours.

#pragma once

#include "kernels/cpu/isa.h"

namespace baton::cpu {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/// 2^x. Below -127 exactly 0, above 127 clamped. Taylor in ln 2 * f, |f| <= 1/2, degree 6: error about 1 ulp.
template <typename V>
inline V exp2_of(V x) {
  x = V::max(V::min(x, V::set(127.0f)), V::set(-127.0f));
  const V n = V::round(x);
  const V f = V::sub(x, n);
  V p = V::set(1.5403530393e-4f);
  p = V::fma(p, f, V::set(1.3333558146e-3f));
  p = V::fma(p, f, V::set(9.6181291076e-3f));
  p = V::fma(p, f, V::set(5.5504108665e-2f));
  p = V::fma(p, f, V::set(2.4022650696e-1f));
  p = V::fma(p, f, V::set(6.9314718056e-1f));
  p = V::fma(p, f, V::set(1.0f));
  return V::mul(p, V::power_of_two(n));
}

/// Sum of squares: four running vectors, then a tree. The tail goes to the first of them.
template <typename V>
inline float sum_of_squares(const float* x, int64_t count) {
  V s0 = V::set(0), s1 = V::set(0), s2 = V::set(0), s3 = V::set(0);
  int64_t i = 0;
  for (; i + 4 * V::kWidth <= count; i += 4 * V::kWidth) {
    const V a = V::load(x + i), b = V::load(x + i + V::kWidth);
    const V c = V::load(x + i + 2 * V::kWidth), d = V::load(x + i + 3 * V::kWidth);
    s0 = V::fma(a, a, s0);
    s1 = V::fma(b, b, s1);
    s2 = V::fma(c, c, s2);
    s3 = V::fma(d, d, s3);
  }
  for (; i < count; i += V::kWidth) {
    const V a = V::load_part(x + i, min64(V::kWidth, count - i));
    s0 = V::fma(a, a, s0);
  }
  return V::reduce_add(V::add(V::add(s0, s1), V::add(s2, s3)));
}

template <typename V>
void rms_norm_row(const float* x, int64_t hidden, const float* weight, float eps, uint16_t* out) {
  const float mean = sum_of_squares<V>(x, hidden) / static_cast<float>(hidden);
  const V inverse = V::set(1.0f / __builtin_sqrtf(mean + eps));
  for (int64_t i = 0; i < hidden; i += V::kWidth) {
    const int64_t n = min64(V::kWidth, hidden - i);
    const V value = V::mul(V::mul(V::load_part(x + i, n), inverse), V::load_part(weight + i, n));
    V::store_bf16_part(out + i, value, n);
  }
}

template <typename V>
void silu_mul_range(const float* gate, const float* up, int64_t count, uint16_t* out) {
  constexpr float kLog2E = 1.4426950408889634f;
  for (int64_t i = 0; i < count; i += V::kWidth) {
    const int64_t n = min64(V::kWidth, count - i);
    const V g = V::load_part(gate + i, n);
    const V exponential = exp2_of(V::mul(g, V::set(-kLog2E)));  // e^-g
    const V silu = V::div(g, V::add(V::set(1.0f), exponential));
    V::store_bf16_part(out + i, V::mul(silu, V::load_part(up + i, n)), n);
  }
}

/// One head: tmp = x (+ bias), optionally RMS-normalised.
template <typename V>
inline void prepare_head(const float* x, const float* bias, const float* norm, float eps, int head_dim, float* tmp) {
  for (int i = 0; i < head_dim; i += V::kWidth) {
    const int64_t n = min64(V::kWidth, head_dim - i);
    V value = V::load_part(x + i, n);
    if (bias != nullptr) value = V::add(value, V::load_part(bias + i, n));
    V::store_part(tmp + i, value, n);
  }
  if (norm == nullptr) return;
  const float mean = sum_of_squares<V>(tmp, head_dim) / static_cast<float>(head_dim);
  const V inverse = V::set(1.0f / __builtin_sqrtf(mean + eps));
  for (int i = 0; i < head_dim; i += V::kWidth) {
    const int64_t n = min64(V::kWidth, head_dim - i);
    V::store_part(tmp + i, V::mul(V::mul(V::load_part(tmp + i, n), inverse), V::load_part(norm + i, n)), n);
  }
}

/// Half-split rotation: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x2 half a head behind x1.
template <typename V>
inline void rotate_head(const float* tmp, const float* cos, const float* sin, int head_dim, uint16_t* out) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i += V::kWidth) {
    const int64_t n = min64(V::kWidth, half - i);
    const V x1 = V::load_part(tmp + i, n), x2 = V::load_part(tmp + half + i, n);
    const V c = V::load_part(cos + i, n), s = V::load_part(sin + i, n);
    V::store_bf16_part(out + i, V::sub(V::mul(x1, c), V::mul(x2, s)), n);
    V::store_bf16_part(out + half + i, V::add(V::mul(x2, c), V::mul(x1, s)), n);
  }
}

template <typename V>
void qkv_one_row(const QkvRow& row) {
  alignas(64) float tmp[kMaxHeadDim];
  alignas(64) uint16_t bits[kMaxHeadDim];
  const int d = row.head_dim;
  const auto bias_of = [&](int head) { return row.bias == nullptr ? nullptr : row.bias + int64_t{head} * d; };
  for (int h = 0; h < row.heads; ++h) {
    prepare_head<V>(row.qkv + int64_t{h} * d, bias_of(h), row.q_norm, row.norm_eps, d, tmp);
    rotate_head<V>(tmp, row.cos, row.sin, d, row.q_out + int64_t{h} * d);
  }
  for (int h = 0; h < row.kv_heads; ++h) {
    const int source = row.heads + h;
    prepare_head<V>(row.qkv + int64_t{source} * d, bias_of(source), row.k_norm, row.norm_eps, d, tmp);
    rotate_head<V>(tmp, row.cos, row.sin, d, bits);
    uint16_t* const out = row.k_out + h * row.kv_head_stride;
    for (int i = 0; i < d; i += 2) __builtin_memcpy(out + i / 2 * row.k_pair_stride, bits + i, 4);
  }
  for (int h = 0; h < row.kv_heads; ++h) {
    const int source = row.heads + row.kv_heads + h;
    prepare_head<V>(row.qkv + int64_t{source} * d, bias_of(source), nullptr, 0, d, tmp);
    for (int i = 0; i < d; i += V::kWidth) {
      const int64_t n = min64(V::kWidth, d - i);
      V::store_bf16_part(bits + i, V::load_part(tmp + i, n), n);
    }
    uint16_t* const out = row.v_out + h * row.kv_head_stride;
    for (int i = 0; i < d; ++i) out[i * row.v_step] = bits[i];
  }
}

}  // namespace
}  // namespace baton::cpu
