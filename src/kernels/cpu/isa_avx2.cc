// AVX2 and FMA: bf16 is widened to float32 by shift and mask, eight lanes at a time.

#include <immintrin.h>

#include "kernels/cpu/float_kernels.h"

namespace baton::cpu {
namespace {

struct VecAvx2 {
  static constexpr int kWidth = 8;
  static constexpr int kRowsPerBlock = 3;
  static constexpr int kVectorsPerBlock = 4;
  __m256 v;

  static __m256i part_mask(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }
  static VecAvx2 set(float x) { return {_mm256_set1_ps(x)}; }
  static VecAvx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static void store(float* p, VecAvx2 a) { _mm256_storeu_ps(p, a.v); }
  static VecAvx2 load_part(const float* p, int64_t count) {
    if (count >= kWidth) return load(p);
    return {_mm256_maskload_ps(p, part_mask(count))};
  }
  static void store_part(float* p, VecAvx2 a, int64_t count) {
    if (count >= kWidth) return store(p, a);
    _mm256_maskstore_ps(p, part_mask(count), a.v);
  }
  static VecAvx2 add(VecAvx2 a, VecAvx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  static VecAvx2 sub(VecAvx2 a, VecAvx2 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static VecAvx2 mul(VecAvx2 a, VecAvx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static VecAvx2 div(VecAvx2 a, VecAvx2 b) { return {_mm256_div_ps(a.v, b.v)}; }
  static VecAvx2 fma(VecAvx2 a, VecAvx2 b, VecAvx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static VecAvx2 max(VecAvx2 a, VecAvx2 b) { return {_mm256_max_ps(a.v, b.v)}; }
  static VecAvx2 min(VecAvx2 a, VecAvx2 b) { return {_mm256_min_ps(a.v, b.v)}; }
  static float reduce_add(VecAvx2 a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float reduce_max(VecAvx2 a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static VecAvx2 round(VecAvx2 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static VecAvx2 power_of_two(VecAvx2 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
  }
  static void store_bf16_part(uint16_t* p, VecAvx2 a, int64_t count) {
    const __m256i u = _mm256_castps_si256(a.v);
    const __m256i upper = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet_nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i bits = _mm256_blendv_epi8(rounded, quiet_nan, is_nan);
    const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    if (count >= kWidth) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
      return;
    }
    alignas(16) uint16_t lanes[kWidth];
    _mm_store_si128(reinterpret_cast<__m128i*>(lanes), half);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
  }
  static void split_pairs(const uint32_t* p, VecAvx2* even, VecAvx2* odd) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even->v = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
    odd->v = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

}  // namespace

const IsaOps kAvx2Ops = float_ops<VecAvx2>("cpu/avx2");

}  // namespace baton::cpu
