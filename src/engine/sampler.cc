#include "engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/random.h"

namespace baton {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kGreedyBelow = 1e-5f;  // as vLLM: colder than this is greedy

/// A total order: larger first, ties by the lower id.
template <typename T>
bool before(const T& a, const T& b) {
  return a.value != b.value ? a.value > b.value : a.token < b.token;
}

TokenChoice unedited_choice(const SamplingParams& params, int32_t index) {
  TokenChoice out;
  out.greedy = is_greedy(params);
  out.uniform = sampling_uniform(params.seed, index);
  out.temperature = params.temperature;
  out.top_p = params.top_p;
  out.min_p = params.min_p;
  out.top_k = params.top_k;
  return out;
}

}  // namespace

bool is_greedy(const SamplingParams& params) { return params.temperature < kGreedyBelow; }

bool has_penalties(const SamplingParams& params) {
  return params.repetition_penalty != 1.0f || params.frequency_penalty != 0.0f || params.presence_penalty != 0.0f;
}

double sampling_uniform(uint64_t seed, int32_t index) {
  return static_cast<double>(mix_bits(seed, static_cast<uint64_t>(index)) >> 11) * 0x1.0p-53;
}

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
  if (!find_maxima(logits)) return not_finite();

  SampledToken sampled;
  double log_sum = 0;  // of exp over the raw logits
  if (params.logprobs >= 0) {
    const float maximum = *std::ranges::max_element(maxima_);
    log_sum = maximum + std::log(weigh(logits, maximum, 1.0f));
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
    sampled.token = is_greedy(params) ? first_equal(logits, maximum)
                                                      : draw(logits, maximum, unedited_choice(params, context.output_index));
  }
  for (size_t i = undo_.size(); i-- > 0;) logits[static_cast<size_t>(undo_[i].token)] = undo_[i].value;
  undo_.clear();
  if (!possible) {
    return nothing_left();
  }
  if (params.logprobs >= 0) {
    sampled.logprob = static_cast<float>(logits[static_cast<size_t>(sampled.token)] - log_sum);
  }
  return sampled;
}

int32_t Sampler::choose(std::span<float> logits, const TokenChoice& choice, std::span<const LogitEdit> edits) {
  for (const LogitEdit& edit : edits.subspan(static_cast<size_t>(choice.edit_begin), static_cast<size_t>(choice.edit_count))) {
    float& logit = logits[static_cast<size_t>(edit.token)];
    logit += edit.bias;
    logit = logit > 0 ? logit / edit.repetition : logit * edit.repetition;
    logit -= edit.frequency;
    logit -= edit.presence;
  }
  if (!find_maxima(logits)) return kChosenNotFinite;
  const float maximum = *std::ranges::max_element(maxima_);
  if (maximum == kMinusInfinity) return kChosenNone;
  return choice.greedy ? first_equal(logits, maximum) : draw(logits, maximum, choice);
}

TokenChoice Sampler::choice(const SampleContext& context, std::vector<LogitEdit>* edits) {
  const SamplingParams& params = *context.params;
  TokenChoice out = unedited_choice(params, context.output_index);
  out.edit_begin = static_cast<int32_t>(edits->size());
  edit_of_.clear();
  const auto edit = [&](TokenId token) -> LogitEdit& {
    const auto [at, is_new] = edit_of_.try_emplace(token, edits->size());
    if (is_new) edits->push_back({.token = token});
    return (*edits)[at->second];
  };
  if (context.output_index < params.min_tokens) {
    for (TokenId token : eos_token_ids_) edit(token).bias = kMinusInfinity;
    for (TokenId token : params.stop_token_ids) edit(token).bias = kMinusInfinity;
  }
  for (const auto& [token, bias] : params.logit_bias) edit(token).bias += std::clamp(bias, -100.0f, 100.0f);
  if (has_penalties(params)) {
    BATON_CHECK(context.counts != nullptr) << "penalties need the token counts";
    context.counts->update(context.tokens, context.prompt_tokens);
    for (const auto& [token, output_count] : context.counts->entries()) {
      LogitEdit& change = edit(token);
      change.repetition = params.repetition_penalty;
      change.frequency = params.frequency_penalty * static_cast<float>(output_count);
      change.presence = output_count > 0 ? params.presence_penalty : 0.0f;
    }
  }
  out.edit_count = static_cast<int32_t>(edits->size()) - out.edit_begin;
  return out;
}

Status Sampler::nothing_left() const {
  return invalid_argument("no token may be chosen: min_tokens and stop_token_ids mask all {} of them", vocab_size_);
}

Status Sampler::not_finite() { return internal_error("the model's logits contain a NaN or an infinity"); }

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
  if (!has_penalties(params)) return;
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
  return loops_.maxima(logits.data(), vocab_size_, maxima_.data());
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

double Sampler::weigh(std::span<const float> logits, float maximum, float scale) {
  weights_.resize(vocab_size_);
  loops_.weigh(logits.data(), vocab_size_, maximum, scale, weights_.data(), chunk_mass_.data());
  double total = 0;
  for (double sum : chunk_mass_) total += sum;
  return total;
}

TokenId Sampler::draw(std::span<const float> logits, float maximum, const TokenChoice& choice) {
  const float scale = 1.0f / choice.temperature;
  const bool limited = choice.top_k > 0 && static_cast<size_t>(choice.top_k) < vocab_size_;

  float threshold = kMinusInfinity;  // top_k keeps ties of the k-th, as vLLM does
  if (limited) threshold = kth_logit(logits, static_cast<size_t>(choice.top_k));
  if (choice.min_p > 0) threshold = std::max(threshold, maximum + choice.temperature * std::log(choice.min_p));

  if (threshold == kMinusInfinity) {
    const double mass = weigh(logits, maximum, scale);
    if (choice.top_p < 1.0f) cut_to(static_cast<double>(choice.top_p) * mass);
    return draw_from_all(choice.uniform);
  }
  collect(logits, threshold);
  double mass = 0;
  for (Candidate& candidate : candidates_) {
    candidate.value = exp_nonpositive((candidate.value - maximum) * scale);
    mass += static_cast<double>(candidate.value);
  }
  Candidate last{.value = 0, .token = std::numeric_limits<TokenId>::max()};
  if (choice.top_p < 1.0f) {
    selection_ = candidates_;
    last = select_by_mass(selection_, 0, static_cast<double>(choice.top_p) * mass);
  }
  return draw_from_candidates(choice.uniform, last);
}

/// Quickselect by mass. Of `candidates`, most likely first, the last one of the shortest prefix with a mass of at least
/// `target` - passed; all of them when rounding leaves it unreached. Reorders them.
Sampler::Candidate Sampler::select_by_mass(std::span<Candidate> candidates, double passed, double target) {
  Candidate last;
  while (!candidates.empty()) {
    const size_t size = candidates.size();
    size_t a = 0, b = size / 2, c = size - 1;  // the median of three goes to the back
    if (before(candidates[b], candidates[a])) std::swap(a, b);
    if (before(candidates[c], candidates[b])) b = before(candidates[c], candidates[a]) ? a : c;
    std::swap(candidates[b], candidates[size - 1]);
    const Candidate pivot = candidates[size - 1];
    size_t store = 0;
    double left = 0;
    for (size_t i = 0; i + 1 < size; ++i) {
      if (!before(candidates[i], pivot)) continue;
      left += static_cast<double>(candidates[i].value);
      std::swap(candidates[i], candidates[store++]);
    }
    std::swap(candidates[store], candidates[size - 1]);
    if (store > 0 && passed + left >= target) {
      candidates = candidates.first(store);
      continue;
    }
    last = pivot;
    passed += left + static_cast<double>(pivot.value);
    if (passed >= target) break;
    candidates = candidates.subspan(store + 1);
  }
  return last;
}

/// Leaves in weights_ only the most likely tokens that together have a mass of `target`. A histogram over the leading
/// bits of the weights (positive floats sort as integers) finds the one bin in which the edge lies.
void Sampler::cut_to(double target) {
  constexpr int kShift = 18;  // 8 bits of exponent, 5 of fraction: a bin spans 3 %
  const auto bin_of = [](float weight) { return std::bit_cast<uint32_t>(weight) >> kShift; };
  histogram_.assign((std::bit_cast<uint32_t>(1.0f) >> kShift) + 2, 0.0);  // exp may round to just above 1
  for (float weight : weights_) histogram_[bin_of(weight)] += static_cast<double>(weight);
  size_t bin = histogram_.size() - 1;
  double passed = 0;
  while (bin > 0 && passed + histogram_[bin] < target) passed += histogram_[bin--];

  selection_.clear();
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (bin_of(weights_[i]) == bin) selection_.push_back({.value = weights_[i], .token = static_cast<TokenId>(i)});
  }
  if (selection_.empty()) return;
  const Candidate last = select_by_mass(selection_, passed, target);
  for (const Candidate& candidate : selection_) {
    if (candidate.value == last.value && candidate.token > last.token) weights_[static_cast<size_t>(candidate.token)] = 0;
  }
  loops_.cut(weights_.data(), weights_.size(), last.value, chunk_mass_.data());
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

/// The same over candidates_, which hold weights by id; those after `last` are not kept.
TokenId Sampler::draw_from_candidates(double uniform, const Candidate& last) const {
  const auto kept = [&](const Candidate& candidate) { return !before(last, candidate) && candidate.value > 0; };
  double total = 0;
  for (const Candidate& candidate : candidates_) total += kept(candidate) ? static_cast<double>(candidate.value) : 0.0;
  const double wanted = uniform * total;
  double passed = 0;
  TokenId chosen = 0;
  for (const Candidate& candidate : candidates_) {
    if (!kept(candidate)) continue;
    chosen = candidate.token;
    passed += static_cast<double>(candidate.value);
    if (passed > wanted) break;
  }
  return chosen;
}

}  // namespace baton
