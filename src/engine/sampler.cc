#include "engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/random.h"

namespace baton {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kGreedyBelow = 1e-5f;  // as vLLM: colder than this is greedy

/// exp(x) for x <= 0 to 2 ulp, 0 below -87. Cephes' polynomial (S. Moshier), without branches so that loops over
/// it become SIMD, and with the same bits on every machine, which libm does not promise.
inline float exp_nonpositive(float x) {
  const float clamped = x > -87.0f ? x : -87.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (clamped * 1.44269504088896341f + kRound) - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = (p * r * r + r) + 1.0f;
  const float scaled = y * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return x > -87.0f ? scaled : 0.0f;
}

/// A total order: larger first, ties by the lower id.
template <typename T>
bool before(const T& a, const T& b) {
  return a.value != b.value ? a.value > b.value : a.token < b.token;
}

double uniform_of(uint64_t seed, int32_t index) {
  return static_cast<double>(mix_bits(seed, static_cast<uint64_t>(index)) >> 11) * 0x1.0p-53;
}

}  // namespace

void TokenCounts::update(std::span<const TokenId> tokens, size_t prompt_tokens) {
  for (; seen_ < tokens.size(); ++seen_) {
    const auto [it, added] = index_.try_emplace(tokens[seen_], entries_.size());
    if (added) entries_.push_back({.token = tokens[seen_], .output_count = 0});
    if (seen_ >= prompt_tokens) ++entries_[it->second].output_count;
  }
}

Sampler::Sampler(int32_t vocab_size, std::vector<TokenId> eos_token_ids)
    : vocab_size_(static_cast<size_t>(vocab_size)), eos_token_ids_(std::move(eos_token_ids)) {
  BATON_CHECK(vocab_size > 0) << vocab_size;
  std::erase_if(eos_token_ids_, [&](TokenId id) { return id < 0 || id >= vocab_size; });
  const size_t chunks = (vocab_size_ + kChunk - 1) / kChunk;
  maxima_.resize(chunks);
  chunk_mass_.resize(chunks);
}

Result<SampledToken> Sampler::sample(std::span<float> logits, const SampleContext& context) {
  BATON_CHECK(logits.size() == vocab_size_) << logits.size() << " logits for a vocabulary of " << vocab_size_;
  const SamplingParams& params = *context.params;
  if (!find_maxima(logits)) return internal_error("the model's logits contain a NaN or an infinity");

  SampledToken sampled;
  double log_sum = 0;  // of exp over the raw logits
  if (params.logprobs >= 0) {
    const float maximum = *std::ranges::max_element(maxima_);
    log_sum = maximum + std::log(weigh(logits, maximum, 1.0f, false));
    const size_t count = std::min(static_cast<size_t>(params.logprobs), vocab_size_);
    if (count > 0) {
      collect_at_least(logits, count);
      std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(count), candidates_.end(),
                        before<Candidate>);
      sampled.top_logprobs.reserve(count);
      for (size_t i = 0; i < count; ++i) {
        sampled.top_logprobs.push_back(
            {.token = candidates_[i].token, .logprob = static_cast<float>(candidates_[i].value - log_sum)});
      }
    }
  }

  edit(logits, context);
  if (!undo_.empty()) find_maxima(logits);
  const float maximum = *std::ranges::max_element(maxima_);
  const bool possible = maximum > kMinusInfinity;
  if (possible) {
    sampled.token = params.temperature < kGreedyBelow ? first_equal(logits, maximum)
                                                      : draw(logits, maximum, params, context.output_index);
  }
  for (size_t i = undo_.size(); i-- > 0;) logits[static_cast<size_t>(undo_[i].token)] = undo_[i].value;
  undo_.clear();
  if (!possible) {
    return invalid_argument("no token may be chosen: min_tokens and stop_token_ids mask all {} of them", vocab_size_);
  }
  if (params.logprobs >= 0) {
    sampled.logprob = static_cast<float>(logits[static_cast<size_t>(sampled.token)] - log_sum);
  }
  return sampled;
}

void Sampler::change(std::span<float> logits, TokenId token, float value) {
  float& logit = logits[static_cast<size_t>(token)];
  undo_.push_back({.value = logit, .token = token});
  logit = value;
}

void Sampler::edit(std::span<float> logits, const SampleContext& context) {
  const SamplingParams& params = *context.params;
  if (context.output_index < params.min_tokens) {
    for (TokenId token : eos_token_ids_) change(logits, token, kMinusInfinity);
    for (TokenId token : params.stop_token_ids) change(logits, token, kMinusInfinity);
  }
  for (const auto& [token, bias] : params.logit_bias) {
    change(logits, token, logits[static_cast<size_t>(token)] + std::clamp(bias, -100.0f, 100.0f));
  }
  if (params.repetition_penalty == 1.0f && params.frequency_penalty == 0.0f && params.presence_penalty == 0.0f) return;
  BATON_CHECK(context.counts != nullptr) << "penalties need the token counts";
  context.counts->update(context.tokens, context.prompt_tokens);
  for (const auto& [token, output_count] : context.counts->entries()) {
    float logit = logits[static_cast<size_t>(token)];
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    logit -= params.frequency_penalty * static_cast<float>(output_count);
    logit -= output_count > 0 ? params.presence_penalty : 0.0f;
    change(logits, token, logit);
  }
}

bool Sampler::find_maxima(std::span<const float> logits) {
  constexpr size_t kLanes = 16;
  uint32_t bad = 0;
  for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
    const float* x = logits.data() + chunk * kChunk;
    const size_t count = std::min(kChunk, vocab_size_ - chunk * kChunk);
    float maximum = kMinusInfinity;
    if (count == kChunk) {
      float lanes[kLanes];
      uint32_t bad_lanes[kLanes] = {};
      for (size_t l = 0; l < kLanes; ++l) lanes[l] = kMinusInfinity;
      for (size_t i = 0; i < kChunk; i += kLanes) {
        for (size_t l = 0; l < kLanes; ++l) {
          const float value = x[i + l];
          lanes[l] = value > lanes[l] ? value : lanes[l];
          bad_lanes[l] |= value <= FLT_MAX ? 0u : 1u;
        }
      }
      for (size_t l = 0; l < kLanes; ++l) {
        maximum = lanes[l] > maximum ? lanes[l] : maximum;
        bad |= bad_lanes[l];
      }
    } else {
      for (size_t i = 0; i < count; ++i) {
        maximum = x[i] > maximum ? x[i] : maximum;
        bad |= x[i] <= FLT_MAX ? 0u : 1u;
      }
    }
    maxima_[chunk] = maximum;
  }
  return bad == 0;
}

TokenId Sampler::first_equal(std::span<const float> logits, float value) const {
  const auto chunk = static_cast<size_t>(std::ranges::find(maxima_, value) - maxima_.begin());
  size_t i = chunk * kChunk;
  while (logits[i] != value) ++i;
  return static_cast<TokenId>(i);
}

float Sampler::kth_maximum(size_t k) {
  order_ = maxima_;
  const auto kth = order_.begin() + static_cast<ptrdiff_t>(k - 1);
  std::nth_element(order_.begin(), kth, order_.end(), std::greater<>());
  return *kth;
}

void Sampler::collect(std::span<const float> logits, float threshold) {
  candidates_.clear();
  for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
    if (maxima_[chunk] < threshold) continue;
    const size_t end = std::min((chunk + 1) * kChunk, vocab_size_);
    for (size_t i = chunk * kChunk; i < end; ++i) {
      if (logits[i] >= threshold) candidates_.push_back({.value = logits[i], .token = static_cast<TokenId>(i)});
    }
  }
}

/// At least `count` of the largest logits: k chunks have a maximum of at least the k-th largest maximum, so
/// at least k logits are as large.
void Sampler::collect_at_least(std::span<const float> logits, size_t count) {
  collect(logits, count <= maxima_.size() ? kth_maximum(count) : kMinusInfinity);
}

float Sampler::kth_logit(std::span<const float> logits, size_t k) {
  collect_at_least(logits, k);
  order_.clear();
  for (const Candidate& candidate : candidates_) order_.push_back(candidate.value);
  const auto kth = order_.begin() + static_cast<ptrdiff_t>(k - 1);
  std::nth_element(order_.begin(), kth, order_.end(), std::greater<>());
  return *kth;
}

double Sampler::weigh(std::span<const float> logits, float maximum, float scale, bool keep) {
  constexpr size_t kLanes = 8;
  float chunk_weights[kChunk];
  if (keep) weights_.resize(vocab_size_);
  double total = 0;
  for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
    const float* x = logits.data() + chunk * kChunk;
    const size_t count = std::min(kChunk, vocab_size_ - chunk * kChunk);
    float* weights = keep ? weights_.data() + chunk * kChunk : chunk_weights;
    double sum = 0;
    if (count == kChunk) {
      double lanes[kLanes] = {};
      for (size_t i = 0; i < kChunk; ++i) weights[i] = exp_nonpositive((x[i] - maximum) * scale);
      for (size_t i = 0; i < kChunk; i += kLanes) {
        for (size_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(weights[i + l]);
      }
      for (double lane : lanes) sum += lane;
    } else {
      for (size_t i = 0; i < count; ++i) {
        weights[i] = exp_nonpositive((x[i] - maximum) * scale);
        sum += static_cast<double>(weights[i]);
      }
    }
    chunk_mass_[chunk] = sum;
    total += sum;
  }
  return total;
}

TokenId Sampler::draw(std::span<const float> logits, float maximum, const SamplingParams& params, int32_t index) {
  const double uniform = uniform_of(params.seed, index);
  const float scale = 1.0f / params.temperature;
  const bool limited = params.top_k > 0 && static_cast<size_t>(params.top_k) < vocab_size_;

  float threshold = kMinusInfinity;  // top_k keeps ties of the k-th, as vLLM does
  if (limited) threshold = kth_logit(logits, static_cast<size_t>(params.top_k));
  if (params.min_p > 0) threshold = std::max(threshold, maximum + params.temperature * std::log(params.min_p));

  double mass = 0;
  if (threshold == kMinusInfinity) {
    mass = weigh(logits, maximum, scale, true);
    if (params.top_p >= 1.0f) return draw_from_all(uniform);
    // Nearly always a few hundred tokens hold the mass of top_p; else all are candidates.
    constexpr size_t kLikely = 256;
    collect_at_least(logits, std::min(kLikely, vocab_size_));
    double held = 0;
    for (const Candidate& candidate : candidates_) held += static_cast<double>(weights_[static_cast<size_t>(candidate.token)]);
    if (held < static_cast<double>(params.top_p) * mass) collect(logits, kMinusInfinity);
  } else {
    collect(logits, threshold);
  }
  double candidates_mass = 0;
  for (Candidate& candidate : candidates_) {
    candidate.value = exp_nonpositive((candidate.value - maximum) * scale);
    candidates_mass += static_cast<double>(candidate.value);
  }
  return draw_from_candidates(uniform, static_cast<double>(params.top_p), mass > 0 ? mass : candidates_mass);
}

/// Inverse CDF in the order of ids over weights_: first the chunk, then inside it.
TokenId Sampler::draw_from_all(double uniform) const {
  double total = 0;
  for (double sum : chunk_mass_) total += sum;
  const double target = uniform * total;
  double passed = 0;
  size_t last_chunk = 0;
  for (size_t chunk = 0; chunk < chunk_mass_.size(); ++chunk) {
    if (chunk_mass_[chunk] <= 0) continue;
    last_chunk = chunk;
    if (passed + chunk_mass_[chunk] > target) break;
    passed += chunk_mass_[chunk];
  }
  TokenId chosen = 0;
  const size_t end = std::min((last_chunk + 1) * kChunk, vocab_size_);
  for (size_t i = last_chunk * kChunk; i < end; ++i) {
    if (weights_[i] <= 0) continue;
    chosen = static_cast<TokenId>(i);  // rounding may leave the target unreached: then the last one
    passed += static_cast<double>(weights_[i]);
    if (passed > target) break;
  }
  return chosen;
}

/// candidates_ hold weights, by id; `mass` is what top_p is a part of.
TokenId Sampler::draw_from_candidates(double uniform, double top_p, double mass) {
  Candidate last{.value = -1.0f, .token = 0};  // the least likely token that is kept
  if (top_p < 1.0) {
    // Quickselect by mass: the shortest prefix, most likely first, that holds top_p of it.
    selection_ = candidates_;
    const double target = top_p * mass;
    size_t begin = 0, end = selection_.size();
    double passed = 0;
    last = {.value = -1.0f, .token = 0};
    while (begin < end) {
      Candidate* first = &selection_[begin];
      const size_t size = end - begin;
      size_t a = 0, b = size / 2, c = size - 1;  // the median of three goes to the back
      if (before(first[b], first[a])) std::swap(a, b);
      if (before(first[c], first[b])) b = before(first[c], first[a]) ? a : c;
      std::swap(first[b], first[size - 1]);
      const Candidate pivot = first[size - 1];
      size_t store = 0;
      double left = 0;
      for (size_t i = 0; i + 1 < size; ++i) {
        if (!before(first[i], pivot)) continue;
        left += static_cast<double>(first[i].value);
        std::swap(first[i], first[store++]);
      }
      std::swap(first[store], first[size - 1]);
      if (store > 0 && passed + left >= target) {
        end = begin + store;
      } else {
        last = pivot;
        passed += left + static_cast<double>(pivot.value);
        if (passed >= target) break;
        begin += store + 1;
      }
    }
  }
  const auto kept = [&](const Candidate& candidate) { return !before(last, candidate); };
  double total = 0;
  for (const Candidate& candidate : candidates_) total += kept(candidate) ? static_cast<double>(candidate.value) : 0.0;
  const double wanted = uniform * total;
  double passed = 0;
  TokenId chosen = 0;
  for (const Candidate& candidate : candidates_) {
    if (!kept(candidate) || candidate.value <= 0) continue;
    chosen = candidate.token;
    passed += static_cast<double>(candidate.value);
    if (passed > wanted) break;
  }
  return chosen;
}

}  // namespace baton
