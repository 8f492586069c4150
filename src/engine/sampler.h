#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "engine/request.h"
#include "engine/sampler_loops.h"
#include "model/token_choice.h"

namespace baton {

/// How often each token stands in a sequence's prompt and output: what penalties are computed from. Follows
/// the sequence as it grows; costs nothing for requests without penalties.
class TokenCounts {
 public:
  struct Entry {
    TokenId token = 0;
    int32_t output_count = 0;
  };
  /// `tokens`: prompt (the first `prompt_tokens`), then output. Only what is new since the last call is read.
  void update(std::span<const TokenId> tokens, size_t prompt_tokens);
  /// Every distinct token once, in order of first appearance.
  std::span<const Entry> entries() const { return entries_; }

 private:
  size_t seen_ = 0;
  std::vector<Entry> entries_;
  std::unordered_map<TokenId, size_t> index_;
};

/// What the sampler must know of a sequence besides its logits.
struct SampleContext {
  const SamplingParams* params = nullptr;
  std::span<const TokenId> tokens;   ///< prompt and output so far
  size_t prompt_tokens = 0;
  int32_t output_index = 0;          ///< of the token that is to be chosen
  TokenCounts* counts = nullptr;     ///< of this sequence
};

struct SampledToken {
  TokenId token = 0;
  float logprob = 0;                       ///< 0 when no logprobs are wanted
  std::vector<TokenLogprob> top_logprobs;
};

/// Whether the most likely token is taken: at temperature 0, and so close to it that vLLM makes no difference either.
bool is_greedy(const SamplingParams& params);
/// Whether what was said so far changes the logits.
bool has_penalties(const SamplingParams& params);
/// In [0, 1): what decides about output token `index`.
double sampling_uniform(uint64_t seed, int32_t index);

/// Chooses a token from logits, in vLLM's order: min_tokens (masks EOS and stop tokens), logit_bias,
/// penalties, temperature, min_p, top_k, top_p, draw. Logprobs are of the raw logits.
///
/// A pure function of the logits, the tokens, the parameters and the output's index: the draw comes from
/// mix_bits(seed, index), sums are made in one order in double, exp is our own polynomial. So batching,
/// preemption and moving to another worker do not change a token.
/// Never sorts the vocabulary: selections work on the maxima of chunks. One thread; keeps scratch memory.
class Sampler {
 public:
  static constexpr int32_t kMaxLogprobs = 256;

  Sampler(int32_t vocab_size, std::vector<TokenId> eos_token_ids);

  /// The same choice for a device that makes it: what sample() would change is appended to `edits`. Without logprobs.
  TokenChoice choice(const SampleContext& context, std::vector<LogitEdit>* edits);
  /// What such a device does: a token, kChosenNone or kChosenNotFinite. `logits` [vocab_size] are left edited.
  int32_t choose(std::span<float> logits, const TokenChoice& choice, std::span<const LogitEdit> edits);

  /// `logits` [vocab_size] are changed and put back. Errors: internal, when the model produced a NaN or an
  /// infinity; invalid_argument when nothing may be chosen (every token masked).
  Result<SampledToken> sample(std::span<float> logits, const SampleContext& context);
  /// What sample() says where a device answered kChosenNotFinite or kChosenNone.
  static Status not_finite();
  Status nothing_left() const;

 private:
  static constexpr size_t kChunk = SamplerLoops::kChunk;

  struct Candidate {
    float value = 0;  // a logit, later a weight
    TokenId token = 0;
  };

  void edit(std::span<float> logits, const SampleContext& context);
  void change(std::span<float> logits, TokenId token, float value);
  /// Fills maxima_; false when a logit is NaN or +infinity.
  bool find_maxima(std::span<const float> logits);
  float kth_maximum(size_t k);
  TokenId first_equal(std::span<const float> logits, float value) const;
  /// candidates_ = the tokens with a logit of at least `threshold`, by id.
  void collect(std::span<const float> logits, float threshold);
  void collect_at_least(std::span<const float> logits, size_t count);
  float kth_logit(std::span<const float> logits, size_t k);
  TokenId draw(std::span<const float> logits, float maximum, const TokenChoice& choice);
  TokenId draw_from_all(double uniform) const;
  TokenId draw_from_candidates(double uniform, const Candidate& last) const;
  static Candidate select_by_mass(std::span<Candidate> candidates, double passed, double target);
  void cut_to(double target);
  /// weights_[i] = exp((logits[i] - maximum) * scale), chunk_mass_ their sums; returns the sum of all.
  double weigh(std::span<const float> logits, float maximum, float scale);

  const SamplerLoops& loops_ = sampler_loops();
  size_t vocab_size_;
  std::vector<TokenId> eos_token_ids_;
  std::vector<float> maxima_;       // [chunks]
  std::vector<float> order_;        // scratch of kth_maximum and kth_logit
  std::vector<float> weights_;      // [vocab_size]
  std::vector<double> chunk_mass_;  // [chunks]
  std::vector<double> histogram_;   // mass by leading bits of the weight
  std::vector<Candidate> candidates_, selection_;
  std::vector<Candidate> undo_;     // edited logits, oldest first
  std::unordered_map<TokenId, size_t> edit_of_;  // scratch of choice()
};

}  // namespace baton
