// Portable kernels: vectors of four floats in the compilers' vector extension, which every CPU that we know maps to
// its baseline SIMD registers (SSE2, NEON). No fused multiply-add: a product, then a sum.

#include "kernels/cpu/float_kernels.h"

namespace baton::cpu {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t Uint4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));

struct VecPlain {
  static constexpr int kWidth = 4;
  static constexpr int kRowsPerBlock = 2;
  static constexpr int kVectorsPerBlock = 4;
  Float4 v;

  static VecPlain set(float x) { return {Float4{x, x, x, x}}; }
  static VecPlain load(const float* p) {
    VecPlain r;
    __builtin_memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  static void store(float* p, VecPlain a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
  static VecPlain load_part(const float* p, int64_t count) {
    if (count >= kWidth) return load(p);
    VecPlain r = set(0);
    for (int64_t i = 0; i < count; ++i) r.v[i] = p[i];
    return r;
  }
  static void store_part(float* p, VecPlain a, int64_t count) {
    if (count >= kWidth) return store(p, a);
    for (int64_t i = 0; i < count; ++i) p[i] = a.v[i];
  }
  static VecPlain add(VecPlain a, VecPlain b) { return {a.v + b.v}; }
  static VecPlain sub(VecPlain a, VecPlain b) { return {a.v - b.v}; }
  static VecPlain mul(VecPlain a, VecPlain b) { return {a.v * b.v}; }
  static VecPlain div(VecPlain a, VecPlain b) { return {a.v / b.v}; }
  static VecPlain fma(VecPlain a, VecPlain b, VecPlain c) { return {a.v * b.v + c.v}; }
  static VecPlain max(VecPlain a, VecPlain b) { return {a.v > b.v ? a.v : b.v}; }
  static VecPlain min(VecPlain a, VecPlain b) { return {a.v < b.v ? a.v : b.v}; }
  static float reduce_add(VecPlain a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
  static float reduce_max(VecPlain a) {
    const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
    return x > y ? x : y;
  }
  /// Nearest whole number for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
  static VecPlain round(VecPlain a) {
    const VecPlain magic = set(12582912.0f);
    return sub(add(a, magic), magic);
  }
  static VecPlain power_of_two(VecPlain n) {
    const Int4 exponent = __builtin_convertvector(n.v, Int4) + 127;
    return {reinterpret_cast<Float4>(exponent << 23)};
  }
  static void store_bf16_part(uint16_t* p, VecPlain a, int64_t count) {
    const Uint4 u = reinterpret_cast<Uint4>(a.v);
    const Uint4 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const Uint4 quiet_nan = (u >> 16) | 0x40u;
    const Uint4 is_nan = reinterpret_cast<Uint4>(a.v != a.v);
    const Uint4 bits = (rounded & ~is_nan) | (quiet_nan & is_nan);
    const Half4 half = __builtin_convertvector(bits, Half4);
    __builtin_memcpy(p, &half, static_cast<size_t>(count < kWidth ? count : kWidth) * 2);
  }
  static void split_pairs(const uint32_t* p, VecPlain* even, VecPlain* odd) {
    Uint4 u;
    __builtin_memcpy(&u, p, sizeof(u));
    even->v = reinterpret_cast<Float4>(u << 16);
    odd->v = reinterpret_cast<Float4>(u & 0xffff0000u);
  }
};

}  // namespace

const IsaOps kPlainOps = float_ops<VecPlain>("cpu/plain");

}  // namespace baton::cpu
