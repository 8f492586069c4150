#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/kernel_arguments.h"
#include "kernels/cuda/row_team.cuh"
#include "kernels/cuda/sample_arguments.h"

/// The element-wise and row-wise operations of a step. All of them move memory and little else: 16-byte accesses, one
/// pass where the row fits into registers, sums in an order that depends on the width of a row only.
namespace baton::cuda {
namespace {

__device__ __forceinline__ void store_bf16x8(uint16_t* to, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

__device__ __forceinline__ void load_bf16x8(const uint16_t* from, float (&v)[8]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  v[0] = bf16_low(bits.x), v[1] = bf16_high(bits.x), v[2] = bf16_low(bits.y), v[3] = bf16_high(bits.y);
  v[4] = bf16_low(bits.z), v[5] = bf16_high(bits.z), v[6] = bf16_low(bits.w), v[7] = bf16_high(bits.w);
}

/// The sum over a thread block of up to 1,024 threads, the same bits in all of them.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float sums[32];
  value = group_sum(value, 32);
  const int warps = (blockDim.x + 31) / 32;
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  return group_sum(lane < warps ? sums[lane] : 0.0f, 32);
}

constexpr int kRowVectors = 4;  // float4 of a row that a thread keeps

}  // namespace

extern "C" __global__ void baton_embed(StepView step, const int32_t* chosen, const uint16_t* table, int64_t hidden, float* x) {
  wait_for_previous();
  let_next_begin();
  int32_t token = step.tokens[blockIdx.x];
  if (token < 0 && chosen != nullptr) token = chosen[-1 - token];
  float4* to = reinterpret_cast<float4*>(x + blockIdx.x * hidden);
  for (int64_t i = threadIdx.x; i < hidden / 8; i += blockDim.x) {
    float v[8] = {};  // a row that is not used may have no token, and one whose choice failed has none
    if (token >= 0) load_bf16x8(table + token * hidden + i * 8, v);
    to[2 * i] = make_float4(v[0], v[1], v[2], v[3]);
    to[2 * i + 1] = make_float4(v[4], v[5], v[6], v[7]);
  }
}

extern "C" __global__ void __launch_bounds__(1024)
    baton_rms_norm(const float* x, int64_t hidden, const float* weight, float eps, uint16_t* out) {
  wait_for_previous();
  let_next_begin();
  const float4* from = reinterpret_cast<const float4*>(x + blockIdx.x * hidden);
  const float4* scales = reinterpret_cast<const float4*>(weight);
  uint2* to = reinterpret_cast<uint2*>(out + blockIdx.x * hidden);
  const int64_t vectors = hidden / 4;
  float4 kept[kRowVectors];
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kRowVectors; ++k) {
    const int64_t i = threadIdx.x + k * static_cast<int64_t>(blockDim.x);
    if (i >= vectors) continue;
    kept[k] = from[i];
    squares += kept[k].x * kept[k].x + kept[k].y * kept[k].y + kept[k].z * kept[k].z + kept[k].w * kept[k].w;
  }
  for (int64_t i = threadIdx.x + kRowVectors * static_cast<int64_t>(blockDim.x); i < vectors; i += blockDim.x) {
    const float4 v = from[i];
    squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  const float factor = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(hidden) + eps);
  const auto store = [&](int64_t i, const float4& v) {
    const float4 s = scales[i];
    to[i] = make_uint2(pack_bf16(v.x * factor * s.x, v.y * factor * s.y), pack_bf16(v.z * factor * s.z, v.w * factor * s.w));
  };
#pragma unroll
  for (int k = 0; k < kRowVectors; ++k) {
    const int64_t i = threadIdx.x + k * static_cast<int64_t>(blockDim.x);
    if (i < vectors) store(i, kept[k]);
  }
  for (int64_t i = threadIdx.x + kRowVectors * static_cast<int64_t>(blockDim.x); i < vectors; i += blockDim.x) store(i, from[i]);
}

/// threads_per_head neighbouring lanes work on one head of one row; each has 4 elements of the first half and the 4 of
/// the second that they are rotated with.
extern "C" __global__ void __launch_bounds__(256) baton_qkv_rope_kv_write(const __grid_constant__ QkvRopeArguments a) {
  wait_for_previous();
  let_next_begin();
  const int32_t head_dim = a.kv.head_dim, half = head_dim / 2, all_heads = a.heads + 2 * a.kv.kv_heads;
  const int64_t row = blockIdx.x;
  const int32_t head = static_cast<int32_t>((blockIdx.y * blockDim.x + threadIdx.x) / a.threads_per_head);
  const int32_t low = static_cast<int32_t>(threadIdx.x % a.threads_per_head) * 4;
  const int32_t slot = head < all_heads ? a.step.slots[row] : -1;
  const bool active = slot >= 0 && low < half;  // the others take part in the sums of their warp
  float v[8] = {};
  if (active) {
    const uint16_t* from = a.qkv + (row * all_heads + head) * head_dim + low;
    const uint2 first = *reinterpret_cast<const uint2*>(from), second = *reinterpret_cast<const uint2*>(from + half);
    v[0] = bf16_low(first.x), v[1] = bf16_high(first.x), v[2] = bf16_low(first.y), v[3] = bf16_high(first.y);
    v[4] = bf16_low(second.x), v[5] = bf16_high(second.x), v[6] = bf16_low(second.y), v[7] = bf16_high(second.y);
    if (a.bias != nullptr) {
      const float* bias = a.bias + head * head_dim + low;
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] += bias[i], v[4 + i] += bias[half + i];
    }
  }
  const bool is_v = head >= a.heads + a.kv.kv_heads;
  const float* norm = head < a.heads ? a.q_norm : is_v ? nullptr : a.k_norm;
  if (a.q_norm != nullptr || a.k_norm != nullptr) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
    squares = group_sum(squares, a.threads_per_head);
    if (active && norm != nullptr) {
      const float factor = 1.0f / sqrtf(squares / static_cast<float>(head_dim) + a.norm_eps);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] *= factor * norm[low + i], v[4 + i] *= factor * norm[half + low + i];
    }
  }
  if (!active) return;
  if (!is_v) {
    const int64_t at = static_cast<int64_t>(a.step.positions[row]) * half + low;
    const float4 cos = *reinterpret_cast<const float4*>(a.rope_cos + at);
    const float4 sin = *reinterpret_cast<const float4*>(a.rope_sin + at);
    const float c[4] = {cos.x, cos.y, cos.z, cos.w}, s[4] = {sin.x, sin.y, sin.z, sin.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = v[i], y = v[4 + i];
      v[i] = x * c[i] - y * s[i];
      v[4 + i] = y * c[i] + x * s[i];
    }
  }
  uint16_t* to;
  if (head < a.heads) {
    to = a.q_out + (row * a.heads + head) * head_dim;
  } else {
    const int32_t kv_head = is_v ? head - a.heads - a.kv.kv_heads : head - a.heads;
    const int64_t block = slot / a.kv.block_tokens, place = slot % a.kv.block_tokens;
    unsigned char* base = a.kv.pool + block * a.kv.block_stride_bytes + (is_v ? a.kv.v_offset_bytes : a.kv.k_offset_bytes);
    to = reinterpret_cast<uint16_t*>(base) + (kv_head * static_cast<int64_t>(a.kv.block_tokens) + place) * head_dim;
  }
  *reinterpret_cast<uint2*>(to + low) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
  *reinterpret_cast<uint2*>(to + half + low) = make_uint2(pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

extern "C" __global__ void __launch_bounds__(256)
    baton_silu_mul(const uint16_t* gate_up, const float* bias, int64_t rows, int64_t inter, uint16_t* out) {
  wait_for_previous();
  let_next_begin();
  const int64_t vectors = inter / 8;
  const int64_t unit = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (unit >= rows * vectors) return;
  const int64_t row = unit / vectors, at = unit % vectors * 8;
  const uint16_t* from = gate_up + row * 2 * inter + at;
  float gate[8], up[8];
  load_bf16x8(from, gate);
  load_bf16x8(from + inter, up);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (bias != nullptr) gate[i] += bias[at + i], up[i] += bias[inter + at + i];
    gate[i] = gate[i] / (1.0f + __expf(-gate[i])) * up[i];
  }
  store_bf16x8(out + row * inter + at, gate);
}

extern "C" __global__ void __launch_bounds__(256) baton_add_bias(float* x, int64_t rows, int64_t width, const float* bias) {
  wait_for_previous();
  let_next_begin();
  const int64_t vectors = width / 4;
  const int64_t unit = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (unit >= rows * vectors) return;
  const float4 b = reinterpret_cast<const float4*>(bias)[unit % vectors];
  float4 v = reinterpret_cast<float4*>(x)[unit];
  v.x += b.x, v.y += b.y, v.z += b.z, v.w += b.w;
  reinterpret_cast<float4*>(x)[unit] = v;
}

extern "C" __global__ void __launch_bounds__(256)
    baton_gather_rows(const uint4* from, int64_t row_vectors, const int32_t* index, uint4* to) {
  wait_for_previous();
  let_next_begin();
  const int32_t row = index[blockIdx.x];
  for (int64_t i = threadIdx.x; i < row_vectors; i += blockDim.x) {
    to[blockIdx.x * row_vectors + i] = row >= 0 ? from[row * row_vectors + i] : make_uint4(0, 0, 0, 0);
  }
}

extern "C" __global__ void __launch_bounds__(kSampleThreads) baton_argmax(const float* logits, int64_t vocab, int32_t* tokens) {
  __shared__ uint64_t slots[33];
  wait_for_previous();
  let_next_begin();
  const int64_t row = blockIdx.x / team_size(), each = (vocab + team_size() - 1) / team_size();
  const int64_t begin = min(vocab, team_rank() * each);
  const uint64_t best = team_best(logits + row * vocab, begin, min(vocab, begin + each), slots);
  if (team_rank() == 0 && threadIdx.x == 0) {
    tokens[row] = ranked_value(best) == __int_as_float(0x7f800000) ? kSampleNotFinite : static_cast<int32_t>(ranked_index(best));
  }
  team_sync();  // others may still read this block's shared memory
}

}  // namespace baton::cuda
