// Reads memory and does nothing with it: how fast that goes is what a product of few rows can reach.
extern "C" __global__ void __launch_bounds__(512) baton_read_memory(const uint4* from, size_t count, unsigned* out) {
  constexpr int kUnroll = 8;
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  unsigned any = 0;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += kUnroll * step) {
    uint4 v[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) v[j] = i + j * step < count ? from[i + j * step] : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) any ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (any == 0x12345678u) *out = any;
}
