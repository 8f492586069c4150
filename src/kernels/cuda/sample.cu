#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/row_team.cuh"
#include "kernels/cuda/sample_arguments.h"

/// Sampling as engine/sampler.h defines it, a team of thread blocks for each row, each with a stretch of the vocabulary.
///
/// Weights are exp by the CPU sampler's polynomial, bit for bit. Sums are of integers, weights in units of 2^-44 or so, hence exact
/// in any order: the same tokens come out whatever runs when, and they differ from the CPU's, which sums doubles in the order of ids,
/// only where a draw or a cut falls closer to an edge than such roundings reach.
/// Selections (top-k by count, top-p by mass) descend through the bits of what is selected by, eight at a time.
namespace baton::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = kSampleThreads / 32;
constexpr uint32_t kNobody = 0xffffffffu;

/// exp(x) for x <= 0: engine/sampler_loops.inc, operation by operation.
__device__ __forceinline__ float exp_nonpositive(float x) {
  const float clamped = x > -88.2f ? x : -88.2f;
  constexpr float kRound = 12582912.0f;
  const float n = __fsub_rn(__fadd_rn(__fmul_rn(clamped, 1.44269504088896341f), kRound), kRound);
  const float r = __fadd_rn(__fsub_rn(clamped, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, 2.12194440e-4f));
  float p = __fadd_rn(__fmul_rn(r, 1.9875691500e-4f), 1.3981999507e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
  const float y = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
  return __fmul_rn(y, __int_as_float((__float2int_rz(n) + 127) << 23));
}

struct Shared {
  uint64_t slots[33];
  uint64_t bins[2][kSampleBins];   // of this block, by turns
  uint64_t totals[kSampleBins];    // of the team
  uint64_t warp_mass[kWarps];
  uint64_t block_mass[2];          // by turns
  uint64_t found[2];               // by turns
  uint64_t chosen_bin, above, in_bin;
};

/// What is selected down to one value of the key.
struct Selection {
  uint32_t key;
  uint64_t above;  ///< of all larger keys
  uint64_t equal;  ///< of the key itself
};

struct Team {
  const float* row;
  int64_t begin, end;              // of this warp
  uint32_t (*low)[32];             // [bins][lanes]: a histogram for each lane, numbers of 64 bits in two halves, for
  uint32_t (*high)[32];            // shared memory adds 32 at a time
  Shared* shared;
  uint32_t turn = 0;

  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
    constexpr int kAtOnce = 8;  // loads on their way
    int64_t i = begin + threadIdx.x % 32;
    for (; i + (kAtOnce - 1) * 32 < end; i += kAtOnce * 32) {
      float values[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) values[k] = row[i + k * 32];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) body(values[k], static_cast<uint32_t>(i + k * 32));
    }
    for (; i < end; i += 32) body(row[i], static_cast<uint32_t>(i));
  }

  /// The largest key whose elements together with those of all larger keys come to `target`, which is positive and no more than the
  /// sum over all. visit(take) calls take(key, amount) for each element of this thread; amounts of 0 are none. `few`: they seldom are
  /// any, so that the lanes can share one histogram.
  template <typename Visit>
  __device__ Selection select(uint64_t target, bool few, Visit visit) {
    Selection selection = {0, 0, 0};
    const int lane = threadIdx.x % 32;
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = threadIdx.x / 32; i < (few ? kSampleBins / 32 : kSampleBins); i += kWarps) low[i][lane] = high[i][lane] = 0;
      __syncthreads();
      visit([&](uint32_t key, uint64_t amount) {
        const bool inside = shift == 24 || (key ^ selection.key) >> (shift + 8) == 0;
        if (amount == 0 || !inside) return;
        const uint32_t bin = key >> shift & 255, add = static_cast<uint32_t>(amount);
        const uint32_t row = few ? bin / 32 : bin, column = few ? bin % 32 : lane;
        const uint32_t before = atomicAdd(&low[row][column], add);
        const uint32_t carried = static_cast<uint32_t>(amount >> 32) + (before + add < before ? 1 : 0);
        if (carried != 0) atomicAdd(&high[row][column], carried);
      });
      __syncthreads();
      uint64_t(&bins)[kSampleBins] = shared->bins[turn % 2];
      if (few && threadIdx.x < kSampleBins) {
        bins[threadIdx.x] = static_cast<uint64_t>(high[threadIdx.x / 32][lane]) << 32 | low[threadIdx.x / 32][lane];
      }
      for (int i = threadIdx.x / 32; i < kSampleBins && !few; i += kWarps) {
        uint64_t sum = static_cast<uint64_t>(high[i][lane]) << 32 | low[i][lane];
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (lane == 0) bins[i] = sum;
      }
      ++turn;
      team_sync();
      if (threadIdx.x < kSampleBins) shared->totals[threadIdx.x] = team_sum(&bins[threadIdx.x]);
      __syncthreads();
      if (threadIdx.x < 32) {  // lane 0 has the largest eight bins
        const int first = kSampleBins - 1 - static_cast<int>(threadIdx.x) * 8;
        uint64_t sum = 0;
        for (int i = 0; i < 8; ++i) sum += shared->totals[first - i];
        uint64_t through = sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const uint64_t other = __shfl_up_sync(kAllLanes, through, step);
          if (threadIdx.x >= static_cast<unsigned>(step)) through += other;
        }
        uint64_t passed = selection.above + through - sum;
        if (passed < target && selection.above + through >= target) {
          int bin = first;
          while (passed + shared->totals[bin] < target) passed += shared->totals[bin--];
          shared->chosen_bin = static_cast<uint64_t>(bin);
          shared->above = passed;
          shared->in_bin = shared->totals[bin];
        }
      }
      __syncthreads();
      selection.key |= static_cast<uint32_t>(shared->chosen_bin) << shift;
      selection.above = shared->above;
      selection.equal = shared->in_bin;
    }
    return selection;
  }

  /// Leaves each warp's part of the sum over all of amount(value, i) for find(), and returns the sum.
  template <typename Amount>
  __device__ uint64_t sum(Amount amount) {
    uint64_t mass = 0;
    for_each([&](float value, uint32_t i) { mass += amount(value, i); });
#pragma unroll
    for (int step = 16; step > 0; step /= 2) mass += __shfl_xor_sync(kAllLanes, mass, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared->warp_mass[threadIdx.x / 32] = mass;
    __syncthreads();
    uint64_t& published = shared->block_mass[turn % 2];
    if (threadIdx.x == 0) {
      published = 0;
      for (int w = 0; w < kWarps; ++w) published += shared->warp_mass[w];
    }
    ++turn;
    team_sync();
    return team_sum(&published);
  }

  /// After sum(amount): the first element with which the running sum exceeds `target`, which is below the sum over all. In all
  /// threads of the team.
  template <typename Amount>
  __device__ uint32_t find(uint64_t target, Amount amount) {
    const uint64_t* const published = &shared->block_mass[(turn - 1) % 2];
    uint32_t owner = 0;
    for (uint64_t mass; owner + 1 < team_size() && (mass = team_load(published, owner)) <= target; ++owner) target -= mass;
    uint64_t& found = shared->found[turn % 2];
    if (owner == team_rank()) {
      int warp = 0;
      while (warp + 1 < kWarps && shared->warp_mass[warp] <= target) target -= shared->warp_mass[warp++];
      if (threadIdx.x / 32 == static_cast<unsigned>(warp)) {
        const int lane = threadIdx.x % 32;
        for (int64_t at = begin; at < end; at += 32) {
          const uint64_t mine = at + lane < end ? amount(row[at + lane], static_cast<uint32_t>(at + lane)) : 0;
          uint64_t through = mine;
#pragma unroll
          for (int step = 1; step < 32; step *= 2) {
            const uint64_t other = __shfl_up_sync(kAllLanes, through, step);
            if (lane >= step) through += other;
          }
          const unsigned passing = __ballot_sync(kAllLanes, through > target);
          if (passing != 0) {
            if (lane == 0) found = static_cast<uint64_t>(at) + __ffs(static_cast<int>(passing)) - 1;
            break;
          }
          target -= __shfl_sync(kAllLanes, through, 31);
        }
      }
    }
    ++turn;
    team_sync();
    return static_cast<uint32_t>(team_load(&found, owner));
  }
};

__device__ int32_t sample_row(Team& team, const SampleRow& how, float unit, int64_t vocab, int64_t block_begin, int64_t block_end) {
  const uint64_t best = team_best(team.row, block_begin, block_end, team.shared->slots);
  const float maximum = ranked_value(best);
  if (maximum == __int_as_float(0x7f800000)) return kSampleNotFinite;
  if (maximum == -__int_as_float(0x7f800000)) return kSampleNoToken;
  if (how.greedy != 0) return static_cast<int32_t>(ranked_index(best));

  float threshold = -__int_as_float(0x7f800000);
  if (how.top_k > 0 && how.top_k < vocab) {
    const auto count = static_cast<uint64_t>(how.top_k);
    // The k-th largest of the threads' maxima is no larger than the k-th of all, and leaves little to choose from.
    uint32_t least = 0;
    if (count <= team_size() * kSampleThreads && team_size() * kSampleThreads <= vocab) {
      uint32_t mine = 0;
      team.for_each([&](float value, uint32_t) { mine = max(mine, order_of(value)); });
      least = team.select(count, true, [&](auto take) { take(mine, 1); }).key;
    }
    const Selection kth = team.select(count, least > 0, [&](auto take) {
      team.for_each([&](float value, uint32_t) { take(order_of(value), order_of(value) >= least ? 1 : 0); });
    });
    threshold = value_of_order(kth.key);
  }
  threshold = fmaxf(threshold, __fadd_rn(maximum, how.min_p_offset));

  const auto weight = [&](float value) {
    return value >= threshold ? exp_nonpositive(__fmul_rn(__fsub_rn(value, maximum), how.scale)) : 0.0f;
  };
  const auto mass = [&](float w) { return static_cast<uint64_t>(__float2ull_rz(w * unit)); };
  const auto mass_of = [&](float value, uint32_t) { return mass(weight(value)); };
  uint64_t total = team.sum(mass_of);
  uint32_t least = 0, last = kNobody;  // weights of these bits stay up to the id `last`
  if (how.top_p < 1.0f) {
    const double wanted = ceil(static_cast<double>(how.top_p) * static_cast<double>(total));
    const uint64_t target = min(max(static_cast<uint64_t>(wanted), uint64_t{1}), total);
    const Selection cut = team.select(target, threshold > -__int_as_float(0x7f800000), [&](auto take) {
      team.for_each([&](float value, uint32_t) {
        const float w = weight(value);
        take(__float_as_uint(w), mass(w));
      });
    });
    least = cut.key;
    const uint64_t each = mass(__uint_as_float(least));
    const uint64_t kept = (target - cut.above + each - 1) / each;
    total = cut.above + kept * each;
    if (kept * each < cut.equal) {
      const auto is_equal = [&](float value, uint32_t) { return static_cast<uint64_t>(__float_as_uint(weight(value)) == least ? 1 : 0); };
      (void)team.sum(is_equal);
      last = team.find(kept - 1, is_equal);
    }
    (void)team.sum([&](float value, uint32_t i) {
      const float w = weight(value);
      const uint32_t bits = __float_as_uint(w);
      return bits > least || (bits == least && i <= last) ? mass(w) : 0;
    });
  }
  const uint64_t target = min(static_cast<uint64_t>(how.uniform * static_cast<double>(total)), total - 1);
  return static_cast<int32_t>(team.find(target, [&](float value, uint32_t i) {
    const float w = weight(value);
    const uint32_t bits = __float_as_uint(w);
    return bits > least || (bits == least && i <= last) ? mass(w) : 0;
  }));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kSampleThreads) baton_sample(const __grid_constant__ SampleArguments a) {
  extern __shared__ __align__(128) uint32_t histogram[][32];
  __shared__ Shared shared;
  wait_for_previous();
  let_next_begin();
  const int64_t index = blockIdx.x / team_size();
  const SampleRow how = a.rows[index];
  float* const row = a.logits + index * a.vocab;
  const int64_t each = (a.vocab + team_size() - 1) / team_size();
  const int64_t begin = min(a.vocab, team_rank() * each), end = min(a.vocab, begin + each);
  for (int32_t i = threadIdx.x; i < how.edit_count; i += kSampleThreads) {
    const SampleEdit edit = a.edits[how.edit_begin + i];
    if (edit.token < begin || edit.token >= end) continue;
    float logit = __fadd_rn(row[edit.token], edit.bias);
    logit = logit > 0 ? __fdiv_rn(logit, edit.repetition) : __fmul_rn(logit, edit.repetition);
    row[edit.token] = __fsub_rn(__fsub_rn(logit, edit.frequency), edit.presence);
  }
  __syncthreads();
  const int64_t per_warp = (end - begin + kWarps - 1) / kWarps, warp_begin = min(end, begin + threadIdx.x / 32 * per_warp);
  Team team = {row, warp_begin, min(end, warp_begin + per_warp), histogram, histogram + kSampleBins, &shared};
  const int32_t token = sample_row(team, how, a.unit, a.vocab, begin, end);
  if (team_rank() == 0 && threadIdx.x == 0) a.tokens[index] = token;
  team_sync();  // others may still read this block's shared memory
}

}  // namespace baton::cuda
